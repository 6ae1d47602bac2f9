"""What each step is fed: inputs in an order that seed and epoch alone decide, so that a resumed run meets the same ones.

>>> for batches in Feed(data, batch_size=64).epoch(0):      # the batches of one step on this process
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor, nn

from normrewrite.data import Batch, Data, check_finite
from normrewrite.errors import NormRewriteError
from normrewrite.execution import runner
from normrewrite.training import randomness


@dataclass(frozen=True)
class Feed:
    """Data that are at hand are shuffled by epoch; a stream comes in its own order and sizes, and may shuffle itself.

    What doesn't fill a step is left out: a last batch of a few inputs would upset running statistics.
    """

    data: Data
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    rank: int = 0
    ranks: int = 1

    @property
    def _batches_a_step(self) -> int:
        return self.accumulate * self.ranks

    @cached_property
    def steps(self) -> int:
        """Steps an epoch. A stream is gone through once to tell."""
        if self.data.whole is None:
            count = sum(1 for _ in self.data.batches(self.batch_size))
            return self._enough(count // self._batches_a_step, f"{count} batches")
        inputs = len(self.data.whole)
        return self._enough(
            max(inputs // (self.batch_size * self._batches_a_step), int(inputs >= self._batches_a_step)),
            f"{inputs} inputs",
        )

    def _enough(self, steps: int, contents: str) -> int:
        if not steps:
            raise NormRewriteError(
                f"the data hold {contents}, and a step takes {self._batches_a_step} batches (--accumulate {self.accumulate}, "
                f"{self.ranks} processes). Give more data, or lower --accumulate."
            )
        return steps

    def epoch(self, number: int, start: int = 0) -> Iterator[list[Batch]]:
        """This process's batches of each step of an epoch, from step `start` on."""
        return self._shuffled(number, start) if self.data.whole is not None else self._streamed(number, start)

    def _shuffled(self, number: int, start: int) -> Iterator[list[Batch]]:
        assert self.data.whole is not None
        inputs = len(self.data.whole)
        order = torch.randperm(inputs, generator=randomness.generator(self.seed, number))
        size = min(self.batch_size, inputs // self._batches_a_step)
        for step in range(start, self.steps):
            batches = order[step * size * self._batches_a_step :][: size * self._batches_a_step].split(size)
            yield [self.data.whole.rows(chosen) for chosen in batches[self.rank :: self.ranks]]

    def _streamed(self, number: int, start: int) -> Iterator[list[Batch]]:
        batches = self.data.batches(self.batch_size)
        for step in range(self.steps):
            randomness.seed(self.seed, number, step)  # what the user's code draws depends on the step alone
            of_step = list(islice(batches, self._batches_a_step))
            if step >= start and len(of_step) == self._batches_a_step:
                yield of_step[self.rank :: self.ranks]


def split(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """Data for training and for validation, by chance."""
    if data.whole is None:
        raise NormRewriteError("--val-split needs data that are at hand whole; give those of a stream as --val DATA.")
    held_out = round(share * len(data.whole))
    if not 0 < held_out < len(data.whole):
        raise NormRewriteError(
            f"--val-split {share} of {len(data.whole)} inputs leaves {held_out} to validate on. Give another share."
        )
    order = torch.randperm(len(data.whole), generator=randomness.generator(seed))
    rest, chosen = order[held_out:].sort()[0], order[:held_out].sort()[0]
    return replace(data, whole=data.whole.rows(rest)), Data(whole=data.whole.rows(chosen))


def check(data: Data, model: nn.Module, labels: bool, what: str) -> None:
    """Raises where data at hand can't serve: inputs that aren't finite or don't fit the model, labels that are not there or
    out of range. A stream is looked at batch by batch (`check_labels`)."""
    batch = next(iter(data.batches(2)), None)
    if batch is None:
        raise NormRewriteError(f"{what} held no batch. Give at least one input.")
    try:
        outputs = runner(model)(batch.rows(slice(2)))
    except NormRewriteError as error:
        raise NormRewriteError(f"{what}: {error}") from error
    check_finite(data.whole or batch, what)
    if labels:
        check_labels(data.whole or batch, next(iter(outputs.values()), None), what)


def check_labels(batch: Batch, outputs: Tensor | None, what: str) -> None:
    """Whether there is a label for every input and a class for every label; outputs: logits of any inputs."""
    if batch.labels is None:
        raise NormRewriteError(f"{what} has no labels. Add them, or leave out --labels: the original teaches then.")
    if outputs is None or outputs.dim() < 2:
        raise NormRewriteError(f"{what}: labels need logits (N, classes), and the model doesn't return such.")
    low, high, classes = int(batch.labels.min()), int(batch.labels.max()), outputs.shape[1]
    if low < 0 or high >= classes:
        raise NormRewriteError(
            f"{what}: labels from {low} to {high}, and the model has {classes} classes (0 to {classes - 1}). Renumber them."
        )
