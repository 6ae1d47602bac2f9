"""A manifest, derived again from the files that it is about: any change of a byte that matters is told.

>>> print(audit(Source(Path("model.l1.pt")), None, Path("model.pt")))
same: nothing that the manifest covers has changed

Bytes need no code: the record against its own digest, every tensor against its digest, the original's file against its.
Where the architecture is at hand too, the sites are found again, the original is had back and compared to the bit, and each
site's difference and error are measured again.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from normrewrite import files
from normrewrite.commands.source import Source, by_key
from normrewrite.diagnostics.remeasure import had_back, measure
from normrewrite.errors import NormRewriteError
from normrewrite.provenance import digests, history, manifest
from normrewrite.results import Result, Summary, Table, Verdict

_STATISTICS = ("running_mean", "running_var", "running_scale", "num_batches_tracked")


@dataclass(frozen=True)
class Finding:
    """One check. what: `manifest`, `tensor`, `original`, `site`; name: of the tensor, file or site; told: what was found."""

    what: str
    name: str
    ok: bool
    told: str


@dataclass
class Audit(Result):
    """Every check of one manifest, and what could not be checked."""

    name: str
    findings: list[Finding]
    unchecked: list[str]

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.ok]

    @property
    def ok(self) -> bool:
        return not self.failed

    def as_dict(self) -> dict[str, Any]:
        failed = [asdict(finding) for finding in self.failed]
        return {"ok": self.ok, "checks": len(self.findings), "failed": failed, "unchecked": self.unchecked}

    def summary(self) -> Summary:
        lines = [(finding.what, finding.name, finding.told) for finding in self.failed]
        failed = [Table(("changed", "name", "what was found"), lines)] if lines else []
        checks = f"{len(self.findings)} checks of {self.name}'s manifest"
        verdict = (
            Verdict(f"same: nothing that the manifest covers has changed ({checks})", "good")
            if self.ok
            else Verdict(f"DIFFERENT: {len(lines)} of {checks} failed", "bad")
        )
        return [*failed, *(f"not checked: {what}" for what in self.unchecked), verdict]


def audit(source: Source, record_file: Path | None, original: Path | None) -> Audit:
    """Check the manifest of a model file, or the one in `record_file`, against the files.

    source: the twin; without an architecture only bytes are compared. original: the network before the rewrite.
    Raises NormRewriteError where there is no manifest, or an older one without digests.
    """
    others = [] if original is None else [original]
    content = _content(source, others)
    record = content.manifest if record_file in (None, source.path) else _record_in(record_file, source)
    record = _with_digests(record, source.path)
    findings = [_record(record), *_tensors(record["tensors"], content.state)]
    unchecked: list[str] = []
    if original is None:
        unchecked.append("the original's file: give it as --original")
    else:
        findings.append(_original(record, original))
    if any(entry.get("forgotten") for entry in record["sites"]):
        unchecked.append("the way back and the sites' figures: the original was forgotten")
    if not (isinstance(content.found, nn.Module) or source.arch or (source.trust and "arch" in record)):
        return Audit(source.path.name, findings, [*unchecked, "the sites: name the code they belong to with --arch"])
    twin, *originals = (file.model for file in source.read_all(source.path, *others))
    first = next(iter(originals), None)
    return Audit(source.path.name, [*findings, *_sites(record, twin), *_figures(record, twin, first)], unchecked)


def _content(source: Source, others: list[Path]) -> files.Content:
    if source.path.suffix == ".json":
        raise NormRewriteError(
            f"{source.path} is a manifest alone. Name the model that it is about, too: "
            f"normrewrite verify MODEL --manifest {source.path.name}."
        )
    look = partial(files.look, allow=source.allow, trust=source.trust)
    contents = by_key(look, source.key, source.path, *others)
    source.notes.extend(note for content in contents for note in content.notes if note not in source.notes)
    return contents[0]


def _record_in(path: Path, source: Source) -> dict[str, Any] | None:
    record = partial(files.record, allow=source.allow, trust=source.trust)
    return by_key(record, source.key, path, source.path)[0]


def _with_digests(record: dict[str, Any] | None, path: Path) -> dict[str, Any]:
    if record is None:
        raise NormRewriteError(
            f"{path}: carries no manifest. It is no twin of normrewrite's, or a pickled module: those have theirs in a file of "
            "its own (convert --manifest FILE); give that as --manifest."
        )
    if "tensors" not in record or "sha256" not in record:
        raise NormRewriteError(
            f"{path}: its manifest carries no digests, so there is nothing to check it by. It was written by an older "
            "normrewrite, or is damaged: convert the original again."
        )
    return record


def _record(record: dict[str, Any]) -> Finding:
    same = record["sha256"] == digests.of_record(record)
    words = "as it was written" if same else "a field is not what was written: the record's digest differs"
    return Finding("manifest", "the record", same, words)


def _tensors(wanted: Mapping[str, str], state: Mapping[str, Any]) -> list[Finding]:
    current = digests.of_tensors(state)
    pairs = [(name, wanted.get(name), current.get(name)) for name in dict.fromkeys((*wanted, *current))]
    return [Finding("tensor", name, before == now, _change(name, before, now)) for name, before, now in pairs]


def _change(name: str, before: str | None, now: str | None) -> str:
    last = name.rpartition(".")[2]
    kind = "kept of the original" if ".origin." in f".{name}" else "statistics" if last in _STATISTICS else "weights"
    if before == now:
        return kind
    return f"{kind}: {'is not in the manifest' if before is None else 'is missing' if now is None else 'bytes differ'}"


def _original(record: Mapping[str, Any], path: Path) -> Finding:
    files.recognise(path)
    known, current = record.get("original"), digests.of_file(path)
    if known is None:
        return Finding("original", path.name, False, "the manifest names no original")
    same = known.get("sha256") == current["sha256"]
    words = "the file that was rewritten" if same else f"another file than {known['file']!r} that was rewritten"
    return Finding("original", path.name, same, words)


def _sites(record: Mapping[str, Any], twin: nn.Module) -> list[Finding]:
    """What the record says of each site against what the twin itself tells."""
    entries = {entry["names"][0]: entry for entry in manifest.describe(twin)["sites"]}
    findings = []
    for entry in record["sites"]:
        own = entries.pop(entry["names"][0], {})
        differing = [key for key in manifest.TOLD if own.get(key) != entry.get(key)]
        differences = "; ".join(f"{key} {entry.get(key)!r}, and the twin says {own.get(key)!r}" for key in differing)
        findings.append(
            Finding("site", entry["names"][0], not differing, differences or f"{entry['was']} -> {entry['to']}")
        )
    return findings + [Finding("site", name, False, "rewritten, and not in the manifest") for name in entries]


def _figures(record: Mapping[str, Any], twin: nn.Module, original: nn.Module | None) -> list[Finding]:
    """The original in the twin, to the bit; and each site's figures, measured again."""
    before, trained = had_back(twin)
    findings = [] if original is None or before is None else _bits(before, original, trained, record)
    known = {entry["names"][0]: entry for entry in record["sites"]}
    for site in measure(twin).rewritten:
        entry = known.get(site.names[0], {})
        if site.tolerance is None or site.difference is None:
            continue
        pairs = [(entry.get("difference"), site.difference), (entry.get("error"), site.error)]
        beyond = [f"{was!r}, measured again {now:.2g}" for was, now in pairs if not _alike(was, now, site.tolerance)]
        findings.append(Finding("figures", site.label, not beyond, "; ".join(beyond) or f"error {site.error:.1e}"))
    return findings


def _alike(recorded: float | None, derived: float | None, limit: float) -> bool:
    """Another machine rounds otherwise, so both have to be within the tolerance, and not the same to the bit."""
    return derived is None or (derived <= limit and (recorded is None or recorded <= limit))


def _bits(before: nn.Module, original: nn.Module, trained: list[str], record: Mapping[str, Any]) -> list[Finding]:
    """The original's tensors, had back from the twin; only a training may have changed them."""
    wrong = [f for f in _tensors(digests.of_tensors(original.state_dict()), before.state_dict()) if not f.ok]
    if not wrong:
        return [Finding("original", "tensors", True, "the twin gives back the same bits")]
    if trained or not record.get("steps") or history.is_changed(record):
        return [Finding("original", "tensors", True, f"{len(wrong)} tensors were trained since")]
    return [Finding("original", f.name, False, f"{f.told} from what the twin gives back") for f in wrong]
