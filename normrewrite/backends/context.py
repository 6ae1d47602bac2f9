"""All ambient state of the backends: what a block of code around a call has chosen.

>>> with setting(kernels="torch"):
...     here.now.kernels
'torch'

It is one context variable, so that neither another thread nor another task of asyncio sees a block that it didn't open; a task
that is started inside, and what runs in a copy of the context, see it. `here.now` is that state. Before torch 2.14 torch.compile
traces no `ContextVar.get`, but it does read a property that is written in C, and looks at it again whenever it calls what it
compiled: `now` is the variable's own `get`, which takes what it is called on, `here`, for the value where none is set.

Torch's function modes, by which its own norms follow half arithmetic, are a thread's: `thread.modes` counts those that are
open, so that our norms are in half where torch's are, and nowhere else.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from normrewrite.backends.accumulate import Accumulator

_STATE: ContextVar["State"] = ContextVar("normrewrite")


@dataclass(frozen=True)
class State:
    """kernels: who is to compute norms (dispatch.py); accumulator: what half arithmetic sums by (half.py); finite: where norms
    write whether their statistics are finite (watch.py). None: nothing was chosen."""

    kernels: str | None = None
    accumulator: Accumulator | None = None
    finite: list[Tensor] | None = None

    now: ClassVar[Any] = property(_STATE.get)


class _Thread(threading.local):
    modes = 0


here, thread = State(), _Thread()


@contextmanager
def setting(**fields: Any) -> Iterator[None]:
    """Inside, these fields of the state; afterwards those that were before, however the block ends."""
    before = {name: getattr(here.now, name) for name in fields}
    _change(fields)
    try:
        yield
    finally:
        _change(before)


def _change(fields: dict[str, Any]) -> None:
    """Other fields stay, which a block that is still open may have set. What is as at the start is that very state again."""
    state = replace(here.now, **fields)
    _STATE.set(here if state == here else state)
