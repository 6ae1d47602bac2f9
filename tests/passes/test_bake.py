"""bake: plain layers with the very bits that were computed, and nothing else touched."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

import normrewrite as nr
from normrewrite.nn.weights import remember
from tests.nn.test_weights import FORMS, LAYERS, learn_anything, parametrised


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_root_keeps_its_bits(kind: str, form: str, dtype: torch.dtype) -> None:
    layer: Any = learn_anything(parametrised(kind, form, dtype=dtype))
    plain: Any = nr.bake(layer)
    fresh = LAYERS[kind][0]()
    assert type(plain) is type(fresh) and list(plain.state_dict()) == list(fresh.state_dict())
    assert torch.equal(plain.weight, layer.weight) and plain.weight.dtype == dtype
    assert plain.weight.is_leaf and plain.weight.requires_grad
    assert parametrize.is_parametrized(layer), "the copy's class is shared with the original"
    assert torch.equal(layer.weight, copy.deepcopy(layer).weight)


class Twice(nn.Module):
    """A layer under two names, one with hooks, a plain one, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrised("linear", "bwn", origin=remember(nn.Linear(5, 3)))
        self.alias = self.first
        self.last = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), parametrised("linear", "wn"))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x)) + self.alias(x)
        return y


def test_a_model_in_place() -> None:
    model, x = Twice().eval(), torch.randn(2, 5)
    layers = [model.first, model.last[0], model.last[1], model.last[2]]
    calls: list[int] = []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    untouched = model.last[0].weight
    bias, wanted = model.first.bias, model(x)
    assert nr.bake_(model) is model
    assert [model.first, *model.last] == layers and model.alias is model.first and model.last[0].weight is untouched
    assert type(model.first) is nn.Linear and model.first.bias is bias and not model.first.training
    assert torch.equal(model(x), wanted) and len(calls) == 4
    assert set(model.state_dict()) >= {"first.weight", "last.2.bias"} and len(model.state_dict()) == 13
    torch.save(model.last, io.BytesIO())  # a parametrised layer can't be pickled


def test_a_graph_module() -> None:
    traced = fx.symbolic_trace(Twice().eval())
    x = torch.randn(2, 5)
    assert torch.equal(nr.bake(traced)(x), traced(x))


def test_frozen_stays_frozen_and_no_grad_does_not_matter() -> None:
    layer = parametrised("linear", "bwn").requires_grad_(False)
    assert not nr.bake(layer).weight.requires_grad  # type: ignore[union-attr]
    with torch.no_grad():
        plain: Any = nr.bake(parametrised("linear", "bwn"))
    assert isinstance(plain.weight, nn.Parameter) and plain.weight.requires_grad


def test_other_parametrisations_stay() -> None:
    layer: Any = parametrised("linear", "wn")
    parametrize.register_parametrization(layer, "bias", nn.ReLU())
    plain: Any = nr.bake(layer)
    assert set(plain.parametrizations) == {"bias"} and set(layer.parametrizations) == {"bias", "weight"}
    assert isinstance(plain.weight, nn.Parameter)
    assert torch.equal(plain.bias, layer.bias) and torch.equal(layer.weight, plain.weight)
    assert isinstance(copy.deepcopy(plain), nn.Linear)


def test_nothing_to_bake() -> None:
    theirs = parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(nr.NormRewriteError, match=r"ParametrizedLinear holds no weight norm .* nothing to bake"):
        nr.bake(theirs)
