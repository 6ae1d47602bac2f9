"""Renormalise: Batch Renorm (Ioffe 2017) in the place of batch norm.

before:  y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          torch's batch norms and kinds.py's finds
after:   the same in eval; training corrects the batch's statistics towards the running ones (nn/renorm.py)

Eval computes the same function, to rounding. Trained statistics start with the corrections' full limits (r 3, d 5), fresh
ones with the published schedule, which begins as plain batch norm.
"""

import torch
from torch import Tensor, nn

from normrewrite.kinds import Kind, native
from normrewrite.nn.renorm import SCHEDULE, BatchRenorm
from normrewrite.passes.base import Rewrite
from normrewrite.passes.swap_metric import from_native
from normrewrite.sites import Site


class Renormalise(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> Renormalise()(torch.fx.symbolic_trace(model)).modified
    True
    """

    target = "renorm"

    def why_not(self, site: Site) -> str | None:
        kind = native(site.module, tracked=True, frozen=False)
        return kind if isinstance(kind, str) else None

    def rewrite(self, site: Site) -> nn.Module:
        kind = native(site.module)
        assert isinstance(kind, Kind)
        new = from_native(site.module, Kind(BatchRenorm, kind.eps, kind.tail), "l2", "exact")
        assert isinstance(new, BatchRenorm)
        new.site, new.r_max, new.d_max, new.schedule = site.name, 3.0, 5.0, SCHEDULE
        new._buffers["trained"] = torch.tensor(not is_fresh(site.module))
        return new


def is_fresh(norm: nn.Module) -> bool:
    """Whether a norm's running statistics are those that it was made with."""
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    return isinstance(mean, Tensor) and isinstance(var, Tensor) and not mean.any() and bool((var == 1).all())
