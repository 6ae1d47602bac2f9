"""Torch: batch-scope normalisation of any row, with its hand-derived backward.

>>> y, mean, spread = normalise(x, weight, bias, metric("l1"), "exact", eps=1e-5)      # x: (N, C, *)

Statistics are fp32 at least, whatever x's dtype; y has x's dtype and memory format. The backward is, with g = dL/dy,
w = dscale/dd and one sum of each kind over a channel (two reductions, as batch norm):

    dbias = sum g      dweight = sum g*d/scale      dx = weight/scale * (g - mean g - dweight * (w - mean w))

It keeps x, two numbers a channel and, for the families that read few elements, their k indices a channel. The sign that
`mean` needs is read again from x. Twice-differentiation is refused by torch rather than answered wrongly.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normrewrite.norms import Gain, Metric

# What a backward must know of S: nothing more for dense families, (indices, signs), each (C, k), for sparse ones.
Sparse = tuple[Tensor, Tensor]


def wide(x: Tensor) -> Tensor:
    """x in the dtype that statistics are kept in: fp32, or float64 where x is that already."""
    return x if x.dtype is torch.float64 else x.float()


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
    dims = [0, *range(2, x.dim())]
    if row.family == "mean":
        d = x - per_channel(mean, x.dim())
        return _power_mean(d, dims, row.power), None
    rows = x.transpose(0, 1).flatten(1)  # (C, n)
    if row.family == "span":
        high, low = rows.max(1), rows.min(1)
        indices = torch.stack([high.indices, low.indices], 1)
        signs = torch.tensor([1.0, -1.0], dtype=x.dtype, device=x.device).expand_as(indices)
        return high.values - low.values, (indices, signs)
    d = rows - mean[:, None]
    indices = d.abs().topk(row.k(rows.shape[1]), dim=1, sorted=False).indices
    taken = d.gather(1, indices)
    return taken.abs().mean(1), (indices, taken.sign())


def _power_mean(d: Tensor, dims: list[int], power: int) -> Tensor:
    if power == 1:
        return d.abs_().mean(dims)
    return d.abs_().pow_(power).mean(dims).pow_(1 / power)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, row: Metric, gain: float, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = wide(x)
        mean = values.mean([0, *range(2, x.dim())])
        raw, sparse = measure(values, mean, row)
        spread = gain * raw
        ctx.row, ctx.gain, ctx.eps = row, gain, eps
        ctx.save_for_backward(x, weight, mean, spread, *(sparse or (None, None)))
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, spread)
        return affine(x, mean, spread + eps, weight, bias), mean, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _mean: Tensor, _spread: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, spread, indices, signs = ctx.saved_tensors
        dweight, dbias = _sums(g, x, mean, spread + ctx.eps)
        dx = None
        if ctx.needs_input_grad[0]:
            sparse = None if indices is None else (indices, signs)
            dx = _dx(ctx, g, x, weight, mean, spread, dweight, dbias, sparse)
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            None,
            None,
            None,
        )


def _sums(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(sum g*d/scale, sum g) by channel: the two reductions of torch's own batch norm backward, in one read of g and x."""
    ones = torch.ones_like(mean)
    _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        g.to(x.dtype), x, ones, None, None, mean, scale.reciprocal(), True, 0.0, [False, True, True]
    )
    return dweight, dbias


def _dx(
    ctx: Any,
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    sparse: Sparse | None,
) -> Tensor:
    row, rank, n = ctx.row, x.dim(), x.numel() // x.shape[1]
    scale = spread + ctx.eps
    factor = scale.reciprocal() if weight is None else weight.to(scale.dtype) / scale
    dx = wide(g) - per_channel(dbias / n, rank)
    if sparse is None:
        slope = _dense_slope(wide(x), mean, spread / ctx.gain, row).mul_(ctx.gain / n)
        slope -= per_channel(slope.mean([0, *range(2, rank)]), rank)
        dx = dx.addcmul_(slope, per_channel(-dweight, rank))
    else:
        indices, signs = sparse
        slope = signs * (ctx.gain if row.family == "span" else ctx.gain / signs.shape[1])
        dx += per_channel(dweight * slope.sum(1) / n, rank)
        _add_at(dx, indices, -dweight[:, None] * slope)
    return (dx * per_channel(factor, rank)).to(x.dtype)


def _dense_slope(x: Tensor, mean: Tensor, spread: Tensor, row: Metric) -> Tensor:
    """n * dS/dd = sign(d) * (|d|/S)^(power-1), elementwise; zero where a channel is constant."""
    d = x - per_channel(mean, x.dim())
    if row.power == 1:
        return d.sign_()
    ratio = d / per_channel(spread.clamp_min(torch.finfo(spread.dtype).tiny), x.dim())
    return ratio.abs().pow_(row.power - 1).mul_(ratio.sign())


def _add_at(dx: Tensor, indices: Tensor, values: Tensor) -> None:
    """dx: (N, C, *) += values at `indices`, (C, k) positions in each channel's own (N, *) order."""
    channels = torch.arange(dx.shape[1], device=dx.device)[:, None].expand_as(indices)
    first, *rest = torch.unravel_index(indices, (dx.shape[0], *dx.shape[2:]))
    dx.index_put_((first, channels, *rest), values, accumulate=True)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, row: Metric, gain: Gain, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x: (N, C, *) by its own batch. Returns y (as x), mean (C,) and C * S (C,), the last two detached, fp32+."""
    n = x.numel() // x.shape[1]
    apply: Any = _Normalise.apply
    y, mean, spread = apply(x, weight, bias, row, row.gain(n, gain), eps)
    return y, mean, spread
