"""Statistics over all ranks, asked for: what torch.nn.SyncBatchNorm.convert_sync_batchnorm is to torch's norms."""

from typing import Any, TypeVar

from torch import nn

from normrewrite.errors import NormRewriteError
from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.nn.mean_only import MeanOnlyBatchNorm

Model = TypeVar("Model", bound=nn.Module)


def synchronise_(model: Model, process_group: Any = None, *, synchronised: bool = True) -> Model:
    """Let every batch norm of ours in the model measure all ranks' batches as one, in training. Returns the model.

    >>> model = DistributedDataParallel(nr.nn.synchronise_(nr.convert(model, "l1")))

    process_group: the ranks that share statistics; None: all. synchronised=False undoes it. What was a SyncBatchNorm before
    `convert` is synchronised already; torch's own norms are SyncBatchNorm.convert_sync_batchnorm's to convert. Files don't
    hold it: ask again after loading. Raises NormRewriteError where there is no such norm.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm | MeanOnlyBatchNorm)]
    norms = [norm for norm in norms if not isinstance(norm, FrozenBatchNorm)]  # which never measures
    if not norms:
        raise NormRewriteError(
            f"{type(model).__name__} holds no batch norm of normrewrite that measures. Convert it first (nr.convert), or use "
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm for torch's own."
        )
    for norm in norms:
        norm.synchronised, norm.process_group = synchronised, process_group
    return model
