"""The options of `bench`."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from normrewrite.options.fields import option, options
from normrewrite.options.groups import Inputs, Source

Runtime = Literal["torch", "onnxruntime"]


@options
class BenchOptions:
    """What runs, and how often."""

    runtime: Runtime = option("What runs a torch model; ONNX files always run in onnxruntime.", default="torch")
    rounds: int = option("Runs of each, in turns.", default=50, least=1)


@options
class Bench(BenchOptions, Inputs, Source):
    """Time MODEL and OTHER, torch or ONNX, in turns on the same batch."""

    other: Path = option("", argument=True)
    _inputs: ClassVar[Any] = Inputs
    batch_size: int = option("With --data: inputs at a time.", default=1, least=1)
    _bench: ClassVar[Any] = BenchOptions
