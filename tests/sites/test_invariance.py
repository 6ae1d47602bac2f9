"""Which weights are scale-invariant: by the graph, and by scaling each and looking at the output in training."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.nn.batch import FrozenBatchNorm
from normrewrite.sites.invariance import param_groups, scale_invariant


def before(norm: nn.Module, layer: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(layer or nn.Conv2d(4, 6, 3, bias=False), norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


WITH_BIAS = nn.Conv2d(4, 6, 3)
FOUND: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "batch": (lambda: before(nn.BatchNorm2d(6), WITH_BIAS), 6),
    "batch l1": (lambda: before(nr.nn.BatchNorm2d(6, metric="l1"), WITH_BIAS), 6),
    "batch topk": (lambda: before(nr.nn.BatchNorm2d(6, metric="topk:3")), 6),
    "synchronised": (lambda: before(nr.nn.BatchNorm2d(6, synchronised=True)), 6),
    "transposed": (lambda: before(nn.BatchNorm2d(6), nn.ConvTranspose2d(4, 6, 3, groups=2)), 6),
    "grouped": (lambda: before(nn.BatchNorm2d(6), nn.Conv2d(4, 6, 3, groups=2)), 6),
    "instance": (lambda: before(nn.InstanceNorm2d(6), WITH_BIAS), 6),
    "instance range": (lambda: before(nr.nn.InstanceNorm2d(6, metric="range")), 6),
    "group": (lambda: before(nn.GroupNorm(2, 6)), 2),
    "group l1": (lambda: before(nr.nn.GroupNorm(2, 6, metric="l1")), 2),
    "group transposed": (lambda: before(nn.GroupNorm(3, 6), nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)), 3),
    "layer": (lambda: before(nn.LayerNorm([6, 4, 4])), 1),
    "rms": (lambda: before(nn.RMSNorm([6, 4, 4])), 1),
    "both": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), Fork(nn.GroupNorm(2, 6), nn.GroupNorm(3, 6))), 1),
}


class Fork(nn.Module):
    """Two norms of one input."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Any:
        return self.a(x) + self.b(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return self.norm(x) + x


class Reads(Twice):
    def forward(self, x: Tensor) -> Any:
        return self.norm(self.conv(x)) + self.conv.weight.sum()


class Branches(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) if x.sum() > 0 else x


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no norm": (lambda: before(nn.ReLU()), "goes into 1, no norm"),
    "output": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3)), "goes into output, no norm"),
    "renorm": (lambda: before(nr.nn.BatchRenorm(6)), "goes into 1, which measures by fixed statistics"),
    "frozen": (lambda: before(FrozenBatchNorm(6)), "goes into 1, which measures by fixed statistics"),
    "mean only": (lambda: before(nr.nn.MeanOnlyBatchNorm(6)), "goes into 1, no norm"),
    "bias": (lambda: before(nn.GroupNorm(2, 6), WITH_BIAS), "has a bias, which 1 doesn't subtract"),
    "rms bias": (lambda: before(nn.RMSNorm([6, 4, 4]), WITH_BIAS), "has a bias, which 1 doesn't subtract"),
    "positions": (lambda: before(nn.BatchNorm1d(7), nn.Linear(4, 6)), "goes into 1, whose channels are not its own"),
    "residual": (Twice, "goes into add, no norm"),
    "reads": (Reads, "its weight is read elsewhere too"),
}


def scaled(weight: Any, x: Tensor, model: nn.Module) -> Tensor:
    """The output in training once each block of the weight is scaled by a factor of its own."""
    factors = torch.linspace(0.5, 3, weight.blocks, dtype=torch.float64)
    with torch.no_grad():
        weight.parameter.mul_(weight.expanded(factors))
    y: Tensor = model(x)
    return y


@pytest.mark.parametrize("name", FOUND)
def test_found_weights_are_scale_invariant_block_by_block(name: str) -> None:
    make, blocks = FOUND[name]
    model, x = copy.deepcopy(make()), torch.randn(5, 4, 6, 6, dtype=torch.float64)
    if "transposed" in name:
        x = x[..., :2, :2]
    model.double()(x)
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-13
    (weight,) = scale_invariant(model).weights
    assert (weight.name, weight.blocks) == ("0.weight", blocks)
    wanted, norms = model(x), weight.norms()
    torch.testing.assert_close(scaled(weight, x, model), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weight.norms(), norms * torch.linspace(0.5, 3, blocks, dtype=torch.float64))
    assert torch.isclose(weight.norms().square().sum().sqrt(), weight.parameter.detach().norm())


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_has_its_reason(name: str) -> None:
    make, reason = LEFT[name]
    found = scale_invariant(make())
    assert not found.weights and reason in found.left.values() and not found.untraceable


def test_shared_and_parametrised_weights_are_left() -> None:
    layers = [nn.Conv2d(4, 4, 3, bias=False) for _ in range(2)]
    layers[1].weight = layers[0].weight
    model = nn.Sequential(layers[0], nn.BatchNorm2d(4), layers[1], nn.BatchNorm2d(4))
    assert set(scale_invariant(model).left.values()) == {"shares its weight"}
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(layers[0]), nn.BatchNorm2d(4))
    assert not scale_invariant(model).weights


def test_a_layer_that_is_called_twice() -> None:
    conv = nn.Conv2d(4, 4, 3, bias=False)
    assert len(scale_invariant(nn.Sequential(conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4))).weights) == 1
    assert not scale_invariant(nn.Sequential(conv, nn.BatchNorm2d(4), conv)).weights


def test_groups_tell_them_apart_and_hold_every_parameter_once() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(6, 3))
    invariant, rest = param_groups(model, weight_decay=0.0, rest=5e-4)
    assert [id(p) for p in invariant["params"]] == [id(model[0].weight)]
    assert (invariant["weight_decay"], rest["weight_decay"]) == (0.0, 5e-4)
    assert (invariant["scale_invariant"], rest["scale_invariant"]) == (True, False)
    held = [id(p) for group in (invariant, rest) for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert param_groups(model, 1e-4)[1]["weight_decay"] == 1e-4
    for cls in (torch.optim.SGD, torch.optim.AdamW):
        assert len(cls(param_groups(model), lr=0.1).param_groups) == 2


def test_a_model_that_cant_be_traced_has_none_and_says_so() -> None:
    model = Branches(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    found = scale_invariant(model)
    assert not found.weights and "torch.fx can't trace Branches" in found.untraceable
    assert found.left == {"0": found.untraceable}
    (rest,) = param_groups(model, weight_decay=5e-4)
    assert not rest["scale_invariant"] and len(rest["params"]) == 4
