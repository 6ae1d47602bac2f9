"""Trained networks converted: the table of benchmarks.targets, and rows of it run again."""

import json
from typing import Any

from benchmarks.norm_matters.claim import Claim
from benchmarks.norm_matters.judge import Check
from benchmarks.norm_matters.run import Arms, Budget, ByArm, Norm, Study, Task
from benchmarks.stamp import RESULTS

TARGETS = ("l1", "bwn", "wn", "none")
TABLE = RESULTS / "targets.json"
FULL = Study("cifar10_resnet20", Task("cifar10", 32, 0, 2_000, "imagenet"), {}, 1, "convert")
STUDIES: dict[Budget, Study] = {
    "smoke": Study("digits_resnet", Task("digits", 8, 0, 256), {}, 1, "convert"),
    "cpu": FULL,
    "gpu": FULL,
}


def arms(budget: Budget) -> Arms:
    return {target: STUDIES[budget].arm(Norm(target)) for target in TARGETS}


def published() -> dict[str, list[dict[str, Any]]]:
    """Rows by network, as benchmarks.targets wrote them."""
    networks: dict[str, list[dict[str, Any]]] = json.loads(TABLE.read_text())["networks"]
    return networks


def exact_rows_keep_accuracy(by_arm: ByArm) -> Check:
    rows = [row for rows in published().values() for row in rows if row["exact"]]
    worst = 100 * max(abs(row["before"] - row["copied"]) for row in rows)
    return Check(
        f"{len(rows)} exact conversions in the table: accuracy differs by at most {worst:.2f} points", worst <= 0.1
    )


def run_again_keeps_accuracy(by_arm: ByArm) -> Check:
    rows = [row for records in by_arm.values() for row in records]
    worst = 100 * max(abs(row["before"] - row["copied"]) for row in rows)
    return Check(f"{len(rows)} run again: accuracy differs by at most {worst:.2f} points", worst <= 0.1)


def rows(by_arm: ByArm) -> tuple[list[str], list[list[str]]]:
    again = [[row["target"], str(row["rewritten"]), *_shares(row)] for records in by_arm.values() for row in records]
    return ["target", "norms", "before (%)", "after (%)", "largest difference of outputs"], again


def _shares(row: dict[str, Any]) -> list[str]:
    return [f"{100 * row['before']:.2f}", f"{100 * row['copied']:.2f}", f"{row['difference']:.1e}"]


def draw(figure: Any, by_arm: ByArm) -> None:
    """A panel a network: every target of the table, as copied and as calibrated, beside the original."""
    networks = published()
    for axes, (name, rows_) in zip(figure.subplots(1, len(networks)), networks.items(), strict=True):
        for i, row in enumerate(rows_):
            axes.plot(100 * row["copied"], i, "o", color="C0", alpha=0.7)
            if "calibrated" in row:
                axes.plot(100 * row["calibrated"], i, "D", color="C1", alpha=0.7)
        axes.axvline(100 * rows_[0]["before"], color="grey", linewidth=0.8)
        axes.set_yticks(range(len(rows_)), [row["target"] for row in rows_], fontsize=8)
        axes.set(xlim=(-5, 105), xlabel="top-1 (%)")
        axes.set_title(name, fontsize=9)
        axes.invert_yaxis()
    axes.plot([], [], "o", color="C0", label="as copied")
    axes.plot([], [], "D", color="C1", label="calibrated")
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)


CLAIM = Claim(
    8,
    "conversion",
    "Trained networks keep their function under every exact target",
    "no figure, it trains from scratch",
    arms,
    (exact_rows_keep_accuracy, run_again_keeps_accuracy),
    draw,
    rows,
    notes="The picture is the table of `python -m benchmarks.targets ../shared/data`, grey the originals; below, rows run again.",
)
