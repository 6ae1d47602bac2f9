"""ONNX files that ask for too much are told before they are run, and one whose loops never end is ended."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from normrewrite import NormRewriteError
from normrewrite.api.verify import runner
from normrewrite.data import Batch
from normrewrite.deploy import onnx_bounds, onnx_file

OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
RELU = helper.make_node("Relu", ["x"], ["y"])


def model(nodes: Sequence[Any], functions: Sequence[Any] = (), **constants: Any) -> Any:
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)]
        for name, sizes in (("x", ["n", 3]), ("y", None))
    ]
    given = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(list(nodes), "graph", *ends, initializer=given)
    return helper.make_model(graph, opset_imports=OPSETS, functions=list(functions), ir_version=9)


def loop(turns: str, inner: Sequence[Any] = ()) -> Any:
    """Relu again and again; `turns` names how often."""
    scalar = {"i": TensorProto.INT64, "c": TensorProto.BOOL, "d": TensorProto.BOOL}
    info = {name: helper.make_tensor_value_info(name, kind, []) for name, kind in scalar.items()}
    v, w = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "vw")
    body = [*inner, helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Relu", ["v"], ["w"])]
    graph = helper.make_graph(body, "body", [info["i"], info["c"], v], [info["d"], w])
    return helper.make_node("Loop", [turns, "go", "x"], ["y"], body=graph)


def function(name: str, *called: str) -> Any:
    nodes = [helper.make_node(each, ["a"], [f"b{i}"], domain="f") for i, each in enumerate(called)]
    return helper.make_function("f", name, ["a"], ["b0"], nodes or [helper.make_node("Relu", ["a"], ["b0"])], OPSETS)


def called(name: str) -> Any:
    return helper.make_node(name, ["x"], ["y"], domain="f")


FILL = [helper.make_node("ConstantOfShape", ["s"], ["z"]), helper.make_node("ReduceSum", ["z"], ["r"], keepdims=0)]
FILL.append(helper.make_node("Add", ["x", "r"], ["y"]))
NUMBER = helper.make_node("Constant", [], ["n"], value_int=10**12)
DOUBLING = [function("f0"), *(function(f"f{i}", f"f{i - 1}", f"f{i - 1}") for i in range(1, 40))]
TOO_MUCH = {
    "a loop": (model([loop("n")], n=10**12, go=True), "loops would run more than"),
    "by a node": (model([NUMBER, loop("n")], go=True), "loops would run more than"),
    "in a loop": (model([loop("n", [loop("n")])], n=2000, go=True), "loops would run more than"),
    "functions": (model([called("f39")], DOUBLING), "more than 50,000 nodes"),
    "themselves": (model([called("f")], [function("f", "f")]), "call themselves"),
    "each other": (model([called("f")], [function("f", "g"), function("g", "f")]), "call themselves"),
    "a result": (model(FILL, s=[50_000, 50_000]), "z would have 2,500,000,000 numbers"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_asks_for_too_much(tmp_path: Path, name: str) -> None:
    proto, said = TOO_MUCH[name]
    onnx.save(proto, tmp_path / "m.onnx")
    for read in (onnx_file.read, onnx_file.has_open_loops):
        with pytest.raises(NormRewriteError, match=f"m.onnx: .*{said}"):
            read(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("proto", "open_ended"),
    [
        (model([RELU]), False),
        (model([loop("n")], n=1000, go=True), False),
        (model([loop("")], go=True), True),
        (model([called("f5")], DOUBLING[:6]), False),
        (model(FILL, s=[100, 100]), False),
    ],
)
def test_what_does_not(proto: Any, open_ended: bool) -> None:
    assert onnx_bounds.check(proto, "m.onnx") is open_ended


def test_weights_are_no_sizes() -> None:
    """A file of large tensors is not looked through, and may make as much as it has."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    assert onnx_bounds.check(model([node], w=np.zeros((3, 100_000), np.float32)), "m.onnx") is False


def test_a_loop_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_bounds, "_LOOPING", 0.2)
    batch = Batch({"x": torch.ones(2, 3)})
    for turns, path in (("", tmp_path / "endless.onnx"), ("n", tmp_path / "three.onnx")):
        onnx.save(model([loop(turns)], n=3, go=True), path)
    with pytest.raises(NormRewriteError, match=r"endless\.onnx: its loops did not end within 0\.2 s"):
        runner(tmp_path / "endless.onnx")(batch)
    assert torch.equal(runner(tmp_path / "three.onnx")(batch)["y"], torch.ones(2, 3))
