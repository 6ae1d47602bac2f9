"""Runs the inputs side by side, counts, and writes results/fuzz.json; exits with 1 where anything was not as it should be."""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import onnxruntime  # noqa: F401 (before forking, so that no input has to wait for it)
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.fuzz import material
from benchmarks.fuzz.judge import CODES, LIMIT, MEMORY, UNFORESEEN, Verdict, judge
from benchmarks.fuzz.kinds import KINDS, kind_of
from benchmarks.stamp import markdown, write
from normrewrite.commands import bench, calibrate, convert, export, finetune, inspect, report, revert, verify  # noqa: F401

HEAD = [
    "input",
    "number",
    "done (0)",
    "check failed (1)",
    "refused (2)",
    "not foreseen (70)",
    "faults",
    "longest, s",
    "memory, MB",
]


def run(seeds: list[int], workers: int) -> Iterator[Verdict]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        sound, scratch = Path(place) / "material", Path(place) / "scratch"
        sound.mkdir()
        scratch.mkdir()
        here = Path.cwd()
        os.chdir(sound)
        material.write(sound)
        os.chdir(here)
        with ProcessPoolExecutor(workers, get_context("fork")) as pool:
            yield from pool.map(partial(judge, material=sound, scratch=scratch), seeds, chunksize=8)


def rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """A line a kind, of a summary."""
    for name, of in result["kinds"].items():
        faults = sum(each["kind"] == name for each in result["faults"])
        counts = (of["codes"].get(str(code), 0) for code in (*CODES, UNFORESEEN))
        numbers = (f"{count:,}" for count in (of["inputs"], *counts, faults))
        yield [name, *numbers, f"{of['seconds']:.1f}", f"{of['bytes'] / 1e6:.0f}"]


def summary(verdicts: list[Verdict]) -> dict[str, Any]:
    by_kind = {name: [each for each in verdicts if each.kind == name] for name in KINDS}
    return {
        "inputs": len(verdicts),
        "limits": {"seconds": LIMIT, "bytes": MEMORY},
        "kinds": {
            name: {
                "inputs": len(of),
                "codes": {str(code): n for code, n in sorted(Counter(each.code for each in of).items())},
                "seconds": max(each.seconds for each in of),
                "bytes": max(each.memory for each in of),
                "messages": len({each.message for each in of}),
            }
            for name, of in by_kind.items()
            if of
        },
        "faults": [
            {
                "seed": each.seed,
                "kind": each.kind,
                "words": each.words,
                "faults": each.faults,
                "said": each.message[:300],
            }
            for each in verdicts
            if each.faults
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", type=int, nargs="+", help="these seeds alone; nothing is written")
    parser.add_argument("--without", nargs="+", default=[], choices=list(KINDS), help="kinds to leave out")
    parser.add_argument("--show", action="store_true", help="print what each input was and what was said")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    seeds = options.only or list(range(options.first, options.first + options.inputs))
    seeds = [seed for seed in seeds if kind_of(Random(seed)) not in options.without]
    verdicts = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("inputs", total=len(seeds))
        for verdict in run(seeds, options.workers):
            verdicts.append(verdict)
            progress.advance(task)
            if options.show or verdict.faults or verdict.code == UNFORESEEN:
                print(f"{verdict.seed} {verdict.kind}: normrewrite {' '.join(verdict.words)!r:.300}")
                print(
                    f"  code {verdict.code}, {verdict.seconds:.1f} s; {'; '.join(verdict.faults) or 'as it should be'}"
                )
                print(f"  {verdict.output if options.show else verdict.message[:300]}", flush=True)
    result = summary(verdicts)
    print(markdown(HEAD, list(rows(result))))
    if not options.only:
        print(f"wrote {write('fuzz', result, 'onnx', 'onnxruntime', 'safetensors')}")
    sys.exit(any(verdict.faults for verdict in verdicts))


if __name__ == "__main__":
    main()
