"""Pictures of results, SVG at the width of a page: the same results give the same bytes.

>>> save(lambda figure: figure.subplots().plot(sizes, seconds), Path("docs/size.svg"))
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 9.0, 3.8  # inches
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "normrewrite",
    "svg.fonttype": "none",
    "font.size": 11,
    "font.family": "sans-serif",
}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}


def save(draw: Callable[[Any], None], path: Path, height: float = HEIGHT) -> Path:
    """draw: onto a matplotlib figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure = pyplot.figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        pyplot.close(figure)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n")
    return path
