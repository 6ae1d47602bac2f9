"""A transformer whose layer norms measure by L1, on digits as sequences of their rows."""

from benchmarks.norm_matters.claim import Claim
from benchmarks.norm_matters.curves import learning
from benchmarks.norm_matters.judge import alike
from benchmarks.norm_matters.run import Arms, Budget, Norm, Study, Task

ADAMW = {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05, "batch_size": 64}
FULL = Study("transformer", Task("digits", 8, 1_400, 397), ADAMW | {"epochs": 20, "warmup": 40}, 5)
STUDIES: dict[Budget, Study] = {
    "smoke": Study("transformer", Task("digits", 8, 512, 256), ADAMW | {"epochs": 1}, 1),
    "cpu": FULL,
    "gpu": FULL,
}


def arms(budget: Budget) -> Arms:
    study = STUDIES[budget]
    return {"L2 layer norm": study.arm(), "L1 layer norm": study.arm(Norm("l1", scope="layer"))}


CLAIM = Claim(
    7,
    "transformer",
    "A transformer with L1 layer norms trains like one with L2",
    "Translation (WMT14): L1 does as L2",
    arms,
    (alike("L1 layer norm", "L2 layer norm"),),
    learning,
    notes="Eight rows of eight pixels, three layers of width 64, seven layer norms. A far smaller task than translation.",
)
