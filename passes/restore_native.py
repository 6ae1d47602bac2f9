"""RestoreNative: torch's own batch norm back from one of ours.

before:  y = weight * (x - running_mean) / (running_scale + eps') + bias           any metric
after:   y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          the class that it once was

Wherever a tensor still has the bits that the rewrite gave it, the original's bits come back. Elsewhere (after training)
running_var = (running_scale + eps')^2 - eps, the nearest: the same function in eval. A norm that never was torch's gets the
class of its rank.
"""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normrewrite.nn import batch
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.parts import assemble
from normrewrite.nn.rows import RowNorm
from normrewrite.passes import restore_rows
from normrewrite.passes.base import Rewrite
from normrewrite.sites import Site, is_norm

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

    def wanted(self, module: nn.Module) -> bool:
        return is_norm(module) or isinstance(module, RowNorm)

    def why_not(self, site: Site) -> str | None:
        old = site.module
        if isinstance(old, RowNorm):
            return restore_rows.why_not(old)
        if not isinstance(old, BatchNorm):
            return "is no norm of normrewrite's"
        if old.origin is None and type(old) not in _NATIVE:
            return f"{site.kind} takes any rank, and torch has no such batch norm; use BatchNorm1d, 2d or 3d"
        return None

    def rewrite(self, site: Site) -> nn.Module:
        old = site.module
        if isinstance(old, RowNorm):
            row, exact = restore_rows.rewrite(old)
            if not exact:
                self.trained.append(site.name)
            return row
        assert isinstance(old, BatchNorm)
        children = {name: child for name, child in old._modules.items() if name != "origin"}
        if old.origin is not None and issubclass(old.origin.kind, BatchNorm):  # it was ours already, of another metric
            new = assemble(old.origin.kind, old.origin.attributes, old._parameters, old._buffers)
        else:
            tensors, exact = _tensors(old)
            if not exact:
                self.trained.append(site.name)
            frozen = {name: tensors.pop(name) for name in ("weight", "bias") if name in old._buffers}
            parameters: dict[str, Any] = {name: tensors.pop(name) for name in ("weight", "bias") if name in tensors}
            new = assemble(*_class(old), parameters, frozen | tensors)
        new._modules.update(children)
        return new  # type: ignore[no-any-return]


def _class(old: BatchNorm) -> tuple[type[nn.Module], dict[str, Any]]:
    """What it was, with the plain attributes it had; a momentum set since then stays."""
    now = {name: getattr(old, name) for name in ("num_features", "eps", "momentum", "affine", "track_running_stats")}
    if old.origin is None:
        return _NATIVE[type(old)], now
    had = old.origin.attributes
    return old.origin.kind, had | {name: value for name, value in now.items() if name in had}


def _tensors(old: BatchNorm) -> tuple[dict[str, Any], bool]:
    """weight, bias and statistics of the native norm, in torch's order, and whether they are the original's bits."""
    tensors: dict[str, Any] = {"weight": old.weight, "bias": old.bias, "running_mean": None, "running_var": None}
    exact = True
    if old.running_mean is not None and old.running_scale is not None:
        live = {"running_var": old.running_scale} | ({} if old.weight is None else {"weight": old.weight.detach()})
        nearest = live | {"running_var": ((old.running_scale + old.eps) ** 2 - old.eps).clamp_min(0)}
        originals, exact = (nearest, False) if old.origin is None else old.origin.restore(live, nearest)
        var = originals["running_var"]
        tensors |= {"running_mean": old.running_mean.detach().to(var.dtype, copy=True), "running_var": var}
        if old.weight is not None:
            old.weight.data = originals["weight"]
    if old.num_batches_tracked is not None or old.origin is None or issubclass(old.origin.kind, _BatchNorm):
        tensors["num_batches_tracked"] = old.num_batches_tracked
    return tensors, exact
