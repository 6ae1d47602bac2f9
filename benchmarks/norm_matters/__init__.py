"""The claims of *Norm matters* (Hoffer, Banner, Golan, Soudry, NeurIPS 2018, arXiv:1803.01814), each tried by its own runs.

    python -m benchmarks.norm_matters --budget smoke             # minutes, on digits: the machinery, no claim
    python -m benchmarks.norm_matters --budget cpu               # hours on one core; goes on where it was stopped
    python -m benchmarks.norm_matters --budget gpu --minutes 9   # one card
    python -m benchmarks.norm_matters --only constant half       # these claims

claims/ has a file a claim: its arms by budget, the rules that judge them, its picture. Rules were written before the results.
run.py says what a run is, measure.py carries it out, runner.py keeps one result file a run, page.py writes docs/paper.md.
"""
