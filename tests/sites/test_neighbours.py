"""Neighbours: the layer that feeds a norm alone, or the reason why there is none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite import sites
from normrewrite.sites.neighbours import attach, is_layer
from normrewrite.tolerances import SAME_FUNCTION, worst
from tests.conftest import randomise
from tests.forms import Fused, PreActivation
from tests.sites.test_kinds import NormAct


def beside(model: nn.Module, *inputs: Tensor) -> dict[str, tuple[str | None, str]]:
    """By site: the layer before it, and why there is none."""
    found = attach(model, sites.find(model), inputs or None)
    return {site.name: (site.before and site.before.name, site.alone) for site in found}


class Of(nn.Module):
    """A convolution, a norm, and a forward between them."""

    def __init__(self, forward: Callable[["Of", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.do = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.do(self, x)


def test_the_layer_in_front() -> None:
    assert beside(Of(lambda m, x: m.norm(m.conv(x)))) == {"norm": ("conv", "")}


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.norm(x), "stands behind x, no convolution"),
        (lambda m, x: m.norm(m.conv(x).relu()), "stands behind relu, no convolution"),
        (lambda m, x: m.norm(m.conv(x)) + m.norm(x), "is used at several places"),
        (lambda m, x: m.norm(m.conv(m.conv(x))), "conv is called at several places"),
        (lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)), "the output of conv is read elsewhere too"),
        (lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum(), "a tensor of conv is read elsewhere too"),
        (lambda m, x: m.norm(m.conv(x)) if x.sum() > 0 else x, "torch.fx can't trace Of"),
    ],
)
def test_reasons(forward: Callable[[Of, Tensor], Tensor], reason: str) -> None:
    before, alone = beside(Of(forward))["norm"]
    assert before is None and reason in alone


@pytest.mark.parametrize("which", ["norm", "conv"])
def test_hooks_are_left_alone(which: str) -> None:
    model = Of(lambda m, x: m.norm(m.conv(x)))
    model.get_submodule(which).register_forward_hook(lambda *_: None)
    assert beside(model)["norm"] == (None, "has hooks" if which == "norm" else "conv has hooks")


def test_parametrised_and_tied_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    nn.utils.parametrizations.weight_norm(model[0])
    assert beside(model) == {"1": (None, "0 is parametrised"), "3": ("2", "")}
    tied = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    tied[2].weight = tied[0].weight  # type: ignore[union-attr]
    assert beside(tied)["1"] == (None, "0 shares its weight with another layer")


def test_linear_layers_need_the_rank() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert "give an example input" in beside(model)["1"][1]
    assert beside(model, torch.randn(2, 3))["1"] == ("0", "")
    assert beside(model, torch.randn(2, 4, 3))["1"][0] is None


def test_norms_with_a_class_of_their_own_are_one_place() -> None:
    """A trace goes into every module that is not torch's; the norm of a fused class would not be found in it."""
    assert beside(Fused()) == {
        "body.1": ("body.0", ""),
        "body.3": (None, "stands behind body.2, no convolution or linear layer"),
    }


@pytest.mark.parametrize("to", ["wn", "bwn", "wn:mean-bn", "none"])
def test_a_fused_norm_is_folded_and_its_activation_stays(to: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8))).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert nr.plan(model, to).choices[0].note == "folded into 0"
    assert worst(nr.convert(model, to)(x), model(x)) <= 100 * SAME_FUNCTION[torch.float64]


def test_every_site_of_a_pre_activation_network_is_alone() -> None:
    found = beside(PreActivation())
    assert {before for before, _ in found.values()} == {None} and all(alone for _, alone in found.values())


def test_looking_touches_nothing() -> None:
    model = Of(lambda m, x: m.norm(m.conv(x))).train()
    before = dict(vars(model.norm))
    beside(model, torch.randn(2, 3, 4, 4))
    assert model.training and model.norm.training and dict(vars(model.norm)) == before
    assert model.norm.num_batches_tracked == 0


def test_layers_are_torchs_own() -> None:
    class Mine(nn.Conv2d):
        pass

    assert is_layer(nn.ConvTranspose1d(2, 2, 1)) and not is_layer(Mine(2, 2, 1)) and not is_layer(nn.ReLU())
