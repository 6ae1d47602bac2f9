"""Options: one frozen dataclass a command, one line an option. No torch here: `normrewrite --help` is made of this.

>>> @options
... class Export(Overwrite):
...     \"\"\"Write ONNX.\"\"\"
...     opset: int = option("ONNX opset, 18 to 23.", default=20)

The command line is made of the fields (normrewrite.cli.fields), functions in Python take them as keywords (`takes`), and a
manifest's history words them (normrewrite.commands.words). What a command's own class and its function in Python have in common
is a class that both inherit; what several commands have in common stands in normrewrite.options.groups.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar, dataclass_transform, get_args, get_origin

from normrewrite.errors import NormRewriteError, nearest

P = ParamSpec("P")
Options = TypeVar("Options")
Result = TypeVar("Result")
Needs = tuple[tuple[str, Callable[[float], bool]], ...]


class UnknownOption(NormRewriteError, TypeError):
    """A keyword that a function has not: Python's own error for that, too."""


@dataclass(frozen=True)
class Mark:
    """What an option is beside its name, its type and its default.

    flag: where it is not the name's own; off: the flag that says no; short: one letter more. least: the smallest number that the
    command line takes; needs: what numbers it may be, in words and as a test. shown: whether --help tells the default. silent:
    where to write, what to print, what to insist on, and not what is computed: a history doesn't tell it. file: it names what is
    read. numbers: several, with commas. argument: without a flag, by its place.
    """

    help: str
    flag: str = ""
    off: str = ""
    short: str = ""
    metavar: str | None = None
    least: int | None = None
    needs: Needs = ()
    shown: bool = True
    silent: bool = False
    file: bool = False
    numbers: bool = False
    argument: bool = False


def option(help: str, *, default: Any = MISSING, **mark: Any) -> Any:
    """A field that is on the command line, too; mark: see Mark."""
    return field(default=default, metadata={"mark": Mark(help, **mark)})


def callback(*, default: Callable[..., object]) -> Any:
    """A field that is called while work is done; `each` was its name before."""
    return field(default=default, metadata={"was": "each"})


def quiet(*_: object, **__: object) -> None:
    """A callback that does nothing."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option, callback, field))
def options(cls: type[Options]) -> type[Options]:
    """A class of options: frozen, and its fields are keywords, but for those with kw_only=False."""
    return dataclass(frozen=True, kw_only=True)(cls)


def mark_of(of: "Field[Any]") -> Mark | None:
    """None for what only Python takes."""
    return of.metadata.get("mark")


def flag_of(of: "Field[Any]") -> str:
    """`--dry-run`, as a field is called on the command line."""
    mark = mark_of(of)
    return mark.flag if mark and mark.flag else f"--{of.name.replace('_', '-')}"


def listed(kind: Any) -> list[tuple["Field[Any]", Mark]]:
    """The options of a command in the order of --help. Bases come first, unless the class's body says by a ClassVar where."""
    known = {each.name: (each, mark) for each in fields(kind) if (mark := mark_of(each))}
    return [known[name] for name in dict.fromkeys(_names(kind)) if name in known]


def _names(kind: Any) -> Iterator[str]:
    body = inspect.get_annotations(kind)
    places = {name: vars(kind)[name] for name in body if isinstance(vars(kind).get(name), type)}
    for base in reversed(kind.__bases__):  # as dataclasses have them
        if base not in places.values():
            yield from _names(base)
    for name in body:
        yield from _names(places[name]) if name in places else (name,)


def read_by(options: Any) -> dict[str, Any]:
    """Flag -> value of the options that name what is read."""
    return {flag_of(each): getattr(options, each.name) for each, mark in listed(type(options)) if mark.file}


def asked(options: Any) -> Iterator[tuple["Field[Any]", Mark, Any]]:
    """The options that are not at their defaults, with what they are."""
    for each, mark in listed(type(options)):
        value = getattr(options, each.name)
        if value != each.default and value not in ([], ()):
            yield each, mark, value


def part(options: Any, kind: Any) -> dict[str, Any]:
    """The fields of a class that `options` inherits, as keywords."""
    return {each.name: getattr(options, each.name) for each in fields(kind)}


def choices(kind: Any) -> dict[str, tuple[str, ...]]:
    """Name -> what it may be, of the options that are one of several words."""
    return {each.name: get_args(each.type) for each, _ in listed(kind) if get_origin(each.type) is Literal}


def require_known(names: Iterable[str], known: Iterable[str]) -> None:
    """Raises for a keyword that is no option."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UnknownOption(f"there is no option {name!r}.{nearest(name, known)} Options: {', '.join(known)}.")


def takes(kind: Callable[P, Options]) -> Callable[[Callable[[Options], Result]], Callable[P, Result]]:
    """A function of one object of options as a function of its fields, which `help` and type checkers show.

    >>> @takes(Export)
    ... def export(options: Export) -> Exported: ...
    >>> export(model, inputs, path, opset=21)

    Raises NormRewriteError for a keyword that there is not; one by its former name is taken with a DeprecationWarning.
    """
    signature = inspect.signature(kind)
    places = [name for name, each in signature.parameters.items() if each.kind is not each.KEYWORD_ONLY]
    known = [name for name in signature.parameters if name not in places]
    former = {was: each.name for each in fields(kind) if (was := each.metadata.get("was"))}  # type: ignore[arg-type]

    def decorate(function: Callable[[Options], Result]) -> Callable[P, Result]:
        @wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> Result:
            renamed: Any = _by_new_names(keywords, former)
            require_known((name for name in renamed if name not in places), known)
            bound = signature.bind(*arguments, **renamed)
            return function(kind(*bound.args, **bound.kwargs))

        shown: Any = call
        shown.__signature__ = signature.replace(return_annotation=inspect.signature(function).return_annotation)
        shown.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
        return call

    return decorate


def _by_new_names(keywords: Mapping[str, Any], former: Mapping[str, str]) -> dict[str, Any]:
    for name in keywords.keys() & former.keys():
        if former[name] in keywords:
            raise TypeError(f"{name}= is the former name of {former[name]}=: give that alone")
        warnings.warn(f"{name}= is called {former[name]}= now", DeprecationWarning, stacklevel=3)
    return {former.get(name, name): value for name, value in keywords.items()}
