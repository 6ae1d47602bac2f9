"""A summary on a terminal: Rich's tables, and colours that follow verdicts.

>>> Console().print(drawn(comparison.summary()), crop=False)
"""

from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from normrewrite.results import Mood, Part, Summary, Table, Title, Verdict, Wrote

COLOURS: dict[Mood, str] = {"good": "green", "mixed": "yellow", "bad": "red", "plain": ""}


def drawn(summary: Summary) -> Group:
    """What Rich prints. Lines of text are not cut: the terminal wraps them, and they are copied as one."""
    return Group(*map(_part, summary))


def _part(part: Part) -> RenderableType:
    match part:
        case Verdict():
            return _line(part.text, COLOURS[part.mood])
        case Table():
            return _grid(part)
        case Title():
            return _line(part.text, "bold")
        case Wrote():
            return _line(f"wrote {part.path}", "dim")
    return _line(part)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ignore")


def _grid(table: Table) -> Grid:
    grid = Grid(header_style="bold", pad_edge=False, box=None)
    units = table.units or [""] * len(table.heads)
    for i, (head, unit) in enumerate(zip(table.heads, units, strict=True)):
        grid.add_column(
            Text(f"{head}\n{unit}".strip()), no_wrap=i == 0, overflow="fold"
        )  # sites keep their names whole
    moods = table.moods or ["plain"] * len(table.lines)
    for line, mood in zip(table.lines, moods, strict=True):
        grid.add_row(*map(Text, line), style=COLOURS[mood])
    return grid
