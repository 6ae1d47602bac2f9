"""Torch's compiler on a CPU: batch norms of dense metrics, forward and backward one compiled function each.

>>> y, mean, spread, indices, signs = forward(Call(x, "l1"), weight, bias)                   # as torch_batch.py's

Chosen by kernels("compiled"). The first call of a kind compiles for some seconds, whatever sizes come later, and needs the C++
compiler that torch.compile needs.
"""

from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from normrewrite.backends.call import Call
from normrewrite.backends.families import wide_dtype
from normrewrite.backends.measuring import recentred_
from normrewrite.backends.torch_batch import near_
from normrewrite.errors import NormRewriteError, first_line

_KINDS = 64  # dtypes, with and without weight and bias, sizes of one: torch gives up after eight


def why_not(call: Call) -> str | None:
    """They are of dense metrics on a CPU, of tensors without gaps, channels first or last. Sparse metrics read few elements,
    which eager kernels find as fast."""
    x = call.x
    if call.sample or call.row.family != "mean":
        return "compiled functions are of dense metrics, by channel"
    if x.device.type != "cpu" or x.numel() == 0:
        return "compiled functions are for a CPU, and for what is not empty"
    return (
        None
        if x.is_contiguous() or _channels_last(x).is_contiguous()
        else "compiled functions read memory without gaps"
    )


def forward(call: Call, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    """y, mean, C * S, no indices and n * sum dS/dd. x: (N, C, *)."""
    constant = call.constant  # first, as it refuses what is too short
    x, row, eps = call.x, call.row, call.eps
    flat, last = _flat(x)
    y, mean, spread, inward = _called(_halves(row.power, last)[0], flat, weight, bias, *_numbers(x, constant, eps))
    y, sparse = _as(y, x, last), (mean.new_empty(0, dtype=torch.int64), inward[:, None])
    recentred_(x, mean, spread, sparse, row, constant, eps)
    return near_(y, x, mean, spread + eps, weight, bias), mean, spread, *sparse


def backward(
    call: Call, g: Tensor, weight: Tensor | None, mean: Tensor, spread: Tensor, indices: Tensor, signs: Tensor
) -> tuple[Tensor, ...]:
    """dx as x, dweight and dbias."""
    x = call.x
    (flat, last), measured = _flat(x), (mean, spread, signs[:, 0])
    g = torch.empty_like(x, dtype=g.dtype).copy_(g) if g.stride() != x.stride() else g
    back = _halves(call.row.power, last)[1]
    dx, dweight, dbias = _called(back, _flat(g)[0], flat, weight, *measured, *_numbers(x, call.constant, call.eps))
    return _as(dx, x, last), dweight, dbias


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _flat(x: Tensor) -> tuple[Tensor, bool]:
    """x as (N, C, P), or by lines, as (N * H, W, C), where channels are last in memory (True)."""
    if x.is_contiguous():
        return x.view(*x.shape[:2], -1), False
    return _channels_last(x).view(-1, x.shape[-1], x.shape[1]), True


def _as(flat: Tensor, x: Tensor, last: bool) -> Tensor:
    return flat.view(_channels_last(x).shape).movedim(-1, 1) if last else flat.view(x.shape)


def _numbers(x: Tensor, *values: float) -> list[Tensor]:
    """As tensors: another number is no other function."""
    return [torch.tensor(value, dtype=wide_dtype(x)) for value in values]


def _called(function: Callable[..., Any], *args: Any) -> Any:
    # a gradient that is itself differentiated comes with a graph, which is the operator's and nothing to compile for
    args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
    try:
        with torch._dynamo.config.patch(recompile_limit=_KINDS):
            return function(*args)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise NormRewriteError(
            f"kernels: torch.compile fails: {first_line(error)}. It needs a C++ compiler; without one, choose auto or torch."
        ) from error


@cache
def _halves(power: int, last: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of one dense metric, for x of (N, C, P); last: of (N * H, W, C)."""

    def summed(values: Tensor) -> Tensor:
        """By channel; lines first, which stay in a cache: at once takes half as long again."""
        return values.sum(1).sum(0) if last else values.sum((0, 2))

    def channels(values: Tensor) -> Tensor:
        return values if last else values[:, None]

    def raised(values: Tensor, exponent: int) -> Tensor:
        """By products, which a compiler's pow is not."""
        return reduce(torch.mul, [values] * exponent) if exponent else torch.ones_like(values)

    def forth(x: Tensor, weight: Tensor | None, bias: Tensor | None, constant: Tensor, eps: Tensor) -> Any:
        n, values = x.numel() // x.shape[2 if last else 1], x.to(constant.dtype)
        mean = summed(values) / n
        d = values - channels(mean)
        raw = (summed(raised(d.abs(), power)) / n).pow(1 / power)
        inward = summed(raised(d.abs(), power - 1) * d.sign())
        inward = inward / raised(raw.clamp_min(torch.finfo(raw.dtype).tiny), power - 1)
        scale = raw * constant + eps
        factor = scale.reciprocal() if weight is None else weight.to(scale.dtype) / scale
        y = d * channels(factor)
        y = y if bias is None else y + channels(bias.to(scale.dtype))
        return y.to(x.dtype), mean, raw * constant, inward

    def back(
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        spread: Tensor,
        inward: Tensor,
        constant: Tensor,
        eps: Tensor,
    ) -> Any:
        n, wide = x.numel() // x.shape[2 if last else 1], g.to(mean.dtype)
        d, scale, slope = x.to(mean.dtype) - channels(mean), spread + eps, constant / n
        dbias, dweight = summed(wide), summed(wide * d) / scale
        factor = scale.reciprocal() if weight is None else weight.to(scale.dtype) / scale
        ratio = d.abs() / channels((spread / constant).clamp_min(torch.finfo(mean.dtype).tiny))
        w = slope * d.sign() * raised(ratio, power - 1)
        middle = (dbias - dweight * slope * inward) / n
        dx = channels(factor) * (wide - channels(middle) - channels(dweight) * w)
        if x.dtype == torch.float16:  # as families.within_half
            largest = torch.where(spread <= eps, torch.finfo(x.dtype).max, torch.inf)
            dx = torch.maximum(torch.minimum(dx, channels(largest)), -channels(largest))
        return dx.to(x.dtype), dweight, dbias

    return torch.compile(forth, dynamic=True, fullgraph=True), torch.compile(back, dynamic=True, fullgraph=True)
