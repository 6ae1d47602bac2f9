"""Torch: normalisation within a sample by any metric (layer, group, instance, RMS), with its hand-derived backward.

>>> y, *measured = forward(Call(x, "l1", sample=True), weight, bias)                  # x: (B, G, K, S)
>>> dx, dweight, dbias = backward(Call(x, "l1", sample=True), g, weight, *measured)

Every scope is one view of its input: B * G lines of n = K * S elements that share statistics, and (G, K) channels that share
a weight. A layer norm of n features is (B, 1, n, 1), a group norm (B, groups, channels a group, positions), an instance
norm (B, C, 1, positions). Not centred (RMS), mean is 0 and d = x. Statistics are fp32 at least, whatever x's dtype; y has
x's dtype and strides. The backward is, with gh = weight * dL/dy, w = dscale/dd and means and sums over a line:

    dx = (gh - mean gh - (sum gh*d / scale) * (w - mean w)) / scale          without both means where not centred
    dbias = sum g      dweight = sum g*d/scale                               over all lines and positions of a channel

It is backends/torch_batch.py's with the weight inside, as that varies in a line; it keeps x, two numbers a line and, for the
families that read few elements, their k indices a line.
"""

from torch import Tensor

from normrewrite.backends.call import Call
from normrewrite.backends.families import (
    Sparse,
    dense_slope,
    distant,
    laid_out_as,
    mean_dtype,
    nothing,
    sparse_slope,
    wide,
    within_half,
)
from normrewrite.backends.measuring import as_lines, measure_lines
from normrewrite.norms import Metric

_LINE, _CHANNEL = (2, 3), (0, 3)  # the dimensions that statistics, and those that parameters, are reduced over


def _by_line(values: Tensor) -> Tensor:
    """(B, G) -> (B, G, 1, 1)."""
    return values[:, :, None, None]


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """(G, K) -> (1, G, K, 1), in x's dtype."""
    return values.to(x.dtype)[None, :, :, None]


def why_not(call: Call) -> str | None:
    return None if call.sample else "statistics are by channel"


def forward(call: Call, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    """y, mean, C * S, and where a sparse family read S (empty for dense ones)."""
    constant = call.constant  # first, as it refuses what is too short
    x, row, centred = call.x, call.row, call.centred
    values = wide(x)
    mean = values.mean(_LINE, dtype=mean_dtype(x)).to(values.dtype) if centred else values.new_zeros(x.shape[:2])
    d = values - _by_line(mean)
    raw, sparse = measure_lines(d, row)
    spread = raw * constant
    if centred and not x.is_cuda:
        _recentre_(d, mean, spread, sparse, row, constant, call.eps)
    y = d.div_(_by_line(spread + call.eps))
    if weight is not None:
        y *= _by_channel(weight, y)
    if bias is not None:
        y += _by_channel(bias, y)
    return laid_out_as(y, x), mean, spread, *(sparse or nothing(mean))


def _recentre_(
    d: Tensor, mean: Tensor, spread: Tensor, sparse: Sparse | None, row: Metric, constant: float, eps: float
) -> None:
    """Centre and measure again, in place, lines where the mean's rounding would count. d: deviations."""
    far = distant(mean, spread + eps)
    if far is None:
        return
    few = d[far]
    moved = mean[far] + few.mean((1, 2))
    few -= (moved - mean[far])[:, None, None]  # 0, where a line is constant
    few -= few.mean((1, 2), keepdim=True)
    mean[far], d[far] = moved, few
    raw, again = measure_lines(few[:, None], row)
    spread[far] = raw[:, 0] * constant
    for of_all, of_few in zip(sparse or (), again or (), strict=True):
        of_all[far.flatten()] = of_few


def backward(
    call: Call, g: Tensor, weight: Tensor | None, mean: Tensor, spread: Tensor, indices: Tensor, signs: Tensor
) -> tuple[Tensor, ...]:
    """dx as x, dweight and dbias (G, K) in the dtype of the statistics."""
    x, row, constant, centred = call.x, call.row, call.constant, call.centred
    scale = _by_line(spread + call.eps)
    d, g = wide(x) - _by_line(mean), wide(g)
    far = None if x.is_cuda or not centred else distant(mean, spread + call.eps)
    if far is not None:
        d[far] -= d[far].mean((1, 2), keepdim=True)
    dweight, dbias = (g * d / scale).sum(_CHANNEL), g.sum(_CHANNEL)
    gh = g if weight is None else g * _by_channel(weight, g)
    share = (gh * d / scale).sum(_LINE, keepdim=True)
    if row.family == "mean":
        slope = dense_slope(d, _by_line(spread / constant), row).mul_(constant / call.n)
        dx = gh - slope * share
    else:
        slope = constant * sparse_slope(signs, row)
        dx = as_lines(gh).scatter_add(1, indices, -slope * share.view(-1, 1)).view(x.shape)
    if centred:
        dx -= dx.mean(_LINE, keepdim=True)
    dx = within_half(dx.div_(scale), _by_line(spread), call.eps, x.dtype)
    return laid_out_as(dx, x), dweight, dbias
