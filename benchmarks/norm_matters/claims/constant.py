"""The constant of L1: times a quarter, one, four. A constant is the inverse of a factor in front of the norm's weight."""

from benchmarks.norm_matters.claim import Claim
from benchmarks.norm_matters.curves import learning
from benchmarks.norm_matters.judge import above
from benchmarks.norm_matters.run import Arms, Budget, Norm
from benchmarks.norm_matters.studies import SCRATCH

TIMES = {"¼": 0.25, "1": 1.0, "4": 4.0}


def arms(budget: Budget) -> Arms:
    return {f"C × {name}": SCRATCH[budget].arm(Norm("l1", times=times)) for name, times in TIMES.items()}


CLAIM = Claim(
    2,
    "constant",
    "L1 wants its constant: C = √(π/2) is better than a quarter and four times of it",
    "ImageNet, ResNet-18, top-1 error (%): C × ¼ 36.0, C 33.8, C × 4 35.2",
    arms,
    (above("C × 1", "C × ¼"), above("C × 1", "C × 4")),
    learning,
    notes="The norm's weight starts at 1 and is learned, so a constant is another start and another step of that weight.",
)
