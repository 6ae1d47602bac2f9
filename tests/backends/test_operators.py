"""What compilers are told of the operators is what they give: shapes, dtypes and strides, in every dtype."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from normrewrite.backends import operators  # noqa: F401 (registers the operators)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAMES = ["batch_norm", "row_norm", "norm_relu", "norm_relu, residual"]


def _forward(name: str, metric: str, dtype: torch.dtype) -> tuple[Any, tuple[Any, ...]]:
    """An operator, and arguments for it: (N, C, H, W), or (B, G, K, S) within a sample."""
    sample, fused = name == "row_norm", name.startswith("norm_relu")
    x = torch.randn(4, 3, 8, 5).to(dtype)
    weight = torch.randn(x.shape[1:3] if sample else x.shape[1]).to(dtype)
    residual = (torch.randn_like(x) if "residual" in name else None,) if fused else ()
    scope = (True,) if sample else (False, True) if fused else ()
    operator = getattr(torch.ops.normrewrite, name.partition(",")[0])
    return operator, (x, *residual, weight, weight.clone(), metric, "exact", 1e-5, *scope)


def _backward(name: str, arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Any, tuple[Any, ...]]:
    operator = getattr(torch.ops.normrewrite, f"{name.partition(',')[0]}_backward")
    g = torch.randn_like(results[0])
    if not name.startswith("norm_relu"):
        x, weight, _, *settings = arguments
        return operator, (g, x, weight, *results[1:], *settings)
    x, residual, weight, bias, *settings = arguments
    return operator, (g, x, weight, bias, *results[1:], *settings, residual is not None)


def _facts(tensors: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    return [(tensor.shape, tensor.dtype, tensor.stride(), tensor.device) for tensor in tensors]


def _as_compilers_see(operator: Any, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    with FakeTensorMode() as mode:
        return _facts(operator(*(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["l1", "topk:3", "range"])  # one a family
@pytest.mark.parametrize("name", NAMES)
def test_compilers_are_told_what_comes(name: str, metric: str, dtype: torch.dtype) -> None:
    operator, arguments = _forward(name, metric, dtype)
    results = operator(*arguments)
    assert _as_compilers_see(operator, arguments) == _facts(results)
    slope, further = _backward(name, arguments, results)
    assert _as_compilers_see(slope, further) == _facts(slope(*further))
