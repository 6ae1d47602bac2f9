"""The command line out of a class of options: a field becomes a click option by its type, its default and its mark."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click

from normrewrite.errors import NormRewriteError
from normrewrite.options.fields import Mark, flag_of, listed

_LARGEST = 2**32 - 1
_PATH = click.Path(path_type=Path)


def parameters(kind: Any) -> list[click.Parameter]:
    """What click takes for a class of options, in the order of its help."""
    return [_parameter(field, mark) for field, mark in listed(kind)]


def help_of(kind: Any) -> str:
    """The first lines of a command's help: what its class says of itself."""
    return inspect.cleandoc(kind.__doc__ or "")


def _parameter(field: "Field[Any]", mark: Mark) -> click.Parameter:
    required = field.default is MISSING
    if mark.argument:
        return click.Argument([field.name], type=_type(field, mark), required=required)
    flags = f"{flag_of(field)}/{mark.off}" if mark.off else flag_of(field)
    default: dict[str, Any] = {} if required else {"default": field.default}
    switch = _plain(field.type) is bool
    return click.Option(
        [field.name, flags, *filter(None, [mark.short])],
        type=None if switch else _type(field, mark),
        is_flag=switch,
        multiple=isinstance(field.default, tuple),
        required=required,
        show_default=mark.shown and _telling(field.default) and (not switch or bool(mark.off)),
        metavar=mark.metavar,
        callback=_numbers if mark.numbers else None,
        help=mark.help,
        **default,
    )


def _telling(default: Any) -> bool:
    return default not in (None, "", (), MISSING)


def _plain(kind: Any) -> Any:
    """A type without `| None`."""
    parts = (
        [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) in (Union, UnionType) else []
    )
    return parts[0] if parts else kind


def _type(field: "Field[Any]", mark: Mark) -> Any:
    kind = _plain(field.type)
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    if mark.least is not None:
        return click.IntRange(min=mark.least)
    return _PATH if kind is Path else kind if kind in (int, float) else str


def _numbers(_context: click.Context, parameter: click.Parameter, text: str | None) -> Sequence[float] | None:
    try:
        numbers = None if text is None else [float(part) for part in text.split(",")]
        if not all(map(math.isfinite, numbers or ())):
            raise ValueError
        return numbers
    except ValueError:
        raise NormRewriteError(
            f"--{parameter.name} {text!r}: write numbers with commas, as in 0.485,0.456,0.406."
        ) from None


def require_bounded(values: dict[str, Any]) -> None:
    """Numbers on the command line are finite, and whole ones no larger than what all of torch and numpy takes."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise NormRewriteError(f"--{name.replace('_', '-')} {value}: give a finite number.")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise NormRewriteError(f"--{name.replace('_', '-')}: give a number of at most {_LARGEST:,}.")
