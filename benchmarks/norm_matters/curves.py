"""What the claims' pictures show: accuracies by epoch, and at the end by seed.

>>> save(lambda figure: learning(figure, found), Path("docs/paper/metrics.svg"))         # benchmarks/figure.py
"""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.norm_matters.judge import percents
from benchmarks.norm_matters.run import ByArm

COLOURS = [f"C{i}" for i in range(10)]


def learning(figure: Any, by_arm: ByArm) -> None:
    """Left: test accuracy by epoch, mean and range over seeds. Right: every seed's accuracy at the end."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    curves(left, by_arm, "val_accuracy", 100)
    left.set(xlabel="epoch", ylabel="test accuracy (%)")
    ends(right, by_arm)
    right.set_xlabel("test accuracy at the end (%)")


def curves(axes: Any, by_arm: ByArm, name: str, factor: float = 1.0) -> None:
    """One line an arm, the mean over seeds; shaded, the range. Colours are those of `ends`."""
    for i, (arm, records) in enumerate(by_arm.items()):
        lines = [[factor * epoch[name] for epoch in record["epochs"]] for record in records if record["epochs"]]
        if not lines:
            continue
        seeds = list(zip(*lines, strict=True))
        epochs = range(1, len(seeds) + 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        marker = "o" if len(seeds) < 12 else ""
        axes.plot(
            epochs, [statistics.mean(each) for each in seeds], color=f"C{i}", label=arm, marker=marker, markersize=4
        )
        axes.fill_between(epochs, list(map(min, seeds)), list(map(max, seeds)), color=f"C{i}", alpha=0.15, linewidth=0)


def ends(axes: Any, by_arm: ByArm, colours: Sequence[str] = COLOURS) -> None:
    """A line an arm, from the top: a dot a seed, and a bar at the mean."""
    for i, (records, colour) in enumerate(zip(by_arm.values(), colours, strict=False)):
        values = percents(records)
        axes.plot(values, [i] * len(values), "o", color=colour, alpha=0.6)
        axes.plot([statistics.mean(values)] * 2, [i - 0.3, i + 0.3], color=colour, linewidth=2)
    axes.set_yticks(range(len(by_arm)), by_arm)
    for label, colour in zip(axes.get_yticklabels(), colours, strict=False):
        label.set_color(colour)
    axes.invert_yaxis()
