"""Norms that are no plain torch.nn class: taken over whole where they can be told, refused by name where not."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import normrewrite as nr
from normrewrite.nn.batch import FrozenBatchNorm
from normrewrite.passes import FoldAffine
from normrewrite.sites.kinds import Kind, recognise
from normrewrite.sites.refusal import Refusal
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


class ByRank(nn.BatchNorm1d):
    """Channels last where there are positions."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2) if x.dim() == 3 else super().forward(x)


class Unbatched(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dim() == 4 else super().forward(x[None])[0]


class StepsAsideForOne(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) == 1 else super().forward(x)


class RefusesNone(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) else x + self.weight.sum() + x.max()


class Guarded(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-65504, 65504))


class WithoutNaN(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.nan_to_num())


class AbsoluteGamma(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        live, momentum = self.training, self.momentum or 0.0
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight.abs(), self.bias, live, momentum, self.eps
        )


class RunningWhereFew(nn.BatchNorm2d):
    """As PyG's with allow_single_element, and others: few samples are no batch to measure."""

    def forward(self, x: Tensor) -> Tensor:
        live = self.training and len(x) > 8
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, live, 0.1, self.eps)


class OtherOnceWarm(nn.BatchNorm2d):
    """Batch norm at first, and something else later."""

    def forward(self, x: Tensor) -> Tensor:
        warm = self.num_batches_tracked is not None and int(self.num_batches_tracked) > 1000
        return super().forward(x) * (2 if warm and self.training else 1)


class MomentumInForward(Handmade):
    """The twin could not know how fast the running statistics follow."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.momentum


class Splits(nn.BatchNorm2d):
    """As timm's SplitBatchNorm2d: norms of its own for parts of the batch."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.aux = nn.ModuleList([nn.BatchNorm2d(width)])

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, rest = x.chunk(2)
        return torch.cat([super().forward(first), *(norm(rest) for norm in self.aux)])


class Doubled(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class DoubledHandmade(AbsoluteGamma):
    """F.batch_norm, which is lifted elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Masked(nn.BatchNorm2d):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


class PositiveGamma(nn.BatchNorm2d):
    """Its forward is torch's, and reads a property."""

    @property
    def weight(self) -> Any:
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return self._parameters["weight"].abs()


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


MORE = [ReluInside, OtherUpdate, TailOutOfOrder, ByRank, Unbatched, StepsAsideForOne, RefusesNone, Guarded, WithoutNaN]
MORE += [AbsoluteGamma, RunningWhereFew, OtherOnceWarm, Splits]


@pytest.mark.parametrize("cls", MORE, ids=lambda cls: cls.__name__)
def test_one_that_does_more_is_refused_by_name(cls: Any) -> None:
    more = "overrides forward, and does more than a batch norm followed by its own children"
    assert recognise(cls(6)) == Refusal(f"{cls.__name__} {more}")
    with pytest.raises(nr.NormRewriteError, match=rf"1: {cls.__name__}"):
        nr.convert(nn.Sequential(nn.Conv2d(3, 6, 3), cls(6)))


def test_a_momentum_that_stands_in_forward_alone_is_read_from_the_call() -> None:
    assert isinstance(recognise(MomentumInForward(6)), Refusal)
    twin: Any = nr.convert(nn.Sequential(MomentumInForward(6)))
    assert twin.get_submodule("0.batch_norm").momentum == 0.2


@pytest.mark.parametrize("to", ["l1", "none", "wn", "bwn", "group", "frozen", "renorm"])
@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Doubled(6), "Doubled overrides __call__"),
        (DoubledHandmade(6), "DoubledHandmade overrides __call__"),
        (Masked(6), "Masked.forward takes further arguments"),
        (PositiveGamma(6), "its weight is computed anew"),
        (prune.l1_unstructured(nn.BatchNorm2d(6), "weight", 0.5), "its weight is computed anew"),
        (prune.l1_unstructured(nn.BatchNorm2d(6), "bias", 0.5), "its bias is computed anew"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_another_module_can_not_take_over_is_refused_by_name(norm: nn.Module, reason: str, to: str) -> None:
    with pytest.raises(nr.NormRewriteError, match=reason):
        nr.convert(nn.Sequential(norm), to)


def test_a_forward_on_the_instance_is_refused_by_name() -> None:
    norm = nn.BatchNorm2d(6)
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x).relu()  # type: ignore[method-assign]
    assert "forward of its own on the instance" in str(recognise(norm))


@pytest.mark.parametrize("to", ["l1", "frozen", "renorm"])
def test_the_twin_takes_the_ranks_that_were_watched(to: str) -> None:
    wide = randomise(nn.Sequential(NormAct(6))).eval()  # its forward leaves torch's rank check out
    for shape in ((4, 6), (4, 6, 6), (4, 6, 3, 3), (1, 6, 2, 2, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(nr.convert(wide, to)(x), wide(x), rtol=1e-5, atol=1e-5)


def test_ranks_that_broadcasting_makes_something_of_are_refused_when_they_come() -> None:
    twin = nr.convert(nn.Sequential(Frozen(6)))
    assert twin(torch.randn(2, 6, 3, 3)).shape == (2, 6, 3, 3)
    with pytest.raises(nr.NormRewriteError, match="expects 4D input"):
        twin(torch.randn(6, 6, 6))


def test_what_other_tensors_hold_is_watched_in_each() -> None:
    """Two modules alike but for a buffer that switches."""

    class Switched(nn.BatchNorm2d):
        def __init__(self, on: bool) -> None:
            super().__init__(6)
            self.register_buffer("on", torch.tensor(on))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu() if self.on else super().forward(x)

    assert [type(recognise(Switched(on))) for on in (False, True, False)] == [Kind, Refusal, Kind]


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
    assert isinstance(recognise(norm), Refusal)


@pytest.mark.parametrize("least", [1, 6, 32, 200])
@pytest.mark.parametrize("axis", [2, 3])
def test_a_class_that_switches_by_the_size_of_planes_is_told(axis: int, least: int) -> None:
    class Switching(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * (2 if input.shape[axis] > least else 1)

    assert isinstance(recognise(Switching(5)), Refusal)
