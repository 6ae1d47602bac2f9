"""Every architecture with a batch norm that eight libraries give offline: converted, and is it still the same function?

    python -m benchmarks.zoo                    # about an hour on two cores; writes results/zoo.jsonl, .json and .md
    python -m benchmarks.zoo --sample 60        # some of each; what is in zoo.jsonl already is not run again
    python -m benchmarks.zoo --one timm/resnet18 --export-every 1

The libraries are an extra, and torchvision comes without its dependencies (its wheel would bring a CUDA torch):

    pip install -c constraints.txt -e .[zoo] && pip install --no-deps torchvision==0.28.0

Weights are random, and norms have statistics near those that reach them; zoo_trial.py tells how the comparison is made,
zoo_libraries.py what is built, zoo_inputs.py what it is fed, zoo_pool.py how a hanging architecture is survived. An architecture
counts as run where its original could be built and run here. The same network under several names counts once.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.stamp import RESULTS, markdown, write
from benchmarks.zoo_libraries import LIBRARIES, library, offline
from benchmarks.zoo_pool import Job, Limits, names, run_jobs
from benchmarks.zoo_trial import Options, Row, trial

RAN = ("converted", "partly", "refused", "failed")


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """All architectures of the libraries asked for, or a sample; in an order that makes the time left predictable."""
    chosen = [job for name in options.library for job in _jobs(name, options)]
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
        order = {name: i for i, name in enumerate(options.library)}  # a worker then imports few libraries
        chosen.sort(key=lambda job: order[job.library])
    return chosen


def _jobs(library_name: str, options: argparse.Namespace) -> list[Job]:
    listed = names(library_name)
    random.Random(options.seed).shuffle(listed)
    plain = Options(options.to, options.max_params)
    return [
        Job(
            library_name,
            name,
            replace(plain, export=_every(i, options.export_every), control=_every(i, options.control_every)),
        )
        for i, name in enumerate(listed)
    ]


def _every(i: int, n: int) -> bool:
    return n > 0 and i % n == 0


def run(jobs: list[Job], path: Path, workers: int) -> None:
    """Append a line for every job that `path` has none for."""
    there = {(row["library"], row["name"], row["to"]) for row in read(path)}
    left = [job for job in jobs if job.key not in there]
    print(f"{len(jobs)} architectures, {len(jobs) - len(left)} of them in {path.name} already", file=sys.stderr)
    start = time.monotonic()
    with path.open("a") as file:
        for done, (job, row) in enumerate(run_jobs(left, workers, Limits()), 1):
            row = {"library": job.library, "name": job.name, **row, "to": job.options.to}
            file.write(json.dumps(row) + "\n")
            file.flush()
            _progress(done, len(left), time.monotonic() - start, row)


def _progress(done: int, total: int, seconds: float, row: Row) -> None:
    rate = done / seconds
    words = f"{row['library']}/{row['name']}: {row['outcome']} {row.get('verdict', '')} {row.get('reason', '')}"
    left = (total - done) / rate / 60
    print(f"[{done}/{total}, {60 * rate:.0f} a minute, {left:.0f} min left] {words[:150]}", file=sys.stderr, flush=True)


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


# --- summary ---------------------------------------------------------------------------------------------------------


def unique(rows: Iterable[Row]) -> list[Row]:
    """Each network once: of those with the same structure in one library, the first."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        first.setdefault((row["library"], row.get("fingerprint") or row["name"]), row)
    return list(first.values())


def summarise(rows: list[Row]) -> dict[str, Any]:
    """The figures of one library, or of all."""
    ran = [row for row in rows if row["outcome"] in RAN]
    seconds = [row["convert_s"] for row in ran if "convert_s" in row]
    verdicts = Counter(row["verdict"] for row in ran if "verdict" in row)
    exports = [row["export"] for row in ran if "export" in row]
    controls = [row["control"] for row in ran if isinstance(row.get("control"), bool)]
    return {
        "architectures": len(ran),
        "sites": sum(row.get("sites", 0) for row in ran),
        "rewritten": sum(row.get("rewritten", 0) for row in ran),
        **{outcome: sum(row["outcome"] == outcome for row in ran) for outcome in RAN},
        "verdicts": dict(verdicts.most_common()),
        "reference_fp32": sum(row.get("reference") == "fp32" for row in ran),
        "revert_differs": sum(row.get("revert") is False for row in ran),
        "refused_reasons": _count(row.get("refused", {}) for row in ran),
        "failed_reasons": dict(Counter(row["reason"] for row in ran if row["outcome"] == "failed").most_common()),
        "unseen": _count(row.get("unseen", {}) for row in ran),
        "kinds": _count(row.get("kinds", {}) for row in ran),
        "median_convert_s": statistics.median(seconds) if seconds else None,
        "max_convert_s": max(seconds, default=None),
        "controls": {"seen": sum(controls), "of": len(controls)},
        "exports": dict(Counter(export["outcome"] for export in exports).most_common()),
        "export_reasons": dict(Counter(e["reason"] for e in exports if "reason" in e).most_common()),
        "not_run": dict(Counter(row["outcome"] for row in rows if row["outcome"] not in RAN).most_common()),
    }


def _count(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())


HEAD = [
    "library",
    "architectures",
    "sites",
    "converted",
    "partly",
    "refused",
    "failed",
    "same",
    "same in float64",
    "live",
    "CHANGED",
    "convert, median (s)",
]


def _line(name: str, figures: dict[str, Any]) -> list[str]:
    verdicts = figures["verdicts"]
    median = figures["median_convert_s"]
    counts = [figures[key] for key in ("architectures", "sites", "converted", "partly", "refused", "failed")]
    counts += [verdicts.get(key, 0) for key in ("same", "same in float64", "live", "CHANGED")]
    return [name, *(f"{count:,}" for count in counts), "–" if median is None else f"{median:.2f}"]


def report(rows: list[Row], to: str, keep: bool) -> str:
    """The markdown; with `keep` also in results/zoo.md, and the figures in results/zoo.json."""
    rows = unique(row for row in rows if row["to"] == to)
    by_library = {name: summarise([row for row in rows if row["library"] == name]) for name in LIBRARIES}
    by_library = {
        name: figures for name, figures in by_library.items() if figures["architectures"] or figures["not_run"]
    }
    total = summarise(rows)
    lines = [_line(name, figures) for name, figures in by_library.items()]
    changed = [f"{row['library']}/{row['name']}" for row in rows if row.get("verdict") == "CHANGED"]
    text = f"{markdown(HEAD, [*lines, _line('all', total)])}\n\n{_prose(total, changed, to)}\n"
    if keep:
        packages = [package for name in by_library for package in LIBRARIES[name].packages if _installed(package)]
        path = write("zoo", {"to": to, "total": total, "libraries": by_library, "changed": changed}, *packages)
        path.with_suffix(".md").write_text(text)
    return text


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _prose(total: dict[str, Any], changed: list[str], to: str) -> str:
    parts = [
        f"To {to}: {total['rewritten']:,} of {total['sites']:,} sites rewritten. Against the original in float64, with fp32 "
        f"against fp32 for {total['reference_fp32']}. Revert gave other bits for {total['revert_differs']}.",
        f"Control, one site's scale wrong by a tenth: seen in {total['controls']['seen']} of {total['controls']['of']}.",
        f"Through nr.export and onnxruntime: {_words(total['exports']) or 'none'}.",
        f"Not run: {_words(total['not_run']) or 'none'}.",
    ]
    titles = (
        ("refused_reasons", "Refused sites"),
        ("failed_reasons", "Failed"),
        ("export_reasons", "Exports"),
        ("unseen", "Unseen"),
    )
    for key, title in titles:
        if total[key]:
            parts.append(f"{title}:\n\n" + "\n".join(f"- {count} × {reason}" for reason, count in total[key].items()))
    if changed:
        parts.append("CHANGED: " + ", ".join(changed))
    return "\n\n".join(parts)


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _one(path: str, options: argparse.Namespace) -> None:
    """One architecture in this process, for a look at a fault."""
    library_name, _, name = path.partition("/")
    offline()
    wanted = Options(options.to, options.max_params, options.export_every == 1, True)
    row = trial(lambda: library(library_name).build(name), wanted, lambda stage, _: print(stage, file=sys.stderr))
    print(json.dumps(row, indent=1), row.get("traceback", ""), sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=lambda text: text.split(","), default=list(LIBRARIES), help="names, by comma")
    parser.add_argument("--to", default="l1")
    parser.add_argument("--sample", type=int, help="so many of all, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-params", type=float, default=60e6, help="larger ones are built only (default: 60e6)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, one thread each")
    parser.add_argument(
        "--export-every", type=int, default=50, metavar="N", help="of those up to 10 million parameters; 0: none"
    )
    parser.add_argument(
        "--control-every", type=int, default=10, metavar="N", help="put a fault in, and see it; 0: never"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what zoo.jsonl holds")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables of zoo.jsonl")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS / "zoo.jsonl",
        help="other than results/zoo.jsonl: its tables are printed only",
    )
    parser.add_argument("--one", metavar="LIBRARY/NAME", help="in this process, with its row printed")
    return parser


def main() -> None:
    options = _parser().parse_args()
    if options.one:
        _one(options.one, options)
        return
    options.results.parent.mkdir(exist_ok=True)
    if options.fresh:
        options.results.unlink(missing_ok=True)
    if not options.report:
        run(jobs_of(options), options.results, options.workers)
    print(report(read(options.results), options.to, keep=options.results == RESULTS / "zoo.jsonl"))


if __name__ == "__main__":
    main()
