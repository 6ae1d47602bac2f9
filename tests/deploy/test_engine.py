"""Engines, as far as that goes without a GPU: what is told where one can't be loaded."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from normrewrite.deploy import engine
from normrewrite.errors import NormRewriteError
from tests.backends.test_onnx import node_model
from tests.plugins.rtx import built, needs_rtx


class Logger:
    pass


class Runtime:
    """TensorRT's, which takes nothing that another version wrote."""

    def __init__(self, log: Any) -> None:
        self.told = log.log

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        self.told(0, "Loaded engine size: 0 MiB")
        if plan[:4] == b"1.07":
            raise AssertionError("it was taken")
        return None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = SimpleNamespace(Runtime=Runtime, ILogger=Logger, get_plugin_registry=lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    monkeypatch.setattr(engine, "known", lambda _: ["NormRewriteMean"])
    monkeypatch.setattr(engine.importlib, "import_module", lambda _: trt)


@pytest.mark.usefixtures("stand_in")
def test_an_engine_that_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(b"1.06 and so on")
    with pytest.raises(
        NormRewriteError, match=r"model\.engine: .* can't load it: built by another version, or for anoth"
    ):
        engine.runner(path)
    path.write_bytes(b"1.07 and so on")
    with pytest.raises(AssertionError, match="it was taken"):
        engine.runner(path)


LOADED = """
import sys, torch
from pathlib import Path
from normrewrite.deploy import engine
torch.cuda.is_available = lambda: True
for name in sys.argv[1:]:
    try:
        engine.runner(Path(name))
    except engine.NormRewriteError as error:
        print(error)
"""


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which says more")
def test_an_engine_of_another_version(tmp_path: Path) -> None:
    """RTX's own, and with its version in the header made another. Neither is loaded here, for want of a GPU."""
    built(node_model("l1", (2, 4, 1, 64), np.float32, 64), tmp_path, "off")
    plan = bytearray((tmp_path / "model.engine").read_bytes())
    assert plan[24:26] == b"\x01\x07", "RTX's header has another form"
    plan[24] += 1
    (tmp_path / "other.engine").write_bytes(plan)
    command = [sys.executable, "-c", LOADED, str(tmp_path / "model.engine"), str(tmp_path / "other.engine")]
    done = subprocess.run(command, capture_output=True, text=True)
    same, other = done.stdout.splitlines()
    assert "built by another version, or for another GPU." in same
    assert "other.engine: tensorrt_rtx_bindings can't load it: built by another version. Build it again" in other


def test_no_file_and_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NormRewriteError, match="there is no such file"):
        engine.runner(tmp_path / "model.engine")
    (tmp_path / "model.engine").write_bytes(b"an engine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NormRewriteError, match="runs only on the GPU it was built for, and torch sees none here"):
        engine.runner(tmp_path / "model.engine")


@pytest.mark.usefixtures("stand_in")
def test_no_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda _: None)
    (tmp_path / "model.engine").write_bytes(b"an engine")
    with pytest.raises(NormRewriteError, match="no TensorRT is installed"):
        engine.runner(tmp_path / "model.engine")
