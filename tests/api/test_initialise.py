"""Data-dependent initialisation: outputs come out standardised, in one pass, and nothing else moves."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.nn import MeanOnlyBatchNorm
from normrewrite.nn.weights import gain_of, weight_norm_of
from tests.nn.test_weights import LAYERS, parametrised

SHIFT = 3.0


def data(kind: str) -> Tensor:
    return torch.randn(64, *LAYERS[kind][1][1:]) * 2 + SHIFT


def by_channel(layer: Any, output: Tensor) -> Tensor:
    axis = 1 if hasattr(layer, "kernel_size") else -1
    return output.detach().double().movedim(axis, 0).flatten(1)


def assert_standard(rows: Tensor, centred: bool, tolerance: float = 1e-5) -> None:
    assert (rows.std(1, correction=0) - 1).abs().max() <= tolerance
    assert (rows.mean(1).abs().max() <= tolerance) == centred


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", ["wn", "bwn"])
def test_one_layer(kind: str, form: str) -> None:
    """The root itself; std reported is that of before; a layer without bias is scaled only."""
    layer: Any = parametrised(kind, form)
    x, before = data(kind), copy.deepcopy(layer)
    report = nr.initialise_(layer, x)
    rows = by_channel(layer, before(x))
    torch.testing.assert_close(report.layers[0].std.double(), rows.std(1, correction=0), rtol=1e-5, atol=0)
    assert_standard(by_channel(layer, layer(x)), centred=layer.bias is not None)
    with pytest.raises(AssertionError):
        assert_standard(by_channel(layer, layer(x)) * 1.01, centred=layer.bias is not None)
    cosine = nn.functional.cosine_similarity
    assert cosine(layer.weight.flatten(), before.weight.flatten(), dim=0) > 0.5
    assert list(dict(layer.named_parameters())) == list(dict(before.named_parameters()))


def test_bounded_gains_stay_at_rms_one() -> None:
    layer: Any = parametrised("grouped", "bwn")
    norm: Any = weight_norm_of(layer)
    v = layer.parametrizations.weight.original0.clone()
    nr.initialise_(layer, data("grouped"))
    gain = gain_of(layer)
    assert gain is not None
    torch.testing.assert_close(gain.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(layer.weight.norm(), norm.rho * 6**0.5)
    assert torch.equal(layer.parametrizations.weight.original0, v)


class Network(nn.Module):
    """A layer called twice, one never, norms with statistics, dropout; keeps what its layers gave."""

    def __init__(self, form: str = "wn") -> None:
        super().__init__()
        self.first = parametrised("conv2d", form)
        self.norm = MeanOnlyBatchNorm(6)
        self.drop = nn.Dropout(0.2)
        self.twice = nr.nn.normalise_weight(nn.Conv2d(6, 6, 3, padding=1), bounded=form == "bwn")
        self.batch = nn.BatchNorm2d(6)
        self.never = parametrised("linear", form)
        self.last = nr.nn.normalise_weight(nn.Linear(6, 2), bounded=form == "bwn")

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.drop(self.norm(self.first(x * scale)).relu())
        self.once = self.twice(x)
        x = self.batch(self.twice(self.once.relu()))
        self.result = self.last(x.mean([2, 3]))
        return self.result


@pytest.mark.parametrize("form", ["wn", "bwn"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_network(form: str, training: bool) -> None:
    model = Network(form).train(training)
    x, before = torch.randn(64, 4, 5, 5) + 1, {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.random.get_rng_state()
    report = nr.initialise_(model, x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [layer.name for layer in report.layers] == ["first", "twice", "last"] and report.unreached == ["never"]
    assert all(module.training == training for module in model.modules() if not hasattr(module, "kind"))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) != (name.endswith("rho") and "never" not in name), name
    # The same draw of dropout: later layers saw what the earlier ones now give.
    during = [model.once.clone(), model.result.clone()]
    model(x)
    for rows, was in zip((model.once, model.result), during, strict=True):
        torch.testing.assert_close(rows, was, rtol=1e-4, atol=1e-4)
        assert_standard(by_channel(nn.Conv2d(1, 1, 1), rows), centred=True, tolerance=1e-4)


@pytest.mark.parametrize("batch", ["tensor", "tuple", "dict"])
def test_every_form_of_a_batch(batch: str) -> None:
    x = torch.randn(16, 4, 5, 5)
    given: Any = {"tensor": x, "tuple": (x, 2.0), "dict": {"scale": 2.0, "x": x}}[batch]
    assert len(nr.initialise_(Network(), given).layers) == 3


def test_dead_channels_are_left_and_told() -> None:
    layer: Any = parametrised("grouped", "wn")
    with torch.no_grad():
        weight = layer.weight.clone()
        weight[1] = 0
        layer.weight = weight
    bias = layer.bias[1].item()
    x = data("grouped")
    report = nr.initialise_(layer, x)
    assert report.layers[0].left == 1 and "1/6 channels" in str(report)
    assert layer.bias[1].item() == bias and not layer.weight[1].any()
    assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
    alive = torch.arange(6) != 1
    assert_standard(by_channel(layer, layer(x))[alive], centred=True)


def test_a_batch_of_one_or_of_nan_changes_nothing() -> None:
    for x in (torch.randn(1, 5), torch.full((4, 5), float("nan"))):
        layer = parametrised("linear", "bwn")
        before = copy.deepcopy(layer.state_dict())
        assert nr.initialise_(layer, x).layers[0].left == 3
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = parametrised("conv1d", "bwn", dtype=dtype)
    x = data("conv1d").to(dtype)
    nr.initialise_(layer, x)
    rows = by_channel(layer, layer(x))
    assert_standard(rows, centred=True, tolerance={torch.float64: 1e-12, torch.float16: 2e-2}.get(dtype, 1e-1))


def test_an_input_without_batch_dimension() -> None:
    layer = parametrised("conv2d", "wn")
    x = torch.randn(4, 9, 9)
    assert len(nr.initialise_(layer, x).layers[0].std) == 6
    assert_standard(layer(x).detach().double().flatten(1), centred=False)


def test_the_layer_itself_is_standardised_before_other_hooks_see_it() -> None:
    layer, x, seen = parametrised("conv2d", "wn"), data("conv2d"), []
    layer.register_forward_hook(lambda _, __, output: seen.append(output) or 5 * output)
    nr.initialise_(layer, x)
    assert_standard(by_channel(layer, seen[0]), centred=False)


def test_what_can_not_be_initialised() -> None:
    for model in (nn.Linear(2, 2), parametrised("linear", "strict")):
        with pytest.raises(nr.NormRewriteError, match="holds no weight norm with a gain"):
            nr.initialise_(model, torch.randn(2, 5))
    layer = parametrised("linear", "wn")
    with pytest.raises(nr.NormRewriteError, match=r"the model can't run on this batch: RuntimeError: mat1 and mat2"):
        nr.initialise_(layer, torch.randn(2, 7))
    assert not layer._forward_hooks
