"""Modules that are held where torch does not look: in plain containers and objects, functions, or past `nn.Module.__setattr__`.

>>> [place.path for place in hidden(model)]
['block.norms[0]', 'block.norms[1]', 'block.settings.norm']
"""

import functools
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from normrewrite.nn.parts import INTERNAL
from normrewrite.sites.known import is_known_class


@dataclass(frozen=True)
class Shelf:
    """A plain container, with the one attribute by which a module's children are replaced; None where it can't be changed."""

    _modules: Any


@dataclass(frozen=True)
class Place:
    """module: what is held; path: where, for people; shelf, key: what has it, and under which key or index; copied: whether
    a copy of the model holds a copy of it there, as it does not in a closure or behind a weak reference."""

    module: nn.Module
    path: str
    shelf: Shelf
    key: Any
    copied: bool = True

    @property
    def fixed(self) -> bool:
        return self.shelf._modules is None


_PLAIN = frozenset(
    {bool, int, float, str, bytes, type(None), Tensor, nn.Parameter}
)  # most attributes; none holds a module


def hidden(model: nn.Module) -> Iterator[Place]:
    """Every such place of the modules that are registered; ours keep notes of their own so."""
    search = _Search()
    for name, module in model.named_modules():
        ours = str(type(module).__module__).startswith("normrewrite.") or isinstance(module, GraphModule)
        for key, value in () if ours else vars(module).items():
            if key not in INTERNAL and type(value) not in _PLAIN:
                yield from search.within(value, f"{name}.{key}" if name else key, vars(module), key)


@dataclass
class _Search:
    """Goes through what a value holds, three levels deep, and through each object once at any depth."""

    depths: dict[int, int] = field(default_factory=dict)

    def within(
        self, value: Any, path: str, holder: Any, key: Any, depth: int = 3, copied: bool = True
    ) -> Iterator[Place]:
        if type(value) in weakref.ProxyTypes:
            value, holder, copied = _behind(value), None, False
        if type(value) in _PLAIN:
            return
        if isinstance(value, nn.Module):
            yield Place(value, path, Shelf(holder if copied else None), key, copied)
        elif self.depths.get(id(value), 0) < depth:
            self.depths[id(value)] = depth
            for held, where, shelf, place, stays in _held(value, path):
                if type(held) not in _PLAIN:
                    yield from self.within(held, where, shelf, place, depth - 1, copied and stays)


def _behind(proxy: Any) -> Any:
    """What a weak proxy stands for, where that is a module."""
    return getattr(getattr(proxy, "modules", None), "__self__", None)


def _held(value: Any, path: str) -> Iterator[tuple[Any, str, Any, Any, bool]]:
    """What a value holds: each with its path, the container in which it can be replaced (None where it can't be) and its key
    there, and whether copies of the value hold copies of it."""
    if isinstance(value, dict):
        for key, held in value.items():
            yield held, f"{path}[{key!r}]" if type(key) in _PLAIN else f"{path}[...]", value, key, True
            yield key, f"a key of {path}", None, None, True
    elif isinstance(value, list | tuple | set | frozenset | deque):
        shelf = value if isinstance(value, list | deque) else None
        for i, held in enumerate(value):
            yield held, f"{path}[{i}]", shelf, i, True
    elif isinstance(value, functools.partial):
        for held in (value.func, *value.args, *value.keywords.values()):
            yield held, path, None, None, True
    elif isinstance(value, MethodType):
        yield value.__self__, path, None, None, True
        yield value.__func__, path, None, None, True
    elif isinstance(value, FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != CellType()]  # which is not filled yet
        for held in (
            *(cell.cell_contents for cell in cells),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
        ):
            yield held, path, None, None, False
    elif isinstance(value, weakref.ref):
        yield value(), path, None, None, False
    if _is_plain_object(value):
        own = getattr(value, "__dict__", None) or {}
        for key, held in own.items():
            yield held, f"{path}.{key}", own, key, True
        slots = [key for cls in type(value).__mro__ for key in _slots(cls) if hasattr(value, key)]
        for key in slots:
            yield getattr(value, key), f"{path}.{key}", None, None, True


def _is_plain_object(value: Any) -> bool:
    """Whether it is of a class of the user's own, or a mere namespace: what libraries make is theirs to look after."""
    if isinstance(value, type | ModuleType | FunctionType | MethodType):
        return False
    has_state = hasattr(value, "__dict__") or any(map(_slots, type(value).__mro__))
    return has_state and (isinstance(value, SimpleNamespace | Namespace) or not is_known_class(type(value)))


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if isinstance(vars(cls).get(name), MemberDescriptorType))
