"""The command `revert`."""

from collections.abc import Callable
from dataclasses import replace

from normrewrite.commands.job import Job
from normrewrite.commands.results import Reverted
from normrewrite.commands.source import Source
from normrewrite.options.revert import Revert
from normrewrite.passes.reversion import reverted


def revert(source: Source, options: Revert, progress: Callable[..., object]) -> Reverted:
    """Write a twin's file back as a network with torch's own batch norms."""
    job = Job(source, options, "reverted")
    job.check()
    file = source.read()
    came = job.came(file)
    model, names, trained = reverted(file.model)
    job.save(file, model, replace(came, report=None))
    return Reverted(names, trained, str(job.output))
