"""How arms are compared: means and ranges over seeds, by rules that know no result.

Two arms differ where their ranges over seeds don't touch: two sets of three seeds of one kind do so one time in ten. They are
alike where their ranges touch and their means are no more than a margin apart, in points of accuracy.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.norm_matters.run import Arms, Budget, ByArm

Verdict = Literal["reproduced", "not reproduced", "not run", "too small to support it"]
MARGIN = 1.0


@dataclass(frozen=True)
class Check:
    """One comparison. claimed: by the paper; others are asked beside it and don't count."""

    text: str
    holds: bool
    claimed: bool = True

    def __str__(self) -> str:
        return f"{'yes' if self.holds else 'no'}: {self.text}"


Rule = Callable[[ByArm], Check]


def percents(records: list[dict[str, Any]]) -> list[float]:
    return [100 * record["accuracy"] for record in records]


def spread(records: list[dict[str, Any]]) -> str:
    """Mean and range."""
    values = percents(records)
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def above(better: str, worse: str, claimed: bool = True) -> Rule:
    """Every seed of `better` is above every seed of `worse`."""

    def rule(by_arm: ByArm) -> Check:
        high, low = percents(by_arm[better]), percents(by_arm[worse])
        gap = statistics.mean(high) - statistics.mean(low)
        return Check(f"`{better}` above `{worse}`: by {gap:.2f} points", min(high) > max(low), claimed)

    return rule


def alike(one: str, other: str, margin: float = MARGIN, claimed: bool = True) -> Rule:
    """Ranges touch, and means are at most `margin` points apart."""

    def rule(by_arm: ByArm) -> Check:
        a, b = percents(by_arm[one]), percents(by_arm[other])
        gap = statistics.mean(a) - statistics.mean(b)
        touch = min(a) <= max(b) and min(b) <= max(a)
        text = f"`{one}` like `{other}`: {gap:+.2f} points, ranges {'touch' if touch else 'do not touch'}"
        return Check(text, touch and abs(gap) <= margin, claimed)

    return rule


def complete(arms: Arms, by_arm: ByArm) -> bool:
    return all(len(by_arm.get(name, [])) == len(runs) for name, runs in arms.items())


def verdict(budget: Budget, arms: Arms, by_arm: ByArm, rules: tuple[Rule, ...]) -> tuple[Verdict, list[Check]]:
    """By the claimed checks alone. Nothing is judged before every run is there."""
    if not complete(arms, by_arm):
        return "not run", []
    checks = [rule(by_arm) for rule in rules]
    if budget == "smoke":
        return "too small to support it", checks
    return ("reproduced" if all(check.holds for check in checks if check.claimed) else "not reproduced"), checks
