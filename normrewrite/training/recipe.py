"""The recipe of a training: every choice that its result depends on, checked before any work.

>>> Recipe(epochs=3, lr=1e-4, precision="bf16")
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from normrewrite.backends.accumulate import accumulator
from normrewrite.errors import NormRewriteError
from normrewrite.options.fields import choices, listed, options, require_known
from normrewrite.options.finetune import RecipeOptions

_EPOCHS = 6


@options
class Recipe(RecipeOptions):
    """How to train. A step is one update: `accumulate` batches of `batch_size` on each process.

    precision: what forward and backward compute in; fp16-pure (normrewrite.training.pure) keeps the parameters in half too.
    accumulator: what its norms sum by, fp32, half or half:CHUNK (normrewrite.backends.accumulate).
    labels: learn from the data's labels by cross-entropy, else from the teacher. distill: the teacher's share beside labels.
    loss: how far from the teacher: mse, kl, cross-entropy; or `module:function` (outputs, teacher's outputs, labels) -> the
    whole loss. features: names or globs of modules whose outputs are to be the teacher's too.
    weight_decay_as: `lr` leaves scale-invariant weights undecayed, and has their learning rate grow by as much as the decay
    would have made them shrink (normrewrite.weight_decay): the same training, for plain momentum.
    epochs, or steps; warmup: steps in which lr rises; ema: decay of the averaged weights, which are then the result; clip:
    largest gradient norm; crop: pixels of zero padding to shift in. val_split: share held out; patience: epochs without
    progress there before it stops. save_every: steps between checkpoints, an epoch by default. timeout: seconds that one
    process waits for another before the run ends with an error.
    int8_gradients: 8 bits for gradients too; int8_ranges: what ranges of activations follow; int8_keep: modules that stay in
    floating point; as in training.int8.
    freeze_statistics: batch norms run on their running statistics, as in eval, and leave them as they are.
    dropout: whether there is any; by default with labels alone: a teacher's outputs are matched best without noise.
    """

    def __post_init__(self) -> None:
        for name, known in choices(RecipeOptions).items():
            if getattr(self, name) not in known:
                raise _wrong(name, getattr(self, name), f"one of {', '.join(known)}")
        for field, mark in listed(RecipeOptions):
            value = getattr(self, field.name)
            for needed, right in mark.needs:
                if value is not None and not (math.isfinite(value) and right(value)):
                    raise _wrong(field.name, value, needed)
        self._check_together()

    def _check_together(self) -> None:
        if str(accumulator(self.accumulator)) != "fp32" and self.precision != "fp16-pure":
            raise NormRewriteError(
                f"--accumulator {self.accumulator}: --precision {self.precision} sums in fp32. Add --precision fp16-pure."
            )
        if self.epochs and self.steps:
            raise NormRewriteError(f"--epochs {self.epochs} and --steps {self.steps}: give one of the two.")
        if self.distill and not self.labels:
            raise NormRewriteError("--distill is the teacher's share beside labels: add --labels, or leave it out.")
        if self.weight_decay_as == "lr" and (self.optimizer != "sgd" or not self.weight_decay):
            raise NormRewriteError(
                f"--weight-decay-as lr stands for the weight decay of sgd; got --optimizer {self.optimizer} --weight-decay "
                f"{self.weight_decay:g}. Give --optimizer sgd and the weight decay that it is to stand for."
            )
        if self.precision != "int8" and (self.int8_gradients or self.int8_keep or self.int8_ranges != "percentile"):
            raise NormRewriteError(
                "--int8-gradients, --int8-ranges and --int8-keep go with --precision int8: add that, or leave them out."
            )

    def total(self, steps_an_epoch: int) -> int:
        """The steps of the whole training."""
        return self.steps or (self.epochs or _EPOCHS) * steps_an_epoch

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        return {name: value for name, value in asdict(self).items() if name not in ("save_every", "timeout")}

    @property
    def drops(self) -> bool:
        """Whether dropout is on."""
        return self.labels if self.dropout is None else self.dropout

    @property
    def nesterov(self) -> bool:
        """Of sgd; the learning rate that stands for a weight decay is a theorem on plain momentum."""
        return self.momentum > 0 and self.weight_decay_as == "decay"

    @property
    def taught(self) -> bool:
        """Whether a teacher is needed for what the names of losses mean; a function of the user's may do with labels."""
        return not self.labels or self.distill > 0 or bool(self.features)


def recipe(options: Mapping[str, Any]) -> Recipe:
    """A recipe from keyword arguments; raises NormRewriteError for one that there is not."""
    require_known(options, (field.name for field in fields(Recipe)))
    values: dict[str, Any] = {
        name: tuple(value) if name in ("features", "int8_keep") else value for name, value in options.items()
    }
    return Recipe(**values)


def _wrong(name: str, value: object, needed: str) -> NormRewriteError:
    return NormRewriteError(f"--{name.replace('_', '-')} {value}: {needed} is needed.")
