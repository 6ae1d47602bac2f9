"""Engines: what is refused before a builder is asked, and real engines where TensorRT-RTX is installed (no GPU needed)."""

import copy
import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.api import build as module
from normrewrite.api.build import build, check_precision, profile_of
from normrewrite.plugins.runtimes import RUNTIMES
from tests.backends.test_onnx import node_model
from tests.conftest import RealNetwork

rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed: pip install normrewrite[rtx]"
)
PRECISIONS = ("fp32", "fp16", "int8")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small network in every precision."""
    folder = tmp_path_factory.mktemp("files")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)
    ).eval()
    x = torch.randn(16, 3, 8, 8)
    for precision in PRECISIONS:
        seen = x if precision == "int8" else None
        nr.export(model, x, folder / f"{precision}.onnx", precision=precision, calibrate=seen, keep_io_types=True)
    return {path.stem: path for path in folder.iterdir()}


def refused(path: Path, folder: Path, said: str, exit_code: int = 2, **options: Any) -> None:
    before = set(folder.iterdir())
    with pytest.raises(nr.NormRewriteError, match=said) as caught:
        build(path, folder / "model.engine", **{"gpus": ["sm89"], **options})
    assert caught.value.exit_code == exit_code and set(folder.iterdir()) == before


# --- bad input -------------------------------------------------------------------------------------------------------


def _text(path: Path) -> None:
    path.write_text("not a graph at all")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def _old(path: Path) -> None:
    proto = onnx.load(path)
    proto.opset_import[0].version = 9
    kept = [node for node in proto.graph.node if node.op_type == "Relu"]
    proto.graph.CopyFrom(onnx.helper.make_graph(kept[:1], "g", [], []))
    value = onnx.helper.make_tensor_value_info
    proto.graph.input.append(value(kept[0].input[0], 1, [1]))
    proto.graph.output.append(value(kept[0].output[0], 1, [1]))
    onnx.save(proto, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "there is no such file"),
        (_text, "can't be read as ONNX"),
        (_truncated, "can't be read as ONNX .*truncated"),
        (_old, "opset 9 is too old, 13 is needed"),
    ],
)
def test_bad_files(files: dict[str, Path], tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(files["fp32"].read_bytes())
    spoil(path)
    refused(path, tmp_path, said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": []}, "builds for GPUs by name: give --gpu"),
        ({"runtime": "tensorrt"}, "for the GPU of the machine it runs on: leave --gpu out"),
        ({"runtime": "openvino"}, "runtime 'openvino' is unknown. Known: rtx, tensorrt"),
        ({"timing_cache": Path("x")}, "keeps no --timing-cache"),
        ({"shapes": {"opt": ["1,3,16,16"]}}, r"--opt 1,3,16,16: input input of the file is \?,3,8,8"),
        ({"shapes": {"max": ["1,3,8"]}}, "--max 1,3,8: input input of the file is"),
        ({"shapes": {"min": ["0,3,8,8"]}}, "write whole numbers"),
        ({"shapes": {"min": ["image:1,3,8,8"]}}, "no input 'image'; it has input"),
        ({"shapes": {"opt": ["9,3,8,8"], "max": ["4,3,8,8"]}}, "lies outside"),
        ({"shapes": {"min": ["5,3,8,8"], "opt": ["4,3,8,8"]}}, "lies outside"),
    ],
)
def test_bad_requests(files: dict[str, Path], tmp_path: Path, options: dict[str, Any], said: str) -> None:
    refused(files["fp32"], tmp_path, said, **options)


@pytest.mark.parametrize(
    ("spec", "n", "said"),
    [
        ("topk:4000", 5000, "norm: reads the 4000 largest of its elements, TensorRT's TopK 3840 at most"),
        ("topk:5%", None, "norm: reads 5 % of as many elements as come"),
    ],
)
def test_what_topk_cannot_do_is_refused_by_name(tmp_path: Path, spec: str, n: int | None, said: str) -> None:
    onnx.save(node_model(spec, (1, 1, 5000, 1), "float32", n), tmp_path / "top.onnx")
    refused(tmp_path / "top.onnx", tmp_path, said)


@rtx
def test_a_plugin_reads_more_than_topk(tmp_path: Path) -> None:
    onnx.save(node_model("topk:4000", (1, 1, 5000, 1), "float32", 5000), tmp_path / "top.onnx")
    assert build(tmp_path / "top.onnx", tmp_path / "e.engine", gpus=["sm89"], plugins="auto").norms == {
        "norm": "plugin"
    }


def test_norms_that_should_have_been_folded(tmp_path: Path) -> None:
    value, tensor = onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    names = ("scale", "bias", "mean", "var")
    node = onnx.helper.make_node("BatchNormalization", ["x", *names], ["y"], "bn")
    constants = [tensor(np.ones(4, np.float32), name) for name in names]
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1, 4, 8, 8])], [value("y", 1, [1, 4, 8, 8])], constants)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "left.onnx")
    refused(tmp_path / "left.onnx", tmp_path, "1 batch norms are left that should have been folded", exit_code=1)


def test_no_builder(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normrewrite.plugins.runtimes.find_spec", lambda name: None)
    refused(files["fp32"], tmp_path, r"TensorRT-RTX is not installed .*pip install 'normrewrite\[rtx\]'")
    refused(files["fp32"], tmp_path, r"TensorRT is not installed", runtime="tensorrt", gpus=[])


# --- what becomes of the worker ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", r"broke down .*\(signal 6\): it said nothing"),
        ("import sys; sys.exit('no driver')", r"broke down .*\(exit code 1\): no driver"),
        ('import sys; sys.stdin.read(); print(\'{"error": "too small"}\')', "can't build .*: too small"),
    ],
)
def test_a_worker_that_breaks_down(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(code)
    monkeypatch.setattr(module, "_WORKER", worker)
    monkeypatch.setattr("normrewrite.plugins.runtimes.find_spec", lambda name: object() if name == "tensorrt" else None)
    refused(files["fp32"], tmp_path, said, runtime="tensorrt", gpus=[])


def test_another_precision_than_the_files_fails(files: dict[str, Path]) -> None:
    proto = onnx.load(files["int8"])
    names = [node.name for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    line = "Name: a, LayerType: gemm, Inputs: [ {{ Name: x, Datatype: {} }}], Outputs: [], Metadata: [ONNX Layer: {}]"
    told = "\n".join(line.format("Int8", name) for name in names)
    assert check_precision(proto, told) == (2, [])
    assert check_precision(proto, told.splitlines()[0]) == (1, names[1:])
    assert check_precision(proto, "") == (0, names)  # nothing is claimed that wasn't told
    with pytest.raises(nr.NormRewriteError, match=f"{names[0]} wants Int8 and computes in Float") as caught:
        check_precision(proto, told.replace("Int8", "Float"))
    assert caught.value.exit_code == 1


def test_nodes_without_a_name_go_by_their_outputs(files: dict[str, Path], tmp_path: Path) -> None:
    """As TensorRT's parser calls them; none stands for another."""
    proto = onnx.load(files["fp32"])
    for node in proto.graph.node:
        node.name = ""
    names = [f"node_of_{node.output[0]}" for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(set(names)) == 2 and check_precision(proto, "") == (0, names)
    for node in proto.graph.node:
        node.op_type = "BatchNormalization" if node.op_type == "Relu" else node.op_type
    with pytest.raises(nr.NormRewriteError, match=r"1 batch norms are left .*\(node_of_\w+\)"):
        module._check_nodes(proto, tmp_path, {})


@rtx
def test_the_builder_calls_nameless_nodes_so(files: dict[str, Path], tmp_path: Path) -> None:
    proto = onnx.load(files["fp32"])
    for node in proto.graph.node:
        node.name = ""
    onnx.save(proto, tmp_path / "nameless.onnx")
    built = build(tmp_path / "nameless.onnx", tmp_path / "model.engine", gpus=["sm89"])
    assert (built.honoured, built.unchecked) == (2, [])


@pytest.mark.parametrize("same", ["output", "model"])
def test_the_engine_replaces_no_other_file_of_the_command(files: dict[str, Path], tmp_path: Path, same: str) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(files["fp32"].read_bytes())
    engine, cache = (tmp_path / "x", tmp_path / "x") if same == "output" else (model, None)
    with pytest.raises(nr.NormRewriteError, match="is the same file"):
        build(model, engine, runtime="tensorrt", timing_cache=cache, force=True)
    assert model.read_bytes() == files["fp32"].read_bytes()


# --- profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "wanted"),
    [
        ({}, [1, 8, 32]),
        ({"max": ["64,3,8,8"]}, [1, 8, 64]),
        ({"max": ["4,3,8,8"]}, [1, 4, 4]),
        ({"min": ["16,3,8,8"]}, [16, 16, 32]),
        ({"min": ["64,3,8,8"]}, [64, 64, 64]),
        ({"opt": ["100,3,8,8"]}, [1, 100, 100]),
        ({"min": ["2,3,8,8"], "opt": ["input:3,3,8,8"], "max": ["4,3,8,8"]}, [2, 3, 4]),
    ],
)
def test_profiles(files: dict[str, Path], shapes: dict[str, list[str]], wanted: list[int]) -> None:
    assert profile_of(onnx.load(files["fp32"]), shapes) == {"input": [(batch, 3, 8, 8) for batch in wanted]}


def test_open_sizes_have_no_default(files: dict[str, Path]) -> None:
    proto = onnx.load(files["fp32"])
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(nr.NormRewriteError, match="sizes beside the batch are open"):
        profile_of(proto, {})
    given = {"min": ["1,3,8,8"], "opt": ["1,3,8,8"], "max": ["2,3,16,8"]}
    assert profile_of(proto, given)["input"][2] == (2, 3, 16, 8)


def test_the_library_gets_its_other_name_without_touching_site_packages(tmp_path: Path) -> None:
    package = tmp_path / "site" / "some_libs"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "libtensorrt_rtx.so.1").touch()
    links = tmp_path / "links"
    links.mkdir()
    runtime = copy.copy(RUNTIMES["rtx"])
    object.__setattr__(runtime, "libs", "some_libs")
    sys.path.insert(0, str(package.parent))
    try:
        paths = runtime.environment(links)["LD_LIBRARY_PATH"].split(os.pathsep)
    finally:
        sys.path.pop(0)
    assert paths[0] == str(links) and (links / "libtensorrt_rtx.so").resolve() == package / "libtensorrt_rtx.so.1"
    assert len(list(package.glob("lib*"))) == 1


# --- real engines ----------------------------------------------------------------------------------------------------


@rtx
@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_keep_the_precision(files: dict[str, Path], tmp_path: Path, precision: str) -> None:
    phases: list[str] = []
    built = build(files[precision], tmp_path / "model.engine", gpus=["sm86", "sm89", "sm120"], progress=phases.append)
    assert (built.precision, built.honoured, built.unchecked) == (precision, 2, [])
    assert built.size == (tmp_path / "model.engine").stat().st_size > 10_000
    assert any(phase.startswith("Building engine ") for phase in phases)
    assert json.dumps(built.as_dict()) and "not run: that needs the GPU" in str(built)
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine"]


@rtx
def test_what_the_builder_refuses(files: dict[str, Path], tmp_path: Path) -> None:
    refused(files["fp32"], tmp_path, "--gpu sm90: this version builds for .*sm89", gpus=["sm90"])
    refused(files["fp32"], tmp_path, "can't build .*SM75", gpus=["sm75"])


@rtx
@pytest.mark.parametrize("spec", ["l1", "linf", "topk:10", "range"])
def test_bodies_build(tmp_path: Path, spec: str) -> None:
    for name, n in (("known", 256), ("open", None)):
        onnx.save(node_model(spec, (2, 4, 1, 256), "float32", n), tmp_path / f"{name}.onnx")
        shapes = {} if n else {"min": ["1,4,1,64"], "opt": ["2,4,1,256"], "max": ["4,4,1,1024"]}
        built = build(tmp_path / f"{name}.onnx", tmp_path / f"{name}.engine", gpus=["sm89"], shapes=shapes)
        assert built.size > 10_000


def test_a_node_without_body_and_plugin_is_told_by_name(tmp_path: Path) -> None:
    proto = node_model("l1", (2, 4, 1, 256), "float32", 256)
    del proto.functions[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    refused(
        tmp_path / "bare.onnx", tmp_path, "node norm: NormRewriteMean has no function body .*Build with --plugins auto"
    )


@rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_trained_network_builds(resnet20: RealNetwork, tmp_path: Path, precision: Any) -> None:
    twin, (x, _) = nr.convert(resnet20.make(), "l1"), resnet20.inputs(64)
    seen = x if precision == "int8" else None
    nr.export(twin, x[:2], tmp_path / "model.onnx", precision=precision, calibrate=seen)
    built = build(tmp_path / "model.onnx", tmp_path / "model.engine", gpus=["sm86", "sm89", "sm120"])
    assert (built.honoured, built.unchecked) == (20, [])
