"""What converting costs: the whole process against a plain load-and-save, and the graph work alone.

    python -m benchmarks.convert_time                     # two minutes; writes results/convert_time.json

Processes alternate, so that both see the same machine; the medians are compared. Graph work is plan and rewrite of a
ResNet-50 (53 norms) in memory, every site's function checked.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import normrewrite as nr
from benchmarks.networks import resnet50
from benchmarks.stamp import write

ROOT = Path(__file__).resolve().parent.parent
PLAIN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from digits import digits_resnet
model = digits_resnet()
model.load_state_dict(torch.load(sys.argv[2], weights_only=True))
torch.save(model.state_dict(), sys.argv[3])
"""


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def whole_process(repeats: int) -> dict[str, float]:
    examples = ROOT / "examples"
    script = Path(sys.executable).with_name("normrewrite")
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/out.pt"
        arch = f"{examples / 'digits.py'}:digits_resnet"
        plain = [sys.executable, "-c", PLAIN, str(examples), str(examples / "digits.pt"), output]
        ours = [
            str(script),
            "convert",
            str(examples / "digits.pt"),
            "--arch",
            arch,
            "--to",
            "l1",
            "-o",
            output,
            "--force",
        ]
        times: dict[str, list[float]] = {"plain": [], "convert": []}
        for _ in range(repeats):
            for name, command in (("plain", plain), ("convert", ours)):
                times[name].append(_seconds(lambda c=command: subprocess.run(c, check=True, stdout=subprocess.DEVNULL)))  # type: ignore[misc]
    medians = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    pairs = [ours_s / plain_s for ours_s, plain_s in zip(times["convert"], times["plain"], strict=True)]
    return {**medians, "ratio": medians["convert_s"] / medians["plain_s"], "ratio_of_pairs": statistics.median(pairs)}


def graph_work(repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        model = resnet50().eval()
        times.append(1000 * _seconds(lambda model=model: nr.plan(model, "l1").apply_()))  # type: ignore[misc]
    return {"median_ms": statistics.median(times), "largest_ms": max(times), "smallest_ms": min(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args().repeats
    result = {"repeats": repeats, "resnet50_graph_work": graph_work(repeats), "whole_process": whole_process(repeats)}
    for name, figures in result.items():
        print(name, figures)
    print(f"wrote {write('convert_time', result)}")


if __name__ == "__main__":
    main()
