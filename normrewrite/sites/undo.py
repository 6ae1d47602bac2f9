"""A model as it was, where a rewrite in place ends in an error half-way.

>>> with undone_on_error(model):
...     rewrite_in_place(model)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from normrewrite.sites.hidden import hidden


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """On any error every module holds what it held: the same objects under the same names, the same bits.

    What is kept is where things stand; tensors are not copied, so that it costs nothing to speak of. Numbers written into a
    tensor that stays would not come back: rewrites give a tensor other data instead.
    """
    modules = [(module, type(module)) for module in model.modules()]
    tensors = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    shelves = [place.shelf._modules for place in hidden(model) if not place.fixed]
    held_in = [*shelves, *(holder for module, _ in modules for holder in _holders(vars(module)))]
    holders = [(holder, holder.copy()) for holder in held_in]
    try:
        yield
    except BaseException:
        for module, cls in modules:
            module.__class__ = cls
        for holder, contents in holders:
            holder.clear()
            (holder.update if isinstance(holder, dict) else holder.extend)(contents)
        for tensor, data in tensors:
            tensor.data = data
        raise


def _holders(holder: Any, depth: int = 3) -> Iterator[Any]:
    """A module's dictionary and the dictionaries and lists in it, a few levels deep: those that modules can be held in."""
    yield holder
    for value in holder.values() if isinstance(holder, dict) else holder:
        if depth and isinstance(value, dict | list):
            yield from _holders(value, depth - 1)
