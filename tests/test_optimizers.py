"""Optimisers follow the model to its copy, with their state."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr

MAKERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", MAKERS, ids=["sgd", "adamw"])
def test_training_goes_on_as_in_place(
    small: Callable[[], nn.Module], make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    """The copy with the re-bound optimiser, and the model rewritten in place, take the same steps."""
    x = torch.randn(8, 3, 4, 4)
    model = small().train()
    optimizer = make(model.parameters())
    _step(model, optimizer, x)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    twin = nr.convert(model, "l1", optimizers=[optimizer])
    nr.convert_(other, "l1")
    for _ in range(3):
        _step(twin, optimizer, x)
        _step(other, other_optimizer, x)
    for name, value in other.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert len(optimizer.state) == len(list(twin.parameters()))


def test_an_optimizer_of_another_model_is_refused_and_nothing_changes(small: Callable[[], nn.Module]) -> None:
    model = small()
    mine, foreign = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    held = [id(parameter) for parameter in mine.param_groups[0]["params"]]
    with pytest.raises(nr.NormRewriteError, match="SGD holds no parameter"):
        nr.convert(model, optimizers=[mine, foreign])
    assert [id(parameter) for parameter in mine.param_groups[0]["params"]] == held
