"""Bad input in great number: what people, disks and attackers may hand to the command line, and what it makes of it.

    python -m benchmarks.fuzz                      # 10,000 inputs, about 25 minutes on two cores; writes results/fuzz.json
    python -m benchmarks.fuzz --only 4711 --show   # one input again, with all that was printed

What is asked of every input stands in `judge.py`; where the inputs come from, in `kinds.py`.
"""
