"""The command `inspect`."""

from collections.abc import Callable

from normrewrite.api.advise import advise
from normrewrite.api.inspect import Inspection
from normrewrite.api.inspect import inspect as inspect_model
from normrewrite.commands.results import Advised
from normrewrite.commands.source import Source, opened
from normrewrite.options.inspect import Inspect


def inspect(source: Source, options: Inspect, progress: Callable[..., object]) -> Inspection | Advised:
    """The norms of a model file; with data, which target suits each."""
    model = source.read().model
    inspection = inspect_model(model)
    if options.advise is None:
        return inspection
    data = opened(options.advise, model, options)
    return Advised(inspection, advise(model, data, batch_size=options.batch_size, progress=progress))
