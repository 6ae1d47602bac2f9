"""Ranges that follow the gradient: they find what the loss needs, alone and on several processes, and outlast bad batches."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.training.descent import LR, Descent
from normrewrite.training.int8 import Int8, int8
from normrewrite.training.products import usual_reach
from tests.ranks import on_ranks


def heavy() -> Tensor:
    """Inputs of which a few reach thirty times as far as the others."""
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    x[::64, 0] *= 30
    return x


def spread(model: nn.Module, quantised: Int8, x: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        found = model.eval()(x)
    model.train()
    return float((found - expected).square().mean())


@pytest.mark.parametrize("start", [0.2, 5.0])
def test_a_range_goes_where_the_error_is_least(start: float) -> None:
    """Against a search over ranges, from a range that is too short and one that is too wide."""
    model, x = nn.Linear(8, 4).requires_grad_(False), heavy()
    expected = model(x)
    far = float(usual_reach(x))
    errors = {}
    for reach in torch.logspace(-1.5, 0.5, 40).tolist():
        with int8(model, ranges=nr.LearnedRanges({"": far * reach})) as quantised:
            errors[reach] = spread(model, quantised, x, expected)
    with int8(model.train(), ranges=nr.LearnedRanges({"": far * start}), by="gradient") as quantised:
        before = spread(model, quantised, x, expected)
        for _ in range(300):
            (model(x) - expected).square().mean().backward()
            quantised.step()
        after = spread(model, quantised, x, expected)
    assert after < 1.02 * min(errors.values()) < 0.5 * before


def learning(model: nn.Module, *batches: Tensor) -> Int8:
    with int8(model.train(), by="gradient") as quantised:
        for batch in batches:
            model(batch).square().mean().backward()
            quantised.step()
    return quantised


def test_the_first_batch_begins_and_a_step_is_two_percent() -> None:
    model, x = nn.Linear(8, 4), heavy()
    quantised = learning(model, x)
    moved = (quantised.amax[""] / usual_reach(x)).log().abs()
    torch.testing.assert_close(moved, torch.tensor(LR), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_and_changes_nothing(bad: float) -> None:
    model, x = nn.Linear(8, 4), heavy()
    broken = x.clone()
    broken[0, 0] = bad
    quantised = learning(model, x)
    before = quantised.ranges
    with int8(model, by="gradient", ranges=before) as again:
        again.load_state_dict(quantised.state_dict())
        y = model(broken)
        y.square().mean().backward()
        again.step()
    assert not y.isfinite().any() and again.ranges == before


def test_a_gradient_that_is_not_finite_spoils_no_later_step() -> None:
    model, x = nn.Linear(8, 4), heavy()
    broken = x.clone()
    broken[0, 0] = torch.nan
    assert learning(model, x, broken, x).ranges.amax == learning(model, x, x).ranges.amax


def test_zeros_wait_for_the_first_numbers() -> None:
    model, x = nn.Linear(8, 4), heavy()
    quantised = learning(model, 0 * x, x, x)
    assert 0 < float(quantised.amax[""]) < 2 * float(usual_reach(x))


def test_a_state_goes_on_bit_for_bit() -> None:
    model, batches = nn.Linear(8, 4), [heavy(), 2 * heavy(), 3 * heavy()]
    whole, first = learning(model, *batches), learning(model, *batches[:2])
    with int8(model, by="gradient") as rest:
        rest.load_state_dict(copy.deepcopy(first.state_dict()))
        model(batches[2]).square().mean().backward()
        rest.step()
    assert rest.ranges == whole.ranges and rest.ranges != first.ranges


def on_a_rank() -> dict[str, float]:
    x = heavy().chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
    torch.manual_seed(0)
    return learning(nn.Linear(8, 4), x, x).ranges.amax


@pytest.mark.slow
def test_ranks_agree(tmp_path: Path) -> None:
    found = on_ranks(2, on_a_rank, tmp_path / "ranks")
    assert found[0] == found[1] and found[0][""] > 0


def test_nothing_to_learn_from_changes_nothing() -> None:
    assert Descent().step() == {}
