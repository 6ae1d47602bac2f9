"""Torch: batch-scope normalisation of any row, with its hand-derived backward.

>>> y, mean, spread = normalise(x, weight, bias, metric("l1"), "exact", eps=1e-5)      # x: (N, C, *)

Statistics are fp32 at least, whatever x's dtype; y has x's dtype and memory format. The backward is, with g = dL/dy,
w = dscale/dd and one sum of each kind over a channel (two reductions, as batch norm):

    dbias = sum g      dweight = sum g*d/scale      dx = weight/scale * (g - mean g - dweight * (w - mean w))

It keeps x, two numbers a channel and, for the families that read few elements, their k indices a channel. The sign that
`mean` needs is read again from x. Forward and backward are two custom operators, whole to torch.compile and torch.export:
the constant C(n) is looked up when they run, so that a dynamic batch needs no formula for it. Twice-differentiation is
refused by torch rather than answered wrongly.
"""

from typing import cast

import torch
from torch import Tensor

from normrewrite.lower.families import (
    Sparse,
    dense_slope,
    extremes,
    gradients,
    keep,
    laid_out_as,
    nothing,
    power_mean,
    sparse_slope,
    taken,
    wide,
    within_half,
)
from normrewrite.norms import Gain, Metric
from normrewrite.norms import metric as row_of


def per_channel(values: Tensor, rank: int) -> Tensor:
    """(C,) -> (1, C, 1, ...), to meet an x of that rank."""
    return values.view(1, -1, *(1,) * (rank - 2))


def affine(x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight * (x - mean) / scale + bias, channel by channel, in one kernel.

    Torch's inference batch norm with unit variance *is* that affine: it reads x once, in any dtype and memory format.
    """
    factor = torch.reciprocal(scale) if weight is None else weight.to(scale.dtype) / scale
    offset = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return torch.batch_norm(x, factor, offset, mean, torch.ones_like(mean), False, 0.0, 0.0, False)


def measure(x: Tensor, mean: Tensor, row: Metric) -> tuple[Tensor, Sparse | None]:
    """S of each channel (C,), and where a sparse family read it. x: (N, C, *), mean: (C,), both fp32 or float64."""
    if row.family == "mean":
        d = x - per_channel(mean, x.dim())
        return power_mean(d.abs_(), [0, *range(2, x.dim())], row.power), None
    rows = x.transpose(0, 1).flatten(1)  # (C, n)
    return extremes(rows if row.family == "span" else rows - mean[:, None], row)


@torch.library.custom_op("normrewrite::batch_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str, gain: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, mean, C * S, and where a sparse family read S (empty for dense ones)."""
    row, values = row_of(metric), wide(x)
    mean = values.mean([0, *range(2, x.dim())])
    raw, sparse = measure(values, mean, row)
    spread = raw * row.gain(x.numel() // x.shape[1], cast(Gain, gain))
    y = affine(x, mean, spread + eps, weight, bias)
    return laid_out_as(y, x), mean, spread, *(sparse or nothing(mean))


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str, gain: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, channels = row_of(metric), x.shape[1]
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean = x.new_empty(channels, dtype=dtype)
    shape = taken(row, channels, x.numel() // channels)
    indices = x.new_empty(shape, dtype=torch.int64)
    return torch.empty_like(x), mean, torch.empty_like(mean), indices, x.new_empty(shape, dtype=dtype)


@torch.library.custom_op("normrewrite::batch_norm_backward", mutates_args=())
def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    indices: Tensor,
    signs: Tensor,
    metric: str,
    gain: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx as x, dweight and dbias in the dtype of the statistics."""
    row, n = row_of(metric), x.numel() // x.shape[1]
    dweight, dbias = sums(g, x, mean, spread + eps)
    slope = slope_of(x, mean, spread, signs, row, row.gain(n, cast(Gain, gain)), n)
    total = torch.stack([dweight, dbias, slope_sum(slope, row)])
    return input_gradient(g, x, weight, spread, slope, indices, total, row, n, eps), dweight, dbias


@_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    indices: Tensor,
    signs: Tensor,
    metric: str,
    gain: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)


_forward.register_autograd(gradients(lambda *kept: _backward(*kept)), setup_context=keep)


def sums(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(sum g*d/scale, sum g) by channel: the two reductions of torch's own batch norm backward, in one read of g and x."""
    ones = torch.ones_like(mean)
    _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        g.to(x.dtype), x, ones, None, None, mean, scale.reciprocal(), True, 0.0, [False, True, True]
    )
    return dweight, dbias


def slope_of(x: Tensor, mean: Tensor, spread: Tensor, signs: Tensor, row: Metric, constant: float, n: int) -> Tensor:
    """w = dscale/dd: as x for dense families; (C, k) for sparse ones, on the elements that they read."""
    if row.family != "mean":
        return constant * sparse_slope(signs, row)
    d = wide(x) - per_channel(mean, x.dim())
    return dense_slope(d, per_channel(spread / constant, x.dim()), row).mul_(constant / n)


def slope_sum(slope: Tensor, row: Metric) -> Tensor:
    """sum w of each channel, (C,)."""
    return slope.sum([0, *range(2, slope.dim())] if row.family == "mean" else 1)


def input_gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    spread: Tensor,
    slope: Tensor,
    indices: Tensor,
    total: Tensor,
    row: Metric,
    n: int,
    eps: float,
) -> Tensor:
    """dx, as x. total: (3, C), dweight, dbias and sum w of all n elements that share statistics, here or elsewhere."""
    dweight, dbias, inward = total
    dx = wide(g) - per_channel((dbias - dweight * inward) / n, x.dim())
    if row.family == "mean":
        dx.addcmul_(slope, per_channel(-dweight, x.dim()))
    elif x.numel():
        _add_at(dx, indices, -dweight[:, None] * slope)
    scale = spread + eps
    factor = scale.reciprocal() if weight is None else weight.to(scale.dtype) / scale
    dx *= per_channel(factor, x.dim())
    return laid_out_as(within_half(dx, per_channel(spread, x.dim()), eps, x.dtype), x)


def _add_at(dx: Tensor, indices: Tensor, values: Tensor) -> None:
    """dx: (N, C, *) += values at `indices`, (C, k) positions in each channel's own (N, *) order."""
    channels = torch.arange(dx.shape[1], device=dx.device)[:, None].expand_as(indices)
    first, *rest = torch.unravel_index(indices, (dx.shape[0], *dx.shape[2:]))
    dx.index_put_((first, channels, *rest), values, accumulate=True)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, row: Metric | str, gain: Gain, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x: (N, C, *) by its own batch. Returns y (as x), mean (C,) and C * S (C,), the last two detached, fp32+."""
    y, mean, spread, _, _ = _forward(x, weight, bias, str(row), gain, eps)
    return y, mean, spread
