"""Norms on int8: a node against the float64 reference in onnxruntime, and norms between Q/DQ that become such nodes."""

from typing import Any

import numpy as np
import onnx
import pytest

from normrewrite.backends import onnx as nodes
from normrewrite.backends.onnx_int8 import absorb
from normrewrite.norms import metric
from normrewrite.plugins import OPS
from tests.backends.test_onnx import SPECS, run

SHAPE = (2, 4, 3, 50)
X_SCALE, Y_SCALE = 0.05, 0.02
make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info


def apart(found: Any, wanted: Any) -> float:
    """The share that differs, all by one at most: ties that fp32 and float64 round differently."""
    difference = np.abs(found.astype(int) - wanted.astype(int))
    assert difference.max() <= 1
    return float((difference > 0).mean())


def drawn(shape: tuple[int, ...] = SHAPE) -> tuple[Any, Any, Any]:
    """x in int8, weight and bias in fp32 that spread y over most of int8."""
    generator = np.random.default_rng(0)
    x = np.clip(np.round(generator.normal(10, 40, shape)), -128, 127).astype(np.int8)
    return x, *(generator.uniform(*bounds, (*shape[1:3], 1)).astype(np.float32) for bounds in ((20, 50), (-9, 9)))


def node_model(spec: str, shape: tuple[int, ...] = SHAPE, **changed: Any) -> onnx.ModelProto:
    """One node for int8, and its body."""
    given = nodes.attributes(metric(spec), shape[2] * shape[3], eps=1e-5 / X_SCALE) | changed
    name = nodes.operator(metric(spec)) + nodes.INT8
    node = make(name, ["x", "weight", "bias"], ["y"], "norm", domain=nodes.DOMAIN, **given)
    inputs = [info("x", 3, shape), *(info(each, 1, [*shape[1:3], 1]) for each in ("weight", "bias"))]
    graph = onnx.helper.make_graph([node], "g", inputs, [info("y", 3, shape)])
    return with_bodies(graph)


def with_bodies(graph: Any) -> onnx.ModelProto:
    opsets = [onnx.helper.make_opsetid(*each) for each in (("", 20), (nodes.DOMAIN, 1))]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    nodes.add_bodies(proto)
    return proto


@pytest.mark.parametrize("spec", SPECS)
def test_a_node_computes_the_reference(spec: str) -> None:
    proto = node_model(spec)
    onnx.checker.check_model(proto, full_check=True)
    x, weight, bias = drawn()
    found = run(proto, x=x, weight=weight, bias=bias)
    op = OPS[proto.graph.node[0].op_type]
    given = {a.name: onnx.helper.get_attribute_value(a) for a in proto.graph.node[0].attribute}
    wanted = op.reference(x, weight, bias, op.parse(given))
    assert found.dtype == np.int8 and apart(found, wanted) < 0.01
    assert apart(np.clip(np.round(1.01 * wanted), -128, 127), wanted) > 0.05  # it can fail


def sandwich(spec: str, *, views: bool = False, dtype: Any = np.float32, second: bool = False) -> onnx.ModelProto:
    """q -> DQ -> norm -> Q -> r, from int8 to int8; `second`: y has another reader."""
    given = nodes.attributes(metric(spec), SHAPE[2] * SHAPE[3], eps=1e-3)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = {
        "x_scale": dtype(X_SCALE),
        "y_scale": dtype(Y_SCALE),
        "zero": np.int8(0),
        "flat": np.array([2, 12, 50]),
    }
    constants |= {"back": np.array(SHAPE), "weight": np.linspace(0.3, 1, 12, dtype=dtype).reshape(4, 3, 1)}
    constants |= {"bias": np.linspace(-0.2, 0.2, 12, dtype=dtype).reshape(4, 3, 1)}
    body = [
        make("DequantizeLinear", ["q", "x_scale", "zero"], ["d"], "dequantise"),
        make("Reshape", ["d", "back"], ["x"], "view"),
        make(
            nodes.operator(metric(spec)),
            ["x" if views else "d", "weight", "bias"],
            ["y"],
            "norm",
            domain=nodes.DOMAIN,
            **given,
        ),
        make("Reshape", ["y", "flat"], ["v"], "unview"),
        make("QuantizeLinear", ["v" if views else "y", "y_scale", "zero"], ["r"], "quantise"),
    ]
    body = body if views else [node for node in body if node.op_type != "Reshape"]
    shape = (2, 12, 50) if views else SHAPE
    outputs = [info("r", 3, shape), *([info("y", kind, SHAPE)] if second else [])]
    held = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    return with_bodies(onnx.helper.make_graph(body, "g", [info("q", 3, shape)], outputs, held))


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("views", [False, True], ids=["alone", "viewed"])
@pytest.mark.parametrize("spec", ["l1", "l2", "topk:10", "range"])
def test_a_norm_between_q_and_dq_becomes_a_node_on_int8(spec: str, views: bool, dtype: Any) -> None:
    proto = sandwich(spec, views=views, dtype=dtype)
    q = drawn()[0].reshape((2, 12, 50) if views else SHAPE)
    wanted = run(proto, q=q)
    assert absorb(proto) == {"norm": nodes.operator(metric(spec)) + nodes.INT8}
    onnx.checker.check_model(proto, full_check=True)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in proto.graph.node}
    assert apart(run(proto, q=q), wanted) < (0.005 if dtype is np.float32 else 0.05)  # fp16 rounds on the way to Q


def test_what_stays() -> None:
    for proto in (sandwich("l1", second=True), node_model("l1")):
        before = proto.SerializeToString(deterministic=True)
        assert absorb(proto) == {} and proto.SerializeToString(deterministic=True) == before
    by_channel = sandwich("l1")
    by_channel.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones(4, np.float32), "x_scale"))
    assert absorb(by_channel) == {}


def test_other_readers_keep_their_dq() -> None:
    proto = sandwich("l1")
    proto.graph.node.append(make("Identity", ["d"], ["e"], "other"))
    proto.graph.output.append(info("e", 1, SHAPE))
    assert list(absorb(proto)) == ["norm"]
    assert "DequantizeLinear" in {node.op_type for node in proto.graph.node}
