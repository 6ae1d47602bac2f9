"""Norms as operators of torch: whole to torch.compile and torch.export, differentiable as often as is asked for.

>>> y, mean, spread = normalise(asked(x, "l1", "exact", 1e-5), weight, bias)            # x: (N, C, *), as nr.nn's norms ask
>>> y, mean, spread = batch_norm(x, weight, bias, metric("l1"), "exact", 1e-5)          # the same, by name
>>> y, mean, spread = sample_norm(x, weight, bias, "l1", "exact", 1e-5, centred=True)   # x: (B, G, K, S)
>>> y, mean, spread = norm_relu(x, residual, weight, bias, "l1", "exact", 1e-5)         # relu(norm(x) + residual)

    normrewrite::batch_norm     normrewrite::batch_norm_backward     (x, weight, bias, metric, gain, eps)
    normrewrite::row_norm       normrewrite::row_norm_backward       ... and centred
    normrewrite::norm_relu      normrewrite::norm_relu_backward      ... sample and centred, with a residual

They look into the table of dispatch.py each time that they run, and the constant C(n) is looked up then, so that a dynamic batch
needs no formula for it. Second derivatives and torch.func are plain.py's.

With its ReLU a norm reads and writes x and dL/dy once less each, by the kernels of backends/triton, and neither y nor a mask of
its size is kept: behind a residual one bit an element, else none, as the mask follows from x. By all others it is the norm's own
operator, an addition and a ReLU; the bits are packed there too, so that one operator has one set of outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.nn.functional import relu

from normrewrite.backends import half, plain, torch_batch
from normrewrite.backends.call import Call
from normrewrite.backends.dispatch import chosen, fused_by_choice, whole
from normrewrite.backends.families import laid_out_as, taken, wide_dtype
from normrewrite.backends.plain import transformed
from normrewrite.backends.relu import pack, passed, unpack
from normrewrite.backends.triton import geometry
from normrewrite.norms import Gain, Metric

Results = tuple[Tensor, ...]
_SETTINGS = "str metric, str gain, float eps"
_MEASURED = "Tensor mean, Tensor spread, Tensor indices, Tensor signs"


def _operator(name: str, arguments: str, results: int) -> Callable[[Callable[..., Results]], CustomOpDef]:
    schema = f"({arguments}) -> ({', '.join(['Tensor'] * results)})"
    return torch.library.custom_op(f"normrewrite::{name}", mutates_args=(), schema=schema)


def _registered(name: str, call: Callable[..., Call], norm: plain.Norm, more: str = "") -> tuple[Any, Any]:
    """The operator of a scope, and its backward; call: what is to be computed, of x and settings."""

    @_operator(name, f"Tensor x, Tensor? weight, Tensor? bias, {_SETTINGS}{more}", 5)
    def operator(x: Tensor, weight: Tensor | None, bias: Tensor | None, *settings: Any) -> Results:
        asking = call(x, *settings)
        return chosen(asking).forward(asking, weight, bias)

    @operator.register_fake
    def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, *settings: Any) -> Results:
        return torch.empty_like(x), *_measured(call(x, *settings))

    @_operator(f"{name}_backward", f"Tensor g, Tensor x, Tensor? weight, {_MEASURED}, {_SETTINGS}{more}", 3)
    def slope(g: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> Results:
        asking = call(x, *rest[4:])
        return chosen(asking).backward(asking, g, weight, *rest[:4])

    @slope.register_fake
    def _(g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, *rest: Any) -> Results:
        return torch.empty_like(x), *_channels(x, mean)

    backward = plain.of_many(slope, norm)
    operator.register_autograd(plain.gradients(backward), setup_context=plain.keep)
    slope.register_autograd(plain.second(norm), setup_context=plain.keep_backward)
    return operator, backward


def _measured(call: Call) -> Results:
    """mean, C * S, and what sparse families keep, as compilers see them."""
    x, row = call.x, call.row
    mean = x.new_empty(x.shape[:2] if call.sample else x.shape[1:2], dtype=wide_dtype(x))
    shape = taken(row, mean.numel(), call.n)
    signs = (mean.numel(), 1) if row.family == "mean" and not call.sample else shape
    return mean, torch.empty_like(mean), x.new_empty(shape, dtype=torch.int64), mean.new_empty(signs)


def _channels(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Room for dweight and dbias: (C,), or (G, K) where statistics are (B, G)."""
    return mean.new_empty(x.shape[1 : 1 + mean.dim()]), mean.new_empty(x.shape[1 : 1 + mean.dim()])


def _of_sample(x: Tensor, metric: str, gain: Gain, eps: float, centred: bool) -> Call:
    return Call(x, metric, gain, eps, sample=True, centred=centred)


_batch, _batch_backward = _registered("batch_norm", Call, plain.batch)
_sample, _sample_backward = _registered("row_norm", _of_sample, plain.sample, ", bool centred")


# --- with ReLU ----------------------------------------------------------------------------------------------------------------

_SCOPE = "bool sample, bool centred"


def _fused(x: Tensor, *settings: Any) -> Call:
    """Lines in registers (layer norms) have no ReLU of their own."""
    call = Call(x, *settings)
    return call if call.sample and x.shape[3] == 1 else call._replace(relu=True)


@_operator("norm_relu", f"Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {_SETTINGS}, {_SCOPE}", 6)
def _relu(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *settings: Any) -> Results:
    """y, what the norm's own operator measures, and bits of y > 0 (empty without a residual)."""
    call = _fused(x, *settings)
    if call.relu and (backend := chosen(call)).fused:
        return backend.forward(call, weight, bias, residual)
    y, *measured = _apart(_sample, _batch, call)(x, weight, bias)
    if residual is None:
        return y.relu_(), *measured, x.new_empty(0, dtype=torch.uint8)
    y.add_(residual)
    live = pack(~(y <= 0), geometry.of(x, call.sample))
    return y.relu_(), *measured, live


@_relu.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *settings: Any) -> Results:
    call = Call(x, *settings)
    bits = 0 if residual is None else geometry.of(x, call.sample).bits
    return torch.empty_like(x), *_measured(call), x.new_empty(bits, dtype=torch.uint8)


@_operator(
    "norm_relu_backward",
    f"Tensor g, Tensor x, Tensor? weight, Tensor? bias, {_MEASURED}, Tensor live, {_SETTINGS}, {_SCOPE}, bool residual",
    4,
)
def _relu_backward(g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Results:
    """dx as x, dweight and dbias in the dtype of the statistics, and the residual's gradient (empty without one)."""
    *measured, live = rest[:5]
    *settings, residual = rest[5:]
    call = _fused(x, *settings)
    if call.relu and (backend := chosen(call)).fused:
        return backend.backward(call, g, weight, *measured, bias, live, residual)
    masked, *gradients = _parted(g, x, weight, bias, *rest)
    return *gradients, laid_out_as(masked, x) if residual else x.new_empty(0)


@_relu_backward.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, *rest: Any) -> Results:
    return torch.empty_like(x), *_channels(x, mean), torch.empty_like(x) if rest[-1] else x.new_empty(0)


def _parted(g: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> Results:
    """ReLU's gradient, as g, then dx, dweight and dbias of the norm's own operator: differentiable."""
    mean, spread, indices, signs, bits = rest[:5]
    *settings, residual = rest[5:]
    call = Call(x, *settings)
    live = (
        unpack(bits, geometry.of(x, call.sample), x.shape)
        if residual
        else passed(x, weight, bias, mean, spread + call.eps)
    )
    masked = torch.where(live, g, 0)
    backward = _apart(_sample_backward, _batch_backward, call)
    return masked, *backward(masked, x, weight, mean, spread, indices, signs)


def _apart(sample: Any, batch: Any, call: Call) -> Callable[..., Results]:
    """The norm's own operator, by its scope, or that one's backward."""
    settings = call.metric, call.gain, call.eps
    return lambda *tensors: sample(*tensors, *settings, call.centred) if call.sample else batch(*tensors, *settings)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    x, residual, weight, bias, *ctx.settings = inputs
    _, *measured = output
    ctx.save_for_backward(x, weight, bias, *measured)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(*measured)


def _gradients(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, *measured = ctx.saved_tensors
    dtype = ctx.residual_dtype
    inputs = g, x, weight, bias, *measured, *ctx.settings, dtype is not None
    if torch.is_grad_enabled() or transformed():  # to be differentiated again, or many g at once
        masked, dx, dweight, dbias = _parted(*inputs)
    else:
        dx, dweight, dbias, masked = _relu_backward(*inputs)
    return (
        dx,
        None if dtype is None else masked.to(dtype),
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        *(None for _ in ctx.settings),
    )


_relu.register_autograd(_gradients, setup_context=_keep)


# --- what norms call ----------------------------------------------------------------------------------------------------------


def normalise(
    call: Call, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (as x), mean and C * S of a call, the last two detached, fp32 at least; with relu, y is relu(y + residual).

    weight, bias: (C,), or (G, K) of a sample; mean is 0 where not centred. Raises NormRewriteError where fewer than two elements
    share statistics, or fewer than the metric reads.
    """
    backend = whole(call)
    if backend is not None:
        return backend.normalise(call, weight, bias)
    settings = str(call.metric), call.gain, call.eps
    if call.relu:
        y, mean, spread, *_ = _relu(call.x, residual, weight, bias, *settings, call.sample, call.centred)
    elif call.sample:
        y, mean, spread, *_ = _sample(call.x, weight, bias, *settings, call.centred)
    else:
        y, mean, spread, *_ = _batch(call.x, weight, bias, *settings)
    return y, mean, spread


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, metric: Metric | str, gain: Gain, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (N, C, *) by its own batch, whatever half arithmetic is chosen."""
    return normalise(Call(x, metric, gain, eps, transformed=transformed()), weight, bias)


def sample_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    metric: Metric | str,
    gain: Gain,
    eps: float,
    centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (B, G, K, S) over its last two dimensions, whatever half arithmetic is chosen."""
    return normalise(Call(x, metric, gain, eps, True, centred, transformed=transformed()), weight, bias)


def norm_relu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    metric: Metric | str,
    gain: Gain,
    eps: float,
    sample: bool = False,
    centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with ReLU and a residual in x's shape, or None, behind it."""
    return normalise(Call(x, metric, gain, eps, sample, centred, relu=True), weight, bias, residual)


def as_one(x: Tensor, residual: Tensor | None) -> bool:
    """Whether one operator is to compute relu(norm(x) + residual): on CUDA, or where the kernels are asked for.

    Not where the sum has a wider dtype than x has, nor in half arithmetic, nor on other devices: there a norm, an addition and
    a ReLU cost no more. Nor under torch.func, which the norm has a plain form for.
    """
    if transformed() or (residual is not None and residual.dtype != x.dtype):
        return False
    by_name = not torch.compiler.is_compiling() and fused_by_choice()  # compilers can't follow the environment
    return (x.is_cuda or by_name) and half.chosen(x) is None


def affine_relu(
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
    by_torch = torch.is_grad_enabled() or torch.compiler.is_compiling()
    fused = None if by_torch else chosen(Call(x, "l2")).affine
    if fused is not None:
        return fused(x, residual, mean, scale, weight, bias)
    y = torch_batch.affine(x, mean, scale, weight, bias)
    return relu(y if residual is None else y + residual)
