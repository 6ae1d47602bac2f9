"""What every command that writes has in common: checks before any work, the history, and the file itself.

>>> job = Job(source, options, "calibrated")
>>> job.check(); file = source.read(); ...; job.save(file, twin)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from normrewrite import files
from normrewrite.commands import words
from normrewrite.commands.source import Source, derived
from normrewrite.options.fields import read_by
from normrewrite.provenance.history import History
from normrewrite.provenance.report import Report


class Job:
    """One run of a command. word: what is put into the model file's name, where the options name no `output`."""

    def __init__(self, source: Source, options: Any, word: str) -> None:
        self.source, self.options = source, options
        self.output: Path = options.output or derived(source.path, word)

    def check(
        self,
        kind: str = "a torch file",
        outputs: Mapping[str, Path | None] | None = None,
        inputs: Mapping[str, object] | None = None,
        going_on: bool = False,
    ) -> None:
        """Raises where an output can't be written, or is a file that the command reads. outputs, inputs: further
        ones. going_on: with what an earlier run has left."""
        written, read = {"-o": self.output, **(outputs or {})}, read_by(self.options) | dict(inputs or {})
        self.source.check_outputs(written, going_on or self.options.force, read, kind)

    def came(self, file: files.ModelFile) -> History:
        """The history of what is to be written, of the files as they are now."""
        return words.came(self.source, file.manifest, self.options)

    def save(
        self,
        file: files.ModelFile,
        twin: nn.Module,
        came: History,
        report: Report | None = None,
        beside: Path | None = None,
    ) -> files.Form:
        """Write what came of a file in its form; and its manifest, where that is to be a file: both or neither."""
        force = self.options.force
        with files.with_manifest(twin.cpu(), beside, report, came, force):
            return self.source.save(file, twin, self.output, report=report, history=came, force=force)
