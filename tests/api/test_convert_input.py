"""Networks that can't be copied or looked into, and arguments of the wrong kind: told in words, or done."""

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normrewrite as nr


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()


class Stubborn(nn.Sequential):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError("there is one of me")


# --- copies --------------------------------------------------------------------------------------------------------------


def test_what_a_network_computed_is_copied_without_its_graph() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    model.seen, model.maps = model(x), {"a": [model(x)]}  # type: ignore[assignment]
    twin: Any = nr.convert(model)
    assert torch.equal(twin.seen, model.seen) and not twin.seen.requires_grad  # type: ignore[arg-type]
    assert twin.maps["a"][0].is_leaf and model.seen.grad_fn is not None
    twin.seen = twin(x)
    assert isinstance(nr.revert(twin), nn.Module)
    assert not nr.calibrate(twin, [x])[0].seen.requires_grad  # type: ignore[index,union-attr]


def test_two_names_of_a_computed_tensor_stay_one() -> None:
    model: Any = network()
    model.first = model.second = model(torch.randn(2, 3, 8, 8))
    twin: Any = nr.convert(model)
    assert twin.first is twin.second and twin.first is not model.first


@pytest.mark.parametrize("held", [threading.Lock, lambda: (i for i in range(3)), lambda: sys.__stdout__])
def test_an_attribute_that_cannot_be_copied_is_named(held: Callable[[], Any]) -> None:
    model = nn.Sequential(network())
    model[0].held = held()
    with pytest.raises(nr.NormRewriteError, match=r"^0\.held can't be copied .*convert_"):
        nr.convert(model)
    assert isinstance(nr.convert_(model)[0][1], nr.nn.BatchNorm2d)  # type: ignore[index]


def test_a_class_that_will_not_be_copied_is_named() -> None:
    model = nn.Sequential(Stubborn(*network()))
    with pytest.raises(
        nr.NormRewriteError, match=r"^0 \(Stubborn\) can't be copied \(RuntimeError: there is one of me\)"
    ):
        nr.convert(model)
    assert isinstance(nr.convert_(model)[0][1], nr.nn.BatchNorm2d)  # type: ignore[index]


# --- TorchScript ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["l1", "none", "wn", "layer"])
def test_compiled_parts_without_a_norm_stay(to: str) -> None:
    parts: list[Any] = [torch.jit.script(part) for part in (nn.ReLU(), nn.Conv2d(8, 8, 1))]
    model, x = nn.Sequential(*network(), *parts).eval(), torch.randn(2, 3, 8, 8)
    twin = nr.convert(model, to=to)
    if to != "layer":
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)
    if to != "none":
        assert torch.equal(nr.revert(twin)(x), model(x))


def test_compiled_parts_with_a_norm_are_left_by_name() -> None:
    model = nn.Sequential(network(), torch.jit.script(network()), torch.jit.script(nn.BatchNorm2d(8).eval()))
    plan = nr.plan(model)
    assert [choice.site.name for choice in plan.rewritten] == ["0.1"]
    assert {choice.site.name for choice in plan.kept if "TorchScript" in str(choice.reason)} == {"1", "2"}


def test_optimizers_follow_compiled_parts_too() -> None:
    model = nn.Sequential(*network(), torch.jit.script(nn.Conv2d(8, 8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    twin = nr.convert(model, optimizers=[optimizer])
    stepped = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert stepped == {id(parameter) for parameter in twin.parameters()}


# --- arguments -----------------------------------------------------------------------------------------------------------

WRONG: list[dict[str, Any]] = [
    *({name: value} for name in ("include", "exclude", "scope") for value in (3, None, [3], b"x")),
    *({"rules": rules} for rules in (3, "1", [("1",)], [None], ["1"], {3: "l1"}, {"1": 3}, {"1": []}, ["ab"])),
    *({"to": to} for to in (None, 3, ["l1"])),
    *({"gain": gain} for gain in (3, [])),
    *({"optimizers": found} for found in (3, [3], None)),
    *({"example_inputs": inputs} for inputs in (3, torch.zeros(1, 3, 8, 8), ["a"], [None])),
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_wrong_arguments_are_told_in_words(options: dict[str, Any]) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    for function in (nr.convert, nr.convert_):
        with pytest.raises(nr.NormRewriteError):
            function(model, **options)
    assert model.state_dict().keys() == before.keys() and type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    "model", [None, 3, "x", {}, torch.jit.script(nn.ReLU())], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize(
    "function",
    [nr.convert, nr.convert_, nr.plan, nr.revert, nr.revert_, nr.bake, nr.bake_, nr.param_groups, nr.scale_invariant],
)
def test_what_is_no_model_is_told_in_words(function: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(nr.NormRewriteError, match=r"needed is a torch\.nn\.Module"):
        function(model)


@pytest.mark.parametrize("size", [0, -1, 1.5, "a", None])
def test_a_batch_size_is_a_whole_number(size: Any) -> None:
    with pytest.raises(nr.NormRewriteError, match="batch size"):
        nr.calibrate(nr.convert(network()), torch.randn(4, 3, 8, 8), batch_size=size)


def test_other_wrong_kinds() -> None:
    for call in (
        lambda: nr.update_norms(nr.convert(network()), 3),  # type: ignore[arg-type]
        lambda: nr.load(3),  # type: ignore[arg-type]
        lambda: nr.verify(network(), 3, torch.zeros(1, 3, 8, 8)),  # type: ignore[arg-type]
        lambda: nr.nn.BatchNorm2d(8, metric=3),  # type: ignore[arg-type]
    ):
        with pytest.raises(nr.NormRewriteError, match="needed is"):
            call()
