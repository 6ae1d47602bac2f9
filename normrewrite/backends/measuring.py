"""Torch: what is measured of a tensor, channel by channel for the batch scope and line by line within a sample.

>>> mean, spread, (indices, signs) = statistics(x, metric("l1"))                 # x: (N, C, *)
>>> dweight, dbias = sums(g, x, mean, scale)

Memory is read once: what takes several small kernels is done piece by piece (pieces.py), and the few elements that sparse
families want are looked for in the cells that can hold them.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from normrewrite.backends.families import (
    Sparse,
    dense_slope,
    distant,
    extremes,
    largest,
    mean_dtype,
    power_mean,
    wide,
    wide_dtype,
)
from normrewrite.backends.pieces import FEW, Cells, Pieces, cut
from normrewrite.norms import Metric


def per_channel(values: Tensor, rank: int) -> Tensor:
    """(C,) -> (1, C, 1, ...), to meet an x of that rank."""
    return values.view(1, -1, *(1,) * (rank - 2))


def over(x: Tensor) -> list[int]:
    """The dimensions of (N, C, *) that share a channel's statistics."""
    return [0, *range(2, x.dim())]


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


def measure(x: Tensor, mean: Tensor, row: Metric) -> tuple[Tensor, Sparse]:
    """S of each channel (C,), and what a backward can't read from x. x: (N, C, *); mean: (C,), fp32 or float64."""
    if row.family == "mean":
        return spread_of(power_sums(x, mean, row), x.numel() // x.shape[1], row.power)
    values = wide(x).transpose(0, 1).flatten(1)  # (C, n)
    return extremes(values if row.family == "span" else values - mean[:, None], row)


def power_sums(x: Tensor, mean: Tensor, row: Metric) -> Tensor:
    """sum |d|^p and sum w of each channel, (2, C), for w = sign(d) |d|^(p-1), of which d*w is |d|^p. x: (N, C, *)."""
    parts, by_piece = Pieces(x), []
    d = mean.new_empty(0)
    for piece, middle in last_first(parts.of(x), parts.each(mean)):
        values = wide(piece)
        if d.shape != values.shape:  # the same memory for each, so that it stays in the cache
            d = torch.empty_like(values)
        torch.sub(values, per_channel(middle, values.dim()), out=d)
        by_piece.append(_power_sums(d, values, middle, row, parts.short))
    return torch.stack([parts.total(each[::-1]) for each in zip(*by_piece, strict=True)]).to(mean.dtype)


def _power_sums(d: Tensor, x: Tensor, mean: Tensor, row: Metric, short: bool) -> tuple[Tensor, Tensor]:
    """sum |d|^p and sum w of d = x - mean, (C,) each; short: as Pieces.short. Overwrites d."""
    one = mean.new_ones(())
    if short:
        return _two_sums(dense_slope(d, one, row), x, mean, torch.ones_like(mean))
    magnitudes = d.abs().pow_(row.power).sum(over(x))
    return magnitudes, dense_slope(d, one, row).sum(over(x))


def spread_of(sums: Tensor, n: int, power: int) -> tuple[Tensor, Sparse]:
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
    extreme = d.gather(1, within)
    return extreme.abs().mean(1), (cells.places(chosen, within), extreme.sign())


def _furthest(cells: Cells, reach: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """The element of each channel that lies furthest to one side, and its place, (C,) each."""
    chosen = reach.max(1, keepdim=True).indices
    values = cells.read(chosen)
    within = (sign * values).max(1, keepdim=True).indices
    return values.gather(1, within)[:, 0], cells.places(chosen, within)[:, 0]


def recentred_(
    x: Tensor, mean: Tensor, spread: Tensor, sparse: Sparse, row: Metric, constant: float, eps: float
) -> None:
    """Measure again, in place, where the mean's rounding would count: about the mean of what lies about the mean."""
    channels = None if x.is_cuda else distant(mean, spread + eps)
    if channels is None:
        return
    mean[channels] += channel_mean(about(x, channels, mean[channels]))
    few = about(x, channels, mean[channels])
    rest = channel_mean(few)  # the signs of dense metrics are told again from the mean as it is rounded
    raw, again = measure(few, torch.zeros_like(rest) if row.family == "mean" else rest, row)
    spread[channels] = raw * constant
    for of_all, of_few in zip(sparse, again, strict=True):
        if of_few.numel():
            of_all[channels] = of_few


def rounding(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor | float:
    """By how much the mean of a channel is more than the number that stands for it, where that counts, else 0.

    In y it is within x's own rounding. In dweight it counts as often as there are elements, and sparse metrics put all of dweight
    into few of them.
    """
    channels = None if x.is_cuda else distant(mean, scale)
    if channels is None:
        return 0.0
    more = torch.zeros_like(mean)
    more[channels] = channel_mean(about(x, channels, mean[channels]))
    return more


def about(x: Tensor, channels: Tensor, mean: Tensor) -> Tensor:
    """Some channels' deviations from their means."""
    return wide(x[:, channels]) - per_channel(mean, x.dim())


def sums(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(sum g*d/scale, sum g) by channel, in one read of g and x."""
    parts, inverse = Pieces(x), scale.reciprocal()
    if x.device.type == "cpu" and not parts.short:
        return _long_sums(wide(g), wide(x), mean, inverse)
    if parts.planes and parts.fold == 1 and math.prod(x.shape[2:]) > FEW:
        return _two_sums(g, x, mean, inverse)
    each = zip(parts.of(g), parts.of(x), parts.each(mean), parts.each(inverse), strict=False)
    product, plain = (parts.total(of_pieces) for of_pieces in zip(*(_two_sums(*piece) for piece in each), strict=True))
    return product.to(mean.dtype), plain.to(mean.dtype)


def _long_sums(g: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """`_two_sums` by torch's own sums, which add up by pairs: where planes have no short parts."""
    d = (x - per_channel(mean, x.dim())).mul_(g)
    return d.sum(over(x)) * inverse, g.sum(over(x))


def _two_sums(g: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """(sum g*d*inverse, sum g) by channel: the two reductions of torch's own batch norm backward, one kernel.

    It goes through all samples channel by channel, which is slow where planes are small and memory is far: give it pieces.
    The sums don't depend on a weight, but on CUDA torch gives them only where there is one, in its dtype.
    """
    asked = mean, inverse, True, 0.0, [False, True, True]
    weight = torch.ones_like(mean)
    _, product, plain = torch.ops.aten.native_batch_norm_backward(g.to(x.dtype), x, weight, None, None, *asked)
    return product, plain


def last_first(*parts: Iterable[Tensor]) -> list[tuple[Tensor, ...]]:
    """The last pieces first: after one pass over a tensor, its end is what the cache still holds."""
    return list(zip(*parts, strict=False))[::-1]


# --- within a sample --------------------------------------------------------------------------------------------------


def measure_lines(d: Tensor, row: Metric) -> tuple[Tensor, Sparse | None]:
    """S of each line (B, G), and where a sparse family read it. d: (B, G, K, S) deviations, fp32 or float64."""
    if row.family == "mean":
        return power_mean(d.abs(), [2, 3], row.power), None
    spread, sparse = extremes(as_lines(d), row)
    return spread.view(d.shape[:2]), sparse


def as_lines(values: Tensor) -> Tensor:
    """(B, G, K, S) -> (B * G, n)."""
    return values.reshape(values.shape[0] * values.shape[1], values.shape[2] * values.shape[3])
