"""NormaliseWeights: norms taken in by the weights in front, affines where none can, the way back of each."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite.nn import BoundedWeightNorm, ChannelAffine, MeanOnlyBatchNorm, StandIn
from normrewrite.nn.weights import weight_norm_of
from normrewrite.passes.reversion import reverted
from normrewrite.tolerances import SAME_NETWORK, worst
from tests.conftest import randomise

EXACT = SAME_NETWORK[torch.float64]


def pair(affine: bool = True, bias: bool = False) -> Any:
    norm = nn.BatchNorm2d(4, affine=affine)
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), norm)).double().eval()


def images() -> Tensor:
    return torch.randn(5, 3, 6, 6, dtype=torch.float64)


def test_what_stands_where() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    twin: Any = nr.convert(randomise(model), "bwn")
    assert type(twin[1]) is StandIn and type(twin[3]) is ChannelAffine
    assert all(isinstance(weight_norm_of(twin[i]), BoundedWeightNorm) for i in (0, 4))
    assert type(nr.convert(model, "wn:mean-bn").get_submodule("1")) is MeanOnlyBatchNorm


def test_statistics_that_were_switched_off_stay_so() -> None:
    model = pair()
    model[1].track_running_stats = False
    twin = nr.convert(model, "wn:mean-bn").train()
    before = twin[1].running_mean.clone()
    twin(images())
    assert torch.equal(twin[1].running_mean, before) and not twin[1].num_batches_tracked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("to", ["wn", "bwn"])
def test_the_folded_weight(to: str, bias: bool) -> None:
    """w' = weight * gamma/sigma by channel, the bias takes the rest."""
    model = pair(bias=bias)
    conv, norm = model
    a = norm.weight / (norm.running_var + norm.eps).sqrt()
    twin: Any = nr.convert(model, to)
    torch.testing.assert_close(twin[0].weight, conv.weight * a.view(-1, 1, 1, 1))
    offset = norm.bias - a * norm.running_mean + (a * conv.bias if bias else 0)
    torch.testing.assert_close(twin[0].bias, offset)
    norms = conv.weight.mul(a.view(-1, 1, 1, 1)).flatten(1).norm(dim=1)
    torch.testing.assert_close(
        weight_norm_of(twin[0]).rho if to == "bwn" else norms, norms.square().mean().sqrt() if to == "bwn" else norms
    )


@pytest.mark.parametrize("affine", [True, False])
def test_mean_only_trains_as_batch_norm_with_its_running_scale(affine: bool) -> None:
    """In training: the batch's mean goes, the scale is that of the weights."""
    model, x = pair(affine), images()
    twin = nr.convert(model, "wn:mean-bn").train()
    y = model[0](x)
    norm = model[1]
    centred = y - y.mean((0, 2, 3), keepdim=True)
    wanted = F.batch_norm(centred, 0 * norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    torch.testing.assert_close(twin(x), wanted)


def test_the_strict_form_keeps_directions_alone() -> None:
    model = pair()
    twin: Any = nr.convert(model, "bwn:strict")
    lengths = twin[0].weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(4))
    assert (
        nr.plan(model, "bwn:strict").choices[0].note
        == "folded into 0; not exact: one norm for all channels of the layer"
    )


def _trained(twin: Any, which: str) -> Any:
    """Only that part of it has moved."""
    if which == "layer":
        with torch.no_grad():
            twin[0].parametrizations.weight.original1.mul_(torch.linspace(1, 2, 4, dtype=torch.float64))
    elif which == "bias":
        with torch.no_grad():
            twin[1].bias.add_(0.5)
    else:
        twin.train()(images())
    return twin.eval()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("which", ["layer", "bias", "statistics"])
def test_mean_only_goes_back_to_the_same_function_whichever_half_has_moved(which: str, affine: bool) -> None:
    """Layer and norm share the scale between them: what one gives back the other must not give again."""
    model, x = pair(affine), images()
    twin = _trained(nr.convert(model, "wn:mean-bn"), which)
    assert worst(twin(x), model(x)) > 1e-3
    back, _, trained = reverted(copy.deepcopy(twin))
    assert worst(back(x), twin(x)) <= EXACT and "1" in trained
    assert type(back[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("form", ["wn", "bwn:mean-bn", "none"])
def test_a_linear_layer_that_took_its_norm_in_comes_back_from_a_file(form: str, tmp_path: Any) -> None:
    """Only example inputs tell that it may, and a file holds none."""

    def make() -> nn.Module:
        return randomise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))).eval()

    x = torch.randn(5, 3)
    twin = nr.convert(make(), form, example_inputs=[x])
    nr.save(twin, tmp_path / "twin.pt")
    assert torch.equal(nr.load(tmp_path / "twin.pt", arch=make)(x), twin(x))
    record = torch.load(tmp_path / "twin.pt", weights_only=True)["normrewrite"]
    assert record["sites"][0]["layer"] == "0"
    other = randomise(nn.Sequential(nn.Identity(), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    with pytest.raises(
        nr.NormRewriteError, match=r"its manifest folds 1 into '0', and the architecture has no such layer"
    ):
        nr.load(tmp_path / "twin.pt", arch=other)


def test_convolutions_without_a_norm_are_measured_too() -> None:
    report = nr.plan(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), "wn").apply()[
        1
    ]
    assert not report.live and all(site.difference is not None for site in report.rewritten)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_cast_is_no_training(dtype: torch.dtype) -> None:
    model = pair().float()
    back, _, trained = reverted(nr.convert(model, "bwn").to(dtype))
    assert not trained and all(
        torch.equal(value, model.to(dtype).state_dict()[name]) for name, value in back.state_dict().items()
    )
