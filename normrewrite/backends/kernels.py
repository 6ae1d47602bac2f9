"""Which lowering computes a norm in training: torch's own operators, the Triton kernels of backends/triton, or torch's compiler.

>>> with nr.kernels("torch"):           # or NORMREWRITE_KERNELS=torch in the environment
...     model(x).sum().backward()       # a backward chooses when it runs

    auto     the kernels where they serve a tensor: CUDA, compute capability 8.0 and newer, fp32, fp16 or bf16; else torch
    torch    torch's operators everywhere
    triton   the kernels, and an error with the reason where they can't serve; on a CPU through Triton's interpreter
    compiled on a CPU, what torch's compiler makes of dense rows (backends/compiled.py); else as auto

The operators `normrewrite::batch_norm` and `normrewrite::row_norm` ask at each call, so compiled and exported graphs, too,
follow the switch. Statistics over several processes (backends/ranks.py) are torch's, and so is eval but for a norm with its
ReLU, where no gradient is asked for (backends/relu.py).
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from normrewrite.backends import compiled
from normrewrite.backends.triton import geometry
from normrewrite.errors import NormRewriteError, nearest
from normrewrite.norms import Metric

CHOICES = ("auto", "torch", "triton", "compiled")
VARIABLE = "NORMREWRITE_KERNELS"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_choice: ContextVar[str | None] = ContextVar("kernels", default=None)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Choose `auto`, `torch`, `triton` or `compiled` for the block, in this thread, whatever the environment says.

    Autograd runs backwards of CUDA tensors in threads of its own: set NORMREWRITE_KERNELS to choose for those.
    """
    token = _choice.set(_checked(choice, "kernels()"))
    try:
        yield
    finally:
        _choice.reset(token)


def serving(x: Tensor, row: Metric, *, sample: bool = False) -> ModuleType | None:
    """backends/triton/launch.py where the kernels are to compute this norm of x, else None.

    sample: x is (B, G, K, S) with statistics by (B, G); else (N, C, *), by channel.
    """
    choice = chosen()
    if choice == "torch" or (choice != "triton" and not x.is_cuda):
        return None
    reason = why_not(x, row, sample=sample)
    if reason and choice == "triton":
        raise NormRewriteError(f"{VARIABLE}=triton: {reason}. Choose auto to let torch compute what the kernels can't.")
    return None if reason else _launch()


def chosen() -> str:
    return _choice.get() or _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def compiles(x: Tensor, row: Metric) -> bool:
    """Whether compiled.py is to compute this norm of x: (N, C, *), by channel."""
    return chosen() == "compiled" and compiled.serves(x, row)


def why_not(x: Tensor, row: Metric, *, sample: bool = False, int8: bool = False) -> str | None:
    """Why the kernels can't compute this norm of x, or None if they can. int8: whether that is among the dtypes that may be."""
    elsewhere = _why_not_here(x.device)
    if elsewhere is not None:
        return elsewhere
    if x.dtype not in _DTYPES and not (int8 and x.dtype is torch.int8):
        return f"the kernels take fp32, fp16 and bf16, got {x.dtype}"
    return geometry.why_not(x.shape, row, sample)


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


def _checked(choice: str, where: str) -> str:
    if choice not in CHOICES:
        raise NormRewriteError(f"{where}: unknown {choice!r}.{nearest(choice, CHOICES)} Known: {', '.join(CHOICES)}.")
    return choice
