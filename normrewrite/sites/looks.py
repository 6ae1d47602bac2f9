"""Looks: places in a network's code that ask what a norm is, and that a rewritten one would answer otherwise.

>>> print(first_looks(model, sites, renewed)["block.norm"])
Block.forward (net.py:12) asks isinstance(self.norm, nn.BatchNorm1d)

Asked may be a class (isinstance, type, a match), the name of a class, or an attribute, there or not, read or written. What
counts is the answer: where old and new give the same, the code may ask. A subject that can't be told from the code may be any
site inside the module that runs it.
"""

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from normrewrite.sites import Site, code
from normrewrite.sites.code import Function
from normrewrite.sites.expressions import Frame
from normrewrite.sites.questions import STATISTICS, Look, questions


@dataclass(frozen=True)
class Renewed:
    """What takes a site's place, and whether it is to be the same function in eval."""

    module: nn.Module
    exact: bool


def first_looks(
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
            asked = _asked_of(look, module, subjects)
            for site in sites:
                changed = look.kind == "list" and site.before is not None and id(site.before.module) in asked
                if site.name in first or not (changed or id(site.module) in asked):
                    continue
                if changed:
                    first[site.name] = look
                    continue
                relevant = known or look.kind not in ("attribute", "key") or hasattr(site.module, str(look.against))
                if relevant and _differs(look, frame, site.module, renewed(site, look.by_class), known=known):
                    first[site.name] = look
    return first


def _asked_of(look: Look, module: nn.Module, subjects: Sequence[Any] | None) -> set[int]:
    values = [module] if subjects is None else subjects
    deep = subjects is None or (look.kind == "list" and "children" not in str(look.against))
    return {
        id(each) for value in values for each in (value.modules() if deep and isinstance(value, nn.Module) else [value])
    }


def _looks(module: nn.Module, functions: Iterable[Function]) -> Iterator[tuple[Look, Frame]]:
    if not isinstance(module, GraphModule):
        for function in sorted(functions, key=lambda each: each.where()):
            looks = questions(function)
            frame = Frame(function, module) if looks else None
            for look in looks:
                assert frame is not None
                yield look, frame


# --- answers ---------------------------------------------------------------------------------------------------------


def _may_matter(look: Look, frame: Frame, known: bool) -> bool:
    """Whether any norm could answer it in two ways: most of what code asks, it asks of other things."""
    if look.kind in ("instance", "class"):
        classes = _asked(look, frame) or _classes(look, frame)
        return any(issubclass(cls, nn.Module) and cls is not nn.Module for cls in classes)
    if look.kind in ("attribute", "key"):
        return known or look.against in STATISTICS or look.literal
    return known or look.kind in ("name", "list")  # anything may be printed or written to


def _classes(look: Look, frame: Frame) -> set[type]:
    """The classes that the function names, and those that its module holds under a name in it."""
    attributes = vars(frame.module)
    own = code.flat(
        attributes[name] for name in code.names(look.function) & attributes.keys() if not name.startswith("_")
    )
    return {*code.classes(look.function), *own}


def _asked(look: Look, frame: Frame) -> tuple[type, ...] | None:
    """The classes of an isinstance; None where they can't be told, or it is asked by `type`."""
    classes = frame.values(look.against) if isinstance(look.against, ast.expr) else None
    return None if classes is None else tuple(code.flat(classes))


def _differs(look: Look, frame: Frame, old: nn.Module, new: Renewed, *, known: bool) -> bool:
    """Whether old and new answer otherwise. known: whether it is sure that this module is asked."""
    pair = old, new.module
    if look.kind in ("instance", "class"):
        asked = _asked(look, frame)
        ways = [asked] if asked is not None else [(cls,) for cls in _classes(look, frame)]
        if look.kind == "class":
            return any(len({type(each) in way for each in pair}) > 1 for way in ways)
        return any(len({isinstance(each, way) for each in pair}) > 1 for way in ways)
    if look.kind == "list":
        return _listed_differs(look, old, new)
    if isinstance(look.against, tuple):
        names = [str(each) if look.kind == "print" else type(each).__name__ for each in pair]
        return any(len({_spelt(name, word) for name in names}) > 1 for word in look.against)
    return _attribute_differs(look, str(look.against), old, new, known=known)


def _listed_differs(look: Look, old: nn.Module, new: Renewed) -> bool:
    method = str(look.against)
    first, second = (list(getattr(each, method)()) for each in (old, new.module))
    if look.literal:
        return len(first) != len(second)
    if method == "state_dict":
        return set(first) != set(second)
    pairs = zip(_tensors_of(first), _tensors_of(second), strict=False)
    return (
        len(first) != len(second)
        or (new.exact and not all(_same(a, b) for a, b in pairs))
        or _named(first) != _named(second)
    )


def _named(listed: Sequence[Any]) -> list[str]:
    return [each[0] for each in listed if isinstance(each, tuple)]


def _tensors_of(listed: Sequence[Any]) -> list[Any]:
    return [each[1] if isinstance(each, tuple) else each for each in listed]


def _spelt(name: str, word: str) -> tuple[bool, ...]:
    """What a word and a name have to do with each other."""
    ways = (name, name.lower()) if len(word) > 1 else ()
    return tuple(a for way in ways for a in (word in way, word == way, way.startswith(word), way.endswith(word)))


def _attribute_differs(look: Look, name: str, old: Any, new: Renewed, *, known: bool) -> bool:
    if look.kind == "key" and _stored(old, name) and not _stored(new.module, name):
        return True
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
