"""Running statistics that stay finite: a batch whose statistics are not never enters them, and is counted.

>>> statistics = Statistics(model)
>>> with statistics.kept_finite() as watch:
...     loss(model(batch)).backward()
>>> watch.spoilt                                    # whether a norm measured what is not finite

Loss and gradient may well be finite then: a variance of inf makes a norm's output its bias. Norms of ours keep such channels
out by themselves; what torch's keep is put back here, channel by channel.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normrewrite.backends.watch import Watch, tell, watching


class Statistics:
    """The running statistics of torch's norms, and of any other that keeps a mean and a variance by their names."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = [module for module in model.modules() if _keeps(module)]

    @contextmanager
    def kept_finite(self) -> Iterator[Watch]:
        """Around forward and backward: autograd may still look at the statistics in between."""
        before = [[value.clone() for value in _pair(norm)] for norm in self.norms]
        with watching() as watch:
            yield watch
            for norm, values in zip(self.norms, before, strict=True):
                _put_back(_pair(norm), values)


def _keeps(module: nn.Module) -> bool:
    statistics = [module._buffers.get(name) for name in ("running_mean", "running_var")]
    return all(isinstance(value, Tensor) for value in statistics)


def _pair(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return norm.get_buffer("running_mean"), norm.get_buffer("running_var")


@torch.no_grad()
def _put_back(now: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    finite = _finite(now) | ~_finite(before)
    tell(finite)
    for value, old in zip(now, before, strict=True):
        value.copy_(torch.where(finite, value, old))


def _finite(pair: Sequence[Tensor]) -> Tensor:
    return torch.isfinite(pair[0]) & torch.isfinite(pair[1])
