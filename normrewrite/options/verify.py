"""The options of `verify`."""

from pathlib import Path
from typing import Any, ClassVar

from normrewrite.options.fields import option, options
from normrewrite.options.groups import BatchSize, Code, Inputs


@options
class VerifyOptions(BatchSize):
    """How far two networks may be apart; None: as the coarser precision of the two allows."""

    tolerance: float | None = option(
        "Of the largest number of an output.  [default: by precision, 1e-4 for fp32]", default=None
    )
    min_snr: float | None = option(
        "Least signal to noise; the signal is how an output varies from input to input.  "
        "[default: by precision, 20 for fp32 and fp16, 10 for bf16 and int8]",
        default=None,
        metavar="DB",
    )
    min_agreement: float | None = option(
        "Least share of inputs with the same class, 0 to 1, where there are classes.  "
        "[default: by precision, 0 for fp32, 0.9 for fp16, 0.75 for bf16, 0.8 for int8]",
        default=None,
        metavar="SHARE",
    )


@options
class Verify(VerifyOptions, Inputs, Code):
    """Run the same inputs through MODEL and OTHER, torch or ONNX. Exit code 1 where they differ beyond tolerance."""

    model: Path | None = option("", default=None, argument=True, silent=True)
    _code: ClassVar[Any] = Code
    other: Path | None = option("", default=None, argument=True)
    _inputs: ClassVar[Any] = Inputs
    _verify: ClassVar[Any] = VerifyOptions
    layers: bool = option("Compare layer by layer, too, on the first 8 inputs.", default=False)
    manifest: Path | None = option(
        "Instead: check this manifest (.json, or a twin's) against MODEL, by default FILE itself, byte by byte.",
        default=None,
        metavar="FILE",
        file=True,
    )
    original: Path | None = option(
        "With --manifest: the network before the rewrite.", default=None, metavar="FILE", file=True
    )

    @property
    def path(self) -> Path | None:
        """--manifest alone is about the file that carries it."""
        return self.model or self.manifest

    def missing(self) -> str:
        one = (self.other is None) != (self.manifest is None)
        return "" if one else "Missing argument 'OTHER', or option '--manifest'; one of the two."
