"""Blocks of a network, histograms and timings as SVG. Colours and faces are page.css's: here are only places."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from normrewrite.api.bench import Bench
from normrewrite.reporting.histograms import gaussian
from normrewrite.reporting.picture import ENTRY, Block, Node
from normrewrite.reporting.svg import path, picture, tag

Point = tuple[float, float]
WIDTH = 342.0  # of the widest block: what a phone leaves
CELL, GAP, LANE, EDGE = 24.0, 9.0, 22.0, 12.0  # height of a node, room between two, between lines, and at the edge
RISE = 5.0  # from one edge over nodes to the next above it
LETTER = 6.1  # a letter's width, about


@dataclass(frozen=True)
class Look:
    """How a site is drawn: a class of page.css, its text, what it tells when it is pointed at, and where it leads."""

    style: str
    text: str
    title: str
    link: str


@dataclass(frozen=True)
class _Cell:
    node: Node
    text: str
    x: float
    y: float
    width: float
    line: int

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def block(drawn: Block, looks: Mapping[str, Look]) -> Markup:
    """One block: its name, its nodes in lines, and the edges that skip over some."""
    cells = _placed(drawn, looks, (24.0 if drawn.name else 0.0) + (LANE if _skips(drawn) else EDGE - 3))
    width = max(
        max(cell.x + cell.width for cell in cells) + EDGE, min(WIDTH, 2 * EDGE + LETTER * 1.15 * len(drawn.name))
    )
    height = cells[-1].y + CELL + EDGE
    parts = [tag("rect", class_="block", x=0.5, y=0.5, width=width - 1, height=height - 1, rx=8)]
    if drawn.name:
        parts.append(tag("text", drawn.name, class_="name", x=EDGE, y=19))
    parts += _edges(cells)
    parts += [_far(cell) for cell in cells if cell.node.far]
    parts += [_cell(cell, looks.get(cell.node.name)) for cell in cells]
    titles = ", ".join(f"{looks[c.node.name].title}" if c.node.name in looks else c.text for c in cells)
    return picture(width, height, f"{drawn.name or 'the network itself'}: {titles}", parts, class_="net")


def _skips(drawn: Block) -> bool:
    """Whether anything is drawn above the first line: an edge over nodes, or where one comes from."""
    return any(node.far or any(source < i - 1 for source in node.comes) for i, node in enumerate(drawn.nodes))


def _placed(drawn: Block, looks: Mapping[str, Look], top: float) -> list[_Cell]:
    cells: list[_Cell] = []
    x, line = EDGE, 0
    for node in drawn.nodes:
        text = looks[node.name].text if node.name in looks else node.label
        width = 20.0 if node.kind == "add" else max(26.0, 9 + LETTER * len(text))
        if x + width > WIDTH - EDGE and x > EDGE:
            x, line = EDGE, line + 1
        cells.append(_Cell(node, text, x, top + line * (CELL + LANE), width, line))
        x += width + GAP
    return cells


def _cell(cell: _Cell, look: Look | None) -> Markup:
    style = f"cell {cell.node.kind}" if look is None else f"cell site {look.style}"
    title = f"{cell.node.name}: {cell.text}" if look is None else look.title
    shape = (
        tag("circle", cx=cell.middle, cy=cell.y + CELL / 2, r=9.0)
        if cell.node.kind == "add"
        else tag("rect", x=cell.x, y=cell.y, width=cell.width, height=CELL, rx=5)
    )
    text = tag("text", cell.text, x=cell.middle, y=cell.y + CELL / 2 + 3.6, text_anchor="middle")
    group = tag("g", tag("title", title), shape, text, class_=style)
    return group if look is None else tag("a", group, href=look.link)


def _edges(cells: Sequence[_Cell]) -> list[Markup]:
    """Straight where two nodes stand side by side, else around what is between them; edges over the same nodes one above
    the other."""
    parts, over = [], list[tuple[int, float, float, int]]()
    for target, to in enumerate(cells):
        for source in to.node.comes:
            straight = _straight(cells, source, target)
            if straight:
                parts.append(tag("path", class_="edge", d=straight))
                continue
            start = 5.0 if source == ENTRY or cells[source].line != to.line else cells[source].middle
            taken = {level for line, low, high, level in over if line == to.line and low < to.middle and start < high}
            level = next(i for i in range(len(taken) + 1) if i not in taken)
            over.append((to.line, start, to.middle, level))
            points = _around(cells, source, to, min(level, 2) * RISE)
            parts += [tag("path", class_="edge", d=_rounded(points)), _tip(to)]
    return parts


def _straight(cells: Sequence[_Cell], source: int, target: int) -> str:
    to = cells[target]
    level = to.y + CELL / 2
    if source == ENTRY and target == 0:
        return path("M", 1, level, "L", to.x, level)
    if source == target - 1 and source != ENTRY and cells[source].line == to.line:
        return path("M", cells[source].x + cells[source].width, level, "L", to.x, level)
    return ""


def _around(cells: Sequence[_Cell], source: int, to: _Cell, rise: float) -> list[Point]:
    over = to.y - 8 - rise
    if source == ENTRY:
        entry = cells[0].y + CELL / 2
        return [(5, entry), (5, over), (to.middle, over), (to.middle, to.y)]
    start = cells[source]
    if start.line == to.line:
        return [(start.middle, start.y), (start.middle, over), (to.middle, over), (to.middle, to.y)]
    if start.line + 1 == to.line:
        return [(start.middle, start.y + CELL), (start.middle, over), (to.middle, over), (to.middle, to.y)]
    below = start.y + CELL + 5
    ends = [(start.middle, start.y + CELL), (start.middle, below), (5.0, below)]
    return [*ends, (5, over), (to.middle, over), (to.middle, to.y)]


def _rounded(points: Sequence[Point], radius: float = 4) -> str:
    """A path through right angles, its corners rounded."""
    steps: list[str | float] = ["M", *points[0]]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        steps += ["L", *_towards(corner, before, radius), "Q", *corner, *_towards(corner, after, radius)]
    return path(*steps, "L", *points[-1])


def _towards(start: Point, end: Point, length: float) -> Point:
    apart = abs(end[0] - start[0]) + abs(end[1] - start[1])  # along an axis
    share = min(length, apart / 2) / apart if apart else 0.0
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _tip(to: _Cell) -> Markup:
    x, y = to.middle, to.y
    return tag("path", class_="tip", d=path("M", x - 3, y - 5, "L", x + 3, y - 5, "L", x, y, "Z"))


def _far(cell: _Cell) -> Markup:
    sources = f"from {', '.join(cell.node.far)}"
    return tag("text", sources, class_="far", x=cell.x + cell.width, y=cell.y - 4, text_anchor="end")


def histogram(shares: Sequence[float], label: str) -> Markup:
    """Shares by bin as an area, and a Gaussian's as a line."""
    width, height, base = 168.0, 74.0, 58.0
    normal = gaussian()
    top = max(*normal, *shares)
    step = width / len(shares)

    def level(share: float) -> float:
        return base - (base - 4) * share / top

    outline: list[str | float] = ["M", 0.0, base]
    for i, share in enumerate(shares):
        outline += ["L", i * step, level(share), "L", (i + 1) * step, level(share)]
    curve: list[str | float] = []
    for i, share in enumerate(normal):
        curve += ["L" if i else "M", (i + 0.5) * step, level(share)]
    parts = [
        tag("path", class_="area", d=path(*outline, "L", width, base, "Z")),
        tag("path", class_="gaussian", d=path(*curve)),
        tag("path", class_="axis", d=path("M", 0, base, "L", width, base)),
    ]
    for tick in (-4, -2, 0, 2, 4):
        x = width / 2 + tick * width / 9.6
        text = "0" if tick == 0 else f"{'−' if tick < 0 else '+'}{abs(tick)}σ"
        parts.append(tag("text", text, class_="tick", x=x, y=height - 3, text_anchor="middle"))
    return picture(width, height, label, parts, class_="histogram")


def timings(bench: Bench, names: Sequence[str], words: Callable[[float], str]) -> Markup:
    """Two bars: medians, with a line from the fastest to the third quartile of all rounds."""
    width, line = 340.0, 44.0
    ordered = [sorted(seconds) for seconds in bench.seconds]
    reach = max(seconds[int(0.75 * (len(seconds) - 1))] for seconds in ordered)
    parts = []
    for i, (name, seconds) in enumerate(zip(names, ordered, strict=True)):
        middle, low, high = (seconds[int(share * (len(seconds) - 1))] for share in (0.5, 0.0, 0.75))
        scale, y = (width - 4) / reach, i * line
        parts += [
            tag("text", f"{name}: {words(middle)}", class_="name", x=0, y=y + 13),
            tag("rect", class_=f"bar bar{i}", x=0, y=y + 20, width=middle * scale, height=12, rx=3),
            tag("path", class_="whisker", d=path("M", low * scale, y + 26, "L", high * scale, y + 26)),
        ]
    return picture(width, 2 * line, "latency: medians of both networks", parts, class_="timings")
