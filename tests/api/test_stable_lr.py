"""stable_lr: the limit where SGD turns from sinking to swinging, on a quadratic and on digits; losses, modes, what stays."""

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite.data import Batch, Data
from tests.conftest import ROOT, digits_network

LABELS = torch.arange(48) % 3
IMAGES = torch.randn(48, 2, 6, 6, generator=torch.Generator().manual_seed(1)) + LABELS[:, None, None, None]


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3)
    )


class _Bowl(nn.Module):
    """Curvatures 8, 2 and 0.5, whatever its input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean() * (self.w**2 * torch.tensor([8, 2, 0.5])).sum() / 2


def _loss_after(model: nn.Module, lr: float, steps: int, loss: Any, **momentum: Any) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr, **momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    return float(loss().detach())


@pytest.mark.parametrize(
    "momentum",
    [{"momentum": 0.0}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"momentum": 0.9, "nesterov": True}],
)
def test_beyond_the_limit_torchs_sgd_swings_up_and_below_it_sinks(momentum: dict[str, Any]) -> None:
    x = torch.ones(1, dtype=torch.float64)
    rate = nr.stable_lr(_Bowl(), lambda outputs: outputs, [x], **momentum)
    assert rate.curvature.value == pytest.approx(8, rel=1e-6)
    below, above = (_Bowl() for _ in range(2))
    assert _loss_after(below, 0.98 * float(rate), 400, lambda: below(x), **momentum) < 0.1
    assert _loss_after(above, 1.02 * float(rate), 400, lambda: above(x), **momentum) > 100


@pytest.fixture(scope="module")
def digits() -> nn.Module:
    return digits_network()


@pytest.mark.parametrize("to", ["layer", "group:4"])
def test_trained_on_digits_the_loss_never_rises_below_the_limit_and_does_beyond(to: str, digits: nn.Module) -> None:
    arrays = np.load(ROOT / "examples" / "digits.npz")
    images, labels = torch.from_numpy(arrays["images"][:64]), torch.from_numpy(arrays["labels"][:64]).long()
    twin, _ = nr.calibrate(nr.convert(digits, to=to), images)  # close to where its loss is least
    rate = nr.stable_lr(twin, F.cross_entropy, [(images, labels)], momentum=0.0)
    assert rate.curvature.change < 0.01

    def peak(factor: float) -> float:
        """The highest loss behind steps of plain SGD on all the images, in units of the loss before them."""
        trained, lr = copy.deepcopy(twin).train(), factor * float(rate)
        losses = [_loss_after(trained, lr, n, lambda: F.cross_entropy(trained(images), labels)) for n in (0, *[1] * 6)]
        return max(losses[1:]) / losses[0]

    assert peak(0.8) < 1 and peak(3.0) > 5


def test_labels_a_teacher_or_outputs_alone() -> None:
    model = _network().eval()
    twin, data = nr.convert(model, to="group:2"), Data(Batch({"input": IMAGES}, LABELS))
    goals: list[Any] = []

    def loss(outputs: Tensor, *goal: Tensor) -> Tensor:
        goals.append(goal)
        return F.mse_loss(outputs, goal[0]) if goal and goal[0].is_floating_point() else outputs.square().mean()

    nr.stable_lr(twin, loss, data, inputs=16, batch_size=16)
    nr.stable_lr(twin, loss, IMAGES, inputs=16, batch_size=16, teacher=model.train())
    nr.stable_lr(twin, loss, IMAGES, inputs=16, batch_size=16)
    (labels,), (taught,), nothing = goals
    assert labels.dtype == torch.int64 and len(labels) == 16 and not nothing
    drawn = [i for i in range(48) if (model.eval()(IMAGES[i : i + 1]) - taught).abs().amax(1).min() < 1e-5]
    assert taught.shape == (16, 3) and len(drawn) == 16 and not taught.requires_grad


def test_it_runs_in_training_in_eval_or_as_it_is_and_changes_nothing() -> None:
    model = nr.convert(_network(), to="l1")
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags, draws, numpys = [m.training for m in model.modules()], torch.get_rng_state(), np.random.get_state()[1]
    modes: list[list[bool]] = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        modes.append([m.training for m in model.modules()])
        return F.cross_entropy(outputs, labels)

    rates = [nr.stable_lr(model, loss, [(IMAGES, LABELS)], training=mode) for mode in (True, False, None)]
    assert modes == [[True] * len(flags), [False] * len(flags), flags]
    assert len({float(rate) for rate in rates}) == 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad.eq(1).all() and model[5].weight.grad is None
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), draws) and np.array_equal(np.random.get_state()[1], numpys)
    torch.manual_seed(5)
    assert nr.stable_lr(model, loss, [(IMAGES, LABELS)]) == rates[0]  # dropout's draws are its own


def test_what_it_tells() -> None:
    rate = nr.stable_lr(
        _network(), F.cross_entropy, Data(Batch({"input": IMAGES}, LABELS)), nesterov=True, batch_size=16
    )
    assert str(rate).startswith(
        f"largest stable learning rate of SGD with Nesterov momentum 0.9: {float(rate):.3g} (curv"
    )
    assert rate.curvature.inputs == 48 and rate.curvature.batch_size == 16
    assert json.loads(json.dumps(rate.as_dict()))["limit"] == float(rate)
    short = nr.stable_lr(_network(), F.cross_entropy, [(IMAGES, LABELS)], iterations=2)
    assert "the limit is lower" in str(short) and short.curvature.iterations == 2
    downhill = nr.stable_lr(nn.Linear(2, 1), lambda outputs: outputs.mean(), torch.randn(4, 2))
    assert float(downhill) == math.inf and downhill.as_dict()["limit"] is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": 1.0}, "momentum 1.0"),
        ({"iterations": 1}, "at least two iterations"),
        ({"batch_size": 0}, "batch size 0"),
        ({"loss": lambda outputs, labels: outputs}, r"loss gave shape \(48, 3\)"),
        ({"loss": lambda outputs, labels: 1.0}, "loss gave float"),
        ({"data": []}, "no batch"),
        ({"data": torch.randn(4, 7)}, "can't run on"),
    ],
)
def test_what_can_not_be_measured(options: dict[str, Any], said: str) -> None:
    call: dict[str, Any] = {"loss": F.cross_entropy, "data": [(IMAGES, LABELS)]} | options
    with pytest.raises(nr.NormRewriteError, match=said):
        nr.stable_lr(_network(), call.pop("loss"), call.pop("data"), **call)
