"""Bias correction: the mean of every output is the original's again, measured here by hooks of the tests' own, in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from tests.forms import NETWORKS, inputs, same_bits, start

SAME = 1e-5


@torch.no_grad()
def rounded(model: nn.Module, bits: int = 4) -> nn.Module:
    """A copy whose weights are whole multiples of a step, as symmetric quantisation by layer leaves them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            step = module.weight.abs().max() / (2 ** (bits - 1) - 1)
            module.weight.copy_((module.weight / step).round() * step)
    return model


def means(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By module, the mean of its first call's output over all but channels; of what applies its own activation, before it."""
    by_name: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if hasattr(module, "act") and hasattr(module, "running_var"):
                statistics = module.running_mean, module.running_var, module.weight, module.bias
                output = F.batch_norm(arguments[0], *statistics, False, 0.0, module.eps)
            by_name.setdefault(name, output.double().mean([0, *range(2, output.dim())]))

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return by_name


@pytest.mark.parametrize("network", NETWORKS)
def test_means_of_outputs_are_the_originals_again(network: str) -> None:
    original, x = start("l1", network), inputs(network)
    model = rounded(original)
    wanted, before = means(original, x), means(model, x)
    report = nr.correct_biases_(model, original, x)
    after = means(model, x)
    biased = {name for name, module in original.named_modules() if getattr(module, "bias", None) is not None}
    corrected = [each.name for each in report.corrected]
    assert set(corrected) == biased and not biased & report.left.keys()
    for name in corrected:
        assert float((after[name] - wanted[name]).abs().max()) <= SAME * max(1, float(wanted[name].abs().max())), name
    moved = [name for name in corrected if float((before[name] - wanted[name]).abs().max()) > 100 * SAME]
    assert len(moved) >= len(corrected) - 1  # there was something to correct; the first norm may stand before any layer
    assert all(torch.equal(a, b) for a, b in zip(_weights(model), _weights(rounded(original)), strict=True))


def _weights(model: nn.Module) -> list[Tensor]:
    return [value for name, value in model.state_dict().items() if not name.endswith("bias")]


@pytest.mark.parametrize("to", ["none", "bwn:strict", "wn:mean-bn", "l1", "group:4", "layer"])
def test_twins_are_compared_where_their_norms_were(to: str) -> None:
    """A layer that took a norm in answers for that norm; one that took only its scale leaves the mean to what is left of it."""
    original, x = start("l1", "chain"), inputs("chain")
    changed = original if to in ("bwn:strict", "layer", "group:4") else rounded(original)
    twin = nr.convert(changed, to)
    nr.correct_biases_(twin, original, x)
    wanted, after = means(original, x), means(twin, x)
    for name in ("bn1", "bn2", "bn3", "bn4", "head"):
        now = after.get(name, after.get(f"{name}.norm"))
        assert now is not None and float((now - wanted[name]).abs().max()) <= SAME * 5, name


@torch.no_grad()
def test_report_tells_shifts_outputs_and_what_is_left() -> None:
    original, x = start("l1", "chain"), inputs("chain")
    model = rounded(original)
    wanted, shifted = means(original, x)["bn1"], means(model, x)["bn1"]
    before = (model(x) - original(x)).norm() / original(x).norm()
    report = nr.correct_biases_(model, original, x)
    after = (model(x) - original(x)).norm() / original(x).norm()
    assert report.outputs == pytest.approx((float(before), float(after)), rel=1e-4)
    unit = original.bn1(original.conv(x)).var((0, 2, 3), correction=0).mean().sqrt()
    first = report.corrected[0]
    assert (first.name, first.channels) == ("bn1", 8) and first.after < SAME
    assert first.before == pytest.approx(float((wanted - shifted).abs().max() / unit), rel=1e-3)
    assert report.left.keys() == {"conv", "depthwise"} | ({"up"} if original.up.bias is None else set())
    assert "conv, depthwise: without a bias" in str(report) and report.as_dict()["inputs"] == len(x)


@torch.no_grad()
def test_norms_over_last_dimensions_and_linear_layers() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).eval()
    x, model = torch.randn(10, 5, 6), rounded(original)
    nr.correct_biases_(model, original, x)
    for cut in (1, 2, 4):
        gap = (model[:cut](x) - original[:cut](x)).mean((0, 1))  # type: ignore[index, operator]
        assert float(gap.abs().max()) <= SAME
    assert float((rounded(original)(x) - original(x)).mean((0, 1)).abs().max()) > 100 * SAME


def test_a_twin_no_longer_passes_for_its_original() -> None:
    original, x = start("l1", "chain"), inputs("chain")
    twin = nr.convert(rounded(original), "l1")
    nr.correct_biases_(twin, original, x)
    back = nr.revert(twin)
    assert torch.allclose(back(x), twin(x), atol=1e-4) and not same_bits(back, rounded(original))
    with pytest.raises(nr.NormRewriteError, match="trained since"):
        nr.passes.reversion.untrained(twin, "")  # type: ignore[attr-defined]


@torch.no_grad()
def test_a_channel_that_is_not_finite_is_left_alone() -> None:
    original, x = start("l1", "chain"), inputs("chain")
    original.head.weight[2, 0] = torch.inf
    model = rounded(original)
    model.head.weight.copy_(original.head.weight)
    before = model.head.bias.clone()
    nr.correct_biases_(model, original, x)
    assert model.head.bias.isfinite().all() and torch.equal(model.head.bias[2], before[2])
    assert not torch.equal(model.head.bias[:2], before[:2])


@pytest.mark.parametrize("batch_size", [5, 250])
@torch.no_grad()
def test_the_first_inputs_are_used(batch_size: int) -> None:
    original, x = start("l1", "chain"), inputs("chain")
    model = rounded(original)
    nr.correct_biases_(model, original, x, batch_size=batch_size)
    gap = (model(x[:5]) - original(x[:5])).mean(0).abs().max()
    assert (float(gap) <= SAME) == (batch_size == 5)


def test_where_it_fails_nothing_has_changed() -> None:
    original, x = start("l1", "chain"), inputs("chain")
    model = rounded(original)
    model.head = nn.Linear(16, 6)  # type: ignore[assignment]
    before = copy.deepcopy(model)
    with pytest.raises(nr.NormRewriteError, match="head: 6 channels, and the original has 5 there"):
        nr.correct_biases_(model, original, x)
    assert same_bits(model, before)
    for data, words in ((x * torch.nan, "NaN or infinity"), (x[:, :2], "can't run on"), ([], "no batch")):
        with pytest.raises(nr.NormRewriteError, match=words):
            nr.correct_biases_(rounded(original), original, data)
    with pytest.raises(nr.NormRewriteError, match="nothing to correct"):
        nr.correct_biases_(nn.Sequential(nn.Conv2d(3, 2, 1, bias=False)), original, x)
