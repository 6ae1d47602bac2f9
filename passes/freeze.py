"""Freeze: a batch norm whose statistics and parameters stand still, in training too.

before:  y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          in eval
after:   the same in eval and in training; weight and bias become buffers, as frozen batch norms of detection models have it
"""

from typing import Any

from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.passes.change_class import ChangeClass


class Freeze(ChangeClass):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> Freeze()(torch.fx.symbolic_trace(model)).modified
    True
    """

    target = "frozen"
    cls = FrozenBatchNorm

    def finish(self, old: Any, new: BatchNorm) -> None:
        for name in ("weight", "bias"):
            value = new._parameters.pop(name, None)
            new._buffers[name] = None if value is None else value.detach().clone()
