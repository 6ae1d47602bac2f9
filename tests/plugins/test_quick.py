"""Plugins inside an engine, by NVIDIA's own Python on a CPU: registered, asked for shapes and types, PTX and launch."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.plugins.rtx import needs_rtx

needs_bindings = pytest.mark.skipif(
    find_spec("tensorrt_bindings") is None,
    reason="TensorRT's Python files are not installed: pip install --no-deps tensorrt-cu13-bindings",
)


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.plugins.stand_in", "89", "l1", "l2", "linf", "topk:10", "range"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])  # type: ignore[no-any-return]


@needs_rtx
@needs_bindings
@pytest.mark.parametrize("spec", ["l1", "l2", "linf", "topk:10", "range"])
def test_what_tensorrt_learns(spec: str, told: dict[str, dict[str, Any]]) -> None:
    """x: (batch, 2, 3, 49), fp16; two groups, and the batch left open."""
    found = told[spec]
    assert found["types"] == ["HALF"] and [re.findall(r"\((\w+),", size)[0] for size in found["shape"]] == [
        "batch",
        "2",
        "3",
        "49",
    ]
    assert re.fullmatch(r"PROD\(CEIL_DIV\(batch, \d+\), 2\)", found["grid"]) and found["further"] == ["batch"]
    entry = re.search(r"\.entry (\w+)\((.*?)\)\n\.reqntid (\d+)", found["ptx"], re.DOTALL)
    assert entry is not None and entry[1] == found["kernel"] and int(entry[3]) == found["block"]
    assert re.findall(r"\.param \.(u\d+)", entry[2]) == [
        "u64",
        "u64",
        "u64",
        "u32",
        "u64",
    ]  # x, weight, bias, samples, y


@needs_rtx
@needs_bindings
def test_an_open_n_is_refused_by_name(told: dict[str, dict[str, Any]]) -> None:
    assert "NormRewriteMean ahead of time needs fixed sizes behind the batch, got -1×2×3×-1" in told["open"]["refused"]
