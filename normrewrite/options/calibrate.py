"""The options of `calibrate`."""

from pathlib import Path
from typing import Any, ClassVar

from normrewrite.options.fields import option, options
from normrewrite.options.groups import DATA, BatchSize, Overwrite, Pixels, Source


@options
class Calibrate(Pixels, BatchSize, Overwrite, Source):
    """Bring a converted network nearer to its original on unlabelled data; the way back stays exact.

    Training comes nearer to the original's eval, with eval as it was, and how far it is from the original's training is told
    beside; norms that can't be exact are fitted to the original. Or, for any network, measure running statistics anew
    (--statistics), or take back what changed weights have shifted (--biases): what it computes changes, and the way back gives
    the nearest.
    """

    data: str = option(DATA, metavar="DATA", file=True)
    statistics: bool = option(
        "Instead: measure batch norms' running statistics anew, for inputs that are no longer the training's.",
        default=False,
    )
    biases: Path | None = option(
        "Instead: correct each bias, so that outputs have the means of this network's, which had other weights; on the first "
        "--batch-size inputs.",
        default=None,
        metavar="ORIGINAL",
        file=True,
    )
    _pixels: ClassVar[Any] = Pixels
    _batch: ClassVar[Any] = BatchSize
    output: Path | None = option(
        "Output file.  [default: MODEL.calibrated.pt beside the input]", default=None, short="-o", silent=True
    )
    _force: ClassVar[Any] = Overwrite

    def missing(self) -> str:
        return "--statistics or --biases: one at a time." if self.statistics and self.biases else ""
