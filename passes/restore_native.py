"""RestoreNative: torch's own batch norm back from one of ours.

before:  y = weight * (x - running_mean) / (running_scale + eps') + bias           any metric
after:   y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          the class that it once was

Wherever a tensor still has the bits that the rewrite gave it, the original's bits come back. Elsewhere (after training)
running_var = (running_scale + eps')^2 - eps, the nearest: the same function in eval. A norm that never was torch's gets the
class of its rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.nn import batch
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.origin import Origin
from normrewrite.passes.base import Rewrite
from normrewrite.sites import Site

_NATIVE: dict[type[BatchNorm], type[nn.Module]] = {
    batch.BatchNorm1d: nn.BatchNorm1d,
    batch.BatchNorm2d: nn.BatchNorm2d,
    batch.BatchNorm3d: nn.BatchNorm3d,
}


class RestoreNative(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> back, _ = RestoreNative().apply(twin)

    `trained` names the sites whose tensors had changed since the rewrite, filled as sites are rewritten.
    """

    def __init__(self) -> None:
        self.trained: list[str] = []

    def why_not(self, site: Site) -> str | None:
        old = site.module
        if not isinstance(old, BatchNorm):
            return "is no norm of normrewrite's"
        if old.origin is None and type(old) not in _NATIVE:
            return f"{site.kind} takes any rank, and torch has no such batch norm; use BatchNorm1d, 2d or 3d"
        return None

    def rewrite(self, site: Site) -> nn.Module:
        old = site.module
        assert isinstance(old, BatchNorm)
        origin = old.origin
        new: Any = _fresh(old) if origin is None else origin.rebuild()
        new.momentum, new.affine, new.track_running_stats = old.momentum, old.affine, old.track_running_stats
        exact = True
        for name in ("weight", "bias"):
            new.register_parameter(name, getattr(old, name))
        mean = None if old.running_mean is None else old.running_mean.detach().clone()
        var, exact = _variance(old, new.eps, origin)
        new.register_buffer("running_mean", mean if mean is None or var is None else mean.to(var.dtype))
        new.register_buffer("running_var", var)
        new.register_buffer("num_batches_tracked", old.num_batches_tracked)
        if not exact:
            self.trained.append(site.name)
        return new  # type: ignore[no-any-return]


def _variance(old: BatchNorm, eps: float, origin: Origin | None) -> tuple[Tensor | None, bool]:
    if old.running_scale is None:
        return None, True
    nearest = ((old.running_scale + old.eps) ** 2 - eps).clamp_min(0)
    if origin is None:
        return nearest, False
    return origin.restore("running_var", old.running_scale, nearest)


def _fresh(old: BatchNorm) -> nn.Module:
    with torch.device("meta"):
        return _NATIVE[type(old)](old.num_features, eps=old.eps, momentum=old.momentum, affine=False, track_running_stats=False)
