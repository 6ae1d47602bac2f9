"""Docstrings as the reference shows them: examples become code, lines that explain arguments become a list.

What takes the fields of a class of options (normrewrite.options.fields) is shown with them.
"""

import inspect
import re
from importlib import import_module
from typing import Any

from griffe import Extension, Function, Object, Parameter, ParameterKind, Parameters

NAMES = r"[a-z_][\w.]*(?:, [a-z_][\w.]*)*:\s(?=\S)"  # `x: (N, ...)`, `include, exclude: globs`
_FIRST = re.compile(NAMES)
_NEXT = re.compile(rf"(?:\. |; |\.\n|;\n)(?={NAMES})")  # `labels: (N,). tolerance: ...` on one line
_RAISES = re.compile(r"(?:\n|(?<=\.) )(?=Raises )")
_OUTSIDE_CODE = re.compile(r"(`[^`]*`)|\*")


def markdown(text: str) -> str:
    """A docstring's text, paragraph by paragraph."""
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", _RAISES.sub("\n\n", text)))


def _paragraph(part: str) -> str:
    if part.startswith(">>>"):
        return f"```pycon\n{part}\n```"
    if part.startswith("    "):  # formulas
        return part
    lines = _OUTSIDE_CODE.sub(lambda found: found[1] or r"\*", part).split("\n")
    start = next((i for i, line in enumerate(lines) if _FIRST.match(line)), None)
    if start is None:
        return "\n".join(lines)
    items = _NEXT.split(_next_lines("\n".join(lines[start:])))
    return "\n".join([*lines[:start], "", *map(_item, items)])


def _next_lines(text: str) -> str:
    """Where a line begins with names, the one before ends a sentence, whether it has a full stop or not."""
    return re.sub(rf"(?<![.;])\n(?={NAMES})", ".\n", text)


def _item(text: str) -> str:
    names, rest = re.split(r":\s", text, maxsplit=1)
    return f"- **{names}**: {' '.join(rest.split())}"


def _parameters(obj: Any) -> Parameters:
    """Of what a decorator has made of a function or class."""
    signature = inspect.signature(getattr(import_module(obj.module.path), obj.name))
    return Parameters(*map(_parameter, signature.parameters.values()))


def _parameter(parameter: inspect.Parameter) -> Parameter:
    required = parameter.default is parameter.empty
    return Parameter(
        parameter.name,
        annotation=re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", inspect.formatannotation(parameter.annotation)),
        kind=ParameterKind(parameter.kind.description),
        default=None if required else getattr(parameter.default, "__name__", repr(parameter.default)),
    )


class Docstrings(Extension):
    """Of griffe, which reads the sources for mkdocstrings."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_function(self, *, func: Function, **_: Any) -> None:
        if any(str(decorator.value).startswith("takes(") for decorator in func.decorators):
            func.parameters = _parameters(func)

    def on_class(self, *, cls: Any, **_: Any) -> None:
        if any(str(decorator.value) == "options" for decorator in cls.decorators):
            cls.set_member("__init__", Function("__init__", parameters=_parameters(cls)))
