"""What an expression in a function may stand for, at a module that runs it. Nothing is run.

>>> Frame(function, block).values(ast.parse("self.norm", mode="eval").body)
[BatchNorm2d(64)]
"""

import ast
import inspect
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from normrewrite.sites.code import NOTHING, Function, named, source

_LISTS = frozenset({"enumerate", "zip", "reversed", "list", "tuple", "iter", "sorted"})
_BELOW = {"modules": True, "named_modules": True, "children": False, "named_children": False}
_HELD = frozenset({"values", "items"})


class Frame:
    """A function at one module: what its expressions may stand for there."""

    def __init__(self, function: Function, module: nn.Module) -> None:
        self.function, self.module = function, module
        self._bound = _bindings(function.call)

    def values(self, expression: ast.expr | None) -> list[Any] | None:
        """Every object that the expression may be, or None where that can't be told."""
        return self._values(expression, frozenset())

    def _values(self, expression: ast.expr | None, open_: frozenset[str]) -> list[Any] | None:
        match expression:
            case ast.Constant(value=value):
                return [value]
            case ast.Name(id=name):
                return self._name(name, open_)
            case ast.Attribute(value=owner, attr=name):
                return _each(self._values(owner, open_), lambda value: _held(value, name))
            case ast.Subscript(value=owner):
                return _each(self._values(owner, open_), _elements)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                alternatives = _joined(self._values(part, open_) for part in parts)
                return None if alternatives is None else [alternatives]
            case ast.BinOp(left=left, op=ast.BitOr() | ast.Add(), right=right):
                return _joined((self._values(left, open_), self._values(right, open_)))
            case ast.IfExp(body=left, orelse=right):
                return _joined((self._values(left, open_), self._values(right, open_)))
            case ast.NamedExpr(value=value):
                return self._values(value, open_)
            case ast.Call(func=ast.Name(id=name), args=parts) if name in _LISTS:
                return _joined(self._values(part, open_) for part in parts)
            case ast.Call(func=ast.Attribute(value=owner, attr=name), args=[]) if name in _BELOW:
                return _each(self._values(owner, open_), lambda value: _below(value, deep=_BELOW[name]))
            case ast.Call(func=ast.Attribute(value=owner, attr=name), args=[]) if name in _HELD:
                return self._values(owner, open_)
        return None

    def _name(self, name: str, open_: frozenset[str]) -> list[Any] | None:
        if name == self.function.receiver and name not in self._bound:
            return [self.module]
        if name in self._bound:
            if name in open_:  # x = x.norm
                return None
            return _joined(
                _each(self._values(value, open_ | {name}), _elements) if within else self._values(value, open_ | {name})
                for value, within in self._bound[name]
            )
        if name in self.function.call.__code__.co_varnames:
            return None
        value = named(self.function.call, name)
        return None if value is NOTHING else [value]


def _each(owners: list[Any] | None, of: Any) -> list[Any] | None:
    return None if owners is None else _joined(of(owner) for owner in owners)


def _joined(parts: Iterable[list[Any] | None]) -> list[Any] | None:
    alternatives: list[Any] = []
    for part in parts:
        if part is None:
            return None
        alternatives += part
    return alternatives


def _held(owner: Any, name: str) -> list[Any] | None:
    """An attribute of a module, a class or a namespace, without running code."""
    if isinstance(owner, nn.Module):
        for holder in (owner._modules, owner._parameters, owner._buffers, vars(owner)):
            if name in holder:
                return [holder[name]]
    if isinstance(owner, ModuleType | type):
        value = inspect.getattr_static(owner, name, NOTHING)
        if value is NOTHING and isinstance(owner, ModuleType):  # one that imports on first use
            value = getattr(owner, name, NOTHING)
        return None if value is NOTHING or isinstance(value, property) else [value]
    value = inspect.getattr_static(type(owner), name, NOTHING)
    return [value] if isinstance(value, type | tuple) else None


def _elements(owner: Any) -> list[Any] | None:
    """What iterating or subscripting the object may give."""
    if isinstance(owner, nn.Module):
        return list(owner._modules.values())
    if isinstance(owner, Mapping):
        return list(owner.values())
    return list(owner) if isinstance(owner, list | tuple | set | frozenset) else None


def _below(owner: Any, *, deep: bool) -> list[Any] | None:
    if not isinstance(owner, nn.Module):
        return None
    return [list(owner.modules() if deep else owner.children())]  # one list, whose elements a loop takes


@lru_cache(maxsize=4096)
def _bindings(call: FunctionType) -> dict[str, list[tuple[ast.expr | None, bool]]]:
    """By local variable, what it is set to, and whether it takes the elements of that."""
    bindings: dict[str, list[tuple[ast.expr | None, bool]]] = {}

    def bind(target: ast.expr, value: ast.expr | None, within: bool) -> None:
        for part in ast.walk(target):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                plain = target is part or within
                bindings.setdefault(part.id, []).append((value if plain else None, within))

    tree = source(call)
    for node in () if tree is None else ast.walk(tree):
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    bind(target, value, within=False)
            case ast.AnnAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value):
                bind(target, value, within=False)
            case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                bind(target, value, within=True)
            case ast.AugAssign(target=target):
                bind(target, None, within=False)
            case ast.withitem(optional_vars=ast.expr() as target):
                bind(target, None, within=False)
    return bindings
