"""What a step is fed: every input once an epoch, from any step on the same, shared out over processes."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from normrewrite import NormRewriteError
from normrewrite.data import Batch, Data
from normrewrite.training.feed import Feed, check, split


def _data(rows: int = 22) -> Data:
    return Data(Batch({"x": torch.arange(rows)[:, None].float()}, torch.arange(rows)))


def _rows(batches: list[Batch]) -> list[list[int]]:
    return [batch.labels.tolist() for batch in batches]  # type: ignore[union-attr]


def test_an_epoch_meets_every_input_once_in_an_order_of_its_own() -> None:
    feed = Feed(_data(24), batch_size=4, accumulate=2, seed=1)
    epochs = [[_rows(step) for step in feed.epoch(number)] for number in (0, 1, 0)]
    assert feed.steps == 3 and [len(step) for step in epochs[0]] == [2, 2, 2]
    assert sorted(row for step in epochs[0] for batch in step for row in batch) == list(range(24))
    assert epochs[0] == epochs[2] != epochs[1]


def test_an_epoch_can_be_entered_at_any_step() -> None:
    feed = Feed(_data(), batch_size=5)
    whole = [_rows(step) for step in feed.epoch(2)]
    assert len(whole) == feed.steps == 4  # the two inputs that don't fill a batch wait for another epoch
    assert [_rows(step) for step in feed.epoch(2, 3)] == whole[3:]


def test_processes_share_what_one_process_would_take() -> None:
    alone = [_rows(step) for step in Feed(_data(), batch_size=2, accumulate=2).epoch(0)]
    ranks = [[_rows(step) for step in Feed(_data(), 2, rank=rank, ranks=2).epoch(0)] for rank in range(2)]
    assert [[first[0], second[0]] for first, second in zip(*ranks, strict=True)] == alone


def test_fewer_inputs_than_a_batch_are_one_step() -> None:
    (step,) = Feed(_data(7), batch_size=64, accumulate=2).epoch(0)
    assert [len(batch) for batch in step] == [3, 3]
    with pytest.raises(NormRewriteError, match="1 inputs, and a step takes 2 batches"):
        _ = Feed(_data(1), batch_size=64, accumulate=2).steps


class _Loader:
    """A stream that shuffles itself, as a DataLoader does."""

    def __iter__(self) -> Iterator[Batch]:
        for rows in torch.randperm(20).split(5):
            yield Batch({"x": rows[:, None] + torch.rand(1)}, rows)


def test_a_stream_of_the_users_own_can_be_entered_at_any_step_too() -> None:
    feed = Feed(Data(stream=_Loader()), batch_size=64, seed=4)
    whole = list(feed.epoch(1))
    torch.manual_seed(99)
    later = list(feed.epoch(1, 2))
    assert feed.steps == 4 and len(later) == 2
    assert all(torch.equal(a[0].inputs["x"], b[0].inputs["x"]) for a, b in zip(later, whole[2:], strict=True))


def test_a_split_leaves_every_input_on_one_side() -> None:
    rest, held_out = split(_data(20), 0.25, seed=0)
    assert rest.whole is not None and held_out.whole is not None
    labels = [part.labels.tolist() for part in (rest.whole, held_out.whole)]  # type: ignore[union-attr]
    assert len(labels[1]) == 5 and sorted(labels[0] + labels[1]) == list(range(20))
    for share in (0.01, 0.99):
        with pytest.raises(NormRewriteError, match=r"leaves .* to validate on"):
            split(_data(20), share, seed=0)


BAD = {
    "shape": (torch.zeros(4, 5), torch.zeros(4), "can't run on input"),
    "nan": (torch.tensor([[0.0], [float("nan")], [1.0]]), torch.zeros(3), "1 of 3 inputs hold NaN .* number 1"),
    "infinity": (torch.tensor([[0.0], [1.0], [float("inf")]]), torch.zeros(3), "1 of 3 inputs hold NaN .* number 2"),
    "negative": (
        torch.zeros(2, 1),
        torch.tensor([0, -1]),
        r"labels from -1 to 0, and the model has 3 classes \(0 to 2\)",
    ),
    "too large": (torch.zeros(2, 1), torch.tensor([0, 3]), "labels from 0 to 3, and the model has 3 classes"),
    "none": (torch.zeros(2, 1), None, "the data has no labels"),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_cannot_serve_are_told_before_any_work(case: str) -> None:
    x, labels, message = BAD[case]
    data = Data(Batch({"input": x}, None if labels is None else labels.long()))
    with pytest.raises(NormRewriteError, match=message):
        check(data, nn.Linear(1, 3), labels=True, what="the data")


def test_data_that_can_serve_pass() -> None:
    check(Data(Batch({"input": torch.zeros(3, 1)}, torch.tensor([0, 1, 2]))), nn.Linear(1, 3), True, "the data")
    check(Data(Batch({"input": torch.zeros(3, 1)})), nn.Linear(1, 3), False, "the data")
    with pytest.raises(NormRewriteError, match="held no batch"):
        check(Data(stream=[]), nn.Linear(1, 3), labels=False, what="the data")
