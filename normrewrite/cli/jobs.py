"""The commands, one line each: its options, its job, and what is said on a terminal while it works.

A job is imported when it is asked for: --help does not wait for torch.
"""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from normrewrite.cli import console
from normrewrite.cli.fields import help_of, parameters, require_bounded
from normrewrite.options.bench import Bench
from normrewrite.options.build import Build
from normrewrite.options.calibrate import Calibrate
from normrewrite.options.convert import Convert
from normrewrite.options.diff import Diff
from normrewrite.options.export import Export
from normrewrite.options.finetune import Finetune
from normrewrite.options.groups import Code
from normrewrite.options.inspect import Inspect
from normrewrite.options.report import Report
from normrewrite.options.revert import Revert
from normrewrite.options.verify import Verify


@dataclass(frozen=True)
class Job:
    """options: the class, by whose name the command and its file in normrewrite.commands are called. doing: what is said
    meanwhile, where the option `over` is given. training: with a bar over its steps, by the first of its processes alone.
    judges: exit code 1 where the result is not `ok`."""

    options: type
    doing: str = ""
    over: str = ""
    training: bool = False
    judges: bool = False

    @property
    def name(self) -> str:
        return self.options.__name__.lower()

    def command(self) -> click.Command:
        """It, as click has it."""
        return click.Command(
            self.name, params=[*parameters(self.options), *printed()], callback=self.run, help=help_of(self.options)
        )

    def run(self, as_json: bool, quiet: bool, **values: Any) -> None:
        require_bounded(values)
        options = self.options(**values)
        source = _source(options)
        silent = quiet or (self.training and os.environ.get("RANK", "0") != "0")
        result: Any = None
        try:
            if missing := getattr(options, "missing", str)():
                raise click.UsageError(missing)
            job = getattr(import_module(f"normrewrite.commands.{self.name}"), self.name)
            with self._watched(options, silent or as_json) as progress:
                result = job(*([] if source is None else [source]), options, progress=progress)
            console.show(result, as_json=as_json, quiet=silent)
        finally:
            for note in () if quiet else (getattr(result, "notes", ()) if source is None else source.notes):
                click.echo(f"note: {note}", err=True)
        if self.judges and not result.ok:
            sys.exit(1)

    def _watched(self, options: Any, quiet: bool) -> AbstractContextManager[Any]:
        if self.training:
            return console.training(quiet=quiet)
        said = self.doing and (not self.over or getattr(options, self.over))
        return console.busy(self.doing, quiet=quiet) if said else nullcontext(lambda *_, **__: None)


def _source(options: Any) -> Any:
    """The model file that a command reads, where it reads one; a fault of it is told before all else."""
    if not isinstance(options, Code):
        return None
    from normrewrite.commands.source import Source

    if options.path is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    return Source.of(options)


def printed() -> list[click.Parameter]:
    """What every command takes that shows a result."""
    return [
        click.Option(["as_json", "--json"], is_flag=True, help="One JSON object on stdout."),
        click.Option(["quiet", "--quiet", "-q"], is_flag=True, help="Print nothing but errors."),
    ]


JOBS = (
    Job(Inspect, "reading", over="advise"),
    Job(Convert, "converting"),
    Job(Calibrate, "calibrating"),
    Job(Revert),
    Job(Report, "reading", over="data"),
    Job(Diff, judges=True),
    Job(Finetune, training=True),
    Job(Export, "exporting"),
    Job(Build, "building"),
    Job(Verify, "comparing", judges=True),
    Job(Bench, "timing"),
)
