"""Modules to place in models: `nr.nn.BatchNorm2d(64, metric="l1")`."""

from normrewrite.nn.affine import ChannelAffine
from normrewrite.nn.batch import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.nn.offset import OffsetNorm
from normrewrite.nn.rectify import norm_relu
from normrewrite.nn.renorm import BatchRenorm
from normrewrite.nn.sample import (
    GroupNorm,
    InstanceNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from normrewrite.nn.stand_in import StandIn
from normrewrite.nn.synchronise import synchronise_
from normrewrite.nn.weights import BoundedWeightNorm, WeightNorm, normalise_weight

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "BoundedWeightNorm",
    "ChannelAffine",
    "GroupNorm",
    "InstanceNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "MeanOnlyBatchNorm",
    "OffsetNorm",
    "RMSNorm",
    "StandIn",
    "WeightNorm",
    "norm_relu",
    "normalise_weight",
    "synchronise_",
]
