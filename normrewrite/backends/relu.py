"""A norm, a residual and ReLU as one operator: relu(norm(x) + residual), in training.

>>> y, mean, spread = normalise(x, residual, weight, bias, metric("l1"), "exact", eps=1e-5)      # x: (N, C, *)
>>> y, mean, spread = normalise(x, None, weight, bias, "l1", "exact", 1e-5, sample=True)         # x: (B, G, K, S)

By the kernels of backends/triton a forward and backward reads and writes x and dL/dy once less each than the norm alone would
with ReLU behind it, and neither y nor a mask of its size is kept: behind a residual one bit an element, else none, as the
mask follows from x. By torch it is the norm's own lowering, an addition and a ReLU; the bits are packed there too, so that
one operator has one set of outputs.
"""

from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, relu

from normrewrite.backends import half, torch_batch, torch_sample
from normrewrite.backends.families import laid_out_as, taken, wide, wide_dtype
from normrewrite.backends.kernels import chosen, serving
from normrewrite.backends.plain import transformed
from normrewrite.backends.triton import geometry
from normrewrite.backends.triton.geometry import Geometry
from normrewrite.norms import METRICS, Gain, Metric
from normrewrite.norms import metric as row_of


def as_one(x: Tensor, residual: Tensor | None) -> bool:
    """Whether one operator is to compute relu(norm(x) + residual): on CUDA, or where the kernels are asked for.

    Not where the sum has a wider dtype than x has, nor in half arithmetic, nor on other devices: there a norm, an addition and
    a ReLU cost no more. Nor under torch.func, which the norm has a plain form for.
    """
    if transformed() or (residual is not None and residual.dtype != x.dtype):
        return False
    asked = not torch.compiler.is_compiling() and chosen() == "triton"  # compilers can't follow the switch
    return (x.is_cuda or asked) and half.chosen(x) is None


@torch.library.custom_op("normrewrite::norm_relu", mutates_args=())
def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    metric: str,
    gain: str,
    eps: float,
    sample: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, what the norm's own operator measures, and bits of y > 0 (empty without a residual)."""
    row, scope = row_of(metric), {"sample": sample, "centred": centred}
    kernels = _kernels(x, row, sample)
    if kernels is not None:
        told = row, cast(Gain, gain), eps
        return kernels.forward(x, residual, weight, bias, *told, **scope, relu=True)  # type: ignore[no-any-return]
    if sample:
        y, *measured = torch.ops.normrewrite.row_norm(x, weight, bias, metric, gain, eps, centred)
    else:
        y, *measured = torch.ops.normrewrite.batch_norm(x, weight, bias, metric, gain, eps)
    if residual is None:
        return y.relu_(), *measured, x.new_empty(0, dtype=torch.uint8)
    y.add_(residual)
    live = pack(~(y <= 0), geometry.of(x, sample))
    return y.relu_(), *measured, live


@_forward.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    metric: str,
    gain: str,
    eps: float,
    sample: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = x.shape[2] * x.shape[3] if sample else x.numel() // x.shape[1]
    mean = x.new_empty(x.shape[:2] if sample else x.shape[1:2], dtype=wide_dtype(x))
    row = row_of(metric)
    shape = taken(row, mean.numel(), n)
    kept = (mean.numel(), 1) if row.family == "mean" and not sample else shape
    indices, signs = x.new_empty(shape, dtype=torch.int64), mean.new_empty(kept)
    bits = 0 if residual is None else geometry.of(x, sample).bits
    return torch.empty_like(x), mean, torch.empty_like(mean), indices, signs, x.new_empty(bits, dtype=torch.uint8)


@torch.library.custom_op("normrewrite::norm_relu_backward", mutates_args=())
def _backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    indices: Tensor,
    signs: Tensor,
    live: Tensor,
    metric: str,
    gain: str,
    eps: float,
    sample: bool,
    centred: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx as x, dweight and dbias in the dtype of the statistics, and the residual's gradient (empty without one)."""
    row, measured = row_of(metric), (mean, spread, indices, signs)
    kernels = _kernels(x, row, sample)
    if kernels is not None:
        more = {"sample": sample, "centred": centred, "relu": True, "residual": residual}
        told = row, cast(Gain, gain), eps
        return kernels.backward(g, x, weight, bias, *measured, live, *told, **more)  # type: ignore[no-any-return]
    kept = g, x, weight, bias, *measured, live, metric, gain, eps, sample, centred, residual
    masked, dx, dweight, dbias = _parted(*kept)
    return dx, dweight, dbias, laid_out_as(masked, x) if residual else x.new_empty(0)


def _parted(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    indices: Tensor,
    signs: Tensor,
    live: Tensor,
    metric: str,
    gain: str,
    eps: float,
    sample: bool,
    centred: bool,
    residual: bool,
) -> tuple[Tensor, ...]:
    """ReLU's gradient, as g, then dx, dweight and dbias of the norm's own operator: differentiable."""
    live = unpack(live, geometry.of(x, sample), x.shape) if residual else passed(x, weight, bias, mean, spread + eps)
    masked, measured = torch.where(live, g, 0), (mean, spread, indices, signs)
    if sample:
        return masked, *torch_sample.backward(masked, x, weight, *measured, metric, gain, eps, centred)
    return masked, *torch_batch.backward(masked, x, weight, *measured, metric, gain, eps)


@_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    indices: Tensor,
    signs: Tensor,
    live: Tensor,
    metric: str,
    gain: str,
    eps: float,
    sample: bool,
    centred: bool,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = mean.new_empty(x.shape[1:3] if sample else x.shape[1:2])
    masked = torch.empty_like(x) if residual else x.new_empty(0)
    return torch.empty_like(x), channels, torch.empty_like(channels), masked


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, *ctx.settings = inputs
    _, *measured = output
    ctx.save_for_backward(x, weight, bias, *measured)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(*measured)


def _gradients(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *measured = ctx.saved_tensors
    dtype = ctx.residual_dtype
    kept = g, x, weight, bias, *measured, *ctx.settings, dtype is not None
    if torch.is_grad_enabled() or transformed():  # to be differentiated again, or many g at once
        masked, dx, dweight, dbias = _parted(*kept)
    else:
        dx, dweight, dbias, masked = _backward(*kept)
    return (
        dx,
        None if dtype is None else masked.to(dtype),
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        *(None for _ in ctx.settings),
    )


_forward.register_autograd(_gradients, setup_context=_keep)


def _kernels(x: Tensor, row: Metric, sample: bool) -> ModuleType | None:
    """Rows in registers (layer norms) have no ReLU of their own."""
    return None if sample and x.shape[3] == 1 else serving(x, row, sample=sample)


def passed(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor) -> Tensor:
    """Which elements of norm(x) ReLU lets through, as torch's does NaN. mean and scale: (C,), or (B, G) of (B, G, K, S)."""
    if mean.dim() == 2:
        y = (wide(x) - mean[:, :, None, None]) / scale[:, :, None, None]
        y = y if weight is None else y * weight[:, :, None]
        y = y if bias is None else y + bias[:, :, None]
    else:
        y = torch_batch.centred_affine(x, mean, scale, weight, bias)
    live: Tensor = ~(y <= 0)
    return live


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack(flags: Tensor, shape: Geometry) -> Tensor:
    """One bit an element, in the order of memory: (height, ceil(width / 8)) bytes, the first in the lowest bit."""
    matrix = _channels_last(flags, shape.sample) if shape.columns else flags
    bits = pad(matrix.reshape(shape.height, shape.width).byte(), (0, -shape.width % 8)).unflatten(1, (-1, 8))
    packed: Tensor = (bits * bits.new_tensor(_BITS)).sum(2, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, shape: Geometry, like: torch.Size) -> Tensor:
    """`pack` undone: truth values in the shape `like`."""
    bits = (packed[:, :, None] & packed.new_tensor(_BITS)) != 0
    matrix = bits.flatten(1)[:, : shape.width]
    if not shape.columns:
        return matrix.reshape(like)
    if shape.sample:  # (B, S, G, K) -> (B, G, K, S)
        return matrix.reshape(like[0], like[3], like[1], like[2]).permute(0, 2, 3, 1)
    return matrix.reshape(like[0], *like[2:], like[1]).movedim(-1, 1)


def _channels_last(values: Tensor, sample: bool) -> Tensor:
    return values.permute(0, 3, 1, 2) if sample else values.movedim(1, -1)


def normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Metric | str,
    gain: Gain,
    eps: float,
    sample: bool = False,
    centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = relu(norm(x) + residual), as x, mean and C * S; residual: in x's shape. The rest as in torch_batch.py."""
    y, mean, spread, *_ = _forward(x, residual, weight, bias, str(row), gain, eps, sample, centred)
    return y, mean, spread


def affine(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """relu(weight * (x - mean) / scale + bias + residual) with statistics that stand, (C,): eval of x: (N, C, *).

    One read and one write: by the kernels, where no gradient is asked for, or as a compiler makes it of torch's operators.
    """
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    kernels = None if plain else serving(x, METRICS["l2"])
    if kernels is not None:
        return kernels.affine(x, residual, mean, scale, weight, bias, relu=True)  # type: ignore[no-any-return]
    y = torch_batch.affine(x, mean, scale, weight, bias)
    return relu(y if residual is None else y + residual)
