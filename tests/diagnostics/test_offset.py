"""The affine in front of a norm: the closed form against numpy, fits that are known, and what a fit may never do."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.diagnostics.offset import Form, Tables, fitted, regressed
from tests.conftest import RealNetwork, randomise, real_images
from tests.forms import Chain


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(samples: int, channels: int, seed: int = 0, own: float = 0.5) -> Tensor:
    """(N, C, 5, 5), channels correlated, with means that differ by channel and sample. own: how much samples differ."""
    x = drawn(samples, channels, 5, 5, seed=seed) + own * drawn(samples, channels, 1, 1, seed=seed + 1)
    return torch.einsum("nchw,cd->ndhw", x, drawn(channels, channels, seed=seed + 2)) + drawn(channels, 1, 1, seed=9)


def by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


def batch_normed(x: Tensor) -> Tensor:
    dims = [0, *range(2, x.dim())]
    return (x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True)


NORMS = {
    "group": lambda c: nn.GroupNorm(2, c, dtype=torch.float64),
    "layer": lambda c: nn.GroupNorm(1, c, eps=1e-2, dtype=torch.float64),
    "rms": lambda c: nr.nn.GroupNorm(1, c, metric="l2", centred=False, dtype=torch.float64),
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("shape", [(9, 6, 5, 5), (9, 6, 4), (40, 6)], ids=str)
def test_weight_and_bias_behind_the_norm_are_numpys_least_squares(make: Any, shape: tuple[int, ...]) -> None:
    x, r = drawn(*shape) + drawn(6, *[1] * (len(shape) - 2), seed=1), drawn(*shape, seed=2) + 2 * drawn(*shape)
    norm, scale, offset = make(6), drawn(6, seed=3), 3 * drawn(6, seed=4)
    tables = Tables.joined([Tables.of(x[:3], r[:3]), Tables.of(x[3:], r[3:])])
    found = regressed(tables, Form.of(norm), scale, offset)
    with torch.no_grad():
        o = norm(by_channel(scale, x) * x + by_channel(offset, x))
    residual, varying = 0.0, 0.0
    for channel in range(6):
        one, wanted = (values[:, channel].flatten().numpy() for values in (o, r))
        solution, left, *_ = np.linalg.lstsq(np.stack([one, np.ones_like(one)], 1), wanted, rcond=None)
        residual, varying = residual + float(left[0]), varying + float(((wanted - wanted.mean()) ** 2).sum())
        assert [float(found.weight[channel]), float(found.bias[channel])] == pytest.approx(solution, rel=1e-5)
        assert [1.01 * float(found.weight[channel])] != pytest.approx(solution[:1], rel=1e-5)
    assert found.explained == pytest.approx(1 - residual / varying, abs=1e-9)


def test_samples_count_by_their_positions() -> None:
    x, r = drawn(3, 4, 6), drawn(3, 4, 6, seed=1)
    other, wanted = drawn(2, 4, 30, seed=2), drawn(2, 4, 30, seed=3)
    tables = Tables.joined([Tables.of(x, r), Tables.of(other, wanted)])
    values = torch.cat([x.transpose(0, 1).flatten(1), other.transpose(0, 1).flatten(1)], 1)
    torch.testing.assert_close(tables.mean(tables.x), values.mean(1))
    torch.testing.assert_close(tables.spread(tables.x, tables.xx), values.var(1, correction=0))


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_most_of_an_affine_that_is_there_is_found(make: Any) -> None:
    """r is the norm's own function of an affine input; other signs than these explain nearly as much."""
    x, norm = mixed(40, 8, own=2.0), make(8)
    _, _, deviation = Tables.of(x, x).standardised(0.0)
    with torch.no_grad():
        r = norm(by_channel(1 / deviation, x) * x + by_channel(2 * drawn(8, seed=5), x))
    tables, form = Tables.of(x, r), Form.of(norm)
    plain = regressed(tables, form, torch.ones(8).double(), torch.zeros(8).double()).explained
    assert plain < 0.95 and 1 - fitted(tables, form, 30).explained < 0.6 * (1 - plain)


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_a_batch_norm_is_reproduced_where_samples_have_nothing_of_their_own_to_lose(make: Any) -> None:
    x = mixed(30, 8, own=0.0)
    x = x - x.mean((2, 3), keepdim=True) + drawn(8, 1, 1)
    tables, form = Tables.of(x, batch_normed(x)), Form.of(make(8))
    free, tight = (1 - fitted(tables, form, bound).explained for bound in (30, 0.3))
    assert free < 0.0005 and tight > 5 * free


@pytest.mark.parametrize("each", [2, 3, 5, 6, 8, 27])
def test_any_number_of_channels_a_group(each: int) -> None:
    x = mixed(40, 2 * each)
    tables, form = Tables.of(x, batch_normed(x)), Form.of(nn.GroupNorm(2, 2 * each))
    ones, zeros = torch.ones(2 * each).double(), torch.zeros(2 * each).double()
    found = fitted(tables, form, 5)
    for values in (found.scale, found.offset, found.weight, found.bias):
        assert values.isfinite().all() and len(values) == 2 * each
    assert found.explained > regressed(tables, form, ones, zeros).explained + 0.005


@pytest.mark.parametrize("bound", [0.1, 0.5, 5])
def test_the_offset_keeps_to_its_bound(bound: float) -> None:
    x = mixed(40, 16)
    tables, form = Tables.of(x, batch_normed(x)), Form.of(nn.GroupNorm(2, 16))
    found, (_, mean, _) = fitted(tables, form, bound), tables.standardised(1e-5)
    size = form.grouped((found.offset + found.scale * mean) ** 2).mean(-1).sqrt()
    assert (size < 1.03 * bound).all() and (bound > 0.1 or (size > 0.05).all())


def test_channels_without_variance_and_all_alike() -> None:
    x = mixed(20, 8)
    x[:, 3] = 2.5
    x[:, 5] = x[:, 4]
    r = batch_normed(mixed(20, 8))
    r[:, 3] = 0.7
    found = fitted(Tables.of(x, r), Form.of(nn.GroupNorm(2, 8)), 5)
    assert all(values.isfinite().all() for values in (found.scale, found.offset, found.weight, found.bias))
    assert float(found.weight[3].abs()) < 1e-3 and float(found.bias[3]) == pytest.approx(0.7, abs=1e-3)


def test_the_random_state_stays() -> None:
    before = torch.random.get_rng_state()
    x = mixed(10, 8)
    first, again = (fitted(Tables.of(x, batch_normed(x)), Form.of(nn.GroupNorm(2, 8)), 5) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before) and torch.equal(first.scale, again.scale)


@pytest.mark.parametrize("to", ["group:2", "group:4", "layer", "rms"])
@pytest.mark.parametrize("offset", ["auto", 0.1, 5])
def test_no_site_ends_further_off_than_its_copy(to: str, offset: float | str) -> None:
    seed = len(f"{to} {offset}")
    model, x = randomise(Chain(), seed).eval(), drawn(24, 3, 6, 6, seed=seed).float()
    fits = nr.calibrate(nr.convert(model, to, offset=offset), x, batch_size=10)[1].fits
    assert len(fits) == 4
    assert all(fit.explained >= fit.copied - 1e-9 for fit in fits)


def test_a_hook_on_the_norm_is_fitted_around() -> None:
    """Original and twin both call it on what the norm gives."""
    model, x = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).eval(), drawn(40, 3, 7, 7).float()
    bare, _ = nr.calibrate(nr.convert(model, "rms"), x)
    model[1].register_forward_hook(lambda _module, _arguments, output: 2 * output)
    hooked, _ = nr.calibrate(nr.convert(model, "rms"), x)
    with torch.no_grad():
        torch.testing.assert_close(hooked(x), 2 * bare(x))


def test_what_is_fitted_is_what_runs() -> None:
    """The share that tables explain is that of the twin's own output."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).eval()
    x = drawn(40, 3, 7, 7).float()
    twin, calibration = nr.calibrate(nr.convert(model, "group:2"), x, batch_size=16)
    with torch.no_grad():
        new, old = (net(x).double().transpose(0, 1).flatten(1) for net in (twin, model))
    explained = 1 - (new - old).square().sum() / (old - old.mean(1, keepdim=True)).square().sum()
    assert calibration.fits[0].explained == pytest.approx(float(explained), abs=1e-4)
    assert torch.equal(nr.revert(twin)(x), model(x))


@pytest.mark.parametrize(("to", "least"), [("layer", 91.0), ("group:4", 89.0)])
def test_a_trained_network_keeps_what_it_knows(resnet20: RealNetwork, to: str, least: float) -> None:
    """500 images, 94 % of them right before; a plain norm, fitted, keeps 91 or 88 of them."""
    model, (images, labels) = resnet20.make(), real_images("test", 500)
    twin, _ = nr.calibrate(nr.convert(model, to), real_images("train", 64)[0])
    with torch.no_grad():
        right = (twin(images).argmax(1) == labels).double().mean()
    assert 100 * float(right) >= least
