"""StandIn: what stands in a norm's place, then the norm's own tail."""

import copy

import pytest
import torch
from torch import fx, nn

from normrewrite.nn import StandIn


@pytest.mark.parametrize("norm", [None, nn.GroupNorm(2, 4)], ids=["nothing", "group norm"])
def test_the_norm_then_its_tail_in_order(norm: nn.Module | None) -> None:
    tail = {"scale": nn.Hardtanh(-0.5, 0.5), "act": nn.ReLU()}
    place, x = StandIn(norm, tail), torch.randn(3, 4, 5)
    y = x if norm is None else norm(x)
    assert torch.equal(place(x), y.clamp(0, 0.5)) and place.tail == ("scale", "act")
    assert torch.equal(copy.deepcopy(place)(x), place(x))
    assert torch.equal(fx.symbolic_trace(place)(x), place(x))


def test_nothing_is_the_identity() -> None:
    x = torch.randn(3, 4)
    assert StandIn(None, {})(x) is x


def test_the_layer_it_belongs_to_is_not_registered_twice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), StandIn(None, {}))
    model[1].layer = (model[0],)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    other = copy.deepcopy(model)
    assert other[1].layer[0] is other[0] and other[0] is not model[0]
