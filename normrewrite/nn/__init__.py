"""Modules to place in models: `nr.nn.BatchNorm2d(64, metric="l1")`."""

from normrewrite.nn.affine import ChannelAffine
from normrewrite.nn.batch import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from normrewrite.nn.folded import Folded
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.nn.weights import BoundedWeightNorm, WeightNorm, normalise_weight

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BoundedWeightNorm",
    "ChannelAffine",
    "Folded",
    "MeanOnlyBatchNorm",
    "WeightNorm",
    "normalise_weight",
]
