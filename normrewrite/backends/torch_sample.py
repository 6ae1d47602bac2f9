"""Torch: normalisation of any row within a sample (layer, group, instance, RMS), with its hand-derived backward.

>>> y, mean, spread = normalise(x, weight, bias, metric("l1"), "exact", eps=1e-5, centred=True)      # x: (B, G, K, S)

Every scope is one view of its input: B * G rows of n = K * S elements that share statistics, and (G, K) channels that share
a weight. A layer norm of n features is (B, 1, n, 1), a group norm (B, groups, channels a group, positions), an instance
norm (B, C, 1, positions). Not centred (RMS), mean is 0 and d = x. Statistics are fp32 at least, whatever x's dtype; y has
x's dtype and strides. The backward is, with gh = weight * dL/dy, w = dscale/dd and means and sums over a row:

    dx = (gh - mean gh - (sum gh*d / scale) * (w - mean w)) / scale          without both means where not centred
    dbias = sum g      dweight = sum g*d/scale                               over all rows and positions of a channel

It is backends/torch_batch.py's with the weight inside, as that varies in a row; it keeps x, two numbers a row and, for the
families that read few elements, their k indices a row. Second derivatives and torch.func are plain.py's.
"""

from typing import cast

import torch
from torch import Tensor

from normrewrite.backends import plain
from normrewrite.backends.families import (
    Sparse,
    dense_slope,
    distant,
    laid_out_as,
    mean_dtype,
    nothing,
    sparse_slope,
    taken,
    wide,
    wide_dtype,
    within_half,
)
from normrewrite.backends.kernels import serving
from normrewrite.backends.measuring import as_rows, measure_rows
from normrewrite.norms import Gain, Metric
from normrewrite.norms import metric as row_of

_ROW, _CHANNEL = (2, 3), (0, 3)  # the dimensions that statistics, and those that parameters, are reduced over


def _by_row(values: Tensor) -> Tensor:
    """(B, G) -> (B, G, 1, 1)."""
    return values[:, :, None, None]


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """(G, K) -> (1, G, K, 1), in x's dtype."""
    return values.to(x.dtype)[None, :, :, None]


def _count(x: Tensor) -> int:
    """n, how many elements share statistics."""
    return x.shape[2] * x.shape[3]


@torch.library.custom_op("normrewrite::row_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str, gain: str, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, mean, C * S, and where a sparse family read S (empty for dense ones)."""
    row = row_of(metric)
    kernels = serving(x, row, sample=True)
    if kernels is not None:
        told = row, cast(Gain, gain), eps
        return kernels.forward(x, None, weight, bias, *told, sample=True, centred=centred)[:5]  # type: ignore[no-any-return]
    return forward(x, weight, bias, row, cast(Gain, gain), eps, centred)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, row: Metric, gain: Gain, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator's results by torch, whatever the kernels could do."""
    values = wide(x)
    constant = row.gain(_count(x), gain)  # first, as it refuses rows that are too short
    mean = values.mean(_ROW, dtype=mean_dtype(x)).to(values.dtype) if centred else values.new_zeros(x.shape[:2])
    d = values - _by_row(mean)
    raw, sparse = measure_rows(d, row)
    spread = raw * constant
    if centred and not x.is_cuda:
        _recentre_(d, mean, spread, sparse, row, constant, eps)
    y = d.div_(_by_row(spread + eps))
    if weight is not None:
        y *= _by_channel(weight, y)
    if bias is not None:
        y += _by_channel(bias, y)
    return laid_out_as(y, x), mean, spread, *(sparse or nothing(mean))


def _recentre_(
    d: Tensor, mean: Tensor, spread: Tensor, sparse: Sparse | None, row: Metric, constant: float, eps: float
) -> None:
    """Centre and measure again, in place, rows where the mean's rounding would count. d: deviations."""
    far = distant(mean, spread + eps)
    if far is None:
        return
    few = d[far]
    moved = mean[far] + few.mean((1, 2))
    few -= (moved - mean[far])[:, None, None]  # 0, where a row is constant
    few -= few.mean((1, 2), keepdim=True)
    mean[far], d[far] = moved, few
    raw, again = measure_rows(few[:, None], row)
    spread[far] = raw[:, 0] * constant
    for of_all, of_few in zip(sparse or (), again or (), strict=True):
        of_all[far.flatten()] = of_few


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str, gain: str, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[:2], dtype=wide_dtype(x))
    shape = taken(row_of(metric), x.shape[0] * x.shape[1], _count(x))
    indices = x.new_empty(shape, dtype=torch.int64)
    return torch.empty_like(x), mean, torch.empty_like(mean), indices, mean.new_empty(shape)


@torch.library.custom_op("normrewrite::row_norm_backward", mutates_args=())
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
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx as x, dweight and dbias (G, K) in the dtype of the statistics."""
    row, constant = row_of(metric), row_of(metric).gain(_count(x), cast(Gain, gain))
    kernels = serving(x, row, sample=True)
    if kernels is not None:
        kept = mean, spread, indices, signs, None, row, cast(Gain, gain), eps
        return kernels.backward(g, x, weight, None, *kept, sample=True, centred=centred)[:3]  # type: ignore[no-any-return]
    scale = _by_row(spread + eps)
    d, g = wide(x) - _by_row(mean), wide(g)
    far = None if x.is_cuda or not centred else distant(mean, spread + eps)
    if far is not None:
        d[far] -= d[far].mean((1, 2), keepdim=True)
    dweight, dbias = (g * d / scale).sum(_CHANNEL), g.sum(_CHANNEL)
    gh = g if weight is None else g * _by_channel(weight, g)
    share = (gh * d / scale).sum(_ROW, keepdim=True)
    if row.family == "mean":
        slope = dense_slope(d, _by_row(spread / constant), row).mul_(constant / _count(x))
        dx = gh - slope * share
    else:
        slope = constant * sparse_slope(signs, row)
        dx = as_rows(gh).scatter_add(1, indices, -slope * share.view(-1, 1)).view(x.shape)
    if centred:
        dx -= dx.mean(_ROW, keepdim=True)
    dx = within_half(dx.div_(scale), _by_row(spread), eps, x.dtype)
    return laid_out_as(dx, x), dweight, dbias


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
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = mean.new_empty(x.shape[1:3])
    return torch.empty_like(x), channels, torch.empty_like(channels)


backward = plain.of_many(lambda *kept: _backward(*kept), plain.rows)
_forward.register_autograd(plain.gradients(backward), setup_context=plain.keep)
_backward.register_autograd(plain.second(plain.rows), setup_context=plain.keep_backward)


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Metric | str,
    gain: Gain,
    eps: float,
    centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each row of x: (B, G, K, S) over its last two dimensions; weight, bias: (G, K) or None.

    Returns y (as x), mean (B, G) and C * S (B, G), the last two detached, fp32 at least; mean is 0 where not centred.
    Raises NormRewriteError where a row has fewer than two elements, or fewer than the metric reads.
    """
    if plain.transformed():
        return plain.rows(x, weight, bias, row_of(str(row)), gain, eps, centred)
    y, mean, spread, _, _ = _forward(x, weight, bias, str(row), gain, eps, centred)
    return y, mean, spread
