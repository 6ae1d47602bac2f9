"""Who wants to know of statistics that are not finite, in this thread: a training counts the batches that gave such.

>>> with watching() as watch:
...     model(x)
>>> watch.spoilt
False
"""

import threading
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


class _Here(threading.local):  # not a context variable: torch.compile reads no such, and norms tell in what it compiles
    watch: Watch | None = None


_here = _Here()


def tell(finite: Tensor) -> None:
    """A norm has measured; finite: which of its statistics are."""
    if _here.watch is not None:
        _here.watch.told.append(finite.all())


def told() -> int:
    """How many norms have told so far of this watch; 0 where nobody watches."""
    return 0 if _here.watch is None else len(_here.watch.told)


@contextmanager
def watching() -> Iterator[Watch]:
    """Be told of all that is measured inside, in place of whoever was told before."""
    before, watch = _here.watch, Watch()
    _here.watch = watch
    try:
        yield watch
    finally:
        _here.watch = before
