"""One kernel ahead of time: its numbers by the interpreter, its PTX by ptxas, and what one launch can't do."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

from normrewrite.backends.triton import launch
from normrewrite.backends.triton.ahead import once
from normrewrite.errors import NormRewriteError
from normrewrite.plugins import OPS, ahead
from tests.backends.test_onnx import SPECS, TOLERANCE, drawn, node_model, off
from tests.backends.triton import interpreter
from tests.conftest import ROOT
from tests.plugins.test_compute import SCOPES
from tests.plugins.test_spec import given_of

interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", SPECS)
def test_the_kernel_computes_the_reference(name: str, scope: str, dtype: Any) -> None:
    """For another batch than it was tuned for."""
    shape = SCOPES[scope]
    x, weight, bias = drawn(shape, dtype)
    proto = node_model(name, shape, dtype, shape[2] * shape[3])
    op = OPS[proto.graph.node[0].op_type]
    given = op.parse(given_of(proto))
    kind = torch.from_numpy(x).dtype
    asked = once(
        meta(64, *shape[1:], dtype=kind), *(meta(*shape[1:3], dtype=kind),) * 2, op.row(given), given["eps"], True
    )
    y = torch.full(shape, torch.nan, dtype=kind)
    x_ptr, weight_ptr, bias_ptr = map(torch.from_numpy, (x, weight, bias))
    told = {"x_ptr": x_ptr, "weight_ptr": weight_ptr, "bias_ptr": bias_ptr, "samples": shape[0], "y_ptr": y}
    programs = -(-shape[0] // asked.arguments["ROWS"]) * asked.arguments["GROUPS"]
    launch.run(asked.kernel, programs, asked.warps, asked.arguments | told)
    wanted = op.reference(x, weight, bias, given)
    assert off(y.numpy(), wanted) <= TOLERANCE[dtype]
    assert off(y.numpy() * dtype(1.01), wanted) > TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("NormRewriteMean", (2, 1, 64, 129), "the kernels keep rows of up to 8192 elements, got 8256"),
        ("NormRewriteSpan", (2, 1, 4097, 1), "the kernels keep rows of up to 4096 elements, got 4097"),
        ("NormRewriteTop", (2, 1, 1024, 1), "the kernels find up to 128 extremes .* asks for 200"),
    ],
)
def test_what_one_launch_cannot_do(name: str, shape: tuple[int, ...], said: str) -> None:
    given = OPS[name].parse({"count": 200})
    with pytest.raises(NormRewriteError, match=f"{name} ahead of time: one launch can't compute .*{said}"):
        ahead.kernel(OPS[name], given, shape, "float16", 89)


PTX = """.visible .entry k(
	.param .u64 k_param_0,
	.param .u64 k_param_1,
	.param .u64 k_param_2,
	.param .u32 k_param_3,
	.param .u64 k_param_4,
	.param .u64 k_param_5,
	.param .u64 k_param_6
)
{ ld.param.b64 %rd1, [k_param_4]; }
"""


def test_hidden_arguments_are_left_out() -> None:
    kept = ahead.without_scratch(PTX)
    assert "k_param_4\n)" in kept and "k_param_5" not in kept and "k_param_6" not in kept
    for other in (PTX.replace("[k_param_4]", "[k_param_6]"), kept, "no kernel"):
        with pytest.raises(NormRewriteError, match="this Triton passes other hidden arguments"):
            ahead.without_scratch(other)


def test_the_assembler_takes_the_kernels() -> None:
    """In a process of its own, as kernels are interpreted here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.plugins.worker", "l1:80", "topk:10:89", "range:90", "l2:120"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kernel in json.loads(done.stdout):
        assert kernel["rc"] == 0 and "0 bytes spill stores, 0 bytes spill loads" in kernel["report"], kernel
        assert kernel["parameters"] == 5 and ".version 8.7" in kernel["head"] and kernel["rc of a spoilt one"] != 0, (
            kernel
        )
