"""The page: one file of HTML that needs no network and no script. What comes from the model is escaped by Jinja and svg.tag.

>>> Path("report.html").write_bytes(page(document))

Jinja2, and MarkupSafe with it, are an extra, and imported where a page is made: whoever has none of them is told so.
"""

import math
from importlib import resources
from typing import Any

from normrewrite._version import __version__
from normrewrite.diagnostics.comparison import OutputDifference
from normrewrite.errors import NormRewriteError
from normrewrite.reporting.columns import Column, power, used
from normrewrite.reporting.document import Document, summary
from normrewrite.reporting.facts import Row
from normrewrite.reporting.picture import Picture, picture
from normrewrite.targets import TARGETS

SITES = (
    "Figures of a site are of random input of its width; those with data are of {inputs:,} inputs in batches of {batch}. "
    "An empty cell: nothing to tell."
)
HISTOGRAMS = (
    "Inputs of each norm, all live channels together, each in units of its own running scale around its running mean. The line "
    "is a Gaussian, on which every metric reads the same; what is beyond 4.8 counts at the ends."
)
COMMANDS = (
    "In the folder of these files, as the manifest says and as this report was made. Read them before you run them."
)


def page(document: Document) -> bytes:
    """The whole page, as UTF-8. Raises NormRewriteError where Jinja2 is missing."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise NormRewriteError(
            "the page needs Jinja2: pip install normrewrite[report]; --text needs nothing."
        ) from error
    folder = resources.files("normrewrite.reporting")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    template = environment.from_string(folder.joinpath("page.html.jinja").read_text("utf-8"))
    css = folder.joinpath("page.css").read_text("utf-8")
    return template.render(_view(document, css)).encode("utf-8", "backslashreplace")  # names may hold half a character


def _view(document: Document, css: str) -> dict[str, Any]:
    from markupsafe import Markup

    facts = document.facts
    mood, word, told = document.verdict
    anchors = {row.name: f"site-{i}" for i, row in enumerate(facts.rows)}
    drawn = picture(facts.model, set(anchors))
    columns = used(facts.rows)
    return {
        "css": Markup(css),
        "version": __version__,
        "date": document.date,
        "title": document.file["file"],
        "lead": document.lead,
        "verdict": {"mood": mood, "word": word, "told": told},
        "figures": [{"value": value, "unit": unit, "what": what} for value, unit, what in document.figures],
        "untraceable": drawn.untraceable,
        "legend": _legend(facts.rows),
        "blocks": _blocks(drawn, facts.rows, anchors),
        "sites_lead": _sites_lead(document),
        "columns": columns,
        "rows": [_row(row, anchors[row.name], columns) for row in facts.rows],
        "histograms": _histograms(facts.rows, anchors),
        "histograms_lead": HISTOGRAMS,
        "network": _network(document),
        "timing": _timing(document),
        "commands": document.commands,
        "commands_lead": COMMANDS,
        "origins": document.origins,
        "manifest": document.manifest,
        "notes": facts.notes,
    }


def style(row: Row) -> str:
    """The class of page.css: by target, or by why it stays."""
    if row.target is None:
        return "refused" if row.refused else "kept"
    name = row.target.partition(":")[0]
    return f"is-{name if name in TARGETS else 'other'}"


def _legend(rows: list[Row]) -> list[dict[str, str]]:
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        words = (
            f"{row.target}: {summary(row.target)}" if row.target else ("refused" if row.refused else "left as it was")
        )
        counts[style(row), words] = counts.get((style(row), words), 0) + 1
    return [{"style": key, "words": f"{words} ({n} site{'s' if n > 1 else ''})"} for (key, words), n in counts.items()]


def _blocks(drawn: Picture, rows: list[Row], anchors: dict[str, str]) -> list[Any]:
    from normrewrite.reporting.drawing import Look, block

    looks = {row.name: Look(style(row), row.target or _kind(row), _title(row), f"#{anchors[row.name]}") for row in rows}
    return [block(each, looks) for each in drawn.blocks]


def _kind(row: Row) -> str:
    """`bn`, `ln`, `gn`, ... for a norm of torch's that stays; others by the beginning of their class."""
    capitals = "".join(letter for letter in row.was if letter.isupper()).lower()
    return capitals if "Norm" in row.was and len(capitals) > 1 else row.was[:8]


def _title(row: Row) -> str:
    became = f" → {row.target}" if row.target else ", refused" if row.refused else ""
    parts = [f"{row.label}: {row.was}{became}", f"{row.channels} channels" if row.channels else "", row.note]
    parts += [f"eval difference {power(row.difference)}" if row.difference is not None else ""]
    parts += [f"κ {row.kappa:.2f}" if row.kappa is not None else ""]
    return ", ".join(part for part in parts if part)


def _sites_lead(document: Document) -> str:
    advice = document.facts.advice
    if advice is None:
        return (
            "Figures are of random input of each site's width; --data adds κ, headroom, dead channels and histograms."
        )
    return SITES.format(inputs=advice.inputs, batch=advice.batch_size)


def _row(row: Row, anchor: str, columns: list[Column]) -> dict[str, Any]:
    cells = [{"text": column.cell(row), "style": _cell_style(row, column)} for column in columns]
    return {"anchor": anchor, "style": style(row), "label": row.label, "cells": cells}


def _cell_style(row: Row, column: Column) -> str:
    if not column.number:
        return "words" if column.head == "note" else ""
    beyond = column.head == "eval difference" and (row.difference or 0.0) > (row.tolerance or float("inf"))
    return "number off" if beyond or column.cell(row).startswith("−") else "number"


def _histograms(rows: list[Row], anchors: dict[str, str]) -> list[dict[str, Any]]:
    from normrewrite.reporting.drawing import histogram

    return [
        {
            "anchor": anchors[row.name],
            "label": row.label,
            "svg": histogram(row.histogram, f"inputs of {row.label} against a Gaussian"),
        }
        for row in rows
        if row.histogram
    ]


def _network(document: Document) -> dict[str, Any] | None:
    found = document.facts.comparison
    if found is None or not document.facts.came:
        return None
    original = document.original["file"] if document.original else "the original, had back from it"
    verdict = found.word.replace("same function", "the same function") if found.ok else "another function"
    lead = (
        f"{document.file['file']} against {original}, both in eval on {found.inputs:,} inputs: {verdict}, by a tolerance of "
        f"{power(found.tolerance, 0)} of the largest output."
    )
    if found.left:
        lead += f" Not compared: {', '.join(found.left)}."
    head = ["output", "largest difference", "of largest output", "signal to noise"]
    head += ["same class"] if any(output.rows for output in found.outputs) else []
    head += ["top-1", "original's top-1"] if found.labelled else []
    return {"lead": lead, "head": head, "rows": [_output(output, len(head)) for output in found.outputs]}


def _output(output: OutputDifference, width: int) -> list[str]:
    cells = [output.name, power(output.max_abs), power(output.max_rel)]
    cells.append(f"{output.snr_db:.1f} dB" if math.isfinite(output.snr_db) else "no noise" if output.snr_db > 0 else "")
    shares = (output.agreeing, *output.right) if output.judged else (output.agreeing,)
    cells += [f"{100 * count / output.rows:.2f} %" for count in shares if output.rows]
    return [*cells, *[""] * width][:width]


def _timing(document: Document) -> dict[str, Any] | None:
    from normrewrite.reporting.drawing import timings

    bench = document.facts.bench
    if bench is None:
        return None
    lead = (
        f"Batches of {bench.inputs} in {bench.runtime}, in turns, {len(bench.seconds[0])} rounds: medians, with a line from the "
        f"fastest to the third quartile. Round by round the rewritten network takes {bench.ratio:.3f} times the original's time."
    )
    return {"lead": lead, "svg": timings(bench, ("original", "rewritten"), lambda seconds: f"{1000 * seconds:.3f} ms")}
