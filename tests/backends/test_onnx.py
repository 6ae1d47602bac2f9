"""Norms as ONNX nodes, run in onnxruntime by their bodies, against the float64 reference."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite import nn as norms
from normrewrite.backends import onnx as backend
from normrewrite.backends import reference
from normrewrite.errors import NormRewriteError
from normrewrite.norms import METRICS, metric

SPECS = ("l2", "l1", "linf", "topk:10", "topk:5%", "range")
# Of max(1, largest value): fp32 inside, some twenty roundings; fp16 rounds the input's copy once and the result once.
TOLERANCE = {np.float32: 5e-6, np.float16: 2e-3}
FIT = {"mean": 1e-9, "top": 5e-4, "span": 5e-4}  # relative error of the fitted 1/C(n), see backend.reads


def node_model(spec: str, shape: tuple[int, ...], dtype: Any, n: int | None, **changed: Any) -> onnx.ModelProto:
    """One node of its own and its body; B, and K * S where n is None, are open."""
    row, kind = metric(spec), onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    given = backend.attributes(row, n, eps=1e-5) | changed
    node = onnx.helper.make_node(
        backend.operator(row), ["x", "weight", "bias"], ["y"], "norm", domain=backend.DOMAIN, **given
    )
    opened = ["b", *shape[1:3], shape[3] if n else "s"]
    inputs = [
        onnx.helper.make_tensor_value_info("x", kind, opened),
        *(onnx.helper.make_tensor_value_info(name, kind, [*shape[1:3], 1]) for name in ("weight", "bias")),
    ]
    graph = onnx.helper.make_graph([node], "g", inputs, [onnx.helper.make_tensor_value_info("y", kind, opened)])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(backend.DOMAIN, 1)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    backend.add_bodies(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto: onnx.ModelProto, **feed: Any) -> Any:
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)[0]


def wanted(spec: str, x: Any, weight: Any, bias: Any) -> Any:
    """The reference on rows: (B, G, K, S) as B * G channels of one sample."""
    rows = x.astype(np.float64).reshape(1, x.shape[0] * x.shape[1], -1)
    normal, _, _ = reference.batch_norm(rows, metric(spec))
    return normal.reshape(x.shape) * weight.astype(np.float64) + bias.astype(np.float64)


def drawn(shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(0)
    x = generator.exponential(size=shape) + 3  # skew, and far from zero
    weight, bias = generator.uniform(0.5, 2, (2, *shape[1:3], 1))
    return x.astype(dtype), weight.astype(dtype), bias.astype(dtype)


def off(found: Any, expected: Any) -> float:
    return float(np.abs(found.astype(np.float64) - expected).max() / max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(3, 2, 4, 49), (5, 1, 64, 1), (1, 7, 1, 1023)])
@pytest.mark.parametrize("spec", SPECS)
def test_a_node_computes_the_reference(spec: str, shape: tuple[int, ...], dtype: Any) -> None:
    x, weight, bias = drawn(shape, dtype)
    found = run(node_model(spec, shape, dtype, shape[2] * shape[3]), x=x, weight=weight, bias=bias)
    assert found.dtype == dtype
    assert off(found, wanted(spec, x, weight, bias)) <= TOLERANCE[dtype]
    assert off(found * dtype(1.01), wanted(spec, x, weight, bias)) > TOLERANCE[dtype]  # it can fail


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [200, 1024])
def test_an_open_n_is_fitted(spec: str, n: int) -> None:
    x, weight, bias = drawn((3, 2, 1, n), np.float32)
    found = run(node_model(spec, x.shape, np.float32, None), x=x, weight=weight, bias=bias)
    limit = 4e-2 if "%" in spec else 2 * FIT[metric(spec).family] + 5e-6
    assert off(found, wanted(spec, x, weight, bias)) <= limit


@pytest.mark.parametrize("gain", ["exact", "paper"])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "%" not in spec])
def test_the_fit_of_the_gain(spec: str, gain: Any) -> None:
    row = metric(spec)
    coefficients = backend.reads(row, None, gain)
    least = max(20, 4 * (row.count or 0))
    for n in (least, 3 * least, 1000, 12_345, 10**6, 4 * 10**6):
        t = backend.variable(row, n)
        read = sum(value * t**power for power, value in enumerate(coefficients))
        assert abs(read * row.gain(n, gain) - 1) <= (2e-2 if gain == "paper" else FIT[row.family])


def test_every_row_has_an_operator() -> None:
    for row in METRICS.values():
        assert backend.body(backend.operator(row), 18).name == backend.operator(row)


def test_not_centred() -> None:
    x, weight, bias = drawn((2, 1, 32, 1), np.float32)
    found = run(node_model("l1", x.shape, np.float32, 32, centred=0), x=x, weight=weight, bias=bias)
    scale = metric("l1").gain(32) * np.abs(x.astype(np.float64)).mean((2, 3), keepdims=True) + 1e-5
    assert off(found, weight * x / scale + bias) <= TOLERANCE[np.float32]


def test_large_values_do_not_overflow_in_fp16() -> None:
    """LayerNorm overflows in fp16 engines (TensorRT #2564, #2781): bodies are fp32 inside."""
    x, weight, bias = drawn((2, 1, 512, 1), np.float16)  # up to 12: squares of 4000 times that are beyond fp16
    found = run(node_model("l1", x.shape, np.float16, 512), x=x * np.float16(4000), weight=weight, bias=bias)
    assert np.isfinite(found).all()


MODULES = {
    "layer": (lambda spec: norms.LayerNorm(24, metric=spec), (2, 7, 24)),
    "layer, two axes": (lambda spec: norms.LayerNorm((7, 24), metric=spec), (2, 7, 24)),
    "layer, channels first": (lambda spec: norms.LayerNorm(24, metric=spec, channels_first=True), (2, 24, 3, 3)),
    "rms": (lambda spec: norms.RMSNorm(24, metric=spec), (2, 7, 24)),
    "group": (lambda spec: norms.GroupNorm(3, 24, metric=spec), (2, 24, 5, 5)),
    "instance": (lambda spec: norms.InstanceNorm2d(4, affine=True, metric=spec), (2, 4, 6, 6)),
    "batch": (lambda spec: norms.BatchNorm2d(4, metric=spec, track_running_stats=False), (3, 4, 6, 6)),
}


@pytest.mark.parametrize(("kind", "spec"), [*((kind, "l1") for kind in MODULES), ("layer", "topk:10")])
def test_every_scope_is_one_node_or_plain_operators(kind: str, spec: str, tmp_path: Path) -> None:
    make, shape = MODULES[kind]
    norm = make(spec)
    nn.init.uniform_(norm.weight, 0.5, 2)
    model, x = nn.Sequential(norm).eval(), 2 * torch.randn(shape) + 1
    expected = model(x).detach().double().numpy()
    name = backend.operator(metric(spec))
    for deploy, count in (("op", 1), ("fold", 0)):
        path = tmp_path / f"{deploy}.onnx"
        written = nr.export(model, x, path, deploy=deploy, live_stats=kind == "batch", dynamic_batch=False)  # type: ignore[arg-type]
        proto = onnx.load(path)
        assert written.live == ["0"] and [node.op_type for node in proto.graph.node].count(name) == count
        assert len(proto.functions) == count
        assert {entry.domain for entry in proto.opset_import} == ({"", backend.DOMAIN} if count else {""})
        assert off(run(proto, **{proto.graph.input[0].name: x.numpy()}), expected) <= TOLERANCE[np.float32]


def test_all_attributes_are_explicit() -> None:
    for spec in SPECS:
        given = backend.attributes(metric(spec), 100, eps=1e-5)
        declared = {a.name for a in backend.body(backend.operator(metric(spec)), 20).attribute_proto}
        assert set(given) == declared and given["plugin_namespace"] == "normrewrite" and given["plugin_version"] == "1"


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", -1), ("percent", 101.0), ("eps", -1.0), ("eps", math.inf), ("centred", 2), ("reads", [1.0])],
)
def test_attributes_out_of_range_are_refused(name: str, value: Any) -> None:
    proto = node_model("topk:10", (1, 1, 64, 1), np.float32, 64, **{name: value})
    with pytest.raises(NormRewriteError, match=f"node norm: attribute {name} is .*out of range"):
        backend.check(proto)
    backend.check(node_model("topk:10", (1, 1, 64, 1), np.float32, 64))


@pytest.mark.parametrize("value", [10.3, 1000.1])
@pytest.mark.parametrize("spec", SPECS)
def test_a_constant_row_gives_the_bias(spec: str, value: float) -> None:
    """A rounding of its mean would be divided by eps alone."""
    _, weight, bias = drawn((3, 2, 4, 49), np.float32)
    x = np.full((3, 2, 4, 49), value, dtype=np.float32)
    found = run(node_model(spec, x.shape, np.float32, 196), x=x, weight=weight, bias=bias)
    assert np.abs(found - bias).max() <= 1e-6
