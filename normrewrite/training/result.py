"""What a fine-tuning came to, as data.

>>> twin, result = finetune(twin, images); print(result)
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from normrewrite.provenance.ranges import LearnedRanges
from normrewrite.results import Result, Summary, Table
from normrewrite.training.progress import Epoch
from normrewrite.training.stability import StableLearningRate


@dataclass
class Finetuned(Result):
    """What a fine-tuning came to. best: the epoch whose weights the model has, where there was validation; last: the
    weights at the end, where they are others. accumulator: what norms summed by, in fp16-pure. nonfinite_batches: how many gave
    norm statistics that were not finite; their steps count as skipped only where loss or gradient were not finite either.
    ranges: what int8 learned beside the weights, and beside `last`. stable_lr: the largest stable learning rate as it began, of
    sgd on one process, where it could be measured."""

    precision: str
    labels: bool
    steps: int
    inputs: int
    seconds: float
    skipped_steps: int
    stopped_early: bool
    epochs: list[Epoch]
    best: int | None = None
    notes: list[str] = field(default_factory=list)
    last: dict[str, Tensor] | None = None
    accumulator: str | None = None
    nonfinite_batches: int = 0
    ranges: LearnedRanges | None = None
    last_ranges: LearnedRanges | None = None
    stable_lr: StableLearningRate | None = None

    def as_dict(self) -> dict[str, Any]:
        without_last = replace(self, last=None, last_ranges=None)  # asdict copies, and these are a network's weights
        values = {name: value for name, value in asdict(without_last).items() if not name.startswith("last")}
        return values | {"stable_lr": None if self.stable_lr is None else self.stable_lr.as_dict()}

    @property
    def inputs_per_second(self) -> float:
        return self.inputs / self.seconds if self.seconds else 0.0

    def summary(self) -> Summary:
        teacher = "labels" if self.labels else "the original"
        total = (
            f"{self.steps} steps on {teacher} in {self.precision}: {self.inputs:,} inputs in {self.seconds:.0f} s, "
            f"{self.inputs_per_second:,.0f} a second"
        )
        share = "accuracy" if self.labels else "same class"
        validated = any(epoch.val_loss is not None for epoch in self.epochs)
        heads = ("epoch", "step", "loss", share, *(("validation loss", share) if validated else ()))
        lines = [_cells(epoch)[: len(heads)] for epoch in self.epochs]
        limit = [] if self.stable_lr is None else self.stable_lr.summary()
        return [total, Table(heads, lines), *self._remarks(), *limit, *self.notes]

    def _remarks(self) -> Iterator[str]:
        if self.accumulator is not None:
            yield (
                f"sums in half arithmetic: norms' by {self.accumulator}, those of convolutions and matrix products in fp32, "
                "rounded to half"
            )
        if self.skipped_steps:
            yield f"{self.skipped_steps} steps were skipped, as loss or gradient were not finite"
        if self.nonfinite_batches:
            yield (
                f"{self.nonfinite_batches} batches gave norm statistics that were not finite, which entered no running ones"
            )
        if self.stopped_early:
            yield "stopped early: no progress in validation"
        if self.best is not None:
            yield f"the weights are those of epoch {self.best}, the best in validation"


def _cells(epoch: Epoch) -> tuple[str, ...]:
    losses = [f"{loss:.4g}" if loss is not None else "" for loss in (epoch.loss, epoch.val_loss)]
    shares = [f"{100 * share:.2f} %" if share is not None else "" for share in (epoch.accuracy, epoch.val_accuracy)]
    return (str(epoch.epoch), str(epoch.step), losses[0], shares[0], losses[1], shares[1])
