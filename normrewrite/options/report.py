"""The options of `report`."""

from pathlib import Path
from typing import Any, ClassVar

from normrewrite.options.bench import Runtime
from normrewrite.options.fields import option, options
from normrewrite.options.groups import DATA, BatchSize, Overwrite, Pixels, Source


@options
class Report(Pixels, BatchSize, Overwrite, Source):
    """Show a network, rewritten or not: sites, figures, histograms, accuracy, manifest; as a page, text or JSON."""

    original: Path | None = option(
        "The network before the rewrite.  [default: had back from the twin itself]", default=None, file=True
    )
    data: str | None = option(DATA, default=None, metavar="DATA", file=True)
    _pixels: ClassVar[Any] = Pixels
    _batch: ClassVar[Any] = BatchSize
    latency: Runtime | None = option(
        "Time MODEL and the original there, too, on the first input of --data.", default=None
    )
    output: Path | None = option(
        "Write a page: one HTML file.  [default: the report as text]", default=None, short="-o", silent=True
    )
    text: bool = option("With -o: print the report as text, too.", default=False, silent=True)
    _force: ClassVar[Any] = Overwrite
