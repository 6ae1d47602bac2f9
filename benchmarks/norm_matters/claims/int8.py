"""Eight bits: weights, activations and gradients of a network with range norms, against fp32."""

from benchmarks.norm_matters.claim import Claim
from benchmarks.norm_matters.curves import learning
from benchmarks.norm_matters.judge import alike
from benchmarks.norm_matters.run import Arms, Budget, Norm
from benchmarks.norm_matters.studies import SCRATCH


def arms(budget: Budget) -> Arms:
    study = SCRATCH[budget]
    int8 = study.arm(Norm("range"), precision="int8", int8_gradients=True)
    return {"range, fp32": study.arm(Norm("range")), "range, int8": int8}


CLAIM = Claim(
    4,
    "int8",
    "A ResNet trained in 8 bits comes to what it does in full precision",
    "ImageNet, ResNet-18: 8 bits as full precision",
    arms,
    (alike("range, int8", "range, fp32"),),
    learning,
    notes=(
        "8-bit weights, activations and gradients, simulated; the weights' own gradient and the norms' arithmetic are wide, "
        "as in Banner et al. (arXiv:1805.11046)."
    ),
)
