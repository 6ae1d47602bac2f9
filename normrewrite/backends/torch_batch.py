"""Torch: batch-scope normalisation of any row, with its hand-derived backward.

>>> y, mean, spread = normalise(x, weight, bias, metric("l1"), "exact", eps=1e-5)      # x: (N, C, *)

Statistics are fp32 at least, whatever x's dtype; y has x's dtype and memory format. The backward is, with g = dL/dy,
w = dscale/dd and one sum of each kind over a channel (two reductions, as batch norm):

    dbias = sum g      dweight = sum g*d/scale      dx = weight/scale * (g - mean g - dweight * (w - mean w))

It keeps x, three numbers a channel and, for the families that read few elements, their k indices a channel. The sign that
`mean` needs is read again from x. Memory is read once a pass: what takes several small kernels is done piece by piece
(pieces.py), and the few elements that sparse families want are looked for in the cells that can hold them.

Forward and backward are two custom operators, whole to torch.compile and torch.export: the constant C(n) is looked up when
they run, so that a dynamic batch needs no formula for it. Second derivatives and torch.func are plain.py's.
"""

from typing import cast

import torch
from torch import Tensor

from normrewrite.backends import compiled, plain
from normrewrite.backends.families import (
    Sparse,
    dense_slope,
    distant,
    laid_out_as,
    sparse_slope,
    taken,
    wide,
    wide_dtype,
    within_half,
)
from normrewrite.backends.kernels import compiles, serving
from normrewrite.backends.measuring import about, last_first, per_channel, recentred_, rounding, statistics, sums
from normrewrite.backends.pieces import Pieces, divided
from normrewrite.norms import Gain, Metric
from normrewrite.norms import metric as row_of


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


# --- forward ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("normrewrite::batch_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str, gain: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, mean, C * S, and what a backward can't read from x: where sparse families read S, and which way."""
    row = row_of(metric)
    kernels = serving(x, row)
    if kernels is not None:
        return kernels.forward(x, None, weight, bias, row, cast(Gain, gain), eps)[:5]  # type: ignore[no-any-return]
    constant = row.gain(x.numel() // x.shape[1], cast(Gain, gain))  # first, as it refuses rows that are too short
    if compiles(x, row):
        y, mean, spread, indices, signs = compiled.forward(x, weight, bias, row, constant, eps)
        recentred_(x, mean, spread, (indices, signs), row, constant, eps)
        return near_(y, x, mean, spread + eps, weight, bias), mean, spread, indices, signs
    mean, raw, kept = statistics(x, row)
    spread = raw * constant
    recentred_(x, mean, spread, kept, row, constant, eps)
    y = centred_affine(x, mean, spread + eps, weight, bias)
    return laid_out_as(y, x), mean, spread, *kept


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str, gain: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, channels = row_of(metric), x.shape[1]
    mean = x.new_empty(channels, dtype=wide_dtype(x))
    shape = taken(row, channels, x.numel() // channels)
    signs = (channels, 1) if row.family == "mean" else shape
    return (
        torch.empty_like(x),
        mean,
        torch.empty_like(mean),
        x.new_empty(shape, dtype=torch.int64),
        mean.new_empty(signs),
    )


# --- backward ---------------------------------------------------------------------------------------------------------


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
    kernels = serving(x, row)
    if kernels is not None:
        measured = mean, spread, indices, signs, None
        return kernels.backward(g, x, weight, None, *measured, row, cast(Gain, gain), eps)[:3]  # type: ignore[no-any-return]
    constant = row.gain(n, cast(Gain, gain))
    if compiles(x, row):
        return compiled.backward(g, x, weight, mean, spread, signs, row, constant, eps)
    dweight, dbias = sums(g, x, mean, spread + eps)
    dweight -= dbias * rounding(x, mean, spread + eps) / (spread + eps)
    total, kept = torch.stack([dweight, dbias, slope_sum(signs, row, constant, n)]), (indices, signs)
    return input_gradient(g, x, weight, mean, spread, kept, total, row, constant, n, eps), dweight, dbias


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


backward = plain.of_many(lambda *kept: _backward(*kept), plain.batch)
_forward.register_autograd(plain.gradients(backward), setup_context=plain.keep)
_backward.register_autograd(plain.second(plain.batch), setup_context=plain.keep_backward)


def slope_sum(signs: Tensor, row: Metric, constant: float, n: int) -> Tensor:
    """sum w of each channel, (C,)."""
    return constant * (signs[:, 0] / n if row.family == "mean" else sparse_slope(signs, row).sum(1))


def input_gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    kept: Sparse,
    total: Tensor,
    row: Metric,
    constant: float,
    n: int,
    eps: float,
) -> Tensor:
    """dx, as x. total: (3, C), dweight, dbias and sum w of all n elements that share statistics, here or elsewhere."""
    dweight, dbias, slopes = total.to(mean.dtype)
    indices, signs = kept
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


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, row: Metric | str, gain: Gain, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x: (N, C, *) by its own batch. Returns y (as x), mean (C,) and C * S (C,), the last two detached, fp32+."""
    if plain.transformed():
        return plain.batch(x, weight, bias, row_of(str(row)), gain, eps)
    y, mean, spread, _, _ = _forward(x, weight, bias, str(row), gain, eps)
    return y, mean, spread
