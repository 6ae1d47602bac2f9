"""Torch: a norm by any metric in plain differentiable operations, and what autograd has to know of the operators.

>>> y, mean, spread = sample(x, weight, bias, metric("l1"), "exact", 1e-5)             # x: (B, G, K, S), as torch_sample.py
>>> y, mean, spread = batch(x, weight, bias, metric("l1"), "exact", 1e-5)            # x: (N, C, *), as torch_batch.py

The operators (operators.py) are faster and keep less; their first derivative is an operator, too.
What torch differentiates itself is this: second derivatives and higher, and all that is asked for through torch.func (grad, vmap,
jvp, ...), forward mode or batched gradients, for which operators have no rules.

Which elements a sparse family reads is piecewise constant, and so is the sign of a deviation: their derivative is zero, as is
that of S where all elements are equal.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normrewrite.backends.call import Call
from normrewrite.backends.families import by_batch, extremes, from_batch, wide, wide_dtype, within_half
from normrewrite.norms import Gain, Metric
from normrewrite.norms import metric as row_of

Norm = Callable[..., tuple[Tensor, Tensor, Tensor]]
_ROW = (2, 3)


def transformed() -> bool:
    """Whether torch.func or forward mode is at work: operators would refuse the one, and lose the other's tangents."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def why_not(call: Call) -> str | None:
    if call.relu:
        return "ReLU is computed behind the plain form"
    return None if call.transformed else "operators are faster, and keep less"


def of_call(call: Call, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if call.sample:
        return sample(call.x, weight, bias, call.row, call.gain, call.eps, call.centred)
    return batch(call.x, weight, bias, call.row, call.gain, call.eps)


def sample(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Metric,
    gain: Gain,
    eps: float,
    centred: bool = True,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and C * S, the last two detached. places: (B * G, k), where a sparse family read S, if that is known."""
    values = wide(x)
    constant = row.gain(x.shape[2] * x.shape[3], gain)
    mean = values.mean(_ROW) if centred else values.new_zeros(x.shape[:2])
    d = values - mean[:, :, None, None]
    spread = constant * _spread(d.flatten(2).flatten(0, 1), row, places).view(x.shape[:2])
    y = d / (spread + eps)[:, :, None, None]
    y = y if weight is None else y * weight.to(y.dtype)[:, :, None]
    y = y if bias is None else y + bias.to(y.dtype)[:, :, None]
    return y.to(x.dtype), mean.detach(), spread.detach()


def batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Metric,
    gain: Gain,
    eps: float,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by channel, of x: (N, C, *); places: (C, k)."""
    weight, bias = (None if value is None else value[:, None] for value in (weight, bias))
    y, mean, spread = sample(by_batch(x), weight, bias, row, gain, eps, places=places)
    return from_batch(y, x), mean[0], spread[0]


def _spread(d: Tensor, row: Metric, places: Tensor | None) -> Tensor:
    """S of each line of deviations (R, n)."""
    if row.family == "mean":
        powers = (d.abs() if row.power % 2 else d).pow(row.power).mean(1)
        alive = powers > 0  # the slope of a root at 0 is inf
        return torch.where(alive, torch.where(alive, powers, 1).pow(1 / row.power), 0)
    taken = d.gather(1, extremes(d.detach(), row)[1][0] if places is None else places)
    return taken[:, 0] - taken[:, 1] if row.family == "span" else taken.abs().mean(1)


# --- derivatives ------------------------------------------------------------------------------------------------------


def pulled(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The cotangents of the inputs; differentiable, where autograd is on."""
    if transformed():
        return torch.func.vjp(function, *inputs)[1](tuple(cotangents))  # type: ignore[no-any-return]
    onward = torch.is_grad_enabled()
    with torch.enable_grad():  # views, as one input may have been computed from another
        views = [value.view_as(value) if onward else value.detach() for value in inputs]
        views = [value if value.requires_grad else value.requires_grad_() for value in views]
        outputs = function(*views)
    return torch.autograd.grad(outputs, views, cotangents, create_graph=onward, materialize_grads=True)


def first(
    norm: Norm, g: Tensor, x: Tensor, weight: Tensor, places: Tensor, metric: str, *settings: Any
) -> tuple[Tensor, ...]:
    """What an operator's backward gives: dx, dweight and dbias, all in the dtype of the statistics."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return norm(x, weight, bias, row_of(metric), *settings, places=places)[:1]

    return pulled(forward, (wide(x), wide(weight), torch.zeros_like(weight, dtype=wide_dtype(x))), (wide(g),))


# --- what autograd has to know, for an operator of (x, weight, bias, *settings) that gives y, mean, C * S and Sparse ----------


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the backward reads: x, weight, and all that was measured."""
    x, weight, bias, *ctx.settings = inputs
    _, *measured = output
    ctx.save_for_backward(x, weight, *measured)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*measured)


def gradients(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """The operator's gradient: `backward` gives dx, dweight and dbias from g and all that was kept."""

    def apply(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *measured = ctx.saved_tensors
        dx, dweight, dbias = backward(g, x, weight, *measured, *ctx.settings)
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            *(None for _ in ctx.settings),
        )

    return apply


def of_many(operator: Callable[..., tuple[Tensor, ...]], norm: Norm) -> Callable[..., tuple[Tensor, ...]]:
    """A backward operator, and what stands for it where it is asked for many g at once (`is_grads_batched`)."""

    def backward(
        g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, spread: Tensor, places: Tensor, *more: Any
    ) -> tuple[Tensor, ...]:
        if not transformed():
            return operator(g, x, weight, mean, spread, places, *more)
        _, *settings = more
        dx, dweight, dbias = first(norm, g, x, _weight(weight, x, mean), places, *settings)
        return dx.to(x.dtype), dweight, dbias

    return backward


def keep_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the second derivative reads; inputs are the backward operator's. Nothing that was measured is a variable: all
    of it follows from x, but for where a sparse family read S."""
    g, x, weight, _, spread, places, _, *ctx.settings = inputs
    ctx.save_for_backward(g, x, weight, spread, places)


def second(norm: Norm) -> Callable[..., tuple[Tensor | None, ...]]:
    """The gradient of the operator's backward, by g, x and weight."""

    def apply(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, spread, places = ctx.saved_tensors

        def function(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return first(norm, g, x, weight, places, *ctx.settings)

        variables = wide(g), wide(x), wide(_weight(weight, x, spread))
        dg, dx, dweight = pulled(function, variables, [wide(value) for value in cotangents])
        dg, dx = (_finite(value, spread, ctx.settings[2], x.dtype) for value in (dg, dx))
        return (
            dg.to(g.dtype),
            dx.to(x.dtype),
            None if weight is None else dweight.to(weight.dtype),
            *[None] * (4 + len(ctx.settings)),
        )

    return apply


def _weight(weight: Tensor | None, x: Tensor, mean: Tensor) -> Tensor:
    """The weight, or ones; mean: as many dimensions as channels have."""
    return mean.new_ones(x.shape[1 : 1 + mean.dim()]) if weight is None else weight


def _finite(values: Tensor, spread: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    each = spread[:, :, None, None] if spread.dim() == 2 else spread.view(-1, *(1,) * (values.dim() - 2))
    return within_half(values, each, eps, dtype)
