"""The tables of the pages are what benchmarks/results hold, cell by cell, and README's figures are among them."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pytest

import benchmarks.fuzz.__main__ as fuzz
from benchmarks import calibrate, convert, cpu_norms, deploy, faults, fp16_pure, int8, repair, scopes, targets
from tests.conftest import ROOT

PAGE = "".join((ROOT / "docs" / name).read_text() for name in ("figures.md", "trust.md"))
README = (ROOT / "README.md").read_text()
Rows = Iterator[list[str]]


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def share(part: float) -> str:
    return f"{100 * part:.2f}"


def converted() -> Rows:
    for found in result("convert")["networks"]:
        name, sites, inputs, difference, top1, _, _, onnx, folded = convert._row(found)
        yield [name, f"{sites} of {sites}", inputs, difference, top1, onnx, folded]


def calibrated() -> Rows:
    rows = result("calibrate")["rows"]
    yield from (calibrate._row(row, rows[0]["as_converted"]["difference"]) for row in rows)


def changed() -> Rows:
    """Targets that are not exact have a line each."""
    repaired = targets.repaired()
    for network, found in result("targets")["networks"].items():
        for row in (row for row in found if not row["exact"]):
            known = repaired.get(row["target"]) if network == targets.REPAIRED else None
            shares = (row["before"], row["copied"], row.get("calibrated"), known)
            cells = ("–" if part is None else share(part) for part in shares)
            sites = str(row["rewritten"])
            yield [network, f"`{row['target']}`", sites, "not exact", f"{row['inputs']:,}", *cells]


def repaired() -> Rows:
    found = result("repair")
    for target in found["targets"]:
        *cells, _, seconds = repair.row(target, found["original"])
        yield [*cells, seconds]


def layer_norms() -> Rows:
    for network, target, _, *cells in scopes.rows(result("scopes")["networks"]):
        yield [network.removeprefix("transformer "), target, *cells]


def trained_on_8_bits() -> Rows:
    for name, title in (("cifar10_resnet20", "ResNet-20"), ("imagenet_mobilenet_v2", "MobileNetV2")):
        yield [title, *int8.row(result(f"int8_{name}"))[1:6]]


def half_alone() -> Rows:
    """The two metrics side by side."""
    runs = [run for run in result("fp16_pure")["runs"] if run["metric"] in ("l2", "l1")]
    for _, same in groupby(runs, key=lambda run: (run["inputs"], run["precision"], run["accumulator"])):
        both: dict[str, list[Any]] = {"l2": [], "l1": []}
        for run in same:
            both[run["metric"]].append(run)
        lines = [fp16_pure.row(found) for found in both.values()]
        cells = [_half(line) for line in lines]
        yield [lines[0][0].replace("pixels", "pixels 0 to 255"), lines[0][1], *cells[0], *cells[1]]


def _half(line: list[str]) -> list[str]:
    _, _, _, mean, extent, batches, *_ = line
    return ["stopped, all three", "–"] if batches == "–" else [f"{mean} ({extent})", batches]


def deployed() -> Rows:
    for found in result("deploy")["networks"]:
        name, precision, inputs, top1, same, snr, _, _ = deploy._row(found)
        (products,) = {f"{made['honoured']} of {made['products']}" for made in found["engines"].values()}
        yield [name, precision, inputs, top1.replace(" / ", " → "), same, snr, products]


def cpu() -> Rows:
    found = result("cpu_norms")["results"]
    for run in cpu_norms.RUNS:
        metric, layout, ratio, goal, _, held, peak = cpu_norms.row(run, cpu_norms.of(run, found))
        yield [metric, layout, ratio, goal, held, peak]


def large() -> Rows:
    for each in result("size")["results"]:
        megabytes = (f"{each[name] / 1e6:,.0f}" for name in ("bytes", "peak"))
        yield [each["form"], *megabytes, f"{each['peak_to_file']:.2f}", f"{each['seconds']:.1f}"]


def fuzzed() -> Rows:
    yield from fuzz.rows(result("fuzz"))


def broken_off() -> Rows:
    yield from faults.rows(result("faults")["outcomes"])


FIGURES = (converted, calibrated, changed, repaired, layer_norms, trained_on_8_bits, half_alone, deployed, cpu, large)
TABLES = (*FIGURES, fuzzed, broken_off)


def absent(rows: Rows, page: str) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    assert lines
    return [line for line in lines if line not in page]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_tables_are_the_results(table: Callable[[], Rows]) -> None:
    assert not (missing := absent(table(), PAGE)), "\n".join(missing)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_another_figure_is_noticed(table: Callable[[], Rows]) -> None:
    last = list(table())[-1][1]
    assert absent(table(), PAGE.replace(last, f"{last}1"))


def numbers(text: str) -> set[str]:
    return {found.rstrip(",") for found in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)}


def test_readme_has_no_figure_of_its_own() -> None:
    """Those of exact targets and of the zoo are in sentences: each number of README's table is on the page."""
    key = README.partition("## Key figures")[2].partition("\n## ")[0]
    rows = "".join(line for line in key.splitlines() if line.startswith("| "))
    assert len(numbers(rows)) > 20 and not numbers(rows) - numbers(PAGE)


def test_the_zoo_and_what_converting_costs() -> None:
    total, time = result("zoo")["total"], result("convert_time")
    work, whole = time["resnet50_graph_work"], time["whole_process"]
    for said in (
        f"{total['architectures']:,} architectures with {total['sites']:,} norms",
        f"{total['verdicts']['same']} are the same by fp32",
        f"{total['verdicts']['same in float64']} whose own",
        f"Median conversion {total['median_convert_s']:.2f} s",
        f"{work['median_ms']:.1f} ms, median of {time['repeats']} (smallest {work['smallest_ms']:.1f})",
        f"{whole['convert_s']:.2f} s to {whole['plain_s']:.2f} s, {whole['ratio']:.2f} times",
    ):
        assert said in PAGE, said
