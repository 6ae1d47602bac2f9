"""A summary on a terminal: Rich's tables, and colours that follow verdicts.

>>> Console().print(drawn(comparison.summary(), Console()), crop=False)

Nothing is cut: lines that are too long run on, as the terminal wraps them, and are copied as one. Control characters are
written out.
"""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from normrewrite.outside import visible
from normrewrite.results import Mood, Part, Summary, Table, Title, Verdict, Wrote

COLOURS: dict[Mood, str] = {"good": "green", "mixed": "yellow", "bad": "red", "plain": ""}
_WORDS = 24  # characters that are room for some words
_GAP = 2  # between two columns


def drawn(summary: Summary, console: Console) -> Group:
    """What the console prints, as wide as it is."""
    return Group(*(_part(part, console) for part in summary))


def _part(part: Part, console: Console) -> RenderableType:
    match part:
        case Verdict():
            return _line(part.text, COLOURS[part.mood])
        case Table():
            return _grid(part, console)
        case Title():
            return _line(part.text, "bold")
        case Wrote():
            return _line(f"wrote {part.path}", "dim")
    return _line(part)


def _line(text: str, style: str = "") -> Text:
    return Text(visible(text), style, no_wrap=True, overflow="ignore")


def _grid(table: Table, console: Console) -> Grid:
    """Names and figures stay whole; the last column, of words, is wrapped where there is room for some of them."""
    heads = [
        f"{head}\n{unit}".strip()
        for head, unit in zip(table.heads, table.units or [""] * len(table.heads), strict=True)
    ]
    lines = [list(map(visible, line)) for line in (heads, *table.lines)]
    columns = zip(*lines, strict=True)
    *widths, last = (max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns)
    room = console.width - sum(widths) - _GAP * len(widths)
    widths.append(min(last, room) if room >= _WORDS else last)
    grid = Grid(header_style="bold", pad_edge=False, box=None, width=sum(widths) + _GAP * (len(widths) - 1))
    for head, width in zip(lines[0], widths, strict=True):
        grid.add_column(Text(head), width=width)
    moods: Sequence[Mood] = table.moods or ["plain"] * len(table.lines)
    for line, mood in zip(lines[1:], moods, strict=True):
        grid.add_row(*map(Text, line), style=COLOURS[mood])
    return grid
