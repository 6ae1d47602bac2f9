"""Int8: onnxruntime's static quantisation, in the form that TensorRT takes.

>>> quantised = quantise(proto, data, "percentile")

Symmetric Q/DQ with zero-point 0; weights by output channel, activations by tensor. Quantised are the inputs of every
convolution and every product with a weight, and both inputs of a residual add, so that the add needs no other type.
Biases stay fp32: TensorRT has no int32 ones.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from normrewrite import onnx_file
from normrewrite.data import Batch, Data
from normrewrite.errors import NormRewriteError, first_line

Ranges = Literal["minmax", "percentile", "entropy"]
RANGES: dict[Ranges, str] = {"percentile": "Percentile", "minmax": "MinMax", "entropy": "Entropy"}
PERCENTILE = 99.99
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BATCH = 32


def quantise(proto: Any, data: Data, ranges: Ranges = "percentile") -> Any:
    """An onnx.ModelProto with Q/DQ nodes; ranges of activations are those that `data` shows.

    ranges: `minmax`, `percentile` (99.99) or `entropy`. Raises NormRewriteError where the data doesn't fit the model,
    or nothing can be quantised.
    """
    import onnx
    from onnxruntime import quantization as ort

    names = [node.name for node in proto.graph.node if _is_quantised(proto, node)]
    if not names:
        raise NormRewriteError("the model has no convolution and no product with a weight, so nothing to quantise.")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "quantised.onnx"
        try:
            ort.quantize_static(
                proto,
                path,
                _Reader(proto, data),
                per_channel=True,
                activation_type=ort.QuantType.QInt8,
                weight_type=ort.QuantType.QInt8,
                nodes_to_quantize=names,
                calibrate_method=ort.CalibrationMethod[RANGES[ranges]],
                extra_options=_OPTIONS,
            )
        except NormRewriteError:
            raise
        except Exception as error:  # onnxruntime runs the model here, on data of any shape
            raise NormRewriteError(f"int8: onnxruntime can't calibrate the model: {first_line(error)}") from error
        return onnx.load(path)


_OPTIONS = {
    "ActivationSymmetric": True,
    "CalibTensorRangeSymmetric": True,
    "CalibPercentile": PERCENTILE,
    "CalibStridedMinMax": 1,  # one batch at a time, whatever the method: activations of all would not fit in memory
    "MatMulConstBOnly": True,
    "OpTypesToExcludeOutputQuantization": [*_LAYERS, "Add"],
    "QDQKeepRemovableActivations": True,
    "QuantizeBias": False,
}


def _is_quantised(proto: Any, node: Any) -> bool:
    if node.op_type != "Add":
        return node.op_type in _LAYERS
    constants = {tensor.name for tensor in proto.graph.initializer}
    constants |= {name for other in proto.graph.node if other.op_type == "Constant" for name in other.output}
    return not constants.intersection(node.input)


class _Reader:
    """What quantize_static reads batches from: it asks for parts by number, and counts them first."""

    def __init__(self, proto: Any, data: Data) -> None:
        self.wanted = [value.name for value in proto.graph.input]
        first = proto.graph.input[0].type.tensor_type.shape.dim[0]
        self.batches = list(data.batches(first.dim_value or _BATCH))
        if not self.batches:
            raise NormRewriteError("the calibration data held no batch. Give at least one input.")
        self.set_range(0, len(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left: Iterator[Batch] = iter(self.batches[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.left, None)
        return None if batch is None else onnx_file.feed(batch, self.wanted, "the model")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime prints its progress and advises a preparation that would rename the nodes."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
