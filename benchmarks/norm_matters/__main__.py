"""The command line: runs what is missing, judges, and writes the page."""

import argparse
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

import normrewrite as nr
from benchmarks.norm_matters import __doc__ as about
from benchmarks.norm_matters import data, page, recipe, table
from benchmarks.norm_matters.claims import CLAIMS
from benchmarks.norm_matters.measure import Machine
from benchmarks.norm_matters.run import Arms
from benchmarks.norm_matters.runner import FOLDER, Results, carry_out, results_of
from benchmarks.stamp import markdown

_MINUTES = {"gpu": 9.0}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.norm_matters",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--budget", choices=("smoke", "cpu", "gpu"), default="smoke")
    add("--only", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="these claims, in this order")
    add("--data", type=Path, default=data.folder(), help="folder with CIFAR-10 and trained networks")
    add("--minutes", type=float, help="end after about so many minutes (gpu: 9); the next call goes on")
    add("--recipe", type=Path, help="a TOML file like imagenet.toml: its arms instead of the claims")
    add("--page", action="store_true", help="run nothing; write docs/paper.md from the results there are")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.budget == "gpu" and not options.page and not torch.cuda.is_available():
        print("no GPU here: nothing was run. --budget cpu needs none.", file=sys.stderr)
        return 2
    try:
        text = (_page if options.page else _recipe if options.recipe else _claims)(options)
    except nr.NormRewriteError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"\n{text}")
    return 0


def _claims(options: argparse.Namespace) -> str:
    """The verdicts; they and the pictures are on the page."""
    results = results_of(options.budget)
    if options.budget == "smoke":
        results.forget()  # what reads old results would not smoke
    run(options, {name: CLAIMS[name].arms(options.budget) for name in options.only}, results)
    verdicts = page.summary(options.budget, results, options.only)
    smoked = options.budget == "smoke"
    return f"{verdicts}\n\n{page.write(results.folder / 'paper.md', {'smoke': results}) if smoked else _page(options)}"


def _page(options: argparse.Namespace) -> str:
    return str(page.write(page.PAGE, {budget: results_of(budget) for budget in ("cpu", "gpu")}))


def _recipe(options: argparse.Namespace) -> str:
    """The arms of a TOML file as a table; nothing is judged."""
    name, arms = options.recipe.stem, recipe.read(options.recipe)
    results = Results(FOLDER / name)
    run(options, {name: arms}, results)
    return markdown(*table.accuracies(results.by_arm(arms)))


def run(options: argparse.Namespace, studies: Mapping[str, Arms], results: Results) -> None:
    """What is missing, study by study. No run begins that would not end in time if it took as long as the longest so far."""
    device = torch.device("cuda" if options.budget == "gpu" else "cpu")
    machine = Machine(options.data.resolve(), device, results.folder)
    limit, begun, longest = 60 * (options.minutes or _MINUTES.get(options.budget, math.inf)), time.monotonic(), 0.0
    for name, arms in studies.items():
        for arm, missing in results.missing(arms):
            started = time.monotonic()
            if started - begun + longest > limit:
                print("out of time: the same command goes on from here", flush=True)
                return
            record = carry_out(missing, machine, results)
            longest = max(longest, seconds := time.monotonic() - started)
            print(f"{name}  {arm}  seed {missing.seed}: {100 * record['accuracy']:.2f} %  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
