"""The library of plugins in C++ with TensorRT's real headers: built by CMake, loaded by TensorRT-RTX's real parser."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

from normrewrite.backends.onnx_int8 import absorb
from normrewrite.cli import app
from normrewrite.errors import NormRewriteError
from normrewrite.plugins import OPS, built
from normrewrite.plugins.built import SOURCES
from tests.backends import test_onnx_int8
from tests.backends.test_onnx import node_model
from tests.conftest import ROOT
from tests.plugins.rtx import OPEN, needs_rtx
from tests.plugins.rtx import built as build

HEADERS = [Path(os.environ.get("TENSORRT_INCLUDE", "/nowhere")), Path("/usr/include/x86_64-linux-gnu")]
FOUND = [folder for folder in HEADERS if (folder / "NvInferRuntime.h").is_file()]
needs_cmake = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="cmake or g++ is missing")
needs_headers = pytest.mark.skipif(
    not FOUND, reason="TensorRT's headers are not here: name their folder in TENSORRT_INCLUDE"
)
SHAPE = (2, 4, 1, 256)


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ["cmake", "-S", SOURCES, "-B", folder, f"-DNORMREWRITE_PYTHON={sys.executable}", *options]
    environment = {name: value for name, value in os.environ.items() if name != "TENSORRT_INCLUDE"}
    return subprocess.run(arguments, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without code of kernels, which nothing here runs."""
    folder = tmp_path_factory.mktemp("library")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tables = [sys.executable, "-m", "tests.plugins.cpp_tables", str(folder / "kernels")]
    subprocess.run(tables, cwd=ROOT, env=environment, check=True)
    done = configure(folder, f"-DTENSORRT_INCLUDE={FOUND[0]}", "-DCMAKE_BUILD_TYPE=Debug")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", folder], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return folder / "libnormrewrite_plugins.so"


@needs_cmake
def test_cmake_says_what_to_install(tmp_path: Path) -> None:
    if len(FOUND) > ("TENSORRT_INCLUDE" in os.environ):
        pytest.skip("TensorRT's headers are at their usual place")
    done = configure(tmp_path)
    said = " ".join(done.stderr.split())
    assert done.returncode != 0 and "NvInferRuntime.h, a header of TensorRT 10.0 or newer, was not found." in said
    assert "-DTENSORRT_INCLUDE=/path/to/include" in said


@needs_cmake
def test_cmake_says_which_python_it_needs(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DNORMREWRITE_PYTHON=false")
    assert done.returncode != 0 and "pip install 'normrewrite[triton]'" in " ".join(done.stderr.split())


@needs_cmake
@needs_headers
def test_it_needs_no_symbol_of_tensorrt_or_cuda(library: Path) -> None:
    needed = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "dlopen" in needed and not [
        line for line in needed.splitlines() if "nvinfer" in line or "cu" in line.split("@")[0]
    ]
    given = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in given.splitlines() if "_Z" not in line} == {"getCreators", "setLoggerFinder"}


@needs_rtx
@needs_cmake
@needs_headers
@pytest.mark.parametrize("name", ["l1", "topk:10"])
def test_rtx_takes_its_plugins(name: str, library: Path, tmp_path: Path) -> None:
    half = name == "topk:10"
    proto = node_model(name, SHAPE, np.float16 if half else np.float32, None if half else 256, eps=3e-4, centred=0)
    result = build(proto, tmp_path, str(library), shapes=OPEN if half else {})
    assert result.norms == {"norm": "plugin"} and "runs only where those plugins are registered" in str(result)


@needs_rtx
@needs_cmake
@needs_headers
def test_rtx_gives_it_int8(library: Path, tmp_path: Path) -> None:
    proto = test_onnx_int8.sandwich("range", views=True)
    absorb(proto)
    assert build(proto, tmp_path, str(library)).norms == {"norm": "plugin"}


def _model(name: str = "l1", shape: Any = SHAPE, **changed: Any) -> Any:
    return node_model(name, shape, np.float32, shape[2] * shape[3], **changed)


def _fp16_weight() -> Any:
    proto = _model()
    proto.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return proto


@needs_rtx
@needs_cmake
@needs_headers
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: _model("l2", power=2.5),
            "node norm: power 2.5: the kernels know powers 1 and 2. Build with --plugins off.",
        ),
        (lambda: _model("topk:10", count=300), "node norm needs 300 elements that share statistics, got 256."),
        (_fp16_weight, "node norm takes float32 or float16 for all inputs alike, got float32, float16, float32."),
    ],
)
def test_what_it_refuses_is_told(make: Any, said: str, library: Path, tmp_path: Path) -> None:
    with pytest.raises(NormRewriteError) as caught:
        build(make(), tmp_path, str(library))
    assert str(caught.value).endswith(said) and not (tmp_path / "model.engine").exists()


SECOND = """
import sys
from normrewrite.errors import NormRewriteError
from normrewrite.plugins import register
assert register("library", "rtx", sys.argv[1]) == []
for kind in ({"kind": "python"}, {"kind": "library", "library": sys.argv[1]}):
    try:
        register(**kind)
    except NormRewriteError as error:
        print(error)
"""


@needs_rtx
@needs_cmake
@needs_headers
def test_a_second_registration_is_an_error(library: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SECOND, library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second and "registered already in this process" in first and all(name in first for name in OPS)


def test_where_it_is_and_how_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert CliRunner().invoke(app, ["plugins", "cmake"]).output.strip() == str(SOURCES)
    with pytest.raises(NormRewriteError, match="has not been built") as caught:
        built.built()
    assert caught.value.exit_code == 1 and 'cmake -S "$(normrewrite plugins cmake)"' in str(caught.value)
    built.place().parent.mkdir()
    built.place().write_bytes(b"\x7fELF")
    assert (
        CliRunner().invoke(app, ["plugins", "path"]).output.strip()
        == f"{tmp_path}/normrewrite/libnormrewrite_plugins.so"
    )


def test_the_page_names_what_there_is() -> None:
    page, cmake = (ROOT / "docs" / "deploy.md").read_text(), (SOURCES / "CMakeLists.txt").read_text()
    options = set(re.findall(r"-D(\w+)=", page))
    assert {"TENSORRT_INCLUDE", "NORMREWRITE_CAPABILITIES"} <= options
    assert all(re.search(rf"(set|find_path)\({option} ", cmake) for option in options)
    commands = set(re.findall(r"normrewrite plugins (\w+)", page))
    group = app.commands["plugins"]
    assert isinstance(group, click.Group) and {"cmake", "path"} <= commands <= set(group.commands)
