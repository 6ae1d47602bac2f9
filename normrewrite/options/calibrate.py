"""The options of `calibrate`."""

from pathlib import Path
from typing import Any, ClassVar

from normrewrite.options.fields import option, options
from normrewrite.options.groups import DATA, BatchSize, Overwrite, Pixels, Source


@options
class Calibrate(Pixels, BatchSize, Overwrite, Source):
    """Bring a converted network nearer to its original on unlabelled data; the way back stays exact.

    Training comes nearer to the original's eval, with eval as it was, and how far it is from the original's training is told
    beside; norms that can't be exact are fitted to the original.
    """

    data: str = option(DATA, metavar="DATA", file=True)
    _pixels: ClassVar[Any] = Pixels
    _batch: ClassVar[Any] = BatchSize
    output: Path | None = option(
        "Output file.  [default: MODEL.calibrated.pt beside the input]", default=None, short="-o", silent=True
    )
    _force: ClassVar[Any] = Overwrite
