"""The options of `build`."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from normrewrite.options.fields import option, options
from normrewrite.options.groups import Overwrite


@options
class Builder:
    """Who builds."""

    runtime: Literal["rtx", "tensorrt"] = option("The builder.", default="rtx")


@options
class BuildOptions(Builder, Overwrite):
    """What an engine is built with."""

    timing_cache: Path | None = option(
        "For tensorrt: measurements kept between builds.", default=None, metavar="FILE", silent=True
    )
    plugins: str = option(
        "Who takes norms that measure at inference: normrewrite's plugins in Python, function bodies, or a library's plugins.",
        default="off",
        metavar="auto|off|PATH.so",
    )
    _force: ClassVar[Any] = Overwrite


@options
class Build(BuildOptions):
    """Build a TensorRT engine from ONNX. Exit code 1 where it doesn't keep the precision of the file."""

    model: Path = option("", argument=True)
    output: Path = option("The engine file to write.", short="-o", silent=True)
    _builder: ClassVar[Any] = Builder
    gpu: str = option("For rtx: GPUs to build for, which need not be here: sm86,sm89.", default="", metavar="SM[,SM]")
    low: tuple[str, ...] = option(
        "Smallest input: 1,3,32,32 or input:1,3,32,32.", default=(), flag="--min", metavar="SHAPE"
    )
    middle: tuple[str, ...] = option(
        "The input to tune for.  [default: a batch of 8]", default=(), flag="--opt", metavar="SHAPE"
    )
    high: tuple[str, ...] = option(
        "Largest input.  [default: a batch of 32]", default=(), flag="--max", metavar="SHAPE"
    )
    _build: ClassVar[Any] = BuildOptions
