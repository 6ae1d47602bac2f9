"""Triton, ahead of time: the kernels of a norm as PTX and machine code, on any machine, without a GPU.

>>> x = torch.empty(64, 256, 56, 56, dtype=torch.float16, device="meta")
>>> with recorded() as launches:
...     forward(x, None, None, None, metric("l1"), "exact", 1e-5)
>>> [compiled(launch, 90).asm["ptx"] for launch in launches]

A recorded launch is what would have run: the kernel, its grid and its arguments. Tensors may be on the meta device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from normrewrite.backends.triton import launch as launching
from normrewrite.backends.triton.geometry import why_not
from normrewrite.backends.triton.resident import row_once
from normrewrite.errors import NormRewriteError
from normrewrite.norms import Metric


class Launch(NamedTuple):
    """A kernel that would have run, with `programs` programs of `warps` warps."""

    kernel: Any
    programs: int
    warps: int
    arguments: dict[str, Any]
    registers: int | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note every launch in the block instead of running it; what the block computes is never written."""
    launches: list[Launch] = []
    run, launching.run = launching.run, lambda *parts: launches.append(Launch(*parts))
    try:
        yield launches
    finally:
        launching.run = run


def once(x: Tensor, weight: Tensor, bias: Tensor, row: Metric, eps: float, centred: bool) -> Launch:
    """The launch that writes a norm's y and keeps nothing: x, weight, bias, samples, y. All other numbers are compiled in.

    x: (B, G, K, S), weight and bias: (G, K), on the meta device. Raises NormRewriteError for rows that registers can't hold.
    """
    rows = x.reshape(*x.shape[:2], -1, 1)
    problem = why_not(rows.shape, row, True)
    if problem:
        raise NormRewriteError(f"one launch can't compute {row} on {'×'.join(map(str, x.shape))}: {problem}.")
    with recorded() as launches:
        launching.forward(rows, None, None, None, row, "exact", eps, sample=True, centred=centred)
    told = launches[0].arguments
    given = {
        "x_ptr": x,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "samples": told["samples"],
        "y_ptr": torch.empty_like(x),
    }
    numbers = {"GAIN": told["gain"], "EPS": eps, "GROUPS": told["groups"], "N": told["n"], "COUNT": told["k"]}
    kept = {name: told[name] for name in ("FAMILY", "CENTRED", "ROWS", "WIDTH", "VEC")}
    return launches[0]._replace(kernel=row_once, arguments=given | numbers | kept | {"POSITIONS": x.shape[3]})


def compiled(launch: Launch, capability: int, ptx: int | None = None) -> CompiledKernel:
    """The kernel compiled for the launch's types and constants, for a GPU of compute capability 80, 89, 90, 120, ...

    ptx: its version, 86 for 8.6; None: the newest that the compiler knows.
    """
    types, names = parameter_types(launch), [parameter.name for parameter in launch.kernel.params]
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {name: launch.arguments[name] for name in names if name not in types}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if types.get(name, "").startswith("*")
    }
    source = ASTSource(launch.kernel, signature, constants, aligned)
    return triton.compile(
        source,
        GPUTarget("cuda", capability, 32),
        {"num_warps": launch.warps, "maxnreg": launch.registers} | ({} if ptx is None else {"ptx_version": ptx}),
    )


def parameter_types(launch: Launch) -> dict[str, str]:
    """What the compiled kernel is given when it runs, in its order, by name: `*fp16`, `i32`, `fp32`, ..."""
    given = {p.name: launch.arguments.get(p.name) for p in launch.kernel.params if not p.is_constexpr}
    return {name: _type(value) for name, value in given.items() if value is not None}


_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
