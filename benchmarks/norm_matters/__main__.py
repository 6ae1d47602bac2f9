"""The command line: runs what is missing, judges, and writes the page."""

import argparse
import sys
import time
from pathlib import Path

import torch

import normrewrite as nr
from benchmarks.norm_matters import __doc__ as about
from benchmarks.norm_matters import data, page
from benchmarks.norm_matters.claims import CLAIMS
from benchmarks.norm_matters.measure import Machine
from benchmarks.norm_matters.runner import Results, carry_out, results_of

_MINUTES = {"gpu": 9.0}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.norm_matters",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", choices=("smoke", "cpu", "gpu"), default="smoke")
    parser.add_argument("--only", nargs="*", choices=CLAIMS, default=list(CLAIMS), help="these claims, in this order")
    parser.add_argument("--data", type=Path, default=data.folder(), help="folder with CIFAR-10 and trained networks")
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument(
        "--page", action="store_true", help="run nothing; write docs/paper.md from the results there are"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, results: Results) -> None:
    """What is missing, claim by claim."""
    device = torch.device("cuda" if options.budget == "gpu" else "cpu")
    machine = Machine(options.data.resolve(), device, results.folder)
    deadline = time.monotonic() + 60 * (options.minutes or _MINUTES.get(options.budget, float("inf")))
    for name in options.only:
        for arm, run in results.missing(CLAIMS[name].arms(options.budget)):
            if time.monotonic() > deadline:
                print("out of time: the same command goes on from here", flush=True)
                return
            started = time.perf_counter()
            record = carry_out(run, machine, results)
            seconds = time.perf_counter() - started
            print(f"{name}  {arm}  seed {run.seed}: {100 * record['accuracy']:.2f} %  {seconds:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.budget == "gpu" and not options.page and not torch.cuda.is_available():
        print("no GPU here: nothing was run. --budget cpu needs none.", file=sys.stderr)
        return 2
    try:
        return _all(options)
    except nr.NormRewriteError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _all(options: argparse.Namespace) -> int:
    results = results_of(options.budget)
    if options.budget == "smoke":
        results.forget()  # a smoke that reads old results would not smoke
    if not options.page:
        run(options, results)
    print("\n" + page.summary(options.budget, results, options.only))
    if options.budget == "smoke":
        print(f"\n{page.write(results.folder / 'paper.md', {'smoke': results})}")
    else:
        print(f"\n{page.write(page.PAGE, {budget: results_of(budget) for budget in ('cpu', 'gpu')})}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
