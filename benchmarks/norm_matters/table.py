"""Tables of results, a line an arm."""

from benchmarks.norm_matters.judge import spread
from benchmarks.norm_matters.run import ByArm

HEAD = ["arm", "seeds", "top-1 (%), mean and range"]


def accuracies(by_arm: ByArm) -> tuple[list[str], list[list[str]]]:
    return HEAD, [[name, str(len(records)), spread(records)] for name, records in by_arm.items() if records]


def turns(by_arm: ByArm) -> tuple[list[str], list[list[str]]]:
    """With the angle by which an epoch turned the channels' weights, a mean over epochs and seeds."""
    rows = accuracies(by_arm)[1]
    for row in rows:
        angles = [epoch["turn"] for record in by_arm[row[0]] for epoch in record["epochs"]]
        row.append(f"{sum(angles) / len(angles):.1f}")
    return [*HEAD, "turn of an epoch (°)"], rows


def overflows(by_arm: ByArm) -> tuple[list[str], list[list[str]]]:
    """With the batches of each run whose statistics were not finite."""
    rows = accuracies(by_arm)[1]
    for row in rows:
        row.append(", ".join("stopped" if r["stopped"] else str(r["nonfinite_batches"]) for r in by_arm[row[0]]))
    return [*HEAD, "batches not finite"], rows
