"""Modules to place in models: `nr.nn.BatchNorm2d(64, metric="l1")`."""

from normrewrite.nn.affine import ChannelAffine
from normrewrite.nn.batch import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from normrewrite.nn.rows import (
    GroupNorm,
    InstanceNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ChannelAffine",
    "GroupNorm",
    "InstanceNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
]
