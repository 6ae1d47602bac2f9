"""Schedules by step, and what is optimised."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite import NormRewriteError
from normrewrite.training.optimise import averaged, make_optimizer, make_schedule
from normrewrite.training.recipe import Recipe


def _rates(recipe: Recipe, total: int) -> list[float]:
    optimizer = make_optimizer(recipe, nn.Linear(2, 2))
    schedule = make_schedule(recipe, optimizer, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules_rise_and_fall_as_they_are_called() -> None:
    assert _rates(Recipe(schedule="constant", lr=0.1), 3) == pytest.approx([0.1, 0.1, 0.1])
    assert _rates(Recipe(schedule="linear", lr=1.0), 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert _rates(Recipe(schedule="cosine", lr=1.0), 4) == pytest.approx([1, 0.853553, 0.5, 0.1464466])
    assert _rates(Recipe(schedule="linear", lr=1.0, warmup=3), 5) == pytest.approx([0.25, 0.5, 0.75, 1, 0.5])
    with pytest.raises(NormRewriteError, match="--warmup 5: the whole training is 5 steps"):
        _rates(Recipe(warmup=5), 5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_frozen_parameters_are_left_to_themselves(name: str) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    recipe = Recipe(optimizer=name, weight_decay=0.1)  # type: ignore[arg-type]
    (group,) = make_optimizer(recipe, model).param_groups
    assert group["params"] == [model.weight] and group["weight_decay"] == 0.1
    with pytest.raises(NormRewriteError, match="no parameter requires a gradient"):
        make_optimizer(recipe, model.requires_grad_(False))


def test_the_average_follows_parameters_and_statistics() -> None:
    model = nn.BatchNorm1d(2)
    ema = averaged(0.9, model)
    assert ema is not None and averaged(None, model) is None
    ema.update_parameters(model)
    with torch.no_grad():
        model.weight.add_(1)
        model.running_mean.add_(1)  # type: ignore[union-attr]
    ema.update_parameters(model)
    torch.testing.assert_close(ema.module.weight, torch.full((2,), 1.1))
    torch.testing.assert_close(ema.module.running_mean, torch.full((2,), 0.1))


def test_the_average_of_a_half_model_is_in_fp32() -> None:
    """In half 1000 + 0.001 * 1 would be 1000."""
    model = nn.Linear(1, 1).half()
    with torch.no_grad():
        model.weight.fill_(1000)
    ema = averaged(0.999, model, wide=True)
    assert ema is not None and model.weight.dtype is torch.float16
    ema.update_parameters(model)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update_parameters(model)
    torch.testing.assert_close(ema.module.weight, torch.full((1, 1), 1000.001), rtol=0, atol=1e-4)


def _trained(recipe: Recipe) -> tuple[list[float], nn.Module]:
    """The losses of ten steps in float64, of a network whose norm has next to no eps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nr.nn.BatchNorm1d(6, eps=1e-14), nn.ReLU(), nn.Linear(6, 3)).double()
    optimizer = make_optimizer(recipe, model)
    schedule, x = make_schedule(recipe, optimizer, 10), torch.randn(10, 8, 4, dtype=torch.float64)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[step]), torch.arange(8) % 3)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, model


def test_weight_decay_as_a_learning_rate_is_the_same_training() -> None:
    plain = Recipe(optimizer="sgd", lr=0.2, momentum=0.0, weight_decay=0.1, schedule="linear", warmup=2)
    decayed, before = _trained(plain)
    grown, after = _trained(replace(plain, weight_decay_as="lr"))
    none, _ = _trained(replace(plain, weight_decay=0.0))
    assert grown == pytest.approx(decayed, abs=1e-9)
    assert none != pytest.approx(decayed, abs=1e-3)
    norms = [model[0].weight.norm().item() for model in (before, after)]  # type: ignore[index]
    assert norms[1] > 1.05 * norms[0]  # the same directions, undecayed


def test_weight_decay_as_a_learning_rate_needs_weights_that_norms_follow() -> None:
    recipe = Recipe(optimizer="sgd", weight_decay=0.1, weight_decay_as="lr")
    with pytest.raises(NormRewriteError, match="--weight-decay-as lr: Linear has no scale-invariant"):
        make_optimizer(recipe, nn.Linear(2, 2))
    momentum = make_optimizer(recipe, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).param_groups
    assert [(group["weight_decay"], group["nesterov"]) for group in momentum] == [(0.0, False), (0.1, False)]
