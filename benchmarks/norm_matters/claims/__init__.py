"""The claims in the page's order, by name."""

from benchmarks.norm_matters.claim import Claim
from benchmarks.norm_matters.claims import (
    constant,
    conversion,
    half,
    int8,
    metrics,
    transformer,
    weight_decay,
    weight_norm,
)

_ALL = (metrics, constant, half, int8, weight_norm, weight_decay, transformer, conversion)
CLAIMS: dict[str, Claim] = {module.CLAIM.name: module.CLAIM for module in _ALL}
