"""Modules that are held where torch does not look: in a plain list, tuple or dictionary, or past `nn.Module.__setattr__`.

>>> [place.path for place in hidden(model)]
['block.norms[0]', 'block.norms[1]']
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule

from normrewrite.nn.parts import INTERNAL


@dataclass(frozen=True)
class Shelf:
    """A plain container, with the one attribute by which a module's children are replaced; None where it can't be changed."""

    _modules: Any


@dataclass(frozen=True)
class Place:
    """module: what is held; path: where, for people; shelf, key: what has it, and under which key or index."""

    module: nn.Module
    path: str
    shelf: Shelf
    key: Any

    @property
    def fixed(self) -> bool:
        return self.shelf._modules is None


_PLAIN = frozenset({bool, int, float, str, type(None)})  # most attributes are, and none holds a module


def hidden(model: nn.Module) -> Iterator[Place]:
    """Every such place of the modules that are registered; ours keep notes of their own so."""
    for name, module in model.named_modules():
        ours = type(module).__module__.startswith("normrewrite.") or isinstance(module, GraphModule)
        for key, value in () if ours else vars(module).items():
            if key not in INTERNAL and type(value) not in _PLAIN:
                yield from _within(value, f"{name}.{key}" if name else key, vars(module), key)


def _within(value: Any, path: str, holder: Any, key: Any, depth: int = 3) -> Iterator[Place]:
    if isinstance(value, nn.Module):
        yield Place(value, path, Shelf(holder if isinstance(holder, dict | list) else None), key)
    elif depth and isinstance(value, dict):
        for name, held in value.items():
            yield from _within(held, f"{path}[{name!r}]", value, name, depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for i, held in enumerate(value):
            if type(held) not in _PLAIN:
                yield from _within(held, f"{path}[{i}]", value, i, depth - 1)
