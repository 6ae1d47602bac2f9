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

from typing import Any, cast

import torch
from torch import Tensor

from normrewrite.norms import Gain, Metric
from normrewrite.norms import metric as row_of

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
        signs = torch.tensor([1.0, -1.0], dtype=x.dtype, device=x.device).repeat(len(indices), 1)
        return high.values - low.values, (indices, signs)
    d = rows - mean[:, None]
    indices = d.abs().topk(row.k(rows.shape[1]), dim=1, sorted=False).indices
    taken = d.gather(1, indices)
    return taken.abs().mean(1), (indices, taken.sign())


def _power_mean(d: Tensor, dims: list[int], power: int) -> Tensor:
    if power == 1:
        return d.abs_().mean(dims)
    return d.abs_().pow_(power).mean(dims).pow_(1 / power)


def _laid_out_as(values: Tensor, x: Tensor) -> Tensor:
    """In x's dtype and strides: what the fake operators announce to compilers, whatever layout a kernel chose."""
    like = torch.empty_like(x)
    return values.to(x.dtype) if values.stride() == like.stride() else like.copy_(values)


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
    return _laid_out_as(y, x), mean, spread, *(sparse or (x.new_empty(0, dtype=torch.int64), mean.new_empty(0)))


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, metric: str, gain: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, channels = row_of(metric), x.shape[1]
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean = x.new_empty(channels, dtype=dtype)
    taken = _fake_taken(row, x)
    indices = x.new_empty(taken, dtype=torch.int64)
    return torch.empty_like(x), mean, torch.empty_like(mean), indices, x.new_empty(taken, dtype=dtype)


def _fake_taken(row: Metric, x: Tensor) -> tuple[Any, ...]:
    """The shape of the indices that a sparse family keeps; a percentage of a symbolic n is known only at run time."""
    if row.family == "mean":
        return (0,)
    if row.family == "span":
        return (x.shape[1], 2)
    n = x.numel() // x.shape[1]
    if row.percent is not None and isinstance(n, torch.SymInt):
        return (x.shape[1], torch.library.get_ctx().new_dynamic_size(min=1))
    return (x.shape[1], row.count if row.percent is None else row.k(n))


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
    scale = spread + eps
    dweight, dbias = _sums(g, x, mean, scale)
    constant = row.gain(n, cast(Gain, gain))
    dx = wide(g) - per_channel(dbias / n, x.dim())
    if row.family == "mean":
        slope = _dense_slope(wide(x), mean, spread / constant, row).mul_(constant / n)
        slope -= per_channel(slope.mean([0, *range(2, x.dim())]), x.dim())
        dx = dx.addcmul_(slope, per_channel(-dweight, x.dim()))
    else:
        slope = signs * (constant if row.family == "span" else constant / signs.shape[1])
        dx += per_channel(dweight * slope.sum(1) / n, x.dim())
        _add_at(dx, indices, -dweight[:, None] * slope)
    factor = scale.reciprocal() if weight is None else weight.to(scale.dtype) / scale
    dx *= per_channel(factor, x.dim())
    if x.dtype is torch.float16:  # 1/eps of a dead channel lies beyond its range, and one inf would void the whole step
        largest = torch.where(spread <= eps, torch.finfo(x.dtype).max, torch.inf)
        dx = dx.clamp(-per_channel(largest, x.dim()), per_channel(largest, x.dim()))
    return _laid_out_as(dx, x), dweight, dbias


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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *ctx.settings = inputs
    _, mean, spread, indices, signs = output
    ctx.save_for_backward(x, weight, mean, spread, indices, signs)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(mean, spread, indices, signs)


def _gradients(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *kept = ctx.saved_tensors
    dx, dweight, dbias = _backward(g, x, weight, *kept, *ctx.settings)
    return (
        dx,
        None if weight is None else dweight.to(weight.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_keep)


def _sums(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(sum g*d/scale, sum g) by channel: the two reductions of torch's own batch norm backward, in one read of g and x."""
    ones = torch.ones_like(mean)
    _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        g.to(x.dtype), x, ones, None, None, mean, scale.reciprocal(), True, 0.0, [False, True, True]
    )
    return dweight, dbias


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
    x: Tensor, weight: Tensor | None, bias: Tensor | None, row: Metric | str, gain: Gain, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x: (N, C, *) by its own batch. Returns y (as x), mean (C,) and C * S (C,), the last two detached, fp32+."""
    y, mean, spread, _, _ = _forward(x, weight, bias, str(row), gain, eps)
    return y, mean, spread
