"""Looks: places in a network's code that ask what a norm is, and that a rewritten one would answer otherwise.

>>> print(found(model, sites, renewed)["block.norm"])
Block.forward (net.py:12) asks isinstance(self.norm, nn.BatchNorm1d)

Asked may be a class (isinstance, type, a match), the name of a class, or an attribute, there or not, read or written. What
counts is the answer: where old and new give the same, the code may ask. A subject that can't be told from the code may be any
site inside the module that runs it.
"""

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from normrewrite.sites import Site, code
from normrewrite.sites.code import Function
from normrewrite.sites.expressions import Frame

_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked", "track_running_stats"})
_OF_A_NORM = frozenset(dir(nn.BatchNorm1d(1))) | frozenset(dir(nn.GroupNorm(1, 1)))
_OF_ANY = frozenset(dir(nn.Module())) - {"__class__"}
_ASKING = frozenset({"isinstance", "issubclass", "type", "__class__", "hasattr", "getattr", "_get_name", "str", "repr"})
_SPELT = frozenset({"__name__", "__qualname__", "__module__", "_get_name", "str", "repr"})


@dataclass(frozen=True)
class Renewed:
    """What takes a site's place, and whether it is to be the same function in eval."""

    module: nn.Module
    exact: bool


@dataclass(frozen=True)
class Look:
    """kind: `instance`, `class`, `name`, `print`, `attribute` or `write`; subject: what is asked; against: the classes, an
    attribute's name, or the words that a class's name is compared with."""

    function: Function
    kind: str
    subject: ast.expr | None
    against: ast.expr | str | tuple[str, ...] | None
    text: str
    line: int = 1
    literal: bool = False  # the attribute is asked for by hasattr or getattr, which raise nothing where it is missing

    @property
    def by_class(self) -> bool:
        return self.kind in ("instance", "class", "name")

    def __str__(self) -> str:
        return f"{self.function.where(self.line)} {'sets' if self.kind == 'write' else 'asks'} {self.text}"


def found(
    model: nn.Module, sites: Sequence[Site], renewed: Callable[[Site, bool], Renewed], apart: Sequence[nn.Module] = ()
) -> dict[str, Look]:
    """By site, the first look at it whose answer the rewrite changes. renewed: what takes a site's place, or, where a class is
    all that counts, the place of one like it; apart: modules whose own code won't run any more, as the sites' won't."""
    running = code.running(model)
    silent = {id(module) for module in [*apart, *(site.module for site in sites)]}
    first: dict[str, Look] = {}
    for module in model.modules():
        own = set() if id(module) in silent else set(running.of(module))
        for look, frame in _looks(module, own | {*code.hooks(module)}):
            subjects = frame.values(look.subject)
            known = subjects is not None
            if not _may_matter(look, frame, known):
                continue
            asked = {id(value) for value in (module.modules() if subjects is None else subjects)}
            for site in sites:
                if id(site.module) not in asked or site.name in first:
                    continue
                had = known or look.kind != "attribute" or hasattr(site.module, str(look.against))
                if had and _differs(look, frame, site.module, renewed(site, look.by_class), known=known):
                    first[site.name] = look
    return first


def _may_ask(function: Function) -> bool:
    return bool(code.names(function) & (_ASKING | _OF_A_NORM - _OF_ANY)) or code.matches_classes(function)


def _looks(module: nn.Module, functions: Iterable[Function]) -> Iterator[tuple[Look, Frame]]:
    if not isinstance(module, GraphModule):
        for function in sorted(functions, key=lambda each: each.where()):
            looks = _in_function(function)
            frame = Frame(function, module) if looks else None
            for look in looks:
                assert frame is not None
                yield look, frame


@lru_cache(maxsize=4096)
def _in_function(function: Function) -> tuple[Look, ...]:
    names = code.names(function)
    if not _may_ask(function):
        return ()
    tree = code.source(function.call)
    if tree is None:
        return tuple(_from_names(function, names))
    visitor = _Visitor(function)
    visitor.visit(tree)
    return tuple(visitor.looks())


def _from_names(function: Function, names: frozenset[str]) -> Iterator[Look]:
    """Without source: every class, word and attribute that the code names, asked of it knows not what."""
    words = tuple(code.constants(function))
    if names & {"isinstance", "issubclass"} or code.matches_classes(function):
        yield Look(function, "instance", None, None, "isinstance(...)")
    if names & {"type", "__class__"}:
        yield Look(function, "class", None, None, "type(...)")
    if names & _SPELT:
        yield Look(function, "name", None, words, "for a class's name")
    for name in sorted((names & _STATISTICS) | (set(words) if names & {"hasattr", "getattr"} else set())):
        yield Look(function, "attribute", None, name, f"for .{name}", literal=True)


class _Visitor(ast.NodeVisitor):
    """Gathers looks; what only words an error is passed by."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self._found: list[Look] = []
        self._words: list[str] = []
        self._spells = bool(code.names(function) & _SPELT)

    def looks(self) -> Iterator[Look]:
        for look in self._found:
            yield replace(look, against=tuple(self._words)) if look.kind in ("name", "print") else look

    def _add(
        self, kind: str, subject: ast.expr, against: ast.expr | str | None, node: ast.expr, *, literal: bool = False
    ) -> None:
        text = " ".join(ast.unparse(node).split())
        text = text if len(text) <= 80 else f"{text[:77]}..."
        self._found.append(Look(self.function, kind, subject, against, text, node.lineno, literal))

    def _add_class(self, subject: ast.expr, node: ast.expr) -> None:
        self._add("class", subject, None, node)
        if self._spells:
            self._add("name", subject, None, node)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._words.append(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Name(id="isinstance"), args=[subject, against]):
                self._add("instance", subject, against, node)
            case ast.Call(func=ast.Name(id="issubclass"), args=[subject, against]):
                self._add("instance", _typed(subject) or subject, against, node)
            case ast.Call(func=ast.Name(id="type"), args=[subject]):
                self._add_class(subject, node)
            case ast.Call(func=ast.Name(id="str" | "repr"), args=[subject]):
                self._add("print", subject, None, node)
            case ast.Call(func=ast.Attribute(value=subject, attr="_get_name")):
                self._add("name", subject, None, node)
            case ast.Call(func=ast.Name(id="hasattr" | "getattr"), args=[subject, ast.Constant(value=str(name)), *_]):
                self._add("attribute", subject, name, node, literal=True)
            case ast.Call(func=ast.Name(id="setattr"), args=[subject, ast.Constant(value=str(name)), *_]):
                self._add("write", subject, name, node)
            case ast.Call(func=ast.Attribute(value=ast.Attribute(value=subject, attr=name), attr=changed)):
                if changed.endswith("_") and not changed.endswith("__"):
                    self._add("write", subject, name, node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "__class__":
            self._add_class(node.value, node)
        elif node.attr not in _OF_ANY and not self._is_no_module(node.value):
            self._add("attribute" if isinstance(node.ctx, ast.Load) else "write", node.value, node.attr, node)
        self.generic_visit(node)

    def _is_no_module(self, node: ast.expr) -> bool:
        """The module that runs the code, which is no site, or a Python module's name."""
        if not isinstance(node, ast.Name):
            return False
        return node.id == self.function.receiver or isinstance(code.named(self.function.call, node.id), ModuleType)

    def visit_Match(self, node: ast.Match) -> None:
        for case in node.cases:
            for pattern in ast.walk(case.pattern):
                if isinstance(pattern, ast.MatchClass):
                    self._add("instance", node.subject, pattern.cls, node.subject)
        self.generic_visit(node)


def _typed(subject: ast.expr) -> ast.expr | None:
    """x, of type(x) and x.__class__."""
    match subject:
        case ast.Call(func=ast.Name(id="type"), args=[inner]) | ast.Attribute(value=inner, attr="__class__"):
            return inner
    return None


# --- answers ---------------------------------------------------------------------------------------------------------


def _may_matter(look: Look, frame: Frame, known: bool) -> bool:
    """Whether any norm could answer it in two ways: most of what code asks, it asks of other things."""
    if look.kind in ("instance", "class"):
        classes = _asked(look, frame) or code.classes(look.function)
        return any(issubclass(cls, nn.Module) and cls is not nn.Module for cls in classes)
    if look.kind == "attribute":
        return known or look.against in _STATISTICS or look.literal
    return known or look.kind == "name"  # anything may be printed or written to


def _asked(look: Look, frame: Frame) -> tuple[type, ...] | None:
    """The classes of an isinstance; None where they can't be told, or it is asked by `type`."""
    given = frame.values(look.against) if isinstance(look.against, ast.expr) else None
    return None if given is None else tuple(code.flat(given))


def _differs(look: Look, frame: Frame, old: nn.Module, new: Renewed, *, known: bool) -> bool:
    """Whether old and new answer otherwise. known: whether it is sure that this module is asked."""
    pair = old, new.module
    if look.kind in ("instance", "class"):
        asked = _asked(look, frame)
        ways = [asked] if asked is not None else [(cls,) for cls in code.classes(look.function)]
        if look.kind == "class":
            return any(len({type(each) in way for each in pair}) > 1 for way in ways)
        return any(len({isinstance(each, way) for each in pair}) > 1 for way in ways)
    if isinstance(look.against, tuple):
        names = [str(each) if look.kind == "print" else type(each).__name__ for each in pair]
        return any(len({_spelt(name, word) for name in names}) > 1 for word in look.against)
    return _attribute_differs(look, str(look.against), old, new, known=known)


def _spelt(name: str, word: str) -> tuple[bool, ...]:
    """What a word and a name have to do with each other."""
    ways = (name, name.lower()) if len(word) > 1 else ()
    return tuple(a for way in ways for a in (word in way, word == way, way.startswith(word), way.endswith(word)))


def _attribute_differs(look: Look, name: str, old: Any, new: Renewed, *, known: bool) -> bool:
    here, there = hasattr(old, name), hasattr(new.module, name)
    if not known:  # anything has attributes, so what counts is one that is lost
        return here and not there
    if not here or not there:
        return here != there
    if look.kind == "write":
        return _stored(old, name) and not _stored(new.module, name)
    return new.exact and not _same(getattr(old, name), getattr(new.module, name))


def _stored(module: nn.Module, name: str) -> bool:
    return any(name in holder for holder in (module._parameters, module._buffers, vars(module)))


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and (
            old.is_meta or bool(torch.allclose(old.float(), new.float(), 1e-3, 1e-6, True))
        )
    if isinstance(old, bool | int | float | str | None) or isinstance(new, bool | int | float | str | None):
        return bool(old == new)
    return isinstance(old, Tensor) == isinstance(new, Tensor)
