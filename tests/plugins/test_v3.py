"""IPluginV3 by a stand-in of TensorRT's module: fields there and back, formats, and enqueue on memory of the CPU."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

from normrewrite.errors import NormRewriteError
from normrewrite.plugins import OPS, v3
from normrewrite.plugins import compute as memory
from tests.backends.test_onnx import SPECS, TOLERANCE, drawn, node_model, off
from tests.backends.triton import interpreter
from tests.plugins.test_compute import room
from tests.plugins.test_spec import given_of

interpreter.mend()


class Field:
    def __init__(self, name: str, data: Any, kind: str) -> None:
        assert data.dtype == {"INT32": np.int32, "FLOAT32": np.float32}[kind]
        self.name, self.data, self.type = name, data, kind


STAND_IN = SimpleNamespace(
    PluginField=Field,
    PluginFieldCollection=list,
    PluginFieldType=SimpleNamespace(INT32="INT32", FLOAT32="FLOAT32"),
    DimsExprs=lambda rank: [None] * rank,
    **{
        name: type(name, (), {})
        for name in ("IPluginCreatorV3One", "IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime")
    },
)
DTYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.int8: "INT8"}


def described(values: Tensor, layout: str = "LINEAR") -> Any:
    """As TensorRT describes a tensor."""
    named = [SimpleNamespace(name=name) for name in (DTYPES[values.dtype], layout)]
    return SimpleNamespace(dims=tuple(values.shape), type=named[0], format=named[1])


def on_cpu(address: int, shape: Any, strides: Any, dtype: str) -> Tensor:
    """What compute.tensor_at does for a GPU."""
    kind = getattr(torch, dtype)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    held = (ctypes.c_char * (size * kind.itemsize)).from_address(address)
    return torch.frombuffer(held, dtype=kind).as_strided(shape, strides)


def made(name: str, dtype: Any = np.float32, shape: tuple[int, ...] = (2, 4, 1, 21)) -> tuple[Any, Any]:
    """A creator, and its plugin for a node of the metric."""
    proto = node_model(name, shape, dtype, shape[2] * shape[3])
    creator = v3.creator(STAND_IN, OPS[proto.graph.node[0].op_type])
    given = given_of(proto)
    fields = [
        Field(k, np.array([v], np.int32 if type(v) is int else np.float32).ravel(), _kind(v)) for k, v in given.items()
    ]
    return creator, creator.create_plugin("norm", fields, "build")


def _kind(value: Any) -> str:
    return "INT32" if type(value) is int else "FLOAT32"


@pytest.mark.parametrize("layout", ["LINEAR", "HWC"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", SPECS)
def test_enqueue_computes_the_reference(name: str, dtype: Any, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the GPU: descriptions to strides, pointers to tensors, in the order that TensorRT has them."""
    monkeypatch.setattr(memory, "tensor_at", on_cpu)
    streams: list[int] = []
    monkeypatch.setattr(memory, "on_stream", lambda stream: (streams.append(stream), nullcontext())[1])
    layout = "HWC8" if layout == "HWC" and dtype is np.float16 else layout
    x, weight, bias = drawn((2, 4, 1, 21), dtype)
    _, plugin = made(name, dtype)
    seen, y = (room(x.shape, torch.from_numpy(x).dtype, v3._MULTIPLES[layout]) for _ in range(2))
    tensors = [seen.copy_(torch.from_numpy(x)), torch.from_numpy(weight), torch.from_numpy(bias)]
    inputs = [described(seen, layout), *map(described, tensors[1:])]
    plugin.on_shape_change(inputs, [described(y, layout)])
    context = plugin.attach_to_context(None)
    context.enqueue(inputs, [described(y, layout)], [t.data_ptr() for t in tensors], [y.data_ptr()], 0, 7)
    wanted = plugin.op.reference(x, weight, bias, plugin.values)
    assert streams == [7] and off(y.numpy(), wanted) <= TOLERANCE[dtype]
    assert off(y.numpy() * dtype(1.01), wanted) > TOLERANCE[dtype]


@pytest.mark.parametrize("name", SPECS)
def test_an_engine_gives_the_fields_back(name: str) -> None:
    creator, plugin = made(name)
    again = creator.create_plugin("norm", plugin.get_fields_to_serialize(), "runtime")
    assert again.values == plugin.values == plugin.clone().values
    assert [field.name for field in creator.field_names] == list(plugin.values)


def test_bad_fields_are_noted_and_no_plugin_is_made() -> None:
    creator, _ = made("l1")
    assert creator.create_plugin("norm", [Field("centred", np.array([2], np.int32), "INT32")], "build") is None
    assert creator.problems == ["node norm: attribute centred is [2], out of range: it is 0 or 1."]


def test_y_is_like_x() -> None:
    _, plugin = made("l1")
    (shape,) = plugin.get_output_shapes([["b", 4, 1, "s"], [4, 1, 1], [4, 1, 1]], [], None)
    assert shape == ["b", 4, 1, "s"]
    half = SimpleNamespace(name="HALF")
    assert plugin.get_output_data_types([half] * 3) == [half]
    with pytest.raises(NormRewriteError, match="got bfloat16, bfloat16, bfloat16"):
        plugin.get_output_data_types([SimpleNamespace(name="BF16")] * 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "layouts"),
    [
        ((2, 4, 1, 21), torch.float32, ["LINEAR", "HWC"]),
        ((2, 4, 1, 21), torch.float16, ["LINEAR", "HWC8"]),
        ((2, 4, 3, 7), torch.float32, ["LINEAR"]),  # a group of several channels: TensorRT's channels-last is another
        ((2, 1, 1, 21), torch.float32, ["LINEAR"]),
        ((2, 4, 1, 21), torch.int8, ["LINEAR"]),
    ],
)
def test_formats(shape: tuple[int, ...], dtype: torch.dtype, layouts: list[str]) -> None:
    wide = torch.float32 if dtype is torch.int8 else dtype
    x, weight = torch.empty(shape, dtype=dtype), torch.empty(*shape[1:3], 1, dtype=wide)
    known = ("LINEAR", "HWC", "HWC8", "CHW32")
    assert [layout for layout in known if v3.supported(0, [described(x, layout)])] == layouts
    before = [described(x, layouts[-1]), described(weight), described(weight)]
    assert v3.supported(2, before) and not v3.supported(1, [before[0], described(weight, "HWC")])
    assert [layout for layout in known if v3.supported(3, [*before, described(x, layout)])] == layouts[-1:]
    other = torch.float16 if wide is torch.float32 else torch.float32
    assert not v3.supported(1, [before[0], described(weight.to(other))])
