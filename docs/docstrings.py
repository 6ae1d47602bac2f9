"""Docstrings as the reference shows them: examples become code, lines that explain arguments become a list."""

import re
from typing import Any

from griffe import Extension, Object

ARGUMENTS = re.compile(r"(?:[a-z_][\w.]*(?:, [a-z_][\w.]*)*): \S")  # `x: (N, ...)`, `include, exclude: globs`
SENTENCE = re.compile(r"(\. |; )(?=[a-z_]\w*(?:, [a-z_]\w*)*: )")  # `labels: (N,). tolerance: ...` on one line


def markdown(text: str) -> str:
    """`>>>` lines fenced; `name: ...` and what is indented or runs on below it as one item of a list."""
    out: list[str] = []
    kind = ""
    for line in text.splitlines():
        before, kind = kind, _kind(line, kind)
        if before == "code" and kind != "code":
            out += ["```", ""]
        if kind == "code" and before != "code":
            out += ["", "```pycon"]
        if kind == "item":
            out += [""] if before != "item" else []
            line = _item(line) if ARGUMENTS.match(line) else f"    {line.strip()}"
        out.append(line)
    return "\n".join([*out, *(["```"] if kind == "code" else [])])


def _kind(line: str, before: str) -> str:
    if line.startswith((">>>", "...")) or (before == "code" and line.strip()):
        return "code"
    if not line.strip() or line.startswith("Raises "):
        return ""
    return "item" if ARGUMENTS.match(line) or before == "item" else "prose"


def _item(line: str) -> str:
    parts = SENTENCE.sub(".\n", line).split("\n")
    return "\n".join("- **{}**: {}".format(*part.partition(": ")[::2]) for part in parts)


class Docstrings(Extension):
    """Of griffe, which reads the sources for mkdocstrings."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
