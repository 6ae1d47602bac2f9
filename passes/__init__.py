"""The rewrites, one a file, each a torch.fx pass; `PIPELINE` is their order.

>>> from normrewrite.passes import SwapMetric, FoldAffine
"""

from normrewrite.passes.base import Rewrite
from normrewrite.passes.fold_affine import FoldAffine
from normrewrite.passes.restore_native import RestoreNative
from normrewrite.passes.swap_metric import SwapMetric

# Norms change first, while their module is whole; folding comes last, as it takes them away.
PIPELINE: tuple[type[Rewrite], ...] = (RestoreNative, SwapMetric, FoldAffine)

__all__ = ["PIPELINE", "FoldAffine", "RestoreNative", "Rewrite", "SwapMetric"]
