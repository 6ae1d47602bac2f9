"""Torch: what a family of the table measures and how it slopes, for every scope.

>>> spread, (indices, signs) = extremes(deviations, metric("linf"))      # deviations: (lines, n)

A line is n elements that share statistics. Dense families take all of it into account, and a backward reads the slope
again from x; sparse ones read k elements, whose (lines, k) indices and signs are all that a backward needs to keep.
"""

from typing import Any

import torch
from torch import Tensor

from normrewrite.norms import Metric

# Where a sparse family read S, and which way: (indices, signs), each (lines, k).
Sparse = tuple[Tensor, Tensor]


def wide(x: Tensor) -> Tensor:
    """x in the dtype that statistics are kept in: fp32, or float64 where x is that already."""
    return x.to(wide_dtype(x))


def wide_dtype(x: Tensor) -> torch.dtype:
    return statistics_dtype(x.dtype)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else fp32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


FAR = 32  # scales from 0, with eps: a mean that lies nearer is good enough as it was rounded on the way


def distant(mean: Tensor, scale: Tensor) -> Tensor | None:
    """Which lines lie so far from 0 that the mean's rounding, divided by their scale, would show; None: none of them.

    A constant line's scale is eps alone.
    """
    far = mean.abs() > FAR * scale
    return far if far.any() else None


def mean_dtype(x: Tensor) -> torch.dtype:
    """What a mean of x is summed in: float64 on CUDA, where that costs nothing, and a look at which lines are `distant` would
    wait for the device."""
    return torch.float64 if x.is_cuda else wide_dtype(x)


def power_mean(magnitude: Tensor, dims: list[int], power: int) -> Tensor:
    """(mean |d|^power)^(1/power) over dims, the spread of the dense family. Overwrites magnitude, |d|, where it can."""
    if power == 1:
        return magnitude.mean(dims)
    return magnitude.pow_(power).mean(dims).pow_(1 / power)


def dense_slope(d: Tensor, spread: Tensor, row: Metric) -> Tensor:
    """n * dS/dd = sign(d) * (|d|/S)^(power-1), elementwise; zero where a line is constant. Overwrites d where it can.

    spread meets d by broadcasting.
    """
    if row.power == 1:
        return d.sign_()
    ratio = d / spread.clamp_min(torch.finfo(spread.dtype).tiny)
    return ratio.abs().pow_(row.power - 1).mul_(ratio.sign())


def extremes(d: Tensor, row: Metric) -> tuple[Tensor, Sparse]:
    """S of each line of deviations (lines, n), for sparse families, and where it was read. A span minds no shift of d."""
    if row.family == "span":
        high, low = d.max(1), d.min(1)
        indices = torch.stack([high.indices, low.indices], 1)
        signs = torch.tensor([1.0, -1.0], dtype=d.dtype, device=d.device).repeat(len(indices), 1)
        return high.values - low.values, (indices, signs)
    _, indices = largest(d.abs(), row.k(d.shape[1]))
    taken = d.gather(1, indices)
    return taken.abs().mean(1), (indices, taken.sign())


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each line, (lines, k), in any order, and where they stand; of one, the first that is as large."""
    return values.max(1, keepdim=True) if k == 1 else values.topk(k, dim=1, sorted=False)


def sparse_slope(signs: Tensor, row: Metric) -> Tensor:
    """dS/dd on the elements that a sparse family read, (lines, k)."""
    return signs if row.family == "span" else signs / signs.shape[1]


def nothing(x: Tensor) -> Sparse:
    """What a dense family keeps: operators return tensors, so empty ones. x: statistics, for dtype and device."""
    return x.new_empty(0, dtype=torch.int64), x.new_empty(0)


def taken(row: Metric, lines: Any, n: Any) -> tuple[Any, ...]:
    """The shape of what `extremes` keeps; a percentage of a symbolic n is known only at run time."""
    if row.family == "mean":
        return (0,)
    if row.family == "span":
        return (lines, 2)
    if row.percent is not None and isinstance(n, torch.SymInt):
        return (lines, torch.library.get_ctx().new_dynamic_size(min=1))
    return (lines, row.count if row.percent is None else row.k(n))


def within_half(dx: Tensor, spread: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """dx, kept finite in fp16 on dead lines: 1/eps lies beyond its range, and one inf would void the whole step."""
    if dtype is not torch.float16:
        return dx
    largest = torch.where(spread <= eps, torch.finfo(dtype).max, torch.inf)
    return dx.clamp(-largest, largest)


def laid_out_as(values: Tensor, x: Tensor) -> Tensor:
    """In x's dtype and strides: what the fake operators announce to compilers, whatever layout a kernel chose."""
    if values.stride() == torch.empty_like(x, device="meta").stride():
        return values.to(x.dtype)
    return torch.empty_like(x).copy_(values)


def by_batch(x: Tensor) -> Tensor:
    """(N, C, *) -> (1, C, 1, N * positions): a batch norm is a norm by lines of this."""
    return x.transpose(0, 1).reshape(1, x.shape[1], 1, -1)


def from_batch(y: Tensor, x: Tensor) -> Tensor:
    """`by_batch` undone: y in the shape of x."""
    return y.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
