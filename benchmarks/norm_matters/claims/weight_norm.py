"""Bounded weight norm against weight norm and batch norm."""

from dataclasses import replace

from benchmarks.norm_matters.claim import Claim
from benchmarks.norm_matters.curves import learning
from benchmarks.norm_matters.judge import above
from benchmarks.norm_matters.run import Arms, Budget, Norm
from benchmarks.norm_matters.studies import SCRATCH

NORMS = {
    "BN": Norm("l2"),
    "BWN": Norm("bwn:mean-bn", initialise=True),
    "BWN, strict": Norm("bwn:strict,mean-bn"),
    "WN": Norm("wn:mean-bn", initialise=True),
}


def arms(budget: Budget) -> Arms:
    study = SCRATCH[budget] if budget != "gpu" else replace(SCRATCH["gpu"], network="resnet50")
    return {name: study.arm(norm) for name, norm in NORMS.items()}


CLAIM = Claim(
    5,
    "weight_norm",
    "Bounded weight norm comes nearer to batch norm than weight norm does",
    "ImageNet, ResNet-50, top-1 error (%): BN 26.0, BWN 28.2, WN 33.0",
    arms,
    (above("BWN", "WN"), above("BN", "WN"), above("BN", "BWN"), above("BWN, strict", "WN", claimed=False)),
    learning,
    notes=(
        "Means are still the batch's (mean-only batch norm) in all three. BWN has a gain by channel inside the fixed norm, and "
        "starts by data as WN does; strict is the paper's form, without gains, from its usual start."
    ),
)
