"""Freeze: a batch norm whose statistics and parameters stand still, in training too.

before:  y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          in eval
after:   the same in eval and in training; weight and bias become buffers, as frozen batch norms of detection models have it
"""

from torch import nn

from normrewrite.kinds import Kind, native
from normrewrite.nn.batch import FrozenBatchNorm
from normrewrite.passes.base import Rewrite
from normrewrite.passes.swap_metric import from_native
from normrewrite.sites import Site


class Freeze(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> Freeze()(torch.fx.symbolic_trace(model)).modified
    True
    """

    target = "frozen"

    def why_not(self, site: Site) -> str | None:
        kind = native(site.module, tracked=True, frozen=False)
        return kind if isinstance(kind, str) else None

    def rewrite(self, site: Site) -> nn.Module:
        kind = native(site.module)
        assert isinstance(kind, Kind)
        new = from_native(site.module, Kind(FrozenBatchNorm, kind.eps, kind.tail), "l2", "exact")
        for name in ("weight", "bias"):
            value = new._parameters.pop(name, None)
            new._buffers[name] = None if value is None else value.detach().clone()
        new.site = site.name
        return new
