"""The options of `export`."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from normrewrite.options.fields import option, options
from normrewrite.options.groups import Inputs, Overwrite, Source

Deploy = Literal["fold", "op"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Ranges = Literal["percentile", "minmax", "entropy"]


@options
class Form:
    """What norms and numbers become in the file."""

    deploy: Deploy = option(
        "fold: standard operators alone. op: a norm that measures at inference is one node, with its body as a function.",
        default="fold",
    )
    live_stats: bool = option("Batch norms measure each batch, instead of using running statistics.", default=False)
    bodies: bool = option("For op: bodies, or nodes for plugins alone.", default=True, off="--no-bodies")
    precision: Precision = option("What the network computes in; bf16 needs --opset 22.", default="fp32")


@options
class ExportOptions(Form, Overwrite):
    """What a file is to be like."""

    ranges: Ranges = option(
        "For int8: how ranges follow from the activations; percentile is 99.99.", default="percentile"
    )
    keep_io_types: bool = option("For fp16 and bf16: inputs and outputs stay fp32.", default=False)
    opset: int = option("ONNX opset, 18 to 23.", default=20)
    dynamic_batch: bool = option(
        "Leave the batch size open, or fix it to the example's.", default=True, off="--static-batch"
    )
    dynamic_size: bool = option("Leave the sizes behind the channels open.", default=False, off="--static-size")
    _force: ClassVar[Any] = Overwrite


@options
class Export(ExportOptions, Inputs, Source):
    """Write ONNX with the norms folded away, or as nodes of their own, in one file."""

    _inputs: ClassVar[Any] = Inputs
    output: Path = option("The ONNX file to write.", short="-o", silent=True)
    _form: ClassVar[Any] = Form
    calibrate: str | None = option(
        "For int8: unlabelled inputs that show how far activations reach, where finetune --precision int8 has not learned it.",
        default=None,
        metavar="DATA",
        file=True,
    )
    _export: ClassVar[Any] = ExportOptions
