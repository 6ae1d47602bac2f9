"""8-bit products against float64 layers of torch's on the numbers that the 8 bits stand for; rounding; gradients."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite.training.products import (
    SIMULATED,
    Convolution,
    Quantised,
    Simulated,
    nearest,
    product,
    reach,
    rounded,
    scale_of,
    stochastic,
    usual_reach,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 throughout
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear of sequences": (lambda: nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 0), dilation=(1, 2)), (2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 2, 3, 4, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2), (2, 4, 6)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2), (1, 2, 3, 3, 3)),
}


def made(case: str) -> tuple[Any, Tensor]:
    layer, shape = LAYERS[case]
    return layer().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)


def numbers(layer: Any) -> Convolution | None:
    if isinstance(layer, nn.Linear):
        return None
    is_transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return Convolution(layer.stride, layer.padding, layer.dilation, is_transposed, layer.output_padding, layer.groups)


def on_8_bits(x: Tensor, amax: float) -> Tensor:
    """By the definition, a value at a time."""
    step = amax / 127
    values = [step * min(max(round(float(v) / step), -128), 127) for v in x.detach().flatten()]
    return torch.tensor(values, dtype=torch.float64).view_as(x)


def weight_on_8_bits(layer: Any) -> Tensor:
    """Row by row: row c holds what output channel c is computed from."""
    weight, groups = layer.weight.detach(), getattr(layer, "groups", 1)
    new = torch.empty_like(weight)
    if "Transpose" in type(layer).__name__:
        size = len(weight) // groups
        for g in range(groups):
            for j in range(weight.shape[1]):
                part = weight[g * size : (g + 1) * size, j]
                new[g * size : (g + 1) * size, j] = on_8_bits(part, float(part.abs().max()))
        return new
    return torch.stack([on_8_bits(row, float(row.abs().max())) for row in weight])


def reference(layer: Any, x: Tensor, amax: float) -> tuple[Tensor, list[Tensor]]:
    """What torch's own layer gives on those numbers, and what it read."""
    read = {"weight": weight_on_8_bits(layer).requires_grad_()} | ({} if layer.bias is None else {"bias": layer.bias})
    a = on_8_bits(x, amax).requires_grad_()
    return torch.func.functional_call(layer, read, (a,)), [a, *read.values()]


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_and_its_gradients_are_those_of_the_rounded_numbers(case: str) -> None:
    layer, x = made(case)
    amax = 0.8 * float(x.detach().abs().max())  # something is clipped
    y = product(x, layer.weight, layer.bias, numbers(layer), torch.tensor(amax, dtype=torch.float64) / 127)
    expected, read = reference(layer, x, amax)
    torch.testing.assert_close(y, expected, **EXACT)
    with pytest.raises(AssertionError):  # it can fail
        torch.testing.assert_close(1.01 * y, expected, **EXACT)
    g = torch.randn_like(y)
    parameters = [value for value in (layer.weight, layer.bias) if value is not None]
    dx, *others = torch.autograd.grad(y, [x, *parameters], g)
    of_read, *of_others = torch.autograd.grad(expected, read, g)
    inside = (x <= 127.5 * amax / 127) & (x >= -128.5 * amax / 127)
    assert not inside.all()
    torch.testing.assert_close(dx, of_read * inside, **EXACT)
    torch.testing.assert_close(others, of_others, **EXACT)


# --- 8-bit gradients --------------------------------------------------------------------------------------------------


def gradients(seed: int, factor: float = 1.0, quantised: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias of one small convolution."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8, requires_grad=True)
    y = product(x, layer.weight, layer.bias, numbers(layer), scale_of(reach(x)), quantised)
    torch.manual_seed(seed)
    y.backward(factor * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    assert x.grad is not None and layer.weight.grad is not None and layer.bias is not None
    return x.grad, layer.weight.grad, layer.bias.grad  # type: ignore[return-value]


def test_gradients_are_bifurcated() -> None:
    dx, dweight, dbias = gradients(2)
    wide_dx, wide_dweight, wide_dbias = gradients(2, quantised=False)
    assert torch.equal(dweight, wide_dweight) and torch.equal(dbias, wide_dbias)
    error = (dx - wide_dx).norm() / wide_dx.norm()
    assert 1e-3 < error < 0.05  # 8 bits' own noise


def test_the_gradient_of_the_input_is_right_on_average() -> None:
    wide, _, _ = gradients(0, quantised=False)
    draws = torch.stack([gradients(seed)[0] for seed in range(2, 202)])
    noise = draws.std(0) / 200**0.5
    off = (draws.mean(0) - wide) / noise.clamp_min(1e-12)
    assert off.abs().mean() < 0.9 and off.abs().max() < 6  # of a unit Gaussian: 0.8, and 4 among 384


def test_draws_are_those_of_torchs_generator() -> None:
    assert torch.equal(gradients(3)[0], gradients(3)[0]) and not torch.equal(gradients(3)[0], gradients(4)[0])


@pytest.mark.parametrize("factor", [1e-9, 1e-20, 1e20])
def test_a_gradient_of_any_size_keeps_its_8_bits(factor: float) -> None:
    torch.testing.assert_close(gradients(5, factor)[0] / factor, gradients(5)[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-3, -7.0])
def test_zero_and_constant_gradients_give_no_nan(value: float) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    y = product(x, layer.weight, None, None, scale_of(reach(x)), True)
    y.backward(torch.full_like(y, value))
    assert x.grad is not None and torch.isfinite(x.grad).all()
    if abs(value) > 1e-6:  # a constant is on the grid, so nothing is left to chance
        wide = torch.full_like(y, value) @ nearest(layer.weight, scale_of(layer.weight.abs().amax(1, True))).wide()
        torch.testing.assert_close(x.grad, wide)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    y = product(x, layer.weight, None, None, scale_of(reach(x)), True)
    g = torch.ones_like(y)
    g[0, 0] = bad
    y.backward(g)
    assert x.grad is not None and not torch.isfinite(x.grad).any()
    with torch.no_grad():
        layer.weight[0, 0] = bad
    assert not torch.isfinite(product(x, layer.weight, None, None, scale_of(reach(x)))[:, 0]).any()


# --- other kernels ----------------------------------------------------------------------------------------------------


class Integers(Simulated):
    """Linear layers in whole numbers, summed in 32 bits, as int8 kernels do it."""

    def output(self, layer: Convolution | None, x: Quantised, weight: Quantised, bias: Tensor | None) -> Tensor:
        if layer is not None:
            return super().output(layer, x, weight, bias)
        sums = x.values.int() @ weight.values.int().T
        y = sums * (x.scale * weight.scale.flatten())
        return y if bias is None else y + bias

    def input_gradient(self, layer: Any, g: Any, weight: Quantised, shape: Any) -> Tensor:
        assert isinstance(g, Quantised) and g.values.dtype == torch.int8
        return super().input_gradient(layer, g, weight, shape)


def test_other_kernels_can_take_the_place_of_the_simulated_ones() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    x, found = torch.randn(2, 3, 6, 6, requires_grad=True), []
    for products in (SIMULATED, Integers()):
        torch.manual_seed(0)
        with nr.int8(model, gradients=True, products=products):
            y = model(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    torch.testing.assert_close(found[0], found[1])


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_rounding_to_nearest_and_its_ends() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, 2.51, 126.6, 127.4, 500.0, -127.6, -500.0])
    assert nearest(x, torch.tensor(1.0)).values.tolist() == [0, 2, 0, 3, 127, 127, 127, -128, -128]
    assert nearest(x, torch.tensor(1.0)).values.dtype == torch.int8


def test_stochastic_rounding_is_unbiased_and_stays_on_the_neighbours() -> None:
    x = torch.tensor([-127.0, -3.25, 0.0, 0.1, 64.5, 126.9, 127.0]).repeat(40_000, 1)
    values = stochastic(x, torch.tensor(1.0)).values.float()
    assert bool(((values == x.floor()) | (values == x.ceil())).all())
    assert (values.mean(0) - x[0]).abs().max() < 6 * 0.5 / 200  # six standard errors
    assert (1.01 * values.mean(0) - x[0]).abs().max() > 6 * 0.5 / 200


def test_rounded_passes_the_gradient_of_what_is_not_clipped() -> None:
    x = torch.tensor([-3.0, -1.0, 0.3, 1.0, 1.1], requires_grad=True)
    y = rounded(x, scale_of(torch.tensor(1.0)))
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    torch.testing.assert_close(y.detach(), on_8_bits(x, 1.0).float())


@pytest.mark.parametrize("case", ["product", "rounded"])
def test_the_gradient_of_a_step_is_that_of_rounding_held_still(case: str) -> None:
    """Against autograd through float64 sums, where rounding counts as a number that stays (straight through)."""
    x, weight = torch.randn(6, 5), torch.eye(5)
    step = torch.tensor(0.013, requires_grad=True)  # 127 of them clip |x| > 1.65
    y = product(x, weight, None, None, step) if case == "product" else rounded(x, step)
    g = torch.randn_like(y)
    y.backward(g)
    wide = step.detach().double().requires_grad_()
    steps = x.double() / wide
    held = (steps.round() - steps).detach() + steps
    expected = (held.clamp(-128, 127) * wide * g.double()).sum()
    expected.backward()
    assert step.grad is not None and wide.grad is not None and (steps.abs() > 128).any()
    torch.testing.assert_close(step.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    assert abs(1.01 * step.grad - wide.grad) > 1e-3 * abs(wide.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_rounded_in_fp32(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(8, 8).to(dtype), torch.randn(4, 8, dtype=dtype)
    y = product(x, layer.weight, layer.bias, None, scale_of(reach(x).float()))
    wide = product(x.float(), layer.weight.float(), layer.bias.float(), None, scale_of(reach(x).float()))
    assert y.dtype == dtype and torch.equal(y, wide.to(dtype))


def test_functional_layers_of_torch_are_the_same_products() -> None:
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    layer = Convolution((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    scale = scale_of(reach(x))
    a, w = nearest(x, scale).wide(), nearest(weight, scale_of(weight.abs().amax((1, 2, 3), True))).wide()
    torch.testing.assert_close(product(x, weight, None, layer, scale), F.conv2d(a, w, padding=1))


def test_the_last_in_ten_thousand_does_not_set_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, 100, 200, generator=generator)  # four million
    x[0, 0, 0, :40] = 1e4
    expected = float(np.quantile(x.abs().numpy(), 0.9999))
    assert math.isclose(float(usual_reach(x)), expected, rel_tol=0.06) and float(reach(x)) == 1e4
    few = torch.randn(3, 40, generator=generator)
    assert float(usual_reach(few)) == float(reach(few))  # the largest of few is within it
    for value in (torch.nan, torch.inf):
        x[3, 49, 99, 199] = value  # one in four million, which a sample may miss
        assert not torch.isfinite(usual_reach(x))
