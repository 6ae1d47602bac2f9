"""Torch: batch-scope normalisation by any metric, with its hand-derived backward.

>>> y, *measured = forward(Call(x, "l1"), weight, bias)                        # x: (N, C, *)
>>> dx, dweight, dbias = backward(Call(x, "l1"), g, weight, *measured)

Statistics are fp32 at least, whatever x's dtype; y has x's dtype and memory format. The backward is, with g = dL/dy,
w = dscale/dd and one sum of each kind over a channel (two reductions, as batch norm):

    dbias = sum g      dweight = sum g*d/scale      dx = weight/scale * (g - mean g - dweight * (w - mean w))

It keeps x, three numbers a channel and, for the families that read few elements, their k indices a channel. The sign that
`mean` needs is read again from x. Memory is read once a pass: what takes several small kernels is done piece by piece
(pieces.py), and the few elements that sparse families want are looked for in the cells that can hold them.
"""

import torch
from torch import Tensor

from normrewrite.backends.call import Call
from normrewrite.backends.families import (
    Sparse,
    dense_slope,
    distant,
    laid_out_as,
    sparse_slope,
    wide,
    within_half,
)
from normrewrite.backends.measuring import about, last_first, per_channel, recentred_, rounding, statistics, sums
from normrewrite.backends.pieces import Pieces, divided
from normrewrite.norms import Metric


def affine(x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight * (x - mean) / scale + bias, channel by channel, in one kernel.

    Torch's inference batch norm with unit variance *is* that affine: it reads x once, in any dtype and memory format.
    """
    return _scaled(x, mean, _factor(scale, weight), None if bias is None else bias.to(mean.dtype))


def _factor(scale: Tensor, weight: Tensor | None) -> Tensor:
    return scale.reciprocal() if weight is None else weight.to(scale.dtype) / scale


def _scaled(x: Tensor, mean: Tensor, factor: Tensor, offset: Tensor | None = None) -> Tensor:
    offset = torch.zeros_like(mean) if offset is None else offset
    return torch.batch_norm(x, factor, offset, mean, torch.ones_like(mean), False, 0.0, 0.0, False)


def centred_affine(x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`affine` that keeps its digits where a mean is large beside its scale."""
    return near_(affine(x, mean, scale, weight, bias), x, mean, scale, weight, bias)


def near_(y: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y, `affine` of x, with such channels computed again, in place, from x - mean: torch subtracts mean * (weight / scale) from
    x * (weight / scale) on a CPU."""
    channels = None if x.is_cuda else distant(mean, scale)  # its kernel subtracts first
    if channels is not None:
        weight, bias = (None if values is None else values[channels] for values in (weight, bias))
        d, zero = about(x, channels, mean[channels]), torch.zeros_like(mean[channels])
        y[:, channels] = affine(d, zero, scale[channels], weight, bias).to(y.dtype)
    return y


# --- forward and backward ---------------------------------------------------------------------------------------------


def why_not(call: Call) -> str | None:
    return "statistics are of a sample" if call.sample else None


def forward(call: Call, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    """y, mean, C * S, and what a backward can't read from x: where sparse families read S, and which way."""
    constant = call.constant  # first, as it refuses what is too short
    x, row, eps = call.x, call.row, call.eps
    mean, raw, sparse = statistics(x, row)
    spread = raw * constant
    recentred_(x, mean, spread, sparse, row, constant, eps)
    y = centred_affine(x, mean, spread + eps, weight, bias)
    return laid_out_as(y, x), mean, spread, *sparse


def backward(
    call: Call, g: Tensor, weight: Tensor | None, mean: Tensor, spread: Tensor, indices: Tensor, signs: Tensor
) -> tuple[Tensor, ...]:
    """dx as x, dweight and dbias in the dtype of the statistics."""
    x, row, n, constant, eps = call.x, call.row, call.n, call.constant, call.eps
    dweight, dbias = sums(g, x, mean, spread + eps)
    dweight -= dbias * rounding(x, mean, spread + eps) / (spread + eps)
    total, sparse = torch.stack([dweight, dbias, slope_sum(signs, row, constant, n)]), (indices, signs)
    return input_gradient(g, x, weight, mean, spread, sparse, total, row, constant, n, eps), dweight, dbias


def slope_sum(signs: Tensor, row: Metric, constant: float, n: int) -> Tensor:
    """sum w of each channel, (C,)."""
    return constant * (signs[:, 0] / n if row.family == "mean" else sparse_slope(signs, row).sum(1))


def input_gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    sparse: Sparse,
    total: Tensor,
    row: Metric,
    constant: float,
    n: int,
    eps: float,
) -> Tensor:
    """dx, as x. total: (3, C), dweight, dbias and sum w of all n elements that share statistics, here or elsewhere."""
    dweight, dbias, slopes = total.to(mean.dtype)
    indices, signs = sparse
    scale, middle = spread + eps, (dbias - dweight * slopes) / n
    inward = -dweight / scale if weight is None else -dweight * weight.to(scale.dtype) / scale
    # in half precision one sum of two roundings would not do, nor the sum of two infinities on a dead channel
    if row.family == "mean":
        dx, factor, parts = torch.empty_like(x), _factor(scale, weight), Pieces(x)
        per = mean, factor, inward * (constant / n), -factor * middle, spread, spread / constant
        for piece in last_first(*map(parts.of, (x, g, dx)), *map(parts.each, per)):
            _dense_part(row, eps, *piece)
        return dx
    dx = affine(wide(g), middle, scale, weight, None)
    if x.numel():
        _add_at(dx, indices, inward[:, None] * constant * sparse_slope(signs, row))
    return laid_out_as(within_half(dx, per_channel(spread, x.dim()), eps, x.dtype), x)


def _dense_part(
    row: Metric,
    eps: float,
    x: Tensor,
    g: Tensor,
    dx: Tensor,
    mean: Tensor,
    factor: Tensor,
    inward: Tensor,
    offset: Tensor,
    spread: Tensor,
    raw: Tensor,
) -> None:
    """dx = factor * g + inward * slope + offset, of some elements; raw: S."""
    rank = x.dim()
    values = dx if dx.dtype == mean.dtype else torch.empty_like(dx, dtype=mean.dtype)
    torch.sub(x, per_channel(mean, rank), out=values)  # what follows is done in place: half of what memory has to carry
    slope = _affine_(dense_slope(values, per_channel(raw, rank), row), inward, offset)
    torch.addcmul(slope, wide(g), per_channel(factor, rank), out=values)
    if values is not dx:
        dx.copy_(within_half(values, per_channel(spread, rank), eps, x.dtype))


def _affine_(x: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """factor * x + offset, channel by channel, in place: torch's inference batch norm again."""
    rest = torch.zeros_like(factor), torch.ones_like(factor), False, 0.0, 0.0
    mean, scale = factor.new_empty(0), factor.new_empty(0)  # of training alone
    torch.ops.aten.native_batch_norm.out(x, factor, offset, *rest, out=x, save_mean=mean, save_invstd=scale)
    return x


def _add_at(dx: Tensor, indices: Tensor, values: Tensor) -> None:
    """dx: (N, C, *) += values at `indices`, (C, k) positions in each channel's own (N, *) order."""
    samples = dx.view(*dx.shape[:2], -1)
    channels = torch.arange(dx.shape[1], device=dx.device)[:, None].expand_as(indices)
    sample, position = divided(indices, samples.shape[2])
    samples.index_put_((sample, channels, position), values, accumulate=True)
