"""Half arithmetic: bit for bit against a scalar emulation in numpy's float16, and near float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from normrewrite import NormRewriteError
from normrewrite.backends import half, reference
from normrewrite.backends.accumulate import accumulator
from normrewrite.backends.half import Rule, normalise, normalise_batch
from normrewrite.backends.watch import watching
from normrewrite.diagnostics.moments import FP16_MAX, Moments
from normrewrite.norms import Metric, metric
from tests.backends import test_torch_sample
from tests.backends.test_accumulate import Half, added_up
from tests.backends.test_torch_batch import ROWS, gradients
from tests.backends.test_torch_sample import Shape, affine_of, without_ties
from tests.backends.tolerances import check_close

EPS = 1e-5
SHAPES = ((2, 1, 37, 1), (2, 3, 4, 21), (1, 3, 1, 300))  # a layer norm, groups, a batch norm as a row norm
SUMS = ("fp32", "half:1", "half:16")

every_row = pytest.mark.parametrize("spec", ROWS)
every_sum = pytest.mark.parametrize("sums", SUMS)
both = pytest.mark.parametrize("centred", [True, False], ids=["centred", "rms"])


def rule(spec: str, sums: str, centred: bool = True, native: bool = False, eps: float = EPS) -> Rule:
    return Rule(metric(spec), "exact", eps, accumulator(sums), centred, native)


def on_a_grid(shape: Shape) -> tuple[Tensor, ...]:
    """x without ties, weight, bias and g, half; sums of x are exact in fp32, so that its order of adding doesn't show."""
    generator = torch.Generator().manual_seed(2)
    g = torch.randint(-64, 64, shape, generator=generator) / 16
    return without_ties(shape, torch.float16) / 64, *affine_of(shape, torch.float16), g.half()


# --- the emulation: one row or channel at a time, number by number ------------------------------------------------------------


def _by_number(values: Half, factor: float) -> Half:
    """Half numbers times an fp32 constant, rounded."""
    return (values.astype(np.float32) * np.float32(factor)).astype(np.float16)


def _mean(values: Half, sums: str) -> np.float16:
    if sums == "fp32":
        return np.float16(np.float32(values.astype(np.float64).sum()) / np.float32(len(values)))
    return np.float16(np.float32(added_up(values, sums)) / np.float32(len(values)))


def _measured(d: Half, x: Half, row: Metric, sums: str, native: bool) -> tuple[np.float16, list[int]]:
    """S, or S² where native, and the indices it was read at."""
    if row.family == "mean":
        powers = abs(d) if row.power == 1 else d * d
        mean = _mean(powers, sums)
        return (mean if row.power == 1 or native else np.sqrt(mean)), []
    if row.family == "span":
        return x.max() - x.min(), [int(x.argmax()), int(x.argmin())]
    taken = sorted(np.argsort(-abs(d), kind="stable")[: row.k(len(d))].tolist())
    return _mean(abs(d)[taken], sums), taken


class Emulation:
    """Forward and backward of x: (B, G, K, S) by the formulas of normrewrite.backends.half."""

    def __init__(self, x: Half, weight: Half, bias: Half, g: Half, used: Rule) -> None:
        sums, row = str(used.accumulator), used.row
        self.y, self.dx = np.empty_like(x), np.empty_like(x)
        self.mean, self.spread = np.empty(x.shape[:2], np.float16), np.empty(x.shape[:2], np.float16)
        unit = np.empty_like(x)
        for place in np.ndindex(x.shape[:2]):
            own = x[place].ravel()
            constant = 1.0 if used.native else row.gain(len(own))
            mean = _mean(own, sums) if used.centred else np.float16(0)
            d = own - mean
            raw, taken = _measured(d, own, row, sums, used.native)
            spread = _by_number(np.array([raw]), constant)[0]
            scale = np.float16(np.float32(spread) + np.float32(used.eps))
            scale = np.sqrt(scale) if used.native else scale
            self.mean[place], self.spread[place] = mean, spread
            unit[place] = (d / scale).reshape(x.shape[2:])
            gh = (g[place] * weight[place[1]][:, None]).ravel()
            t = self._pulled(gh, unit[place].ravel(), d, scale if used.native else raw, taken, used, constant)
            t = t - _mean(t, sums) if used.centred else t
            self.dx[place] = (t / scale).reshape(x.shape[2:])
        self.y = unit * weight[None, :, :, None] + bias[None, :, :, None]
        self.dweight, self.dbias = (self._by_channel(values, sums) for values in (g * unit, g))

    def _pulled(
        self, gh: Half, unit: Half, d: Half, root: np.float16, taken: list[int], used: Rule, constant: float
    ) -> Half:
        row, sums = used.row, str(used.accumulator)
        if row.family == "mean":
            share = _by_number(np.array([_mean(gh * unit, sums)]), constant)[0]
            slope = np.sign(d) if row.power == 1 else abs(d / root) * np.sign(d)
            return gh - slope * share
        t = gh.copy()
        total = np.float32(added_up(gh * unit, sums)) * np.float32(constant)
        for at, sign in zip(taken, self._signs(d, taken, row), strict=True):
            t[at] = t[at] - np.float16(total * np.float32(sign))
        return t

    def _signs(self, d: Half, taken: list[int], row: Metric) -> list[float]:
        return (
            [1.0, -1.0]
            if row.family == "span"
            else [np.float32(np.sign(d[at])) / np.float32(len(taken)) for at in taken]
        )

    def _by_channel(self, values: Half, sums: str) -> Half:
        channels = values.transpose(1, 2, 0, 3).reshape(*values.shape[1:3], -1)
        return np.array([[added_up(own, sums) for own in group] for group in channels])


def check_bits(found: dict[str, Tensor], wanted: Emulation) -> None:
    for name, value in found.items():
        expected = getattr(wanted, name)
        assert value.dtype in (torch.float16, torch.float32)
        np.testing.assert_array_equal(value.detach().float().numpy(), expected.astype(np.float32), err_msg=name)


def found_by(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, used: Rule) -> dict[str, Tensor]:
    y, mean, spread = normalise(x, weight, bias, used)
    dx, dweight, dbias = gradients(lambda *inputs: normalise(*inputs, used)[0], g, x, weight, bias)
    return {"y": y, "mean": mean, "spread": spread, "dx": dx, "dweight": dweight, "dbias": dbias}


@every_row
@every_sum
@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_is_the_emulations(spec: str, sums: str, centred: bool, shape: Shape) -> None:
    inputs, used = on_a_grid(shape), rule(spec, sums, centred)
    check_bits(found_by(*inputs, used), Emulation(*(value.numpy() for value in inputs), used))


@every_sum
def test_torchs_own_rule_is_the_emulations(sums: str) -> None:
    inputs, used = on_a_grid((2, 3, 4, 21)), rule("l2", sums, native=True)
    check_bits(found_by(*inputs, used), Emulation(*(value.numpy() for value in inputs), used))


def test_the_emulation_tells_accumulators_apart() -> None:
    inputs = on_a_grid((1, 3, 1, 300))
    emulated = Emulation(*(value.numpy() for value in inputs), rule("l1", "half:16"))
    for other in ("fp32", "half:1"):
        with pytest.raises(AssertionError):
            check_bits(found_by(*inputs, rule("l1", other)), emulated)


# --- float64 -----------------------------------------------------------------------------------------------------------------

# In units of the largest wanted value. An elementwise result is off by 2^-11 of it, some six deep; a sum of 300 by pairs adds
# nine roundings, which mostly cancel. All stay below 1e-2: a factor of 1.01 shows.
Y, STATISTICS, DX, TOTALS = 4e-3, 2e-3, 6e-3, 4e-3


def check_near(found: dict[str, Tensor], inputs: tuple[Tensor, ...], used: Rule) -> None:
    x, weight, bias, g = (value.double() for value in inputs)
    wanted = reference.row_norm(x.numpy(), used.row, weight.numpy(), bias.numpy(), EPS, centred=used.centred)
    check_close("y", found["y"], wanted[0], Y)
    check_close("mean", found["mean"], wanted[1], STATISTICS, unit=float(x.abs().mean()))
    check_close("spread", found["spread"], wanted[2], STATISTICS)
    plain = gradients(lambda *leaves: test_torch_sample.plain(*leaves, used.row, used.centred), g, x, weight, bias)
    terms = float((g.abs() * 4).sum((0, 3)).max())
    check_close("dx", found["dx"], plain[0], DX)
    check_close("dweight", found["dweight"], plain[1], TOTALS, unit=max(terms, float(plain[1].abs().max())))
    check_close("dbias", found["dbias"], plain[2], TOTALS, unit=terms)


@every_row
@every_sum
@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_near_float64(spec: str, sums: str, centred: bool, shape: Shape) -> None:
    inputs, used = on_a_grid(shape), rule(spec, sums, centred)
    check_near(found_by(*inputs, used), inputs, used)


@every_row
@pytest.mark.parametrize("which", ["y", "spread", "dx"])
def test_one_percent_off_is_caught(spec: str, which: str) -> None:
    inputs, used = on_a_grid(SHAPES[1]), rule(spec, "half:16")
    found = found_by(*inputs, used)
    found[which] = 1.01 * found[which].double()
    with pytest.raises(AssertionError, match=f"{which}: off by"):
        check_near(found, inputs, used)


@every_row
@pytest.mark.parametrize("shape", [(16, 3), (5, 3, 7), (4, 3, 5, 6)], ids=str)
def test_a_batch_is_a_row_with_channels_first(spec: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).half()
    weight, bias = (value.flatten() for value in affine_of((1, 3, 1, 1), torch.float16))
    for layout in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        y, mean, spread = normalise_batch(layout, weight, bias, rule(spec, "half:4"))
        wanted = reference.batch_norm(x.double().numpy(), metric(spec), weight.double().numpy(), bias.double().numpy())
        assert y.stride() == torch.empty_like(layout).stride() and mean.shape == spread.shape == (3,)
        for name, found, expected in zip(("y", "mean", "spread"), (y, mean, spread), wanted, strict=True):
            check_close(name, found, expected, Y, unit=max(1.0, float(abs(expected).max())))


# --- range -------------------------------------------------------------------------------------------------------------------


def overflows(spec: str, x: Tensor, sums: str) -> bool:
    _, mean, spread = normalise(x, None, None, rule(spec, sums))
    assert bool(mean.isfinite().all())
    return not bool(spread.isfinite().all())


def test_squares_overflow_where_magnitudes_do_not() -> None:
    signs = 1.0 - 2.0 * (torch.arange(4000) % 2)
    tens, hundreds = ((10 * signs).half().view(1, 1, 4000, 1), (300 * signs[:200]).half().view(1, 1, 200, 1))
    found = {(spec, sums): overflows(spec, tens, sums) for spec in ROWS for sums in SUMS}
    assert [pair for pair, inf in found.items() if inf] == [
        ("l2", "half:1"),
        ("l2", "half:16"),
    ]  # sums 400,000 and 40,000
    found = {(spec, sums): overflows(spec, hundreds, sums) for spec in ROWS for sums in SUMS}
    assert [pair for pair, inf in found.items() if inf] == [("l2", sums) for sums in SUMS]  # one square is 90,000


def test_an_infinite_spread_is_told_and_leaves_gradients_finite() -> None:
    """Nothing else would tell: y is the bias, and the loss is as finite as ever."""
    x, weight, bias, g = on_a_grid((2, 3, 4, 21))
    x[1, 2] *= 500
    with watching() as watch:
        found = found_by(x, weight, bias, g, rule("l2", "half:16"))
    assert watch.spoilt and found["spread"].isinf().sum() == 1
    assert torch.equal(found["y"][1, 2], bias[2][:, None].expand(4, 21)) and not found["dx"][1, 2].any()
    assert all(bool(found[name].isfinite().all()) for name in ("y", "dx", "dweight", "dbias"))
    with watching() as watch:
        found_by(x, weight, bias, g, rule("l1", "half:16"))
    assert not watch.spoilt


@pytest.mark.parametrize("n", [50, 1000])
def test_the_forecast_of_advise_holds(n: int) -> None:
    """Channels whose sums are foreseen beyond 65504 overflow, and those within don't: an accumulator of half throughout."""
    unit = torch.randn(n, 60)
    x = ((unit - unit.mean(0)) * torch.linspace(0.2, 3, 60) * FP16_MAX / n**0.5 / 60).half()
    moments = Moments()
    moments.add(x, [])
    for spec, forecast in (("l1", moments.sums), ("l2", moments.squares)):
        real = normalise_batch(x, None, None, rule(spec, "half:1"))[2].isinf()
        assert real[forecast > 1.02 * FP16_MAX].all() and not real[forecast < FP16_MAX / 1.02].any()
        assert forecast.max() > FP16_MAX or spec == "l1"
    assert moments.squares.min() < FP16_MAX < moments.squares.max()


@every_row
@every_sum
@both
def test_a_dead_row_stays_finite(spec: str, sums: str, centred: bool) -> None:
    x, weight, bias, g = on_a_grid((2, 2, 3, 8))
    x[0, 0] = 0.0
    x[0, 1] = 0.25 if centred else 0.0  # sums of it are exact
    for eps in (EPS, 1e-12):
        found = found_by(x, weight, bias, g, rule(spec, sums, centred, eps=eps))
        assert torch.equal(found["y"][0], bias[:, :, None].expand(2, 3, 8))
        assert all(bool(value.isfinite().all()) for value in found.values())


def test_rows_that_are_too_short_and_none_at_all() -> None:
    with pytest.raises(NormRewriteError, match="topk:10 needs at least 10 elements"):
        normalise(torch.ones(2, 1, 4, 1).half(), None, None, rule("topk:10", "fp32"))
    x = torch.zeros(0, 2, 3, 7).half().requires_grad_()
    y = normalise(x, *affine_of((0, 2, 3, 7), torch.float16), rule("l1", "half:4"))[0]
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None


def test_centring_is_that_of_float64() -> None:
    x, bias, g = torch.randn(6, 3, 5).half(), torch.randn(3).half(), torch.randn(6, 3, 5).half()
    leaves: list[Any] = [value.clone().requires_grad_() for value in (x, bias)]
    y, mean = half.centre(*leaves, accumulator("half:4"))
    wide = [value.detach().double().requires_grad_() for value in leaves]
    wanted = wide[0] - wide[0].mean((0, 2), keepdim=True) + wide[1][:, None]
    check_close("y", y, wanted, Y)
    check_close("mean", mean, wide[0].mean((0, 2)), STATISTICS, unit=1.0)
    for found, expected in zip(
        torch.autograd.grad(y, leaves, g), torch.autograd.grad(wanted, wide, g.double()), strict=True
    ):
        check_close("gradient", found, expected, TOTALS)
        assert math.isfinite(float(found.sum())) and found.dtype is torch.float16


@every_row
@pytest.mark.parametrize("sums", SUMS)
def test_constant_rows_give_the_bias(sums: str, spec: str) -> None:
    """Whatever the sum of half numbers loses of their mean."""
    _, weight, bias, _ = on_a_grid(SHAPES[1])
    x = torch.full(SHAPES[1], 10.3, dtype=torch.float16)
    y, mean, spread = normalise(x, weight, bias, rule(spec, sums))
    assert torch.equal(y, bias[None, :, :, None].expand(x.shape))
    assert torch.equal(mean, x[:, :, 0, 0].float()) and not spread.any()
