"""Renormalise: Batch Renorm (Ioffe 2017) in the place of batch norm.

before:  y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          torch's batch norms and kinds.py's finds
after:   the same in eval; training corrects the batch's statistics towards the running ones (nn/renorm.py)

Eval computes the same function, to rounding. Trained statistics start with the corrections' full limits (r 3, d 5), fresh
ones with the published schedule, which begins as plain batch norm.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.renorm import SCHEDULE, BatchRenorm
from normrewrite.passes.change_class import ChangeClass


class Renormalise(ChangeClass):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> Renormalise()(torch.fx.symbolic_trace(model)).modified
    True
    """

    target = "renorm"
    cls = BatchRenorm

    def finish(self, old: Any, new: BatchNorm) -> None:
        assert isinstance(new, BatchRenorm)
        new.r_max, new.d_max, new.schedule = 3.0, 5.0, SCHEDULE
        new._buffers["trained"] = torch.tensor(not is_fresh(old), device="cpu")


def is_fresh(norm: nn.Module) -> bool:
    """Whether a norm's running statistics are those that it was made with."""
    mean, var = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return False
    if mean.is_meta or is_lazy(mean):  # without values yet: as fresh as can be
        return True
    return not mean.any() and bool((var == 1).all())
