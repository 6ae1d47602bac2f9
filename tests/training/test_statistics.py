"""A batch whose statistics are not finite enters no running ones, whoever keeps them, and is counted."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.api.finetune import finetune
from normrewrite.data import Batch, Data
from normrewrite.training.statistics import Statistics

HUGE = 1e25  # its square is beyond fp32: torch's norms make a variance of inf of it, and their bias of the input


class Handwritten(nn.Module):
    """Keeps a mean and a variance by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean += x.mean(0)
        self.running_var += x.var(0)
        return x


def _batch(spoilt: bool) -> Tensor:
    x = torch.randn(20, 3)
    x[4, 1] = HUGE if spoilt else 1.0
    return x


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(3), lambda: nr.nn.BatchNorm1d(3, metric="l2"), Handwritten])
def test_one_channel_is_kept_out_and_the_others_enter(make: Any) -> None:
    norm = make()
    statistics = Statistics(norm)
    for spoilt in (False, True, False):
        before = {name: value.clone() for name, value in norm.named_buffers()}
        with statistics.kept_finite() as watch:
            norm(_batch(spoilt))
        assert watch.spoilt is spoilt
        for name, value in norm.named_buffers():
            if name.startswith("running"):
                moved = [bool(now != then) for now, then in zip(value, before[name], strict=True)]
                assert bool(value.isfinite().all()) and moved == [True, not spoilt, True]


def test_without_it_they_would_be_spoilt() -> None:
    norm = nn.BatchNorm1d(3)
    norm(_batch(True))
    assert not bool(norm.running_var.isfinite().all())  # type: ignore[union-attr]


def test_what_came_spoilt_is_not_counted_for_ever() -> None:
    norm = nn.BatchNorm1d(3)
    norm.running_var[1] = torch.nan  # type: ignore[index]
    with Statistics(norm).kept_finite() as watch:
        norm(_batch(False))
    assert not watch.spoilt


@pytest.mark.parametrize("to", ["l2", "l1"])
def test_training_goes_on_and_tells(to: str) -> None:
    """In fp32 as in any precision; l1 of the same inputs is finite."""
    model: nn.Module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    model = model if to == "l2" else nr.convert(model, to)
    inputs = torch.randn(100, 3)
    inputs[17, 1] = HUGE
    data = Data(Batch({"input": inputs}, torch.arange(100) % 2))
    trained, result = finetune(model, data, labels=True, epochs=3, batch_size=20)
    assert (result.skipped_steps, result.nonfinite_batches) == (0, 3 if to == "l2" else 0)
    assert ("3 batches gave norm statistics that were not finite" in str(result)) is (to == "l2")
    assert result.as_dict()["nonfinite_batches"] == result.nonfinite_batches
    assert all(bool(value.isfinite().all()) for value in trained.state_dict().values())
