"""Who wants to know of statistics that are not finite: a training counts the batches that gave such.

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


@dataclass
class Watch:
    """What was told, without waiting for the device."""

    told: list[Tensor] = field(default_factory=list)

    @property
    def spoilt(self) -> bool:
        """Whether any statistic was not finite."""
        return bool(self.told) and not bool(torch.stack(self.told).all())


_watch: Watch | None = None


def tell(finite: Tensor) -> None:
    """A norm has measured; finite: which of its statistics are."""
    if _watch is not None:
        _watch.told.append(finite.all())


def told() -> int:
    """How many norms have told so far of this watch; 0 where nobody watches."""
    return 0 if _watch is None else len(_watch.told)


@contextmanager
def watching() -> Iterator[Watch]:
    """Be told of all that is measured inside, in place of whoever was told before."""
    global _watch
    before, _watch = _watch, Watch()
    try:
        yield _watch
    finally:
        _watch = before
