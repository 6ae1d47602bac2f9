"""Moments of site inputs against float64 numpy, and the fp16 forecast against real half arithmetic."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite import sites
from normrewrite.backends import reference
from normrewrite.data import as_data
from normrewrite.diagnostics.moments import FP16_MAX, Moments, Readings, every_row, headroom, read
from normrewrite.norms import METRICS, metric
from tests.conftest import NETWORKS, RealNetwork, randomise

ROWS = [*map(str, METRICS.values()), "topk:1%"]
Array = npt.NDArray[Any]


def _read(model: nn.Module, x: Tensor, size: int) -> Readings:
    return read(model, sites.find(model), as_data(x, ["x"]), every_row, batch_size=size)


def _channels(x: Tensor) -> Array:
    """(N, C, *) -> (C, n), float64."""
    values: Array = x.transpose(0, 1).flatten(1).double().numpy()
    return values


def _skewed(count: int = 60) -> Tensor:
    """Inputs of five channels, far from Gaussian, one of them dead."""
    return torch.randn(count, 5, 6, 7).exp() * torch.tensor([0.1, 1.0, 3.0, 20.0, 0.0]).view(5, 1, 1) - 2


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read_once() -> tuple[Tensor, Moments]:
    torch.manual_seed(0)
    x = _skewed()
    return x, _read(nn.BatchNorm2d(5).eval(), x, 10).by_site[""]


def test_sums_and_extremes_are_numpys(read_once: tuple[Tensor, Moments]) -> None:
    x, moments = read_once
    calls = [_channels(part) for part in x.split(10)]
    d = [values - values.mean(1, keepdims=True) for values in calls]
    whole = _channels(x)
    expected = {
        "mean": whole.mean(1),
        "sigma": whole.std(1),
        "sums": np.max([abs(part).sum(1) for part in d], 0),
        "squares": np.max([(part**2).sum(1) for part in d], 0),
        "largest": abs(whole).max(1),
        "furthest": np.max([abs(part).max(1) for part in d], 0),
    }
    assert (moments.calls, moments.skipped, moments.n) == (6, 0, 420)
    assert moments.dead.tolist() == [False] * 4 + [True]
    for name, value in expected.items():
        got = getattr(moments, name).numpy()
        np.testing.assert_allclose(got, value, rtol=2e-6, atol=1e-6, err_msg=name)
        assert not np.allclose(1.01 * got, value, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_kappa_and_noise_are_the_references(read_once: tuple[Tensor, Moments], name: str) -> None:
    x, moments = read_once
    parts = [part.numpy().astype(np.float64) for part in x[:, :4].split(10)]
    scale = np.stack([reference.batch_norm(part, metric(name))[2] for part in parts])
    sigma = np.stack([part.std((0, 2, 3)) for part in parts])
    kappa = torch.from_numpy(scale.sum(0) / sigma.sum(0)).median().item()  # torch's median: the lower of the middle two
    noise = torch.from_numpy(scale.std(0, ddof=1) / scale.mean(0)).median().item()
    assert moments.kappa(name) == pytest.approx(kappa, rel=1e-5)
    assert moments.noise(name) == pytest.approx(noise, rel=1e-4)
    assert moments.kappa(name) != pytest.approx(1.01 * kappa, rel=1e-5)


def test_noise_without_enough_calls_is_that_of_gaussians() -> None:
    norm = nn.BatchNorm1d(64).eval()
    x = torch.randn(200 * 50, 64)
    few, many = (_read(norm, part, 50).by_site[""] for part in (x[:150], x))
    for name in ("l1", "l2"):
        theory, measured = few.noise(name), many.noise(name)
        assert theory is not None and measured == pytest.approx(theory, rel=0.05)
    assert few.noise("linf") is None and few.noise("topk:10") is None
    assert few.noise("l2") == pytest.approx(math.sqrt(0.5 / 50))


def test_torchs_norm_and_its_twin_are_fed_the_same() -> None:
    norm, x = randomise(nn.BatchNorm2d(5)).eval(), _skewed()
    of_torch, of_twin = (_read(model, x, 20).by_site[""] for model in (norm, nr.convert(norm, "linf")))
    assert torch.equal(of_torch.sums, of_twin.sums) and of_torch.kappa("l1") == of_twin.kappa("l1")


def test_half_input_is_read_in_fp32() -> None:
    x = 300 * torch.randn(40, 4, 16, 16)
    moments = _read(nn.BatchNorm2d(4).half().eval(), x.half(), 20).by_site[""]
    np.testing.assert_allclose(moments.sigma.numpy(), _channels(x.half()).std(1), rtol=1e-5)
    assert float(moments.squares.min()) > FP16_MAX and bool(moments.squares.isfinite().all())


def test_metrics_that_need_more_elements_are_left_out() -> None:
    moments = _read(nn.BatchNorm1d(3).eval(), torch.randn(40, 3), 8).by_site[""]
    assert set(moments.scales) == set(ROWS) - {"topk:10"}
    assert _read(nn.BatchNorm1d(3).eval(), torch.randn(4, 3), 1).by_site[""].scales == {}


def test_dead_sites_have_no_kappa() -> None:
    moments = _read(nn.BatchNorm1d(3).eval(), torch.full((40, 3), 7.0), 8).by_site[""]
    assert moments.dead.all() and math.isnan(moments.kappa("l1"))
    assert headroom(moments.sums) == math.inf


def test_calls_that_are_not_finite_are_counted() -> None:
    class Blows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x / x[0, 0])  # type: ignore[no-any-return]

    x = torch.randn(40, 3)
    x[10, 0] = 0.0
    readings = _read(Blows().eval(), x, 10)
    assert (readings.by_site["norm"].calls, readings.by_site["norm"].skipped) == (3, 1)
    x[25, 1] = math.nan
    readings = _read(Blows().eval(), x, 10)
    assert (readings.inputs, readings.skipped_batches) == (30, 1)


def test_squares_beyond_fp32_do_not_hide_the_rest() -> None:
    norm, x = nn.BatchNorm1d(3).eval(), 1e20 * torch.randn(400, 3)
    moments = _read(norm, x, 50).by_site[""]
    assert moments.skipped == 0 and headroom(moments.squares) == -math.inf < headroom(moments.sums) < -50
    assert "nan" not in str(nr.advise(norm, x, batch_size=50))
    assert nr.calibrate(nr.convert(norm), x, batch_size=50)[1].sites[0].headroom_squares == -math.inf


def test_nothing_is_left_on_the_model(small: Callable[[], nn.Module]) -> None:
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _read(model, torch.randn(8, 3, 4, 4), 4)
    with pytest.raises(nr.NormRewriteError, match="can't run on"):
        _read(model, torch.randn(8, 5, 4, 4), 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


# --- half arithmetic --------------------------------------------------------------------------------------------------


def in_a_tree(terms: Array) -> Array:
    """Sum of (C, n) half numbers, every partial sum rounded to half: pairs, pairs of pairs, ... as parallel kernels do."""
    sums = np.asarray(terms, np.float16)
    with np.errstate(over="ignore"):
        while sums.shape[1] > 1:
            if sums.shape[1] % 2:
                sums = np.concatenate([sums, np.zeros_like(sums[:, :1])], 1)
            sums = sums[:, ::2] + sums[:, 1::2]
            assert sums.dtype == np.float16
    return sums[:, 0].astype(np.float64)


def running(terms: Array) -> Array:
    """The same with one accumulator, element after element."""
    with np.errstate(over="ignore"):
        sums = np.add.accumulate(np.asarray(terms, np.float16), axis=1, dtype=np.float16)
    return sums[:, -1].astype(np.float64)


def half_terms(x: Tensor) -> tuple[Array, Array]:
    """|d| and d*d of each channel as half precision has them, (C, n)."""
    values = _channels(x)
    with np.errstate(over="ignore"):
        d = abs(values - values.mean(1, keepdims=True)).astype(np.float16)
        return d, d * d


def margin(n: int) -> float:
    """How far rounding may move a tree's sum: 2**-11 at each of its levels, of d, of its square, and of the last result."""
    return (1 + 2**-11) ** (math.ceil(math.log2(n)) + 4) - 1


def check_forecast(x: Tensor, moments: Moments) -> tuple[int, int, int]:
    """Forecast against a tree, channel by channel. Returns how many overflow, how many don't, and how many are too close."""
    slack, counts = margin(x.numel() // x.shape[1]), [0, 0, 0]
    for terms, forecast in zip(half_terms(x), (moments.sums.numpy(), moments.squares.numpy()), strict=True):
        real = ~np.isfinite(in_a_tree(terms))
        beyond, within = forecast > FP16_MAX * (1 + slack), forecast < FP16_MAX / (1 + slack)
        assert real[beyond].all() and not real[within].any()
        counts = [counts[0] + beyond.sum(), counts[1] + within.sum(), counts[2] + (~beyond & ~within).sum()]
    return int(counts[0]), int(counts[1]), int(counts[2])


def test_half_sums_are_rounded_at_every_step() -> None:
    terms = torch.rand(3, 777).half().numpy()
    expected = np.zeros(3, np.float16)
    for column in terms.T:
        expected = expected + column
    assert expected.dtype == np.float16
    np.testing.assert_array_equal(running(terms), expected.astype(np.float64))
    ones = np.ones((1, 5000))
    assert running(ones) == 2048 and in_a_tree(ones) == 5000  # the note on one running half sum
    assert running(ones[:, :2048]) == 2048
    assert np.isinf(in_a_tree(16 * ones)) and running(16 * ones) == 32768


@pytest.mark.parametrize("n", [50, 1000, 20_000])
def test_forecast_around_the_limit(n: int) -> None:
    """120 channels whose sums of |d|, then of d*d, lie between 0.9 and 1.1 of 65504."""
    unit = torch.randn(n, 120)
    unit -= unit.mean(0)
    ratio = torch.linspace(0.9, 1.1, 120)
    for x in (unit * (FP16_MAX * ratio / unit.abs().sum(0)), unit * (FP16_MAX * ratio / (unit**2).sum(0)).sqrt()):
        overflow, fit, close = check_forecast(x, _read(nn.BatchNorm1d(120).eval(), x, n).by_site[""])
        assert overflow > 40 and fit > 40 and close < 20
        wrong = _read(nn.BatchNorm1d(120).eval(), 1.05 * x, n).by_site[""]  # a forecast that is 5 % off shows
        with pytest.raises(AssertionError):
            check_forecast(x, wrong)


def test_one_element_whose_square_overflows() -> None:
    x = torch.zeros(1000, 2)
    x[0], x[1] = torch.tensor([255.0, 257.0]), torch.tensor([-255.0, -257.0])
    moments = _read(nn.BatchNorm1d(2).eval(), x, 1000).by_site[""]
    assert (moments.furthest**2 > FP16_MAX).tolist() == [False, True]
    assert np.isinf(half_terms(x)[1]).any(1).tolist() == [False, True]


@pytest.mark.parametrize("network", [NETWORKS[0], NETWORKS[3]], ids=lambda network: network.name, indirect=True)
def test_forecast_on_a_real_network(network: RealNetwork) -> None:
    model, x = network.make(), network.inputs(64)[0]
    inputs: dict[str, Tensor] = {}
    found = sites.find(model)
    for site in found:
        site.module.register_forward_pre_hook(
            lambda _, arguments, name=site.name: inputs.update({name: arguments[0].clone()})
        )
    readings = _read(model, x, len(x))
    counts = np.array([check_forecast(inputs[site.name], readings.by_site[site.name]) for site in found]).sum(0)
    assert counts[0] > 50 and counts[1] > 50 and counts[2] <= 0.05 * counts.sum()
    for site in found:
        moments = readings.by_site[site.name]
        for terms, forecast in zip(half_terms(inputs[site.name]), (moments.sums, moments.squares), strict=True):
            check_running(running(terms) / forecast.numpy(), forecast.numpy(), moments.n)


def check_running(got: Array, forecast: Array, n: int) -> None:
    """One running sum, in units of the true one: no infinity unforeseen, and what advise's note on many elements says."""
    assert np.isfinite(got[forecast < FP16_MAX / (1 + margin(n))]).all()
    finite = got[np.isfinite(got)]
    assert (finite < 0.8).all() if n >= 16_384 else (abs(finite[forecast[np.isfinite(got)] < FP16_MAX] - 1) < 0.3).all()


@pytest.mark.parametrize("narrow", [1.0, 0.1, 1e-4])
def test_int8_headroom_is_whether_rounding_leaves_the_narrowest_channel(narrow: float) -> None:
    """Quantise the input with one scale, as int8 tensors have: below 0 bits nearly nothing of the channel is left."""
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, 1] *= narrow
    x[:, 2] = 1.0  # dead: it counts for nothing
    moments = Moments()
    moments.add(x, [])
    step = float(x.abs().max()) / 127
    left = (x[:, 1] / step).round() * step
    sigma = float(x[:, 1].double().std(correction=0))
    assert moments.int8 == pytest.approx(np.log2(sigma / step), abs=1e-4)
    assert (float(left.std()) > 0.9 * sigma) == (moments.int8 > 0)


def test_int8_headroom_of_dead_sites_is_infinite() -> None:
    moments = Moments()
    moments.add(torch.ones(4, 2, 3), [])
    assert moments.int8 == float("inf")
