"""What runs when a network runs: the functions that forward leads to.

>>> running(model).by_class[Block]          # forward, the methods it calls, and the helpers that those call

Nothing is run. Code of torch, of the standard library and of normrewrite is taken as known; a constructor and what only it calls
is no part of what runs. Followed are functions that code names, alone or of a module, in a table, as a default, and as methods of
plain objects and classes. Functions are found by the names that their code objects hold, so that most are never parsed.
"""

import ast
import builtins
import copy
import dis
import functools
import inspect
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
from normrewrite.sites.known import is_known

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
    """by_class: what runs of each class's code; held: by module's id, the same of the functions and objects that it holds."""

    by_class: Mapping[type[nn.Module], frozenset[Function]]
    held: Mapping[int, frozenset[Function]]

    def of(self, module: nn.Module) -> frozenset[Function]:
        """What runs of a module's code: its class's, and that of the functions and objects it holds whose names are read."""
        return self.by_class.get(type(module), frozenset()) | self.held.get(id(module), frozenset())


def running(model: nn.Module) -> Running:
    """What runs when a network runs; a method counts that any code which runs names, whatever object it names it of."""
    modules = [module for module in model.modules() if not isinstance(module, GraphModule)]
    every_class: set[Any] = {type(module) for module in modules}
    classes = {cls for cls in every_class if _methods(cls)}
    values = {(name, id(value)): value for module in modules for name, value in attributes(module).items()}
    carried = {key: parts for key, value in values.items() if (parts := tuple(_carried(value)))}
    names = ENTRIES
    while True:
        by_class = {cls: _reached(_methods(cls), names) for cls in classes}
        held = {key: _followed(_called(each, names), {}) for key, each in carried.items() if key[0] in names}
        functions = frozenset().union(*by_class.values(), *held.values())
        every = names.union(*(_names(each.call.__code__) for each in functions)) - _APART
        if every <= names:
            return Running(by_class, _by_module(modules, held))
        names |= every


def _by_module(
    modules: Iterable[nn.Module], held: Mapping[tuple[str, int], frozenset[Function]]
) -> dict[int, frozenset[Function]]:
    by_module = {}
    for module in modules if held else ():
        keys = [(name, id(value)) for name, value in attributes(module).items()]
        by_module[id(module)] = frozenset().union(*(held[key] for key in keys if key in held))
    return by_module


def hooks(module: nn.Module) -> Iterator[Function]:
    """The hooks around a module's forward, which a twin gets too."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        yield from _as_function(hook, receives=True)


def _as_function(value: Any, *, receives: bool) -> Iterator[Function]:
    call = _function(value)
    if call is not None and not is_known(call):
        arguments = call.__code__.co_varnames[isinstance(value, MethodType) : call.__code__.co_argcount]
        yield Function(call, arguments[0] if receives and arguments else "")


_TABLES = (dict, list, tuple, set, frozenset)
_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})


def _carried(value: Any, depth: int = 2) -> Iterator[tuple[str, Function]]:
    """The functions that a value is or holds, in a table or as methods of a plain object or class: each by the name that it is
    called by, `__call__` where it needs none."""
    if type(value) in _PLAIN or isinstance(value, nn.Module | ModuleType):
        return
    registered = getattr(value, "registry", None) if isinstance(value, FunctionType) else None  # of singledispatch
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, _TABLES) else ()
    for each in (*inside, *(registered.values() if isinstance(registered, Mapping) else ())) if depth else ():
        yield from _carried(each, depth - 1)
    if _function(value) is not None:
        yield from (("__call__", function) for function in _as_function(value, receives=False))
        return
    cls: Any = value if isinstance(value, type) else type(value)
    for name, functions in {} if issubclass(cls, nn.Module) else _methods(cls).items():
        yield from ((name, Function(each.call, "")) for each in functions)


def _called(carried: Iterable[tuple[str, Function]], names: frozenset[str]) -> set[Function]:
    wanted = (names | {"__call__"}) - _APART
    return {function for name, function in carried if name in wanted}


@lru_cache(maxsize=4096)
def _methods(cls: Any) -> Mapping[str, tuple[Function, ...]]:
    """By name, every definition of a method that the class or a base of it has in code that is not known, the first first."""
    methods: dict[str, tuple[Function, ...]] = {}
    for base in cls.__mro__:
        for name, value in vars(base).items():
            call = _function(value)
            if call is not None and not is_known(call):
                arguments = call.__code__.co_varnames[: call.__code__.co_argcount]
                receiver = "" if isinstance(value, staticmethod | classmethod) or not arguments else arguments[0]
                methods[name] = (*methods.get(name, ()), Function(call, receiver))
    return methods


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


def _reached(own: Mapping[str, tuple[Function, ...]], entries: frozenset[str]) -> frozenset[Function]:
    return _followed({function for name in entries & own.keys() for function in own[name]}, own)


def _followed(start: set[Function], own: Mapping[str, tuple[Function, ...]]) -> frozenset[Function]:
    """These, and what they lead to: own methods, and helpers."""
    todo, reached = list(start), set(start)
    while todo:
        function = todo.pop()
        called = [each for name in _names(function.call.__code__) - _APART for each in own.get(name, ())]
        new = {*called, *_helpers(function.call)} - reached
        reached |= new
        todo += new
    return frozenset(reached)


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """Every name that the code and the functions inside it read, of variables and of attributes alike."""
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    cells = {*code.co_freevars} - {"__class__"}  # super()'s
    return frozenset({*code.co_names, *cells}).union(*inner)


@lru_cache(maxsize=4096)
def _helpers(call: FunctionType) -> frozenset[Function]:
    """The functions that the code names, alone or of a module that it names, and what of objects and tables that it names."""
    names = _names(call.__code__)
    candidates = [named(call, name) for name in names] + [*defaults(call).values()]
    others = [each for each in candidates if isinstance(each, ModuleType)]
    candidates += [vars(other).get(name) for other in others for name in names]
    return frozenset(function for each in candidates for function in _called(_carried(each), names))


NOTHING = object()


def named(call: FunctionType, name: str) -> Any:
    """What a free name of the function stands for; a value that nobody has where it can't be told."""
    cells = dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=True))
    if name in cells:
        try:
            return cells[name].cell_contents
        except ValueError:  # not filled yet
            return NOTHING
    return call.__globals__.get(name, vars(builtins).get(name, NOTHING))


def defaults(call: FunctionType) -> dict[str, Any]:
    """What arguments stand for where they are not given."""
    arguments, values = call.__code__.co_varnames[: call.__code__.co_argcount], call.__defaults__ or ()
    return dict(zip(arguments[len(arguments) - len(values) :], values, strict=True)) | (call.__kwdefaults__ or {})


def names(function: Function) -> frozenset[str]:
    return _names(function.call.__code__)


@lru_cache(maxsize=4096)
def classes(function: Function) -> frozenset[type]:
    """Every class that the code names, alone, of a module that it names, in a table that it names, or by a word."""
    free = _names(function.call.__code__)
    values = [named(function.call, name) for name in free] + [*defaults(function.call).values()]
    others = [vars(value) for value in values if isinstance(value, ModuleType)]
    values += [other[name] for other in others for name in free | constants(function) if name in other]
    return frozenset(flat(values))


def flat(values: Iterable[Any]) -> Iterator[type]:
    """The classes among values, in tables and unions of them, and those that a function of singledispatch is there for."""
    for value in values:
        if isinstance(value, type):
            yield value
        elif isinstance(value, _TABLES):
            yield from flat([*value, *(value.values() if isinstance(value, dict) else ())])
        elif isinstance(value, UnionType):
            yield from flat(value.__args__)
        elif isinstance(value, FunctionType) and isinstance(getattr(value, "registry", None), Mapping):
            yield from flat(cls for cls in value.registry if cls is not object)  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _has(code: CodeType, operations: frozenset[int]) -> bool:
    inner = any(_has(each, operations) for each in code.co_consts if isinstance(each, CodeType))
    return inner or not operations.isdisjoint(code.co_code[::2])


_MATCH = frozenset({dis.opmap["MATCH_CLASS"]})
_FORMAT = frozenset(number for name, number in dis.opmap.items() if name.startswith("FORMAT_"))  # by Python's version


def matches_classes(function: Function) -> bool:
    """Whether the code holds a match on classes."""
    return _has(function.call.__code__, _MATCH)


def formats(function: Function) -> bool:
    """Whether the code makes text of values, in an f-string or by `%`."""
    return _has(function.call.__code__, _FORMAT) or any("%" in word for word in constants(function))


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
    except SyntaxError:
        return _part_of_a_line(call)
    except (OSError, TypeError, tokenize.TokenError):
        return None


def _part_of_a_line(call: FunctionType) -> ast.Module | None:
    """A lambda whose lines are no statement, where it is the only one that begins there."""
    try:
        tree, first = _parsed("".join(inspect.findsource(call)[0])), call.__code__.co_firstlineno
    except (OSError, SyntaxError):
        return None
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda) and node.lineno == first]
    if len(lambdas) != 1 or not _is_of(ast.unparse(lambdas[0]), call.__code__):
        return None
    alone = ast.Module([ast.Expr(copy.deepcopy(lambdas[0]))], [])
    ast.increment_lineno(alone, 1 - first)
    return alone


_parsed = lru_cache(maxsize=8)(ast.parse)


def _is_of(text: str, code: CodeType) -> bool:
    """Whether a text has every name of the code; a private one is written without its class, and pytest adds to an assert."""
    head = "lambda" if code.co_name == "<lambda>" else f"def {code.co_name}"
    names = _names(code)
    added = any(name.startswith("@py") for name in names)
    return head in text and (added or all(name in text or name.rpartition("__")[2] in text for name in names))
