"""The options of `inspect`."""

from typing import Any, ClassVar

from normrewrite.options.fields import option, options
from normrewrite.options.groups import BatchSize, Pixels, Source


@options
class Inspect(Pixels, BatchSize, Source):
    """List the norms of a model and its traps; with data, which target suits each norm."""

    advise: str | None = option(
        "Say which target suits each norm and why, from this data, no labels needed.",
        default=None,
        metavar="DATA",
        file=True,
    )
    _pixels: ClassVar[Any] = Pixels
    _batch: ClassVar[Any] = BatchSize
