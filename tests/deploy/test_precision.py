"""Half precisions: what the types of a file are, and what a file says it computes in."""

from pathlib import Path
from typing import Any

import onnx
import pytest

import normrewrite as nr
from normrewrite.deploy import precision
from tests.api.test_export import FP16, images, residual, types


@pytest.mark.parametrize(("kind", "code"), [("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)])
def test_half_precisions(tmp_path: Path, kind: Any, code: int) -> None:
    model, x = residual(), images()
    plain, kept = tmp_path / "plain.onnx", tmp_path / "kept.onnx"
    nr.export(model, x, plain, precision=kind, opset=22)
    nr.export(model, x, kept, precision=kind, opset=22, keep_io_types=True)
    assert types(plain) == [code, code] and types(kept) == [1, 1]
    assert [value.name for value in onnx.load(kept).graph.input] == ["images"]
    weights = {tensor.data_type for tensor in onnx.load(plain).graph.initializer if tensor.dims}
    assert weights <= {code, onnx.TensorProto.INT64} and precision.of(onnx.load(plain)) == kind
    if kind == "fp16":
        assert all(nr.verify(path, model, x, tolerance=FP16).ok for path in (plain, kept))
    else:
        with pytest.raises(nr.NormRewriteError, match=r"no bf16: run such a file on a GPU|can't run it|can't load it"):
            nr.verify(kept, model, x)


@pytest.mark.parametrize(("kinds", "said"), [((1,), "fp32"), ((10,), "fp16"), ((16,), "bf16"), ((1, 10), "fp32")])
def test_precision_of_files_by_others(kinds: tuple[int, ...], said: str) -> None:
    tensors = [onnx.TensorProto(name=str(kind), data_type=kind, dims=[1]) for kind in kinds]
    assert precision.of(onnx.ModelProto(graph=onnx.GraphProto(initializer=tensors))) == said


def test_what_a_file_says_counts_before_its_weights(tmp_path: Path) -> None:
    tensors = [onnx.TensorProto(name="weight", data_type=onnx.TensorProto.FLOAT, dims=[1])]
    proto = onnx.ModelProto(graph=onnx.GraphProto(initializer=tensors))
    nr.export(residual(), images(), tmp_path / "half.onnx", precision="fp16")
    proto.metadata_props.extend(onnx.load(tmp_path / "half.onnx").metadata_props)
    assert precision.of(proto) == "fp16"
    assert precision.shown(proto) == "fp32"  # but for what it is judged by
    proto.graph.initializer.append(onnx.TensorProto(name="half", data_type=onnx.TensorProto.FLOAT16, dims=[1]))
    assert precision.shown(proto) == "fp16"


def test_a_type_that_no_onnx_has_is_none_of_ours() -> None:
    tensor = onnx.TensorProto(data_type=99, name="odd")
    graph = onnx.helper.make_graph([], "net", [], [], [tensor])
    assert precision.present(onnx.helper.make_model(graph)) == set()
