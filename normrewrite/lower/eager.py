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

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from normrewrite.lower import compiled, plain
from normrewrite.lower.families import (
    Sparse,
    dense_slope,
    distant,
    extremes,
    laid_out_as,
    largest,
    mean_dtype,
    sparse_slope,
    taken,
    wide,
    wide_dtype,
    within_half,
)
from normrewrite.lower.kernels import compiles, serving
from normrewrite.lower.pieces import FEW, Cells, Pieces, cut, divided
from normrewrite.norms import Gain, Metric
from normrewrite.norms import metric as row_of


def per_channel(values: Tensor, rank: int) -> Tensor:
    """(C,) -> (1, C, 1, ...), to meet an x of that rank."""
    return values.view(1, -1, *(1,) * (rank - 2))


def over(x: Tensor) -> list[int]:
    """The dimensions of (N, C, *) that share a channel's statistics."""
    return [0, *range(2, x.dim())]


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
        d, zero = _about(x, channels, mean[channels]), torch.zeros_like(mean[channels])
        y[:, channels] = affine(d, zero, scale[channels], weight, bias).to(y.dtype)
    return y


def _about(x: Tensor, channels: Tensor, mean: Tensor) -> Tensor:
    """Some channels' deviations from their means."""
    return wide(x[:, channels]) - per_channel(mean, x.dim())


# --- statistics -------------------------------------------------------------------------------------------------------


def statistics(x: Tensor, row: Metric) -> tuple[Tensor, Tensor, Sparse]:
    """mean and S of each channel (C,), and what a backward can't read from x, (N, C, *); for few extremes in one read."""
    if row.family != "mean":
        k = 1 if row.family == "span" else row.k(x.numel() // x.shape[1])
        cells = cut(x, k)
        if cells is not None and 4 * k <= cells.high.shape[1]:
            return cells.mean, *extremes_in(cells, row, k)
    mean = channel_mean(x)
    return mean, *measure(x, mean, row)


def channel_mean(x: Tensor) -> Tensor:
    """The mean of each channel, (C,), fp32 at least; plane by plane first, where planes lie together in memory."""
    if x.dim() > 2 and x.is_contiguous():
        return x.flatten(2).mean(2, dtype=mean_dtype(x)).mean(0).to(wide_dtype(x))
    return x.mean(over(x), dtype=mean_dtype(x)).to(wide_dtype(x))


def recentred_(x: Tensor, mean: Tensor, spread: Tensor, kept: Sparse, row: Metric, constant: float, eps: float) -> None:
    """Measure again, in place, where the mean's rounding would count: about the mean of what lies about the mean."""
    channels = None if x.is_cuda else distant(mean, spread + eps)
    if channels is None:
        return
    mean[channels] += channel_mean(_about(x, channels, mean[channels]))
    few = _about(x, channels, mean[channels])
    rest = channel_mean(few)  # the signs of dense rows are told again from the mean as it is rounded
    raw, again = measure(few, torch.zeros_like(rest) if row.family == "mean" else rest, row)
    spread[channels] = raw * constant
    for of_all, of_few in zip(kept, again, strict=True):
        if of_few.numel():
            of_all[channels] = of_few


def measure(x: Tensor, mean: Tensor, row: Metric) -> tuple[Tensor, Sparse]:
    """S of each channel (C,), and what a backward can't read from x. x: (N, C, *); mean: (C,), fp32 or float64."""
    if row.family == "mean":
        return power_mean(power_sums(x, mean, row), x.numel() // x.shape[1], row.power)
    rows = wide(x).transpose(0, 1).flatten(1)  # (C, n)
    return extremes(rows if row.family == "span" else rows - mean[:, None], row)


def power_sums(x: Tensor, mean: Tensor, row: Metric) -> Tensor:
    """sum |d|^p and sum w of each channel, (2, C), for w = sign(d) |d|^(p-1), of which d*w is |d|^p. x: (N, C, *)."""
    parts, found = Pieces(x), []
    d = mean.new_empty(0)
    for piece, middle in _last_first(parts.of(x), parts.each(mean)):
        values = wide(piece)
        if d.shape != values.shape:  # the same memory for each, so that it stays in the cache
            d = torch.empty_like(values)
        torch.sub(values, per_channel(middle, values.dim()), out=d)
        found.append(_power_sums(d, values, middle, row, parts.short))
    return torch.stack([parts.total(each[::-1]) for each in zip(*found, strict=True)]).to(mean.dtype)


def _power_sums(d: Tensor, x: Tensor, mean: Tensor, row: Metric, short: bool) -> tuple[Tensor, Tensor]:
    """sum |d|^p and sum w of d = x - mean, (C,) each; short: as Pieces.short. Overwrites d."""
    one = mean.new_ones(())
    if short:
        return _two_sums(dense_slope(d, one, row), x, mean, torch.ones_like(mean))
    magnitudes = d.abs().pow_(row.power).sum(over(x))
    return magnitudes, dense_slope(d, one, row).sum(over(x))


def _last_first(*parts: Iterable[Tensor]) -> list[tuple[Tensor, ...]]:
    """The last pieces first: after one pass over a tensor, its end is what the cache still holds."""
    return list(zip(*parts, strict=False))[::-1]


def power_mean(sums: Tensor, n: int, power: int) -> tuple[Tensor, Sparse]:
    """S of n elements by `power_sums`, and n * sum dS/dd in the place of a sparse family's signs, (C, 1)."""
    spread = (sums[0] / n).pow(1 / power)
    inward = sums[1] / spread.clamp_min(torch.finfo(spread.dtype).tiny).pow(power - 1)
    return spread, (sums.new_empty(0, dtype=torch.int64), inward[:, None])


def extremes_in(cells: Cells, row: Metric, k: int) -> tuple[Tensor, Sparse]:
    """`extremes` of each channel, looked for in the cells that hold them."""
    if row.family == "span":
        high, low = (_furthest(cells, side, sign) for side, sign in ((cells.high, 1), (-cells.low, -1)))
        spread, places = high[0] - low[0], torch.stack([high[1], low[1]], 1)
        return spread, (places, spread.new_tensor([1.0, -1.0]).repeat(len(places), 1))
    mean = cells.mean[:, None]
    _, chosen = largest(torch.maximum(cells.high - mean, mean - cells.low), k)
    d = cells.read(chosen) - mean
    _, within = largest(d.abs(), k)
    found = d.gather(1, within)
    return found.abs().mean(1), (cells.places(chosen, within), found.sign())


def _furthest(cells: Cells, reach: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """The element of each channel that lies furthest to one side, and its place, (C,) each."""
    chosen = reach.max(1, keepdim=True).indices
    values = cells.read(chosen)
    within = (sign * values).max(1, keepdim=True).indices
    return values.gather(1, within)[:, 0], cells.places(chosen, within)[:, 0]


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


def sums(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(sum g*d/scale, sum g) by channel, in one read of g and x."""
    parts, inverse = Pieces(x), scale.reciprocal()
    if x.device.type == "cpu" and not parts.short:
        return _long_sums(wide(g), wide(x), mean, inverse)
    if parts.planes and parts.fold == 1 and math.prod(x.shape[2:]) > FEW:
        return _two_sums(g, x, mean, inverse)
    each = zip(parts.of(g), parts.of(x), parts.each(mean), parts.each(inverse), strict=False)
    product, plain = (parts.total(found) for found in zip(*(_two_sums(*piece) for piece in each), strict=True))
    return product.to(mean.dtype), plain.to(mean.dtype)


def _long_sums(g: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """`_two_sums` by torch's own sums, which add up by pairs: where planes have no short parts."""
    d = (x - per_channel(mean, x.dim())).mul_(g)
    return d.sum(over(x)) * inverse, g.sum(over(x))


def rounding(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor | float:
    """By how much the mean of a channel is more than the number that stands for it, where that counts, else 0.

    In y it is within x's own rounding. In dweight it counts as often as there are elements, and sparse rows put all of dweight
    into few of them.
    """
    channels = None if x.is_cuda else distant(mean, scale)
    if channels is None:
        return 0.0
    found = torch.zeros_like(mean)
    found[channels] = channel_mean(_about(x, channels, mean[channels]))
    return found


def _two_sums(g: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """(sum g*d*inverse, sum g) by channel: the two reductions of torch's own batch norm backward, one kernel.

    It goes through all samples channel by channel, which is slow where planes are small and memory is far: give it pieces.
    The sums don't depend on a weight, but on CUDA torch gives them only where there is one, in its dtype.
    """
    asked = mean, inverse, True, 0.0, [False, True, True]
    weight = torch.ones_like(mean)
    _, product, plain = torch.ops.aten.native_batch_norm_backward(g.to(x.dtype), x, weight, None, None, *asked)
    return product, plain


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
        for piece in _last_first(*map(parts.of, (x, g, dx)), *map(parts.each, per)):
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
