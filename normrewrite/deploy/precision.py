"""The precisions of a deployed network: what an ONNX file computes in, and how a network gets there.

>>> of(onnx.load("model.fp16.onnx"))
'fp16'
"""

from typing import Any, cast, get_args

import torch
from torch import nn

from normrewrite.options.export import Precision

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_HALF: dict[str, tuple[torch.dtype, str]] = {"fp16": (torch.float16, "FLOAT16"), "bf16": (torch.bfloat16, "BFLOAT16")}


def cast_model(model: nn.Module, inputs: tuple[torch.Tensor, ...], precision: Precision) -> tuple[torch.Tensor, ...]:
    """Cast a model (in place) and its example inputs to a half precision; others are left.

    Torch's own rules then stand in the exported graph as types and Casts, which is what strongly typed TensorRT reads.
    """
    if precision not in _HALF:
        return inputs
    dtype, _ = _HALF[precision]
    model.to(dtype)
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)


def keep_io_types(proto: Any) -> None:
    """Give an ONNX graph fp32 inputs and outputs, each behind a Cast; the names stay. proto is changed in place."""
    import onnx

    halves = {onnx.TensorProto.DataType.Value(name) for _, name in _HALF.values()}
    graph = proto.graph
    for value in [*graph.input, *graph.output]:
        kind = value.type.tensor_type
        if kind.elem_type not in halves:
            continue
        inside = f"{value.name}_{onnx.TensorProto.DataType.Name(kind.elem_type).lower()}"
        _rename(graph, value.name, inside)
        if value in graph.input:
            graph.node.insert(0, _cast_node(value.name, inside, kind.elem_type))
        else:
            graph.node.append(_cast_node(inside, value.name, onnx.TensorProto.FLOAT))
        kind.elem_type = onnx.TensorProto.FLOAT


def _cast_node(source: str, result: str, to: int) -> Any:
    import onnx

    return onnx.helper.make_node("Cast", [source], [result], name=f"cast_{result}", to=to)


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def of(proto: Any) -> Precision:
    """What a model's layers compute in: as its metadata say, else as its types show."""
    return _said(proto) or by_types(proto)


def shown(proto: Any) -> Precision:
    """The same, where what the metadata say counts only as far as types in the file show it: for what is judged by it."""
    said = _said(proto)
    return said if said == "fp32" or said in present(proto) else by_types(proto)


def by_types(proto: Any) -> Precision:
    """Int8 where a model dequantises, else its widest weights."""
    kinds = present(proto, weights=True)
    return next((kind for kind in ("int8", "fp32", "fp16", "bf16") if kind in kinds), "fp32")


def _said(proto: Any) -> Precision | None:
    said = next((entry.value for entry in proto.metadata_props if entry.key == "normrewrite.precision"), None)
    return cast(Precision, said) if said in PRECISIONS else None


_NAMES: dict[str, Precision] = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


def present(proto: Any, weights: bool = False) -> set[Precision]:
    """The precisions that a model's types show: those of its weights, or of its inputs and outputs, too."""
    import onnx

    graph = proto.graph
    codes = {tensor.data_type for tensor in graph.initializer}
    if not weights:
        codes |= {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output, *graph.value_info]}
    names = {code: name for name, code in onnx.TensorProto.DataType.items()}  # a file may say any number
    kinds = {_NAMES[names[code]] for code in codes if names.get(code) in _NAMES}
    quantised = any(node.op_type == "DequantizeLinear" for node in graph.node)
    return kinds | ({"int8"} if quantised else set())
