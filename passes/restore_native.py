"""RestoreNative: torch's own batch norm back from one of ours.

before:  y = weight * (x - running_mean) / (running_scale + eps') + bias           any metric
after:   y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          the class that it once was

Wherever a tensor still has the bits that the rewrite gave it, the original's bits come back. Elsewhere (after training)
running_var = (running_scale + eps')^2 - eps, the nearest: the same function in eval. A norm that never was torch's gets the
class of its rank.
"""

from torch import Tensor, nn

from normrewrite.nn import batch
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.parts import assemble
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
        if old.origin is not None and issubclass(old.origin.kind, BatchNorm):  # it was ours already, of another metric
            return assemble(old.origin.kind, old.origin.attributes, old._parameters, old._buffers)  # type: ignore[no-any-return]
        cls, attributes = (_NATIVE[type(old)], {}) if old.origin is None else (old.origin.kind, old.origin.attributes)
        kept = {name: getattr(old, name) for name in ("num_features", "momentum", "affine", "track_running_stats")}
        attributes = {"eps": old.eps, **attributes, **kept}
        mean, var, exact = _statistics(old, attributes["eps"])
        if not exact:
            self.trained.append(site.name)
        buffers = {"running_mean": mean, "running_var": var, "num_batches_tracked": old.num_batches_tracked}
        return assemble(cls, attributes, {"weight": old.weight, "bias": old.bias}, buffers)  # type: ignore[no-any-return]


def _statistics(old: BatchNorm, eps: float) -> tuple[Tensor | None, Tensor | None, bool]:
    """running_mean, running_var, and whether they are the original's bits."""
    if old.running_mean is None or old.running_scale is None:
        return None, None, True
    var, exact = ((old.running_scale + old.eps) ** 2 - eps).clamp_min(0), False
    if old.origin is not None:
        var, exact = old.origin.restore("running_var", old.running_scale, var)
    return old.running_mean.detach().to(var.dtype, copy=True), var, exact
