"""The options of `revert`."""

from pathlib import Path
from typing import Any, ClassVar

from normrewrite.options.fields import option, options
from normrewrite.options.groups import Overwrite, Source


@options
class Revert(Overwrite, Source):
    """Give a converted network its original batch norms back, to the bit."""

    output: Path | None = option(
        "Output file.  [default: MODEL.reverted.pt beside the input]", default=None, short="-o", silent=True
    )
    _force: ClassVar[Any] = Overwrite
