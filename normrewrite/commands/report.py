"""The command `report`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from normrewrite import files
from normrewrite.api.bench import bench
from normrewrite.commands import words
from normrewrite.commands.source import Source, opened
from normrewrite.data import Data
from normrewrite.errors import NormRewriteError
from normrewrite.options.bench import Runtime
from normrewrite.options.fields import read_by
from normrewrite.options.report import Report
from normrewrite.provenance import digests, history, manifest
from normrewrite.reporting.document import Document
from normrewrite.reporting.facts import Facts, gather
from normrewrite.reporting.printout import Printout

ROUNDS = 100


def report(source: Source, options: Report, progress: Callable[..., object]) -> Printout:
    """Tell everything of a network, rewritten or not; as a page where there is an `output`.

    The original is the one that the options name, of the same --arch; by default what the twin itself gives back. Data's labels
    give the accuracy.
    """
    source.check_outputs({"-o": options.output}, options.force, read_by(options), "a page")
    if options.latency is not None and options.data is None:
        raise NormRewriteError("--latency of what input? Give --data FILE: the first one is timed.")
    original = options.original or _beside(source)
    file, *originals = source.read_all(source.path, *([] if original is None else [original]))
    first = originals[0].model if originals else None
    data = None if options.data is None else opened(options.data, file.model, options)
    record = file.manifest if file.manifest is not None else _derived(file.model)
    facts = gather(file.model, first, data, record=record, batch_size=options.batch_size, progress=progress)
    if options.latency is not None and data is not None:
        _time(facts, first, data, options.latency)
    named, seen = (None if path is None else _digest(Path(path)) for path in (original, options.data))
    command = words.step(source, options)["command"]
    document = Document(facts, digests.of_file(source.path), named, seen, record, command)
    if options.output is not None:
        from normrewrite.reporting import html

        content = html.page(document)
        files.write_atomically(options.output, lambda temporary: Path(temporary).write_bytes(content), options.force)
    return Printout(document, str(options.output or ""), brief=options.output is not None and not options.text)


def _beside(source: Source) -> Path | None:
    """The original of a trained twin: the file that its manifest names, where it lies beside it and has those very bytes."""
    record = files.look(source.path, key=source.key, allow=source.allow, trust=source.trust).manifest
    named = (record or {}).get("original")
    if not named or not history.is_changed(record or {}):  # the twin itself gives it back
        return None
    path = source.path.with_name(Path(named["file"]).name)
    same = path.is_file() and path.stat().st_size == named.get("bytes") and digests.of_file(path) == named
    return path if same else None


def _derived(model: nn.Module) -> dict[str, Any] | None:
    """What a pickled module tells itself: it has no manifest in its file."""
    record = manifest.describe(model)
    return manifest.seal(record, model.state_dict()) if record["sites"] else None


def _digest(path: Path) -> dict[str, Any]:
    return digests.of_file(path) if path.is_file() else {"file": path.name}


def _time(facts: Facts, original: nn.Module | None, data: Data, runtime: Runtime) -> None:
    """Latency of the rewritten network against the original, or against what it gives back."""
    from normrewrite.diagnostics.remeasure import had_back

    first = original if original is not None else had_back(facts.model)[0]
    if first is None:
        facts.notes.append("Latency was not measured: there is no original to compare with.")
        return
    facts.bench = bench(first, facts.model, data.first(1).inputs, runtime=runtime, rounds=ROUNDS)
