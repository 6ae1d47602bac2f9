"""8-bit products with their backward, and the one place where real int8 kernels can stand.

>>> y = product(x, weight, bias, Convolution((1, 1), (1, 1), (1, 1), False, (0, 0), 1), scale_of(x.abs().amax()))

As Banner et al. (arXiv:1805.11046) train: 8 bits for weights, by output channel, and activations, by tensor, both symmetric
and rounded to nearest; master weights stay as they are. Gradients, where they are asked to be 8-bit too, are bifurcated:
the gradient of the input comes from a copy of g on 8 bits, rounded stochastically, that of the weight from g as it is.
What was clipped gets no gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from normrewrite.backends.families import statistics_dtype
from normrewrite.deploy.quantise import PERCENTILE

_SAMPLE = 1 << 17  # eight times as many take a fifth of a training step, and the moving average evens out
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Quantised:
    """values * scale. values: int8; scale: fp32 (float64 of float64), one number, or of a shape that meets values."""

    values: Tensor
    scale: Tensor

    def wide(self) -> Tensor:
        return self.values.to(self.scale.dtype) * self.scale


class Convolution(NamedTuple):
    """A convolution's numbers, in the order that torch's own operators take them."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class Products(Protocol):
    """What a layer computes on 8-bit operands, all three wide (fp32 or float64). layer: None for a linear one.

    Fake-quantised here (`Simulated`); kernels of a device take `.values` and `.scale`. The gradient g of the output is
    8-bit where gradients are trained so, else wide; the gradient of the weight always has the wide one.
    """

    def output(self, layer: Convolution | None, x: Quantised, weight: Quantised, bias: Tensor | None) -> Tensor: ...

    def input_gradient(
        self, layer: Convolution | None, g: Quantised | Tensor, weight: Quantised, shape: Sequence[int]
    ) -> Tensor: ...

    def weight_gradient(self, layer: Convolution | None, g: Tensor, x: Quantised, shape: Sequence[int]) -> Tensor: ...


class Simulated:
    """Torch's own products of the numbers that the 8 bits stand for."""

    def output(self, layer: Convolution | None, x: Quantised, weight: Quantised, bias: Tensor | None) -> Tensor:
        if layer is None:
            return F.linear(x.wide(), weight.wide(), bias)
        output: Tensor = torch.ops.aten.convolution(x.wide(), weight.wide(), bias, *layer)
        return output

    def input_gradient(
        self, layer: Convolution | None, g: Quantised | Tensor, weight: Quantised, shape: Sequence[int]
    ) -> Tensor:
        wide = g.wide() if isinstance(g, Quantised) else g
        if layer is None:
            return wide @ weight.wide()
        return _backward(layer, wide, _shaped(wide, shape), weight.wide(), 0)

    def weight_gradient(self, layer: Convolution | None, g: Tensor, x: Quantised, shape: Sequence[int]) -> Tensor:
        if layer is None:
            return g.flatten(0, -2).T @ x.wide().flatten(0, -2)
        return _backward(layer, g, x.wide(), _shaped(g, shape), 1)


def _backward(layer: Convolution, g: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    gradients = torch.ops.aten.convolution_backward(g, x, weight, None, *layer, [which == 0, which == 1, False])
    return gradients[which]  # type: ignore[no-any-return]


def _shaped(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of which torch reads the shape alone."""
    return like.new_empty(1).expand(*shape)


SIMULATED = Simulated()


# --- rounding ---------------------------------------------------------------------------------------------------------


def scale_of(reach: Tensor) -> Tensor:
    """The step of 8 bits that reach so far to both sides: 127 steps. NaN and infinity stay, and show in the product.

    What is zero, or next to it, gets 1, as onnxruntime has it; no larger bound: the mean loss of a batch has gradients of
    1e-8 an element, which are to keep their 8 bits.
    """
    step = reach / 127
    return torch.where(step < _TINY, torch.ones_like(step), step)


def nearest(x: Tensor, scale: Tensor) -> Quantised:
    """To the nearest step, halves to even, clipped as ONNX's QuantizeLinear clips (-128 to 127)."""
    return Quantised((x / scale).round_().clamp_(-128, 127).to(torch.int8), scale)


def stochastic(x: Tensor, scale: Tensor) -> Quantised:
    """Up or down by chance, so that the mean is x; draws from torch's own generator."""
    steps = x / scale
    steps += torch.rand_like(steps)
    return Quantised(steps.floor_().clamp_(-128, 127).to(torch.int8), scale)


def reach(x: Tensor) -> Tensor:
    """max |x|, (); NaN where x holds one."""
    low, high = x.detach().aminmax()
    return torch.maximum(-low, high)


def usual_reach(x: Tensor) -> Tensor:
    """What 99.99 % of |x| stay within, (), told by some hundred thousand elements; NaN or infinity where x holds one.

    A step that serves the last element in ten thousand is too coarse for all others.
    """
    stride = x.numel() // _SAMPLE | 1  # odd, so as not to meet the same column of each image
    sample = x.detach().flatten()[::stride].abs()
    usual = sample.topk(max(1, round(len(sample) * (1 - PERCENTILE / 100)))).values[-1]
    largest = reach(x)
    return torch.where(largest.isfinite(), usual, largest)


def by_channel(weight: Tensor, layer: Convolution | None) -> Tensor:
    """max |w| of each output channel, in a shape that meets the weight; a transposed one is (in, out/groups, *kernel)."""
    if layer is None or not layer.transposed:
        return weight.detach().abs().amax(list(range(1, weight.dim())), keepdim=True)
    grouped: Tensor = weight.detach().abs().unflatten(0, (layer.groups, -1))
    largest = grouped.amax([1, *range(3, grouped.dim())], keepdim=True)
    return largest.expand(-1, grouped.shape[1], *largest.shape[2:]).flatten(0, 1)


# --- with gradients ---------------------------------------------------------------------------------------------------


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer: Convolution | None,
    scale: Tensor,
    gradients: bool = False,
    products: Products = SIMULATED,
) -> Tensor:
    """What a layer gives on 8 bits, as x. x: (N, C, *), or (*, C) for a linear layer (None); scale: of x, ().

    gradients: 8-bit ones too. Statistics and sums are fp32 at least, whatever x's dtype.
    """
    output: Tensor = _Product.apply(x, weight, bias, layer, scale, gradients, products)  # type: ignore[no-untyped-call]
    return output


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Convolution | None,
        scale: Tensor,
        gradients: bool,
        products: Products,
    ) -> Tensor:
        dtype = statistics_dtype(x.dtype)
        a = nearest(x.to(dtype), scale.to(dtype))
        w = nearest(weight.to(dtype), scale_of(by_channel(weight.to(dtype), layer)))
        ctx.save_for_backward(x, a.values, a.scale, w.values, w.scale)
        ctx.layer, ctx.gradients, ctx.products = layer, gradients, products
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return products.output(layer, a, w, None if bias is None else bias.to(dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, values, scale, weights, scales = ctx.saved_tensors
        of_x, of_weight, of_bias, _, of_scale, *_ = ctx.needs_input_grad
        layer, products, g = ctx.layer, ctx.products, g.to(scale.dtype)
        dx = dweight = dbias = dscale = None
        if of_x or of_scale:
            small = stochastic(g, scale_of(reach(g))) if ctx.gradients else g
            back = products.input_gradient(layer, small, Quantised(weights, scales), x.shape)
            dscale = _of_scale(back, x, values, scale) if of_scale else None
            dx = _unclipped(back, x, scale) if of_x else None
        if of_weight:
            a = Quantised(values, scale)
            dweight = products.weight_gradient(layer, g, a, weights.shape).to(ctx.dtypes[0])
        if of_bias:
            dbias = g.flatten(0, -2).sum(0) if layer is None else g.sum([0, *range(2, g.dim())])
            dbias = dbias.to(ctx.dtypes[1])
        return dx, dweight, dbias, None, dscale, None, None


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x on 8 bits and back, as x: what no product reads (both sides of a residual add)."""
    output: Tensor = _Rounded.apply(x, scale)  # type: ignore[no-untyped-call]
    return output


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        dtype = statistics_dtype(x.dtype)
        quantised = nearest(x.to(dtype), scale.to(dtype))
        ctx.save_for_backward(x, scale, *([quantised.values] if ctx.needs_input_grad[1] else []))
        return quantised.wide().to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None]:
        x, scale, *values = ctx.saved_tensors
        return _unclipped(g, x, scale), _of_scale(g, x, values[0], scale) if values else None


def _unclipped(g: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """The gradient of what was not clipped, as x, in one kernel: hardtanh's."""
    step = float(scale)
    gradient: Tensor = torch.ops.aten.hardtanh_backward(g.to(x.dtype), x, -128.5 * step, 127.5 * step)
    return gradient


def _of_scale(g: Tensor, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the step: of what was rounded, how far rounding moved it; of what was clipped, where it was clipped.

    Esser et al., Learned Step Size Quantization (arXiv:1902.08153), eq. 3.
    """
    steps = x.to(scale.dtype) / scale
    inside = (steps >= -128.5) & (steps <= 127.5)
    moved = values.to(scale.dtype).sub_(steps.mul_(inside))
    return moved.mul_(g).sum()
