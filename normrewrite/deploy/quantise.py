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
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from normrewrite.data import Batch, Data
from normrewrite.deploy import onnx_file
from normrewrite.errors import NormRewriteError, first_line
from normrewrite.options.export import Ranges

RANGES: dict[Ranges, str] = {"percentile": "Percentile", "minmax": "MinMax", "entropy": "Entropy"}
PERCENTILE = 99.99
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BATCH = 32


def quantise(
    proto: Any,
    data: Data | None,
    ranges: Ranges = "percentile",
    *,
    learned: Mapping[str, float] = MappingProxyType({}),
    kept: Collection[str] = (),
) -> Any:
    """An onnx.ModelProto with Q/DQ nodes; ranges of activations are those that `data` shows.

    ranges: `minmax`, `percentile` (99.99) or `entropy`. learned: ranges that are known, by tensor, and taken as they are;
    without data all others stay in floating point. kept: modules that do so anyway. Raises NormRewriteError where the data
    doesn't fit the model, or nothing can be quantised.
    """
    nodes = unkept(proto, kept)
    if data is None:
        nodes = [node for node in nodes if all(name in learned for name in activations(node))]
    if not nodes:
        raise NormRewriteError(
            "int8: nothing to quantise: no convolution and no product with a weight, but for what is kept in floating point or "
            "has no range. Use --precision fp32 or fp16."
        )
    with _quiet():
        try:
            quantised = (
                _by_ranges(proto, nodes, learned) if data is None else _by_data(proto, nodes, data, ranges, learned)
            )
        except NormRewriteError:
            raise
        except Exception as error:  # onnxruntime runs the model here, on data of any shape
            raise NormRewriteError(f"int8: onnxruntime can't calibrate the model: {first_line(error)}") from error
    if learned:
        _read_exactly(quantised, {node.name for node in nodes})
    return quantised


def _read_exactly(quantised: Any, nodes: Collection[str]) -> None:
    """Let what isn't quantised read an activation as it was in training, not what its quantised readers make of it."""
    made_by = {node.output[0]: node for node in quantised.graph.node}
    for node in quantised.graph.node:
        for i, name in enumerate(node.input):
            if node.op_type != "DequantizeLinear" and node.name not in nodes and _activates(made_by, name):
                node.input[i] = made_by[made_by[name].input[0]].input[0]


def _activates(made_by: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor is an activation on 8 bits and back."""
    back = made_by.get(name)
    there = made_by.get(back.input[0]) if back is not None and back.op_type == "DequantizeLinear" else None
    return there is not None and there.op_type == "QuantizeLinear"


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


def _by_data(proto: Any, nodes: list[Any], data: Data, ranges: Ranges, learned: Mapping[str, float]) -> Any:
    import onnx
    from onnxruntime import quantization as ort

    known = {name: [{"rmin": np.float32(-amax), "rmax": np.float32(amax)}] for name, amax in learned.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantised.onnx"
        ort.quantize_static(
            proto,
            path,
            _Reader(proto, data),
            per_channel=True,
            activation_type=ort.QuantType.QInt8,
            weight_type=ort.QuantType.QInt8,
            nodes_to_quantize=[node.name for node in nodes],
            calibrate_method=ort.CalibrationMethod[RANGES[ranges]],
            extra_options=_OPTIONS | ({"TensorQuantOverrides": known} if known else {}),
        )
        return onnx.load(path)


def _by_ranges(proto: Any, nodes: list[Any], learned: Mapping[str, float]) -> Any:
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer

    limits = {name: (np.float32(-amax), np.float32(amax)) for name, amax in learned.items()}
    quantiser = QDQQuantizer(
        save_and_reload_model_with_shape_infer(proto),
        per_channel=True,
        reduce_range=False,
        weight_qType=ort.QuantType.QInt8,
        activation_qType=ort.QuantType.QInt8,
        tensors_range=TensorsData(ort.CalibrationMethod.MinMax, limits),
        nodes_to_quantize=[node.name for node in nodes],
        nodes_to_exclude=[],
        op_types_to_quantize=[*_LAYERS, "Add"],
        extra_options=_OPTIONS,
    )
    quantiser.quantize_model()
    quantiser.model.topological_sort()
    return quantiser.model.model


def quantised_nodes(proto: Any) -> list[Any]:
    """The nodes whose inputs int8 quantises: convolutions, products with a weight, and adds of two activations."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    constants |= {name for node in proto.graph.node if node.op_type == "Constant" for name in node.output}

    def is_quantised(node: Any) -> bool:
        if node.op_type == "Add":
            return not constants.intersection(node.input)
        return node.op_type in _LAYERS and (node.op_type != "MatMul" or node.input[1] in constants)

    return [node for node in proto.graph.node if is_quantised(node)]


def unkept(proto: Any, kept: Collection[str]) -> list[Any]:
    """The same without those of modules that are to stay in floating point."""
    return [node for node in quantised_nodes(proto) if not set(kept).intersection(onnx_file.scopes(node))]


def activations(node: Any) -> list[str]:
    """What of a quantised node's inputs is no weight and no bias."""
    return list(node.input[: 2 if node.op_type == "Add" else 1])


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
