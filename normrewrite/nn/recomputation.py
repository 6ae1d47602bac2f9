"""Forwards that activation checkpointing repeats: what the first one read from state that it then moved.

>>> remember(owner, torch.stack([mean, spread, r, d]))       # in a forward; owner: a tensor that lives as long as the norm
>>> recalled(owner, torch.stack([mean, spread]))             # in its recomputation: the same r and d

torch.utils.checkpoint runs a forward again inside the backward, and gives no place where the first could leave something for the
second: one kind runs the first without a graph, the other drops what it saves. What is sure is that the second sees the same
batch. So the few numbers a channel that a batch measured stand beside what was read for it, for the last forwards alone and as
long as their norm lives: by a tensor of it that no forward moves, as compiled graphs pass such a one on as it is. A batch that
isn't among them is an error, never a wrong gradient.
"""

from collections import deque

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from normrewrite.backends.plain import transformed
from normrewrite.errors import NormRewriteError

FORWARDS = (
    32  # that may lie between a forward and its recomputation: calls of a shared norm, micro-batches of a pipeline
)
_NEAR = 1e-2  # kernels may add up in another order; other batches are further off than that
_recent: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def recomputing() -> bool:
    """Whether this forward runs inside a backward. Compilers don't see it: operators ask when they run."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def remember(owner: Tensor, record: Tensor) -> None:
    """record: (4, C), mean and spread of the batch, and what was computed from them and from running statistics."""
    if not transformed():
        _recent.setdefault(owner, deque(maxlen=FORWARDS)).append(record)


def recalled(owner: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """What was remembered of this batch; of equal ones, the last. measured: (2, C), its mean and spread."""
    records = list(_recent.get(owner, ()))[::-1]
    off = [] if not records else _distances(torch.stack(records)[:, :2], measured).tolist()
    if not off or min(off) > _NEAR:
        raise NormRewriteError(
            "a norm that corrects towards its running statistics ran inside a backward, on a batch that is none of the last "
            f"{FORWARDS} it was trained on. Let checkpointing repeat each forward exactly (preserve_rng_state), and in time."
        )
    r, d = records[off.index(min(off))][2:]
    return r.clone(), d.clone()


def _distances(seen: Tensor, measured: Tensor) -> Tensor:
    """How far batches are from this one, on average over channels and in units of its spread. seen: (batches, 2, C)."""
    same = (seen == measured) | (seen.isnan() & measured.isnan())
    unit = measured[1].abs().clamp_min(torch.finfo(measured.dtype).tiny)
    off = torch.where(same, 0, (seen - measured).abs() / unit)
    return off.nan_to_num(torch.inf).mean((1, 2))
