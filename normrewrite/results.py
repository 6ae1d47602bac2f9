"""The one form of what functions and commands return: parts in the order in which they are read, and their plain text.

>>> print(text([Verdict("same function: largest difference 2.4e-07", "good"), Table(("site", "was"), [("bn1", "BatchNorm2d")])]))
same function: largest difference 2.4e-07
site  was
bn1   BatchNorm2d

A result says what is a verdict, a table or a note, and a renderer how that looks: plain text here, a terminal's in
normrewrite.reporting.terminal.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Mood = Literal["good", "mixed", "bad", "plain"]


@dataclass(frozen=True)
class Verdict:
    """What something came to. mood: what colours follow; `mixed` is what needs a look, and `plain` no judgement."""

    text: str
    mood: Mood = "plain"


@dataclass(frozen=True)
class Table:
    """heads: of the columns; lines: their cells; units: of the columns, where they have some; moods: of the lines."""

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    units: Sequence[str] = ()
    moods: Sequence[Mood] = ()


@dataclass(frozen=True)
class Title:
    """What all the rest is about."""

    text: str


@dataclass(frozen=True)
class Wrote:
    """A file that was written."""

    path: str


Part = Verdict | Table | Title | Wrote | str  # a text is a note
Summary = Sequence[Part]


class Printable(ABC):
    """What has a summary, and prints as its plain text."""

    @abstractmethod
    def summary(self) -> Summary: ...

    def __str__(self) -> str:
        return text(self.summary())


class Result(Printable):
    """What a command returns: a summary for people, a dictionary for machines."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]: ...


def apart(summaries: Sequence[Summary]) -> Summary:
    """Several summaries as one, with an empty line between each two."""
    return [part for i, summary in enumerate(summaries) for part in (*([""] if i else []), *summary)]


def shortened(names: Sequence[str]) -> str:
    """The first eight, and how many more there are."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{more}"


def text(summary: Summary) -> str:
    """A summary for pipes, and for `str`."""
    return "\n".join(map(_plain, summary))


def _plain(part: Part) -> str:
    match part:
        case Table():
            return _columns(part)
        case Wrote():
            return f"wrote {part.path}"
        case Verdict() | Title():
            return part.text
    return part


def _columns(table: Table) -> str:
    units = table.units or [""] * len(table.heads)
    heads = [f"{head} ({unit})" if unit else head for head, unit in zip(table.heads, units, strict=True)]
    lines = [heads, *table.lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
