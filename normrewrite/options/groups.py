"""Options that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from normrewrite.options.fields import option, options

DATA = "A .npz (arrays named as forward's arguments, or images; labels), a .npy, a folder of images, or module:factory."


@options
class Found:
    """How the weights in a file are found, without the code that they belong to."""

    key: str | None = option(
        "Where in a checkpoint the state_dict is, dotted; of the files that have it.",
        default=None,
        metavar="K",
        silent=True,
    )
    allow: tuple[str, ...] = option(
        "A further class that a pickled module may hold; repeatable.", default=(), metavar="MODULE:CLASS", silent=True
    )
    trust: bool = option("Unpickle freely: runs any code that the file contains.", default=False, silent=True)


@options
class Code(Found):
    """How a model file is read. A history words it as normrewrite.commands.words has it."""

    arch: str | None = option(
        "Code of a state_dict: PATH.py:factory, module:factory, timm:NAME or torchvision:NAME.",
        default=None,
        metavar="WHERE:FACTORY",
        silent=True,
    )
    arch_args: tuple[str, ...] = option(
        "Keyword argument of the factory; repeatable.", default=(), metavar="K=V", silent=True
    )
    _found: ClassVar[Any] = Found
    device: str = option("Where to compute: cpu, cuda, cuda:1, ...", default="cpu", silent=True)

    @property
    def path(self) -> Path | None:
        """The model file, where one is named."""
        return getattr(self, "model", None)


@options
class Source(Code):
    """The model file that a command reads."""

    model: Path = option("", argument=True, silent=True)
    _code: ClassVar[Any] = Code


@options
class Pixels:
    """How uint8 images become numbers."""

    mean: Sequence[float] | None = option(
        "Mean of uint8 images, pixels in 0..1.", default=None, metavar="R,G,B", numbers=True
    )
    std: Sequence[float] | None = option(
        "Standard deviation of uint8 images, pixels in 0..1.", default=None, metavar="R,G,B", numbers=True
    )


@options
class BatchSize:
    """How many inputs are computed at a time."""

    batch_size: int = option(
        "Inputs at a time; for calibration and advice that of the training to come.", default=250, least=1
    )


@options
class Inputs(Pixels):
    """What goes into a network: data, or random numbers."""

    data: str | None = option(DATA, default=None, metavar="DATA", file=True)
    input_shape: str | None = option(
        "Random input of this shape instead, as in 1,3,32,32.", default=None, metavar="N,C,..."
    )
    _pixels: ClassVar[Any] = Pixels


@options
class Overwrite:
    """What a command that writes asks before it does."""

    force: bool = option("Overwrite an existing output.", default=False, silent=True)
