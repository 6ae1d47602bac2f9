"""The rewrites, one a file, each a torch.fx pass; `PIPELINE` is the order in which a plan carries them out.

>>> from normrewrite.passes import SwapMetric, FoldAffine
"""

from normrewrite.passes.base import Replacement, Rewrite
from normrewrite.passes.change_scope import ChangeScope
from normrewrite.passes.fold_affine import FoldAffine
from normrewrite.passes.fold_offset import FoldOffset
from normrewrite.passes.freeze import Freeze
from normrewrite.passes.fuse_activation import FuseActivation
from normrewrite.passes.lift_functional import LiftFunctional
from normrewrite.passes.normalise_weights import NormaliseWeights
from normrewrite.passes.renormalise import Renormalise
from normrewrite.passes.restore_native import RestoreNative
from normrewrite.passes.swap_metric import SwapMetric

# Calls get a module first, so that the others find it; folding comes last, as it takes norms away.
# FuseActivation is for a graph that is about to be trained or compiled, FoldOffset for deployment: both stand in no pipeline.
PIPELINE = (LiftFunctional, RestoreNative, SwapMetric, Renormalise, Freeze, ChangeScope, NormaliseWeights, FoldAffine)

__all__ = [
    "PIPELINE",
    "ChangeScope",
    "FoldAffine",
    "FoldOffset",
    "Freeze",
    "FuseActivation",
    "LiftFunctional",
    "NormaliseWeights",
    "Renormalise",
    "Replacement",
    "RestoreNative",
    "Rewrite",
    "SwapMetric",
]
