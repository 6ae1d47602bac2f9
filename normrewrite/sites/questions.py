"""Questions: what a function's code asks that the class, name or attributes of a norm could be the answer to.

>>> [look.text for look in questions(function)]
['isinstance(self.norm, nn.BatchNorm1d)']

Read is the source, where it is to be had, or else the names that the code holds. What only words an error, a warning or a line of
a log is passed by, and so are annotations.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

from torch import nn

from normrewrite.sites import code
from normrewrite.sites.code import Function
from normrewrite.sites.listings import is_counted, is_innocent

STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked", "track_running_stats"})
_OF_A_NORM = frozenset(dir(nn.BatchNorm1d(1))) | frozenset(dir(nn.GroupNorm(1, 1)))
_OF_ANY = frozenset(dir(nn.Module())) - {"__class__"}
_ASKING = frozenset(
    {
        "vars",
        "__dict__",
        "_buffers",
        "_parameters",
        "isinstance",
        "issubclass",
        "type",
        "__class__",
        "hasattr",
        "getattr",
        "_get_name",
        "str",
        "repr",
    }
)
_SPELT = frozenset({"__name__", "__qualname__", "__module__", "_get_name", "str", "repr"})


@dataclass(frozen=True)
class Look:
    """kind: `instance`, `class`, `name`, `print`, `attribute`, `key`, `write` or `list`; subject: what is asked, None for it
    knows not what; against: the classes, the name of an attribute, of a key of its dictionaries or of a method that lists, or
    the words that a class's name is compared with."""

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


_BUILTIN = {
    each: each.__name__ for each in (isinstance, issubclass, type, hasattr, getattr, setattr, str, repr, format)
}
_LISTS_TENSORS = frozenset({"parameters", "named_parameters", "buffers", "named_buffers", "state_dict"})
_LISTS_MODULES = frozenset({"children", "named_children", "modules", "named_modules"})
_SPEAKS = frozenset(
    {"print", "warn", "warning", "warning_once", "warn_once", "info", "info_once", "debug", "error", "exception"}
)


def _may_ask(function: Function) -> bool:
    names = code.names(function)
    if names & (_ASKING | _LISTS_TENSORS | _LISTS_MODULES | _OF_A_NORM - _OF_ANY) or code.matches_classes(function):
        return True
    if code.formats(function):
        return True
    words = (word.rpartition(".")[2] for word in code.constants(function))
    return any(map(_may_answer, _mentioned(function))) or any(word in STATISTICS for word in words)


def _mentioned(function: Function) -> list[Any]:
    values = [code.named(function.call, name) for name in code.names(function)]
    return [*values, *code.defaults(function.call).values(), *code.classes(function)]


def _may_answer(value: Any) -> bool:
    """Whether it is a module's class, or asks something, under whatever name."""
    if isinstance(value, type) and value not in _BUILTIN:
        return issubclass(value, nn.Module)
    return _builtin(value) is not None or hasattr(value, "registry")


def _builtin(value: Any) -> str | None:
    value = value.func if isinstance(value, partial) else value
    return next((name for each, name in _BUILTIN.items() if each is value), None)


@lru_cache(maxsize=4096)
def questions(function: Function) -> tuple[Look, ...]:
    names = code.names(function)
    if not _may_ask(function):
        return ()
    tree = code.source(function.call)
    if tree is None:
        return tuple(_from_names(function, names))
    visitor = _Visitor(function, tree)
    visitor.visit(tree)
    return tuple(visitor.looks())


def _from_names(function: Function, names: frozenset[str]) -> Iterator[Look]:
    """Without source: every class, word and attribute that the code names, asked of it knows not what."""
    words = tuple(code.constants(function))
    if code.matches_classes(function) or any(map(_may_answer, _mentioned(function))):
        yield Look(function, "instance", None, None, "isinstance(...)")
    if names & {"type", "__class__"}:
        yield Look(function, "class", None, None, "type(...)")
    if names & _SPELT or code.formats(function):
        yield Look(function, "name", None, words, "for a class's name")
    for name in sorted(names & _LISTS_TENSORS if "next" not in names else ()):  # next(self.parameters()).device
        yield Look(function, "list", None, name, f"{name}()")
    for name in sorted((names & STATISTICS) | (set(words) if names & {"hasattr", "getattr"} else set())):
        yield Look(function, "attribute", None, name, f"for .{name}", literal=True)
    for name in sorted({word.rpartition(".")[2] for word in words} & STATISTICS):
        yield Look(function, "key", None, name, f"for .{name}")


class _Visitor(ast.NodeVisitor):
    """Gathers looks; what only words an error is passed by."""

    def __init__(self, function: Function, tree: ast.AST) -> None:
        self.function, self._tree = function, tree
        self._above = {below: node for node in ast.walk(tree) for below in ast.iter_child_nodes(node)}
        self._speaks = False
        self._asked: list[Look] = []
        self._words: list[str] = []
        self._spells = bool(code.names(function) & _SPELT)

    def looks(self) -> Iterator[Look]:
        for look in self._asked:
            yield replace(look, against=tuple(self._words)) if look.kind in ("name", "print") else look

    def _add(
        self,
        kind: str,
        subject: ast.expr | None,
        against: ast.expr | str | None,
        node: ast.expr,
        *,
        literal: bool = False,
    ) -> None:
        text = " ".join(ast.unparse(node).split())
        text = text if len(text) <= 80 else f"{text[:77]}..."
        self._asked.append(Look(self.function, kind, subject, against, text, node.lineno, literal))

    def _add_class(self, subject: ast.expr | None, node: ast.expr) -> None:
        self._add("class", subject, None, node)
        if self._spells:
            self._add("name", subject, None, node)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        for part in () if self._speaks else node.values:
            if isinstance(part, ast.FormattedValue):
                self._add("print", part.value, None, node)
                self.visit(part.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            for part in () if self._speaks else node.right.elts if isinstance(node.right, ast.Tuple) else (node.right,):
                self._add("print", part, None, node)
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        pass  # its annotation

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (node.args, *node.body):
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        for part in filter(None, (node.target, node.value)):
            self.visit(part)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._words.append(node.value)
            if node.value.rpartition(".")[2] in STATISTICS:
                self._add("key", None, node.value.rpartition(".")[2], node)

    def visit_Call(self, node: ast.Call) -> None:
        before, self._speaks = self._speaks, self._speaks or _last(node.func) in _SPEAKS
        for part in self._ask(node):
            self.visit(part)
        self._speaks = before

    def _ask(self, node: ast.Call) -> list[ast.expr]:
        """Adds what a call asks; returns what of it is to be visited."""
        known = _builtin(self._static(node.func))
        if known is not None and known != _last(node.func) and not isinstance(self._static(node.func), type):
            self._add("instance", None, None, node)  # by another name, or in part
        match (known or "", node.args):
            case ("isinstance", [subject, against]):
                self._add("instance", subject, against, node)
                return [subject]
            case ("issubclass", [subject, against]):
                self._add("instance", _typed(subject) or subject, against, node)
                return [subject]
            case ("type", [subject]):
                self._add_class(subject, node)
            case ("str" | "repr" | "format", [subject, *_]):
                self._add("print", subject, None, node)
            case ("hasattr" | "getattr", [subject, ast.Constant(value=str(name)), *others]):
                self._add("attribute", subject, name, node, literal=True)
                return [subject, *others]
            case ("setattr", [subject, ast.Constant(value=str(name)), *others]):
                self._add("write", subject, name, node)
                return [subject, *others]
        match node.func:
            case ast.Attribute(value=holder, attr="get" | "pop") if node.args:
                self._ask_for_key(node, holder, node.args[0])
            case ast.Attribute(value=subject, attr="_get_name"):
                self._add("name", subject, None, node)
            case ast.Attribute(value=ast.Constant(value=str()), attr="format") if not self._speaks:
                for part in node.args:
                    self._add("print", part, None, node)
            case ast.Attribute(value=ast.Attribute(value=subject, attr=name), attr=changed):
                if changed.endswith("_") and not changed.endswith("__"):
                    self._add("write", subject, name, node)
        self._ask_of_class(node)
        self._ask_for_list(node)
        return [node.func, *node.args, *(keyword.value for keyword in node.keywords)]

    def _ask_of_class(self, node: ast.Call) -> None:
        """A function for some classes, a class's own method called by hand, a class that is handed on."""
        if node.args and hasattr(self._static(node.func), "registry"):
            self._add("instance", node.args[0], node.func, node)
        if node.args and isinstance(node.func, ast.Attribute) and self._is_class(node.func.value):
            self._add("instance", node.args[0], node.func.value, node)
        for part in node.args if _last(node.func) not in ("super", "cast") else ():
            if self._is_class(part):
                self._add("instance", None, part, node)

    def _ask_for_list(self, node: ast.Call) -> None:
        if not isinstance(node.func, ast.Attribute):
            return
        subject, name = node.func.value, node.func.attr
        if name in _LISTS_TENSORS and not is_innocent(node, self._above, self._tree):
            self._add("list", subject, name, node)
        if name in _LISTS_MODULES and is_counted(node, self._above):
            self._add("list", subject, name, node, literal=True)

    def visit_Compare(self, node: ast.Compare) -> None:
        parts = [node.left, *node.comparators]
        if not any(_typed(part) for part in parts):
            for part in parts:
                if self._is_class(part):
                    self._add("instance", None, part, node)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if _is_callee(node, self._above) or not isinstance(node.ctx, ast.Load):
            return
        known = _builtin(self._static(node))
        if known in ("isinstance", "issubclass"):
            self._add("instance", None, None, node)
        elif known == "type":
            self._add_class(None, node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._ask_for_key(node, node.value, node.slice)
        self.generic_visit(node)

    def _ask_for_key(self, node: ast.expr, holder: ast.expr, key: ast.expr) -> None:
        owner = _holder(holder)
        if owner is not None and isinstance(key, ast.Constant) and isinstance(key.value, str):
            self._add("key", owner, key.value, node)

    def _is_class(self, node: ast.expr) -> bool:
        value = self._static(node)
        return isinstance(value, type) and issubclass(value, nn.Module) and value is not nn.Module

    def _static(self, node: ast.expr) -> Any:
        """What a name stands for that is not set in the function, or one of a Python module."""
        call = self.function.call
        match node:
            case ast.Name(id=name) if name in call.__code__.co_varnames:
                return code.defaults(call).get(name)
            case ast.Name(id=name):
                return code.named(call, name)
            case ast.Attribute(value=owner, attr=name):
                container = self._static(owner)
                return vars(container).get(name) if isinstance(container, ModuleType) else None
        return None

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


def _last(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _is_callee(node: ast.expr, above: dict[ast.AST, ast.AST]) -> bool:
    call = above.get(node)
    return isinstance(call, ast.Call) and call.func is node


def _holder(node: ast.expr) -> ast.expr | None:
    """x, of vars(x), x.__dict__, x._buffers and x.state_dict()."""
    match node:
        case ast.Call(func=ast.Name(id="vars"), args=[inner]):
            return inner
        case ast.Attribute(value=inner, attr="__dict__" | "_buffers" | "_parameters"):
            return inner
        case ast.Call(func=ast.Attribute(value=inner, attr="state_dict")):
            return inner
    return None
