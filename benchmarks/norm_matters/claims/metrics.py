"""Other measures of spread do what the standard deviation does, L-infinity a little worse; the paper's gains and exact ones."""

from benchmarks.norm_matters.claim import Claim
from benchmarks.norm_matters.curves import learning
from benchmarks.norm_matters.judge import above, alike
from benchmarks.norm_matters.run import Arms, Budget, Norm
from benchmarks.norm_matters.studies import SCRATCH

NORMS = {
    "L2": Norm("l2"),
    "L1": Norm("l1"),
    "Top-10, paper's gain": Norm("topk:10", "paper"),
    "Top-10, exact gain": Norm("topk:10"),
    "L∞, paper's gain": Norm("linf", "paper"),
    "L∞, exact gain": Norm("linf"),
    "range, exact gain": Norm("range"),
}


def arms(budget: Budget) -> Arms:
    return {name: SCRATCH[budget].arm(norm) for name, norm in NORMS.items()}


CLAIM = Claim(
    1,
    "metrics",
    "L1 and Top-10 train like L2; L∞ a little worse",
    "ImageNet, top-1 error (%). ResNet-18: L2 33.8, L1 33.7, Top-10 34.2, L∞ 35.7. ResNet-50: L2 26.5, L1 26.9",
    arms,
    (
        alike("L1", "L2"),
        alike("Top-10, paper's gain", "L2"),
        above("L2", "L∞, paper's gain"),
        alike("L∞, exact gain", "L2", claimed=False),
        above("L∞, exact gain", "L∞, paper's gain", claimed=False),
        alike("Top-10, exact gain", "L2", claimed=False),
        alike("range, exact gain", "L2", claimed=False),
    ),
    learning,
    notes="Does the exact gain close L∞'s gap? The checks that are not the paper's answer it. L1's two gains are one number.",
)
