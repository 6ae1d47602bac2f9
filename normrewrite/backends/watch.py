"""Who wants to know of statistics that are not finite, in this context: a training counts the batches that gave such.

>>> with watching() as watch:
...     model(x)
>>> watch.spoilt
False
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normrewrite.backends.context import here, setting


@dataclass
class Watch:
    """What was told, without waiting for the device."""

    told: list[Tensor] = field(default_factory=list)

    @property
    def spoilt(self) -> bool:
        """Whether any statistic was not finite."""
        return bool(self.told) and not bool(torch.stack(self.told).all())


def tell(finite: Tensor) -> None:
    """A norm has measured; finite: which of its statistics are."""
    if here.now.finite is not None:
        here.now.finite.append(finite.all())


def told() -> int:
    """How many norms have told so far of this watch; 0 where nobody watches."""
    return len(here.now.finite or ())


@contextmanager
def watching() -> Iterator[Watch]:
    """Be told of all that is measured inside, in place of whoever was told before."""
    watch = Watch()
    with setting(finite=watch.told):
        yield watch
