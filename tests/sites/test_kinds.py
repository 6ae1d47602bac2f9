"""Norms that are no plain torch.nn class: taken over whole where they can be told, refused by name where not."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite.nn.batch import FrozenBatchNorm
from normrewrite.passes import FoldAffine
from normrewrite.sites.kinds import Kind, recognise
from tests.conftest import TARGETS, randomise


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d: four buffers and an eps attribute."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.1, 3)):
            self.register_buffer(name, torch.empty(width).uniform_(low, high))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class FrozenWithItsOwnEps(Frozen):
    """As in DETR and its copies: the eps stands in forward alone."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.eps = 1e-3
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        scale = weight * (var + 1e-3).rsqrt()
        return x * scale + (bias - mean * scale)


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: its own forward, dropout and activation behind the norm."""

    def __init__(self, width: int, drop: float = 0.0) -> None:
        super().__init__(width)
        self.drop = nn.Dropout(drop) if drop else nn.Identity()
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        live = self.training or self.running_mean is None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = 0.0 if self.momentum is None else self.momentum
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, live, momentum, self.eps)
        return self.act(self.drop(x))


class Handmade(nn.Module):
    """A batch norm by another name, on F.batch_norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.momentum, self.epsilon = 0.2, 1e-4
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.rand(width))
        self.register_buffer("running_mean", torch.rand(width))
        self.register_buffer("running_var", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.2, 1e-4)


class ReluInside(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OtherUpdate(nn.BatchNorm2d):
    """The same outputs, but its running statistics follow another rule."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if self.training and self.running_var is not None:
            self.running_var.mul_(1.5)
        return output


class TailOutOfOrder(NormAct):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop = nn.Hardtanh(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.act(nn.BatchNorm2d.forward(self, x)))


ACCEPTED: list[tuple[nn.Module, type[nn.Module]]] = [
    (nn.SyncBatchNorm(6), nr.nn.BatchNorm),
    (Frozen(6), FrozenBatchNorm),
    (Frozen(6, eps=1e-6), FrozenBatchNorm),
    (FrozenWithItsOwnEps(6), FrozenBatchNorm),
    (NormAct(6), nr.nn.BatchNorm),
    (NormAct(6, drop=0.3), nr.nn.BatchNorm),
    (Handmade(6), nr.nn.BatchNorm),
]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(("norm", "cls"), ACCEPTED, ids=lambda value: type(value).__name__)
def test_taken_over_whole(norm: nn.Module, cls: type[nn.Module], to: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 6, 3), copy.deepcopy(norm), nn.Conv2d(6, 3, 3, padding=1))).eval()
    twin, report = nr.plan(model, to).apply()
    assert type(twin[1]) is cls and report.ok
    x = torch.randn(4, 3, 9, 9)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
    folded = FoldAffine()(torch.fx.symbolic_trace(twin)).graph_module
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    back = nr.revert(twin)
    assert type(back[1]) is type(norm) and list(back.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(back(x), model(x))
    assert {name for name, _ in back.named_parameters()} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "norm", [ReluInside(6), OtherUpdate(6), TailOutOfOrder(6)], ids=lambda norm: type(norm).__name__
)
def test_refused_by_name(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm)
    with pytest.raises(nr.NormRewriteError, match=f"1: {type(norm).__name__} overrides forward"):
        nr.convert(model)


def test_frozen_stays_frozen_in_training() -> None:
    model, x = Frozen(6), torch.randn(4, 6, 5, 5)
    twin = nr.convert(model).train()
    before = copy.deepcopy(twin.state_dict())
    torch.testing.assert_close(twin(x), model(x), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(before[name], value) for name, value in twin.state_dict().items())
    assert not list(twin.parameters())


def test_the_activation_and_the_dropout_survive_training() -> None:
    model = randomise(nn.Sequential(NormAct(6, drop=0.5)))
    twin: Any = nr.convert(model).train()
    y = twin(torch.randn(4, 6, 8, 8))
    assert 0.3 < (y == 0).float().mean() < 0.7 and twin[0].act is twin[0].get_submodule("act")
    y.sum().backward()
    assert twin[0].weight.grad.abs().sum() > 0


def test_watching_leaves_module_and_random_state_alone() -> None:
    norm = randomise(NormAct(6, drop=0.5))
    before, state = copy.deepcopy(norm.state_dict()), torch.random.get_rng_state()
    assert recognise(norm) == Kind(nr.nn.BatchNorm, 1e-5, ("drop", "act"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_zero_gamma_hides_nothing() -> None:
    """Residual branches start with gamma = 0, where every function of the input looks the same."""
    norm = ReluInside(6)
    nn.init.zeros_(norm.weight)
    assert isinstance(recognise(norm), str)
