"""What benchmarks of norms make sure of before they time anything: every metric, dtype, memory format and form against float64.

>>> correctness()
{"cases": 105, "largest error": {"torch.float32": ..., ...}, "same bits": True}
"""

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_traffic import FORMS
from normrewrite.backends import operators
from normrewrite.backends.dispatch import kernels

SPECS = ("l1", "linf", "range", "topk:10")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # torch's backend there, or by Triton's interpreter
# Differences, in units of the largest wanted value.
ALLOWED = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def distinct(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values of which no two in a channel are equal, nor equally far from the mean: else two extremes are both right."""
    n = torch.Size(shape).numel() // shape[1]
    values = torch.arange(n, dtype=torch.float64)
    values[-1], values[-2] = values[-1] + n // 2, values[-2] + n // 3
    rows = torch.stack([values[torch.randperm(n)] for _ in range(shape[1])])
    return rows.unflatten(1, (shape[0], *shape[2:])).transpose(0, 1).contiguous().to(DEVICE, dtype)


def errors(spec: str, dtype: torch.dtype, shape: tuple[int, ...], last: bool, form: str) -> dict[str, float]:
    """Largest difference of y and all gradients from float64, in units of the largest wanted value."""
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = distinct(shape, dtype).to(memory_format=memory_format)
    g = torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=memory_format)
    residual = torch.randn(shape, device=DEVICE).to(dtype) if form == "add" else None
    weight, bias = torch.randn(2, shape[1], device=DEVICE) + 2
    with kernels("torch"):
        doubles = [None if t is None else t.double() for t in (x, residual, weight, bias)]
        if form != "plain":
            g = g * _decided(spec, dtype, *doubles)
        wanted = _gradients(spec, form, g, *doubles)
    got = _gradients(spec, form, g, x, residual, weight, bias)
    names = [
        name
        for name, value in zip(("y", "x", "residual", "weight", "bias"), (1, x, residual, 1, 1), strict=True)
        if value is not None
    ]
    return _off(names, got, wanted)


def _decided(
    spec: str, dtype: torch.dtype, x: Tensor | None, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Where ReLU's input lies further from zero than it may be off: elsewhere either gradient is right."""
    assert x is not None
    y = operators.batch_norm(x, weight, bias, spec, "exact", 1e-5)[0]
    y = y if residual is None else y + residual
    return y.abs() > ALLOWED[dtype] * y.abs().max()


def _off(names: Iterable[str], got: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """Largest difference of each, in units of its largest wanted value."""
    pairs = zip(names, got, wanted, strict=True)
    return {name: float((a.double() - b).abs().max() / b.abs().max()) for name, a, b in pairs}


def _gradients(spec: str, form: str, g: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    x, residual, weight, bias = (None if value is None else value.detach().requires_grad_() for value in inputs)
    assert x is not None
    if form == "plain":
        y = operators.batch_norm(x, weight, bias, spec, "exact", 1e-5)[0]
    else:
        y = operators.norm_relu(x, residual, weight, bias, spec, "exact", 1e-5)[0]
    leaves = [leaf for leaf in (x, residual, weight, bias) if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


def row_errors(spec: str, dtype: torch.dtype, width: int) -> dict[str, float]:
    """The same of a layer norm."""
    x = distinct((width, 64), dtype).T.contiguous().view(64, 1, width, 1)
    weight, bias = torch.randn(2, 1, width, device=DEVICE) + 2
    g = torch.randn_like(x)

    def run(g: Tensor, *inputs: Tensor) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in inputs]
        y = operators.sample_norm(*leaves, spec, "exact", 1e-5)[0]  # type: ignore[misc, arg-type]
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]

    got = run(g, x, weight, bias)
    with kernels("torch"):
        wanted = run(g.double(), x.double(), weight.double(), bias.double())
    return _off(("y", "x", "weight", "bias"), got, wanted)


def checked(spec: str, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of each form of a metric; raises where one is beyond what the dtype allows."""
    torch.manual_seed(0)
    errors_by_case = {f"layer {spec}": row_errors(spec, dtype, 200)}
    shape = (2, 24, 9, 11) if dtype is not torch.bfloat16 else (2, 24, 7, 9)
    for last in (False, True):
        for form in FORMS:
            errors_by_case[f"{'last' if last else 'first'} {form} {spec}"] = errors(spec, dtype, shape, last, form)
    for name, each in errors_by_case.items():
        if not max(each.values()) <= ALLOWED[dtype]:
            raise AssertionError(f"{name} {dtype}: off by {each}, {ALLOWED[dtype]} allowed")
    return {f"{name} {dtype}": max(each.values()) for name, each in errors_by_case.items()}


def correctness() -> dict[str, Any]:
    """Every case, the largest error by dtype; raises where one is off, or where two runs differ in a bit.

    Some two hundred kernels are compiled for it, by several processes side by side.
    """
    asked = [(spec, dtype) for dtype in ALLOWED for spec in ("l2", *SPECS)]
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), get_context("spawn")) as pool:
        cases = {
            name: worst
            for errors_by_case in pool.map(checked, *zip(*asked, strict=True))
            for name, worst in errors_by_case.items()
        }
    largest = {str(d): max(worst for name, worst in cases.items() if name.endswith(str(d))) for d in ALLOWED}
    return {"cases": len(cases), "largest error": largest, "same bits": same_bits()}


def same_bits() -> bool:
    """Two runs on a tensor of many programs."""
    x, g = (torch.randn(64, 256, 28, 28, device=DEVICE).half().to(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(2, 256, device=DEVICE)
    once, again = (_gradients("l1", "relu", g, x, None, weight, bias) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(once, again, strict=True)):
        raise AssertionError("two runs on the same input differ")
    return True
