"""What the table of backends/dispatch.py is told of the kernels: whom they serve, and how they are asked. Imports no triton."""

import importlib.util
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from normrewrite.backends.call import Call
from normrewrite.backends.triton import geometry

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(call: Call) -> str | None:
    """Why the kernels can't compute this norm, or None if they can."""
    elsewhere = _why_not_here(call.x.device)
    if elsewhere is not None:
        return elsewhere
    if call.x.dtype not in _DTYPES and not (call.int8 and call.x.dtype is torch.int8):
        return f"the kernels take fp32, fp16 and bf16, got {call.x.dtype}"
    return geometry.why_not(call.x.shape, call.row, call.sample)


@cache
def _why_not_here(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install normrewrite[triton])"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are for CUDA, got a tensor on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"the kernels are for compute capability 8.0 and newer, {device} has {torch.cuda.get_device_capability(device)}"
    return None


def _launch() -> ModuleType:
    from normrewrite.backends.triton import launch  # triton takes half a second to import

    return launch


def forward(
    call: Call, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, ...]:
    """y, what was measured, and, with relu, bits of what it let through; out: as launch.forward."""
    how = {"sample": call.sample, "centred": call.centred, "relu": call.relu, "out": out}
    results = _launch().forward(call.x, residual, weight, bias, call.row, call.gain, call.eps, **how)
    return results if call.relu else results[:5]  # type: ignore[no-any-return]


def backward(
    call: Call,
    g: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    indices: Tensor,
    signs: Tensor,
    bias: Tensor | None = None,
    live: Tensor | None = None,
    residual: bool = False,
) -> tuple[Tensor, ...]:
    """dx, dweight and dbias, and, with relu, the residual's gradient (empty without one)."""
    measured, settings = (mean, spread, indices, signs, live), (call.row, call.gain, call.eps)
    how = {"sample": call.sample, "centred": call.centred, "relu": call.relu, "residual": residual}
    results = _launch().backward(g, call.x, weight, bias, *measured, *settings, **how)
    return results if call.relu else results[:3]  # type: ignore[no-any-return]


def affine(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """relu(weight * (x - mean) / scale + bias + residual), as x: (N, C, *)."""
    return _launch().affine(x, residual, mean, scale, weight, bias, relu=True)  # type: ignore[no-any-return]
