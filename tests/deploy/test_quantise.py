"""Int8 files: the form that TensorRT takes, and how far they are off."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.deploy import precision
from normrewrite.deploy.quantise import quantise
from tests.api.test_export import images, live, operators, residual

INT8 = 5e-2  # of max(1, largest output): a few layers of 8 bits, on the inputs that they were calibrated on


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "entropy"])
def test_int8_is_symmetric_and_by_channel(tmp_path: Path, ranges: Any) -> None:
    model, x, path = residual(), images(64), tmp_path / "model.onnx"
    nr.export(model, x, path, precision="int8", calibrate=x, ranges=ranges)
    proto = onnx.load(path)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    made_by = {node.output[0]: node for node in proto.graph.node}
    quantisers = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert all(constants[node.input[2]].dtype == np.int8 and not constants[node.input[2]].any() for node in quantisers)
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm", "Add"):  # both inputs; the bias of a product stays fp32
            sources = [made_by[name].op_type for name in node.input[:2]]
            assert sources == ["DequantizeLinear"] * 2, node.name
        if node.op_type == "Conv":
            assert constants[made_by[node.input[1]].input[1]].shape == (8,)
    # entropy clips a small net's rare large values: it is meant for deep ones
    assert nr.verify(path, model, x, tolerance=INT8 if ranges != "entropy" else 5 * INT8).ok
    assert precision.of(proto) == "int8"


def test_nothing_to_quantise() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
    )
    with pytest.raises(nr.NormRewriteError, match=r"int8: nothing to quantise: .* Use --precision fp32 or fp16"):
        quantise(proto, None)


@pytest.mark.parametrize("deploy", ["op", "fold"])
def test_int8_leaves_norms_alone(tmp_path: Path, deploy: Any) -> None:
    model, x, path = live(), images(32), tmp_path / "model.onnx"
    nr.export(model, x, path, deploy=deploy, precision="int8", calibrate=x)
    assert ("NormRewriteMean" in operators(path)) == (deploy == "op")
    assert operators(path).count("QuantizeLinear") == 1  # the input of its one convolution
    assert nr.verify(path, model, x, tolerance=2 * INT8).ok


def test_the_ranges_that_are_asked_for_are_those_of_the_file(tmp_path: Path) -> None:
    """One input reaches a thousand times as far as all others: minmax takes it in, percentile leaves it out."""
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(20_000, 4)
    x[0, 0] = reach = 1000.0
    steps = {}
    for ranges in ("minmax", "percentile"):
        nr.export(model, x[:2], tmp_path / "int8.onnx", precision="int8", calibrate=x, ranges=ranges, force=True)  # type: ignore[arg-type]
        values = {
            each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "int8.onnx").graph.initializer
        }
        steps[ranges] = max(
            float(value) for name, value in values.items() if value.ndim == 0 and value.dtype == np.float32
        )
    assert steps["minmax"] == pytest.approx(reach / 127, rel=1e-5)
    assert steps["percentile"] < reach / 127 / 50
