"""Modules out of pickles: every layer of torch and of ours is sound, and what no class would set is told."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.files import soundness
from normrewrite.files.soundness import check, fault
from tests.forms import FORMS, FROM_OURS


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))


@pytest.mark.parametrize("to", sorted(set(FORMS) - FROM_OURS))
def test_twins_are_sound(to: str) -> None:
    assert check(nr.convert(network().eval(), to=to)) is None


NETWORKS = (network(), nn.TransformerEncoderLayer(8, 2, 8), nn.LSTM(3, 4), nn.Embedding(3, 4), nn.LayerNorm(4))


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: type(model).__name__)
def test_networks_of_torch_are_sound(model: nn.Module) -> None:
    assert check(model) is None


SPOILED: list[tuple[str, Any, str]] = [
    ("eps", "x", "1 has eps of type str"),
    ("momentum", [], "1 has momentum of type list"),
    ("training", 3.0, "1 has training of type float"),
    ("forward", {}, "1 has forward of type dict"),
    ("_buffers", None, "1 has no _buffers"),
    ("_parameters", {"weight": 1}, "1 has no _parameters"),
    ("_modules", {0: nn.ReLU()}, "1 has no _modules"),
    ("_modules", {"": nn.ReLU()}, "1 has a part without a name"),
    ("_forward_hooks", {0: "no function"}, "1 has no _forward_hooks"),
    ("weight", torch.zeros(4), "1 has two things called weight"),
]


@pytest.mark.parametrize(
    ("name", "value", "said"), SPOILED, ids=[f"{name} {value!r:.20}" for name, value, _ in SPOILED]
)
def test_what_no_class_sets_is_told(name: str, value: Any, said: str) -> None:
    model = copy.deepcopy(network())
    model[1].__dict__[name] = value  # type: ignore[index]
    assert str(check(model)).startswith(said)


def test_another_class_and_no_end_are_told() -> None:
    norm = nn.ReLU()
    object.__setattr__(norm, "__class__", nn.BatchNorm2d)
    assert str(fault(norm)).startswith("has no ")
    ring = nn.Sequential(nn.ReLU())
    inner: nn.Module = nn.Sequential()
    for _ in range(300):
        inner = nn.Sequential(inner)
    ring.append(inner)
    assert "nested without end" in str(check(ring))


@pytest.mark.parametrize("name", ["type", "half", "cuda"])
def test_a_network_may_keep_something_under_a_name_that_nobody_calls(name: str) -> None:
    """YOLO's modules keep their `type`, a text."""
    model = network()
    vars(model[1])[name] = "models.block.Norm"
    model.add_module("last", nn.Identity())
    model._modules[name] = model._modules.pop("last")  # as a ModuleDict's key
    assert check(model) is None


@pytest.mark.parametrize("name", ['c"', "c'", "c\\", "c\r", "c\x1b[2J", "c\u2028", "\ud800"])
@pytest.mark.parametrize("table", ["_modules", "_parameters", "_buffers", "__dict__"])
def test_names_that_could_be_code_are_told(name: str, table: str) -> None:
    model = network()
    getattr(model[1], table)[name] = nn.ReLU() if table == "_modules" else nn.Parameter(torch.ones(1))
    assert "1 has a part called" in str(check(model)) and "could be read as code" in str(check(model))


def test_what_is_nested_without_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundness, "_HELD", 10_000)
    nest: list[object] = []
    shared: nn.Module = nn.ReLU()
    for _ in range(40):
        nest, shared = [nest, nest], nn.Sequential(shared, shared)
    model = network()
    vars(model[0])["nest"] = {"a": nest}
    assert check(model) == "Sequential has attributes nested without end"
    assert "nested without end" in str(check(shared))
