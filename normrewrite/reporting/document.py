"""A report put together: the facts of a network, the files that they are about, and the words for both."""

import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from normrewrite.provenance import history
from normrewrite.reporting.columns import power
from normrewrite.reporting.facts import Facts, SiteFigures
from normrewrite.results import Mood
from normrewrite.targets import TARGETS


@dataclass
class Document:
    """facts: normrewrite.reporting.facts; file, original, data: digests (normrewrite.provenance.digests.of_file) of what was
    read; record: the manifest; command: the words of the command that made this."""

    facts: Facts
    file: dict[str, Any]
    original: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    record: dict[str, Any] | None = None
    command: list[str] = field(default_factory=list)
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d"))

    def as_dict(self) -> dict[str, Any]:
        files = {"file": self.file, "original": self.original, "data": self.data}
        made = {"files": files, "versions": history.versions(), "machine": machine(), "command": self.command}
        return {**made, **self.facts.as_dict(), "manifest": self.record}

    @property
    def verdict(self) -> tuple[Mood, str, str]:
        """A mood, a word or two, and what was found."""
        facts = self.facts
        if not facts.rewritten:
            return "plain", "An original.", f"None of its {len(facts.sites)} norms was rewritten."
        exact, rest = len(facts.exact), len(facts.rewritten) - len(facts.exact)
        beyond = f"{rest} of {len(facts.rewritten)} sites can't be exact or have no figure; their notes say why."
        if not facts.ok:
            return (
                "bad",
                "Another function.",
                f"Exact sites differ beyond their tolerance, the largest by {power(facts.difference)}.",
            )
        if facts.difference is None:
            return "mixed", "Not exact.", beyond
        limit = max(site.tolerance or 0.0 for site in facts.exact)
        within = (
            f"In eval no exact site differs by more than {power(facts.difference)} of its largest output (tolerance "
            f"{power(limit, 0)})."
        )
        if rest:
            return "mixed", f"Same function at {exact} sites.", f"{within} {beyond}"
        return "good", "Same function.", within

    @property
    def lead(self) -> str:
        facts = self.facts
        count = f"{type(facts.model).__name__}, {facts.parameters:,} parameters"
        if not facts.rewritten:
            return f"{count}."
        known = (self.record or {}).get("original", {}).get("file")
        name = self.original["file"] if self.original else known
        came = f", rewritten from {name}" if name else ", a rewritten network"
        back = "; the original was had back from it" if facts.came == "had back" else ""
        return f"{count}{came}{back}."

    @property
    def figures(self) -> list[tuple[str, str, str]]:
        """(figure, unit, what it is) of what matters most."""
        facts = self.facts
        shown = [(f"{len(facts.rewritten)} of {len(facts.sites)}", "sites", f"rewritten: {_counts(facts.rewritten)}")]
        if facts.difference is not None:
            shown.append((power(facts.difference), "", "largest eval difference of a site, of its largest output"))
        shown += self._of_network()
        if facts.bench is not None:
            what = f"time a batch, over the original's ({facts.bench.runtime})"
            shown.append((f"{facts.bench.ratio:.3f}", "×", what))
        if facts.advice is not None and facts.rewritten:
            dead = sum(site.advice.dead for site in facts.sites if site.advice is not None)
            shown.append((str(dead), "channels", f"dead: constant on all {facts.advice.inputs:,} inputs"))
        return shown

    def _of_network(self) -> list[tuple[str, str, str]]:
        comparison = self.facts.comparison
        if comparison is None:
            return []
        shown = []
        if self.facts.came:
            largest = f"largest difference of the outputs, {comparison.inputs:,} inputs"
            shown.append((power(comparison.max_abs), "", largest))
        output = next((output for output in comparison.outputs if output.judged), None)
        if output is not None and comparison.labelled:
            now, before = (f"{100 * right / output.rows:.2f}" for right in output.right)
            was = f"; the original {before} %" if self.facts.came else ""
            shown.append((now, "%", f"of {output.rows:,} labelled inputs right (top-1){was}"))
        return shown

    @property
    def commands(self) -> list[str]:
        """What was run to get here, as the manifest says, and what made this report."""
        steps = [step["command"] for step in (self.record or {}).get("steps", [])]
        return [history.as_shell(words) for words in [*steps, self.command] if words]

    @property
    def origins(self) -> list[tuple[str, str]]:
        """Files and versions."""
        record = self.record or {}
        made = record.get("original")
        same = made and self.original and made.get("sha256") == self.original["sha256"]
        read = [("model", self.file), ("original, by the manifest" if not same else "original", made)]
        read += [("original, as given", None if same else self.original), ("data", self.data)]
        origins = [(name, _digest(file)) for name, file in read if file]
        origins += [("manifest", f"{len(record['sites'])} sites, {_covered(record)}")] if record else []
        origins += [("versions, when written", _versions(record["versions"]))] if "versions" in record else []
        seeds = sorted({str(step.get("seed")) for step in record.get("steps", [])})
        origins += [("seeds", ", ".join(seeds))] if seeds else []
        return [*origins, ("versions of this report", _versions(history.versions())), ("machine", machine())]

    @property
    def manifest(self) -> str:
        return "" if self.record is None else json.dumps(self.record, indent=1)


def _covered(record: Mapping[str, Any]) -> str:
    if "sha256" not in record:
        return "no digests: it is an older file's"
    return f"{len(record.get('tensors', ()))} tensors with their digests, SHA-256 {record['sha256']}"


def _counts(sites: list[SiteFigures]) -> str:
    """`17 l1, 2 linf`."""
    return ", ".join(f"{n} {target}" for target, n in Counter(site.target for site in sites).most_common()) or "none"


def summary(target: str) -> str:
    """What a target is, in words."""
    known = TARGETS.get(target.partition(":")[0])
    return "" if known is None else known.summary


def _digest(file: Mapping[str, Any]) -> str:
    size = f", {file['bytes']:,} bytes" if "bytes" in file else ""
    return f"{file['file']}{size}{', SHA-256 ' + str(file['sha256']) if 'sha256' in file else ''}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def machine() -> str:
    """What computed, as far as it says so itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{named[0] if named else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
