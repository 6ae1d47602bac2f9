"""Freeze: nothing moves, in training too."""

import copy

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite import sites
from normrewrite.nn.batch import FrozenBatchNorm
from normrewrite.passes import Freeze
from tests.conftest import randomise
from tests.sites.test_kinds import Frozen


@pytest.mark.parametrize("affine", [True, False])
def test_training_computes_what_eval_does_and_nothing_is_learned(affine: bool) -> None:
    norm = randomise(nn.BatchNorm2d(4, affine=affine)).eval()
    twin, x = nr.convert(norm, "frozen").train(), torch.randn(3, 4, 5, 5, requires_grad=True)
    before = copy.deepcopy(twin.state_dict())
    torch.testing.assert_close(twin(x), norm(x), rtol=1e-5, atol=1e-5)
    twin(x).sum().backward()
    assert isinstance(twin, FrozenBatchNorm) and not list(twin.parameters()) and x.grad is not None
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_its_tensors_are_its_own() -> None:
    """The original goes on training; the frozen copy does not follow."""
    norm = randomise(nn.BatchNorm2d(4))
    new = Freeze().rewrite(sites.find(norm)[0])
    with torch.no_grad():
        norm.weight.add_(1), norm.running_mean.add_(1)
    assert not torch.equal(new.weight, norm.weight) and not torch.equal(new.running_mean, norm.running_mean)  # type: ignore[arg-type]


def test_parameters_come_back_as_parameters() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    back = nr.revert(nr.convert(model, "frozen"))
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(parameter.requires_grad for parameter in back.parameters())


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Frozen(4), "is frozen"),
        (nn.BatchNorm2d(4, track_running_stats=False), "has no running statistics"),
        (nr.nn.BatchNorm2d(4, metric="linf"), "is linf already"),
    ],
)
def test_refusals(norm: nn.Module, reason: str) -> None:
    assert reason in str(Freeze().why_not(sites.find(norm)[0]))
