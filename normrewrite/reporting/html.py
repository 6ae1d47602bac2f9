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
from normrewrite.reporting.facts import SiteFigures
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
    mood, word, finding = document.verdict
    anchors = {site.name: f"site-{i}" for i, site in enumerate(facts.sites)}
    drawn = picture(facts.model, set(anchors))
    columns = used(facts.sites)
    return {
        "css": Markup(css),
        "version": __version__,
        "date": document.date,
        "title": document.file["file"],
        "lead": document.lead,
        "verdict": {"mood": mood if mood in ("good", "bad") else "", "word": word, "told": finding},
        "figures": [{"value": value, "unit": unit, "what": what} for value, unit, what in document.figures],
        "untraceable": drawn.untraceable,
        "legend": _legend(facts.sites),
        "blocks": _blocks(drawn, facts.sites, anchors),
        "sites_lead": _sites_lead(document),
        "columns": columns,
        "lines": [_line(site, anchors[site.name], columns) for site in facts.sites],
        "histograms": _histograms(facts.sites, anchors),
        "histograms_lead": HISTOGRAMS,
        "network": _network(document),
        "timing": _timing(document),
        "commands": document.commands,
        "commands_lead": COMMANDS,
        "origins": document.origins,
        "manifest": document.manifest,
        "notes": facts.notes,
    }


def style(site: SiteFigures) -> str:
    """The class of page.css: by target, or by why it stays."""
    if site.target is None:
        return "refused" if site.refused else "kept"
    name = site.target.partition(":")[0]
    return f"is-{name if name in TARGETS else 'other'}"


def _legend(sites: list[SiteFigures]) -> list[dict[str, str]]:
    counts: dict[tuple[str, str], int] = {}
    for site in sites:
        words = (
            f"{site.target}: {summary(site.target)}"
            if site.target
            else ("refused" if site.refused else "left as it was")
        )
        counts[style(site), words] = counts.get((style(site), words), 0) + 1
    return [{"style": key, "words": f"{words} ({n} site{'s' if n > 1 else ''})"} for (key, words), n in counts.items()]


def _blocks(drawn: Picture, sites: list[SiteFigures], anchors: dict[str, str]) -> list[Any]:
    from normrewrite.reporting.drawing import Look, block

    looks = {
        site.name: Look(style(site), site.target or _kind(site), _title(site), f"#{anchors[site.name]}")
        for site in sites
    }
    return [block(each, looks) for each in drawn.blocks]


def _kind(site: SiteFigures) -> str:
    """`bn`, `ln`, `gn`, ... for a norm of torch's that stays; others by the beginning of their class."""
    capitals = "".join(letter for letter in site.was if letter.isupper()).lower()
    return capitals if "Norm" in site.was and len(capitals) > 1 else site.was[:8]


def _title(site: SiteFigures) -> str:
    became = f" → {site.target}" if site.target else ", refused" if site.refused else ""
    parts = [f"{site.label}: {site.was}{became}", f"{site.channels} channels" if site.channels else "", site.note]
    parts += [f"eval difference {power(site.difference)}" if site.difference is not None else ""]
    parts += [f"κ {site.kappa:.2f}" if site.kappa is not None else ""]
    return ", ".join(part for part in parts if part)


def _sites_lead(document: Document) -> str:
    advice = document.facts.advice
    if advice is None:
        return (
            "Figures are of random input of each site's width; --data adds κ, headroom, dead channels and histograms."
        )
    return SITES.format(inputs=advice.inputs, batch=advice.batch_size)


def _line(site: SiteFigures, anchor: str, columns: list[Column]) -> dict[str, Any]:
    cells = [{"text": column.cell(site), "style": _cell_style(site, column)} for column in columns]
    return {"anchor": anchor, "style": style(site), "label": site.label, "cells": cells}


def _cell_style(site: SiteFigures, column: Column) -> str:
    if not column.number:
        return "words" if column.head == "note" else ""
    beyond = column.head == "eval difference" and (site.difference or 0.0) > (site.tolerance or float("inf"))
    return "number off" if beyond or column.cell(site).startswith("−") else "number"


def _histograms(sites: list[SiteFigures], anchors: dict[str, str]) -> list[dict[str, Any]]:
    from normrewrite.reporting.drawing import histogram

    return [
        {
            "anchor": anchors[site.name],
            "label": site.label,
            "svg": histogram(site.histogram, f"inputs of {site.label} against a Gaussian"),
        }
        for site in sites
        if site.histogram
    ]


def _network(document: Document) -> dict[str, Any] | None:
    comparison = document.facts.comparison
    if comparison is None or not document.facts.came:
        return None
    original = document.original["file"] if document.original else "the original, had back from it"
    verdict = comparison.word.replace("same function", "the same function") if comparison.ok else "another function"
    lead = (
        f"{document.file['file']} against {original}, both in eval on {comparison.inputs:,} inputs: {verdict}, by a tolerance of "
        f"{power(comparison.tolerance, 0)} of the largest output."
    )
    if comparison.left:
        lead += f" Not compared: {', '.join(comparison.left)}."
    heads = ["output", "largest difference", "of largest output", "signal to noise"]
    heads += ["same class"] if any(output.rows for output in comparison.outputs) else []
    heads += ["top-1", "original's top-1"] if comparison.labelled else []
    return {"lead": lead, "heads": heads, "lines": [_output(output, len(heads)) for output in comparison.outputs]}


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
