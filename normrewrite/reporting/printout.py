"""What the command `report` returns: a document, as far as lines and tables can tell it."""

from dataclasses import dataclass
from typing import Any

from normrewrite.reporting.columns import SITE, used
from normrewrite.reporting.document import Document
from normrewrite.reporting.facts import Facts, SiteFigures
from normrewrite.results import Result, Summary, Table, Title, Verdict, Wrote, apart

_BARS = " ▁▂▃▄▅▆▇█"
_SPARKS = 16  # characters of a histogram


@dataclass
class Printout(Result):
    """output: the page that was written, if any; brief: a few lines, as the page tells the rest."""

    document: Document
    output: str = ""
    brief: bool = False

    @property
    def facts(self) -> Facts:
        return self.document.facts

    def as_dict(self) -> dict[str, Any]:
        return {**self.document.as_dict(), "output": self.output or None}

    def summary(self) -> Summary:
        parts = [] if self.brief else [*([table] for table in _tables(self.facts.sites)), *_rest(self.document)]
        return [*apart([_head(self.document), *parts]), *([Wrote(self.output)] if self.output else [])]


def _head(document: Document) -> Summary:
    """What it is, the verdict, and what matters most."""
    mood, word, finding = document.verdict
    figures = [f"  {value}{f' {unit}' if unit else ''} {what}" for value, unit, what in document.figures]
    return [Title(f"{document.file['file']}: {document.lead}"), Verdict(f"{word} {finding}", mood), *figures]


def _rest(document: Document) -> list[Summary]:
    """What stands below the tables of sites."""
    facts = document.facts
    network = [] if facts.comparison is None or not facts.came else [facts.comparison.summary()]
    latency = [] if facts.bench is None else [facts.bench.summary()]
    commands = [f"  {command}" for command in document.commands]
    again: Summary = ["to do it again:", *commands, *(f"{name}: {origin}" for name, origin in document.origins)]
    return [*network, *latency, again, *([note] for note in facts.notes)]


def _tables(sites: list[SiteFigures]) -> list[Table]:
    """The table by site, in parts that fit a terminal."""
    tables, columns = [], used(sites)
    for part in dict.fromkeys(column.part for column in columns):
        shown = [SITE, *(column for column in columns if column.part == part)]
        heads, units = [column.head for column in shown], [column.unit for column in shown]
        lines = [[column.cell(site) for column in shown] for site in sites]
        if part == "inputs" and any(site.histogram for site in sites):
            heads, units = [*heads, "inputs"], [*units, "−4.8σ to +4.8σ"]
            lines = [[*line, sparks(site)] for line, site in zip(lines, sites, strict=True)]
        tables.append(Table(heads, lines, units))
    return tables


def sparks(site: SiteFigures) -> str:
    """A histogram in one line of text."""
    if not site.histogram:
        return ""
    width = len(site.histogram) // _SPARKS
    sums = [sum(site.histogram[i : i + width]) for i in range(0, len(site.histogram), width)]
    return "".join(_BARS[round((len(_BARS) - 1) * share / max(sums))] for share in sums)
