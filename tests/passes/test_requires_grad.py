"""requires_grad through every target and back: what keeps its name keeps its flag, and what is folded learns where a part did."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr

SCOPES = ["group:1", "layer", "rms", "instance"]
TARGETS = ["l1", "topk:2", "renorm", "frozen", *SCOPES, "wn", "wn:mean-bn", "bwn", "bwn:strict", "bwn:mean-bn"]
FOLDED = {"0.weight": ("0.weight", "1.weight"), "0.bias": ("0.bias", "1.bias")}
FOLDED |= {"3.weight": ("3.weight",), "3.bias": ("3.bias",), "4.weight": ("4.weight",), "4.bias": ()}


def network(seed: int) -> nn.Sequential:
    """Norms behind a layer, alone, and without parameters; frozen all over for seed 0, at random otherwise."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 1, bias=False),
        nn.BatchNorm2d(2, affine=False),
    )
    draw = random.Random(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(bool(seed) and draw.random() < 0.5)
    return model.eval()


def flags(model: nn.Module) -> dict[str, bool]:
    """A norm behind an offset goes by the name of its place."""
    return {name.replace(".norm.", "."): parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("to", TARGETS)
def test_flags_come_back_by_name(to: str, seed: int) -> None:
    model = network(seed)
    assert flags(nr.revert(nr.convert(model, to=to))) == flags(model)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("to", TARGETS)
def test_flags_come_back_after_training_too(to: str, seed: int) -> None:
    model = network(seed)
    twin = nr.convert(model, to=to)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.01)
    back = flags(nr.revert(twin))
    assert {name: back[name] for name in flags(model)} == flags(model)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("to", ["l1", "renorm", *SCOPES])
def test_what_keeps_its_name_keeps_its_flag(to: str, seed: int) -> None:
    model = network(seed)
    twin = flags(nr.convert(model, to=to))
    assert {name: twin[name] for name in flags(model)} == flags(model)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_folded_learns_where_a_part_did(seed: int) -> None:
    before = flags(network(seed))
    expected = {name: any(before[part] for part in parts) for name, parts in FOLDED.items()}
    assert flags(nr.convert(network(seed), to="none")) == expected
    twin = flags(nr.convert(network(seed), to="wn"))
    lengths = {name: value for name, value in twin.items() if name.startswith("0.parametrizations")}
    assert len(lengths) == 2 and set(lengths.values()) == {expected["0.weight"]}
    assert twin["0.bias"] == expected["0.bias"]


def test_the_bias_that_stays_with_the_means_is_its_own() -> None:
    model = network(0)
    model[1].bias.requires_grad_()  # type: ignore[union-attr,operator]
    twin = flags(nr.convert(model, to="wn:mean-bn"))
    assert twin["1.bias"] and not twin["0.bias"]


@pytest.mark.parametrize("to", ["none", "wn", "bwn", "wn:mean-bn"])
@pytest.mark.parametrize("tensor", ["running_var", "running_mean", "weight", "bias"])
def test_what_is_not_finite_is_not_folded(to: str, tensor: str) -> None:
    model = network(1)
    getattr(model[1], tensor).data[0] = torch.nan
    left = {choice.site.name: choice.reason for choice in nr.plan(model, to=to).kept}
    assert list(left) == ["1"] and "finite" in str(left["1"])


def test_means_without_a_scale_are_folded() -> None:
    model, x = network(1), torch.randn(2, 3, 8, 8)
    folded = nr.convert(nr.convert(model, to="wn:mean-bn"), to="none")
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    flat, row = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).eval(), torch.randn(4, 5)
    twin = nr.convert(flat, to="wn:mean-bn", example_inputs=(row,))
    torch.testing.assert_close(nr.convert(twin, to="none", example_inputs=(row,))(row), flat(row), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", [*TARGETS, "none"])
def test_a_default_device_changes_nothing(to: str) -> None:
    model, x = network(1), torch.randn(2, 3, 8, 8)
    with torch.device("meta"):
        twin: Any = nr.convert(model, to=to)
        back: Any = model if to == "none" else nr.revert(twin)
    expected: Tensor = nr.convert(model, to=to)(x)
    assert torch.equal(twin(x), expected) and torch.equal(back(x), model(x))
