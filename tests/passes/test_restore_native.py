"""`convert(to="l2")` of twins whose norms went into weights: the original again, measured layer and norm together."""

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.nn.weights import gain_of

FORMS = ("bwn", "wn", "bwn:mean-bn", "wn:mean-bn", "wn:l1", "bwn:strict")


def trained_network(bias: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model.train()(torch.randn(9, 3, 8, 8))
    return model.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("to", FORMS)
def test_the_originals_bits_come_back(to: str, bias: bool) -> None:
    model = trained_network(bias)
    back, report = nr.plan(nr.convert(model, to=to), to="l2").apply()
    assert report.ok
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    if to != "bwn:strict":
        assert report.sites[1].difference is not None and report.sites[1].difference < 1e-5
        assert report.sites[0].difference is None  # told by the norm that it took in


@pytest.mark.parametrize("to", ["bwn", "wn", "bwn:mean-bn"])
def test_what_was_trained_computes_the_same(to: str) -> None:
    twin = nr.convert(trained_network(bias=False), to=to)
    with torch.no_grad():
        gain = gain_of(twin[0])  # type: ignore[index]
        assert gain is not None
        gain.mul_(1.5)
    back, report = nr.plan(twin, to="l2").apply()
    x = torch.randn(4, 3, 8, 8)
    assert report.ok and nr.verify(twin, back, x).ok
    with torch.no_grad():
        back[0].weight.mul_(1.01)  # type: ignore[index]
    assert not nr.verify(twin, back, x).ok
