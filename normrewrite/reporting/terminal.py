"""The report as text: plain for pipes, with Rich's tables on a terminal."""

from dataclasses import dataclass
from typing import Any

from normrewrite.provenance.report import table
from normrewrite.reporting.columns import SITE, used
from normrewrite.reporting.document import Document
from normrewrite.reporting.facts import Facts, Row

_BARS = " ▁▂▃▄▅▆▇█"
_SPARKS = 16  # characters of a histogram


@dataclass
class Printout:
    """What the command `report` returns. output: the page that was written, if any; brief: a few lines, as the page tells
    the rest."""

    document: Document
    output: str = ""
    brief: bool = False

    @property
    def facts(self) -> Facts:
        return self.document.facts

    def as_dict(self) -> dict[str, Any]:
        return {**self.document.as_dict(), "output": self.output or None}

    def __str__(self) -> str:
        written = [f"wrote {self.output}"] if self.output else []
        return "\n".join([head(self.document) if self.brief else text(self.document), *written])

    def rich(self) -> Any:
        """For a terminal: the same, its tables in colour."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        mood, word, told = self.document.verdict
        colour = {"good": "green", "bad": "red"}.get(mood, "")
        lines = head(self.document).splitlines()
        parts: list[Any] = [Text(lines[0], style="bold"), Text(f"{word} {told}", style=colour), *map(Text, lines[2:])]
        wrote = [Text(f"wrote {self.output}", style="dim")] if self.output else []
        if self.brief:
            return Group(*parts, *wrote)
        for heads, cells in _tables(self.document):
            shown = Table(header_style="bold", pad_edge=False, box=None)
            for name, unit in heads:
                shown.add_column(Text(f"{name}\n{unit}".strip()), no_wrap=name == SITE.head, overflow="fold")
            for row in cells:
                shown.add_row(*map(Text, row))
            parts += [Text(), shown]
        return Group(*parts, *(Text(f"\n{rest}") for rest in _rest(self.document)), *wrote)


def text(document: Document) -> str:
    """Everything, in plain text."""
    tables = [table([_told(name, unit) for name, unit in heads], rows) for heads, rows in _tables(document)]
    return "\n\n".join([head(document), *tables, *_rest(document)])


def _told(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def head(document: Document) -> str:
    """What it is, and the verdict."""
    _, word, told = document.verdict
    figures = [f"{value}{f' {unit}' if unit else ''} {what}" for value, unit, what in document.figures]
    return "\n".join(
        [f"{document.file['file']}: {document.lead}", f"{word} {told}", *(f"  {figure}" for figure in figures)]
    )


def _rest(document: Document) -> list[str]:
    """What stands below the tables of sites."""
    facts = document.facts
    whole = [] if facts.comparison is None or not facts.came else [str(facts.comparison)]
    timed = [] if facts.bench is None else [str(facts.bench)]
    commands = [f"  {command}" for command in document.commands]
    again = "\n".join(["to do it again:", *commands, *(f"{name}: {told}" for name, told in document.origins)])
    return [*whole, *timed, again, *facts.notes]


def _tables(document: Document) -> list[tuple[list[tuple[str, str]], list[list[str]]]]:
    """The table by site, in parts that fit a terminal: heads with their units, and cells."""
    rows, tables = document.facts.rows, []
    columns = used(rows)
    for part in dict.fromkeys(column.part for column in columns):
        shown = [SITE, *(column for column in columns if column.part == part)]
        heads = [(column.head, column.unit) for column in shown]
        cells = [[column.cell(row) for column in shown] for row in rows]
        if part == "inputs" and any(row.histogram for row in rows):
            heads.append(("inputs", "−4.8σ to +4.8σ"))
            cells = [[*line, sparks(row)] for line, row in zip(cells, rows, strict=True)]
        tables.append((heads, cells))
    return tables


def sparks(row: Row) -> str:
    """A histogram in one line of text."""
    if not row.histogram:
        return ""
    each = len(row.histogram) // _SPARKS
    sums = [sum(row.histogram[i : i + each]) for i in range(0, len(row.histogram), each)]
    return "".join(_BARS[round((len(_BARS) - 1) * share / max(sums))] for share in sums)
