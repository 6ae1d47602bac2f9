"""Modules that are held where torch does not look: in a plain list, tuple or dictionary, or past `nn.Module.__setattr__`.

>>> [path for path, module in hidden(model)]
['block.norms[0]', 'block.norms[1]']

A rewrite replaces what is registered. One of these that is registered too would be replaced at one place and run at the other.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule

from normrewrite import sites
from normrewrite.nn.parts import attributes
from normrewrite.sites import Site

OUT_OF_SIGHT = "is held in a plain list or attribute, where torch does not find it either. Put it into an nn.ModuleList"


def hidden(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that a registered one holds in a plain container or attribute, with the place; ours keep their own notes so."""
    for name, module, _ in sites.registrations(model):
        ours = type(module).__module__.startswith("normrewrite.") or isinstance(module, GraphModule)
        for key, value in () if ours else attributes(module).items():
            yield from _within(value, f"{name}.{key}" if name else key, depth=3)


def _within(value: Any, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif depth and isinstance(value, Mapping):
        for key, held in value.items():
            yield from _within(held, f"{path}[{key!r}]", depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for i, held in enumerate(value):
            yield from _within(held, f"{path}[{i}]", depth - 1)


def out_of_sight(model: nn.Module, wanted: Callable[[nn.Module], bool] = sites.is_norm) -> list[Site]:
    """Wanted modules that are registered nowhere in the model, under the name of the first place that leads to them."""
    known = {id(module) for module in model.modules()}
    found = []
    for path, holder in hidden(model):
        for site in sites.find(holder, wanted) if id(holder) not in known else ():
            if id(site.module) not in known:
                known.add(id(site.module))
                found.append(Site((f"{path}.{site.name}".removesuffix("."),), site.module, ()))
    return found


def also_held(model: nn.Module) -> dict[int, str]:
    """By id, one such place of every module that has one."""
    return {id(module): path for path, module in hidden(model)}
