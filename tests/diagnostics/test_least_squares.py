"""Sequential least squares: the fit of each channel against numpy, both ways through a network, and what does not fit."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.diagnostics import least_squares, walk
from normrewrite.diagnostics.least_squares import fittable
from tests.conftest import randomise
from tests.forms import NETWORKS, inputs, start
from tests.passes.test_lift_functional import Block
from tests.sites.test_kinds import NormAct

SCOPES = ("group:2", "layer", "rms")


def images(count: int = 40, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 6, 6, generator=torch.Generator().manual_seed(3)) + 0.5


def calibrated(
    model: nn.Module, to: str, data: Any, offset: float | str = 0, **options: Any
) -> tuple[Any, list[least_squares.Fit]]:
    """Plain norms, without an offset in front, unless one is asked for: that is tests/diagnostics/test_offset.py's."""
    twin, calibration = nr.calibrate(nr.convert(model, to, offset=offset), data, **{"batch_size": 10, **options})
    return twin, calibration.fits


class Branching(nn.Module):
    """Its path depends on its input, so that torch.fx can't trace it; every input here takes the same."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x) if x.shape[0] and x.sum() > -1e9 else x
        return y


@pytest.mark.parametrize("to", SCOPES)
def test_each_channel_is_numpys_least_squares(to: str) -> None:
    """One norm behind a convolution; the ridge of 1e-6 is far below the variances here."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    twin, fits = calibrated(model, to, images())
    norm = twin[1]
    weight, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
    with torch.no_grad():
        norm.weight.fill_(1), norm.bias.zero_()
        o, r = (net(images()).double().transpose(0, 1).flatten(1).numpy() for net in (twin, model))
    residual = 0.0
    for channel in range(4):
        columns = np.stack([o[channel], np.ones_like(o[channel])], 1)
        wanted, left, *_ = np.linalg.lstsq(columns, r[channel], rcond=None)
        residual += float(left[0])
        assert [float(weight[channel]), float(bias[channel])] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert [1.01 * float(weight[channel])] != pytest.approx(wanted[:1], rel=1e-4, abs=1e-4)
    explained = 1 - residual / ((r - r.mean(1, keepdims=True)) ** 2).sum()
    assert fits[0].explained == pytest.approx(explained, abs=1e-5) and fits[0].copied < fits[0].explained


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "dense"])
@pytest.mark.parametrize("to", SCOPES)
def test_traced_or_not_the_result_is_the_same(to: str, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = start(to, network), inputs(network)
    twin, fits = calibrated(model, to, x)
    monkeypatch.setattr(walk, "traced", lambda *_: None)
    other, others = calibrated(model, to, x)
    assert [fit.name for fit in fits] == [fit.name for fit in others] and len(fits) == len(fittable(twin))
    for fit, again in zip(fits, others, strict=True):
        assert fit.explained == pytest.approx(again.explained, abs=1e-5) and fit.copied == pytest.approx(
            again.copied, abs=1e-5
        )
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-4)


def test_what_torch_fx_cannot_trace() -> None:
    body = start("layer", "chain")
    plain, fits = calibrated(body, "layer", images(12))
    twin, others = calibrated(Branching(body), "layer", images(12))
    assert [f"body.{fit.name}" for fit in fits] == [fit.name for fit in others]
    torch.testing.assert_close(twin(images(12)), plain(images(12)), rtol=1e-4, atol=1e-4)


def test_batches_are_one_data_set() -> None:
    model = start("layer", "chain")
    whole, _ = calibrated(model, "layer", images(), batch_size=40)
    parts, _ = calibrated(model, "layer", images(), batch_size=7)  # the last one of five
    torch.testing.assert_close(parts(images()), whole(images()), rtol=1e-4, atol=1e-4)


def test_the_fit_is_behind_the_norm_and_before_its_tail() -> None:
    """A fused activation throws half of what it gets away: the fit is to what goes in."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4))).eval()
    plain = nn.Sequential(model[0], nn.BatchNorm2d(4)).eval()
    plain[1].load_state_dict(model[1].state_dict())
    twin, fits = calibrated(model, "layer", images())
    other, others = calibrated(plain, "layer", images())
    torch.testing.assert_close(twin[1].norm.weight, other[1].weight)
    assert fits[0].explained == pytest.approx(others[0].explained)
    assert torch.equal(nr.revert(twin)(images()), model(images()))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = randomise(nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(x)))


def test_a_norm_at_two_places_is_fitted_once() -> None:
    """By its first call; and it goes back."""
    model = Shared().eval()
    twin, fits = calibrated(model, "layer", images())
    alone, _ = calibrated(nn.Sequential(model.norm).eval(), "layer", images())
    assert len(fits) == 1
    torch.testing.assert_close(twin.norm.weight, alone[0].weight)
    assert torch.equal(nr.revert(twin)(images()), model(images()))


def test_a_channel_without_variance_takes_the_mean() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        model[0].weight[2] = 0
    twin, _ = calibrated(model, "instance", images())
    assert twin[1].weight[2].abs() < 1e-3
    torch.testing.assert_close(twin(images())[:, 2], model(images())[:, 2], rtol=1e-4, atol=1e-4)


def test_after_training_the_original_has_to_be_given() -> None:
    model = start("layer", "chain")
    twin = nr.convert(model, "layer", offset=0)
    with torch.no_grad():
        twin.get_submodule("bn1").weight.add_(1)  # type: ignore[operator]
    with pytest.raises(nr.NormRewriteError, match=r"bn1: was trained since .* Give that one as `original`"):
        nr.calibrate(twin, images())
    wanted, _ = calibrated(model, "layer", images())
    torch.testing.assert_close(
        nr.calibrate(twin, images(), batch_size=10, original=model)[0](images()), wanted(images())
    )


def test_training_flags_and_the_original_stay() -> None:
    model = start("layer", "chain").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin, _ = calibrated(model, "layer", images(), original=model)
    assert (
        twin.training
        and model.training
        and all(module.training for module in twin.modules() if not hasattr(module, "kind"))
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_original_may_call_its_norms_by_function() -> None:
    model = nn.Sequential(Block(4), nn.ReLU()).eval()
    calls, twin = model[0], nr.convert(model, "group")
    alone, fits = nr.calibrate(twin, images(), batch_size=10)
    given, again = nr.calibrate(twin, images(), batch_size=10, original=model)
    assert torch.equal(given(images()), alone(images())) and fits.fits == again.fits and model[0] is calls


@pytest.mark.parametrize(
    "other", [nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))]
)
def test_another_network_as_original(other: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with pytest.raises(nr.NormRewriteError, match="1: the original has no norm of that name and width"):
        calibrated(model, "group", images(), original=other.eval())


def test_inputs_that_are_not_finite_are_left_out() -> None:
    model = start("layer", "chain")
    x = images(30)
    x[13, 1, 2, 2] = float("nan")
    dirty, _ = calibrated(model, "layer", x)
    clean, _ = calibrated(model, "layer", torch.cat([x[:10], x[20:]]))
    torch.testing.assert_close(dirty(images()), clean(images()))
    calibration = nr.calibrate(nr.convert(model, "layer"), x, batch_size=10)[1]
    assert (calibration.inputs, calibration.skipped_batches) == (20, 1) and "1 batches left out" in str(calibration)
    with pytest.raises(nr.NormRewriteError, match="not finite"):
        calibrated(model, "layer", torch.full((4, 3, 6, 6), float("nan")))


@pytest.mark.parametrize(
    ("data", "message"),
    [(torch.randn(4, 5, 6, 6), "can't run on"), ([], "no batch"), (["text"], "a batch is a tensor")],
    ids=["shape", "empty", "text"],
)
def test_data_that_does_not_fit(data: Any, message: str) -> None:
    with pytest.raises(nr.NormRewriteError, match=message):
        calibrated(start("layer", "chain"), "layer", data)


def test_a_norm_that_the_data_does_not_reach_is_told() -> None:
    model = Branching(start("layer", "chain"))
    model.other = nn.BatchNorm2d(3).eval()
    fits = calibrated(model.eval(), "layer", images())[1]
    assert [fit.note for fit in fits if fit.name == "other"] == ["not reached by the data"]
