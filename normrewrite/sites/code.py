"""What runs when a network runs: the functions that forward leads to, and what an expression in them stands for.

>>> running(model).by_class[Block]          # forward, the methods it calls, and the helpers that those call
>>> Frame(function, block).values(ast.parse("self.norm", mode="eval").body)
[BatchNorm2d(64)]

Nothing is run. Code of torch, of the standard library and of normrewrite is taken as known; a constructor and what only it calls
is no part of what runs. Functions are found by the names that their code objects hold, so that most are never parsed.
"""

import ast
import builtins
import dis
import functools
import inspect
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType, MethodType, ModuleType, UnionType
from typing import Any

from torch import nn
from torch.fx import GraphModule

from normrewrite.nn.parts import attributes

_KNOWN = frozenset(sys.stdlib_module_names) | {"torch", "normrewrite", "numpy"}
ENTRIES = frozenset({"forward", "__call__"})
_APART = frozenset({"__init__", "train", "eval"})  # training flags are compared by themselves


@dataclass(frozen=True)
class Function:
    """A Python function, and the name that its module goes by in it; empty where no argument is known to be that."""

    call: FunctionType
    receiver: str

    def where(self, line: int = 1) -> str:
        """`Block.forward (net.py:12)`, for people."""
        code = self.call.__code__
        name = self.call.__qualname__.rpartition("<locals>.")[2]
        return f"{name} ({code.co_filename.replace(chr(92), '/').rpartition('/')[2]}:{code.co_firstlineno + line - 1})"


@dataclass(frozen=True)
class Running:
    """by_class: what runs of each class's code; names: every name of a variable or attribute in it."""

    by_class: Mapping[type[nn.Module], frozenset[Function]]
    names: frozenset[str]

    def of(self, module: nn.Module) -> Iterator[Function]:
        """What runs of a module's code: its class's, and the functions it holds whose names are read."""
        yield from self.by_class.get(type(module), ())
        for name, value in attributes(module).items():
            if name in self.names:
                yield from _as_function(value, receives=False)


def running(model: nn.Module, entries: frozenset[str] = ENTRIES) -> Running:
    """What runs when a network runs; a method counts that any code which runs names, whatever object it names it of."""
    classes: set[Any] = {type(module) for module in model.modules() if not isinstance(module, GraphModule)}
    classes = {cls for cls in classes if _methods(cls)}
    names = entries
    while True:
        found = {cls: _reached(cls, names.intersection(_methods(cls))) for cls in classes}
        every = names.union(*(_names(each.call.__code__) for functions in found.values() for each in functions))
        if every - _APART <= names:
            return Running(found, names)
        names |= every - _APART


def hooks(module: nn.Module) -> Iterator[Function]:
    """The hooks around a module's forward, which a twin gets too."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        yield from _as_function(hook, receives=True)


def _as_function(value: Any, *, receives: bool) -> Iterator[Function]:
    call = _function(value)
    if call is not None and _is_open(call):
        arguments = call.__code__.co_varnames[isinstance(value, MethodType) : call.__code__.co_argcount]
        yield Function(call, arguments[0] if receives and arguments else "")


def _is_open(thing: Any) -> bool:
    """Whether the code of a class or function may do anything: it is a user's, or a library's."""
    return (getattr(thing, "__module__", None) or "torch").partition(".")[0] not in _KNOWN


@lru_cache(maxsize=4096)
def _methods(cls: Any) -> Mapping[str, tuple[Function, ...]]:
    """By name, every definition of a method that the class or an open base of it has, the first of them first."""
    found: dict[str, tuple[Function, ...]] = {}
    for base in filter(_is_open, cls.__mro__):
        for name, value in vars(base).items():
            call = _function(value)
            if call is not None:
                given = call.__code__.co_varnames[: call.__code__.co_argcount]
                receiver = "" if isinstance(value, staticmethod | classmethod) or not given else given[0]
                found[name] = (*found.get(name, ()), Function(call, receiver))
    return found


def _function(value: Any) -> FunctionType | None:
    """The Python function behind a method of any kind, a property, a partial or a decorator that tells what it wraps."""
    match value:
        case property(fget=inner) | functools.partial(func=inner) | functools.cached_property(func=inner):
            return _function(inner)
        case staticmethod() | classmethod() | MethodType():
            return _function(value.__func__)
        case FunctionType():
            inner = inspect.unwrap(value)
            return inner if isinstance(inner, FunctionType) else value
    inner = getattr(value, "__wrapped__", None) if callable(value) and not isinstance(value, type) else None
    return inner if isinstance(inner, FunctionType) else None


def _reached(cls: type, entries: Iterable[str]) -> frozenset[Function]:
    own = _methods(cls)
    todo = [function for name in entries for function in own[name]]
    found = set(todo)
    while todo:
        function = todo.pop()
        called = [each for name in _names(function.call.__code__) - _APART for each in own.get(name, ())]
        new = {*called, *_helpers(function.call)} - found
        found |= new
        todo += new
    return frozenset(found)


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """Every name that the code and the functions inside it read, of variables and of attributes alike."""
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    cells = {*code.co_freevars} - {"__class__"}  # super()'s
    return frozenset({*code.co_names, *cells}).union(*inner)


@lru_cache(maxsize=4096)
def _helpers(call: FunctionType) -> tuple[Function, ...]:
    """The functions that the code names, alone or of a module that it names."""
    names = _names(call.__code__)
    found = [named(call, name) for name in names]
    others = [each for each in found if isinstance(each, ModuleType) and each.__name__.partition(".")[0] not in _KNOWN]
    found += [vars(other).get(name) for other in others for name in names]
    calls = [_function(each) for each in found]
    return tuple(Function(each, "") for each in calls if each is not None and _is_open(each))


_NOTHING = object()


def named(call: FunctionType, name: str) -> Any:
    """What a free name of the function stands for; a value that nobody has where it can't be told."""
    cells = dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=True))
    if name in cells:
        try:
            return cells[name].cell_contents
        except ValueError:  # not filled yet
            return _NOTHING
    return call.__globals__.get(name, vars(builtins).get(name, _NOTHING))


def names(function: Function) -> frozenset[str]:
    return _names(function.call.__code__)


@lru_cache(maxsize=4096)
def classes(function: Function) -> frozenset[type]:
    """Every class that the code names, alone, of a module that it names, or in a table that it names."""
    free = _names(function.call.__code__)
    values = [named(function.call, name) for name in free]
    others = [vars(value) for value in values if isinstance(value, ModuleType)]
    values += [other[name] for other in others for name in free if name in other]
    return frozenset(flat(values))


def flat(values: Iterable[Any]) -> Iterator[type]:
    """The classes among values, and in tables and unions of them."""
    for value in values:
        if isinstance(value, type):
            yield value
        elif isinstance(value, dict | list | tuple | set | frozenset):
            yield from flat(list(value))
        elif isinstance(value, UnionType):
            yield from flat(value.__args__)


@lru_cache(maxsize=4096)
def _matches(code: CodeType) -> bool:
    inner = any(_matches(each) for each in code.co_consts if isinstance(each, CodeType))
    return inner or dis.opmap["MATCH_CLASS"] in code.co_code[::2]


def matches_classes(function: Function) -> bool:
    """Whether the code holds a match on classes."""
    return _matches(function.call.__code__)


def constants(function: Function) -> frozenset[str]:
    """Every string in the code, for functions whose source is not to be had."""
    return frozenset(_strings(function.call.__code__.co_consts))


def _strings(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple | frozenset):
            yield from _strings(value)
        elif isinstance(value, CodeType):
            yield from _strings(value.co_consts)


@lru_cache(maxsize=4096)
def source(call: FunctionType) -> ast.Module | None:
    """The function's source, parsed; None where it is not to be had, or was edited since it was imported."""
    try:
        text = textwrap.dedent(inspect.getsource(call))
        return ast.parse(text) if _is_of(text, call.__code__) else None
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return None


def _is_of(text: str, code: CodeType) -> bool:
    """Whether a text has every name of the code; a private one is written without its class, and pytest adds to an assert."""
    head = "lambda" if code.co_name == "<lambda>" else f"def {code.co_name}"
    names = _names(code)
    added = any(name.startswith("@py") for name in names)
    return head in text and (added or all(name in text or name.rpartition("__")[2] in text for name in names))


# --- expressions -----------------------------------------------------------------------------------------------------

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
                found = _joined(self._values(part, open_) for part in parts)
                return None if found is None else [found]
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
        return None if value is _NOTHING else [value]


def _each(owners: list[Any] | None, of: Any) -> list[Any] | None:
    return None if owners is None else _joined(of(owner) for owner in owners)


def _joined(parts: Iterable[list[Any] | None]) -> list[Any] | None:
    found: list[Any] = []
    for part in parts:
        if part is None:
            return None
        found += part
    return found


def _held(owner: Any, name: str) -> list[Any] | None:
    """An attribute of a module, a class or a namespace, without running code."""
    if isinstance(owner, nn.Module):
        for holder in (owner._modules, owner._parameters, owner._buffers, vars(owner)):
            if name in holder:
                return [holder[name]]
    if isinstance(owner, ModuleType | type):
        value = inspect.getattr_static(owner, name, _NOTHING)
        if value is _NOTHING and isinstance(owner, ModuleType):  # one that imports on first use
            value = getattr(owner, name, _NOTHING)
        return None if value is _NOTHING or isinstance(value, property) else [value]
    value = inspect.getattr_static(type(owner), name, _NOTHING)
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
    found: dict[str, list[tuple[ast.expr | None, bool]]] = {}

    def bind(target: ast.expr, value: ast.expr | None, within: bool) -> None:
        for part in ast.walk(target):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                plain = target is part or within
                found.setdefault(part.id, []).append((value if plain else None, within))

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
    return found
