"""The options of `finetune`. What they mean together is checked by normrewrite.training.recipe.Recipe."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from normrewrite.options.fields import Needs, option, options
from normrewrite.options.groups import DATA, Overwrite, Pixels, Source

Precision = Literal["fp32", "bf16", "fp16", "fp16-pure", "int8"]
Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw", "sgd"]
WeightDecayAs = Literal["decay", "lr"]
RangesBy = Literal["percentile", "gradient"]

_ABOVE_ZERO: Needs = (("a number above zero", lambda value: value > 0),)
_AT_LEAST_ZERO: Needs = (("a number, at least zero", lambda value: value >= 0),)
_SHARE: Needs = (("a number from 0 to 1", lambda value: 0 <= value <= 1),)
_BELOW_ONE: Needs = (("a number from 0 up to, not including, 1", lambda value: 0 <= value < 1),)


@options
class Validation:
    """What a training is judged by."""

    val_split: float | None = option(
        "Hold out this share of --data instead.", default=None, metavar="SHARE", needs=_BELOW_ONE
    )
    patience: int | None = option(
        "Stop after so many epochs without progress in validation.", default=None, metavar="EPOCHS", needs=_ABOVE_ZERO
    )


@options
class Processes:
    """How several processes go together."""

    timeout: float = option(
        "How long processes wait for another.", default=45.0, metavar="SECONDS", needs=_ABOVE_ZERO, silent=True
    )


@options
class Choices:
    """What the result of a training depends on."""

    labels: bool = option("Learn from labels by cross-entropy, or from the teacher.", default=False, off="--no-labels")
    distill: float = option(
        "With labels: the teacher's share of the loss.", default=0.0, metavar="SHARE", shown=False, needs=_SHARE
    )
    loss: str = option(
        "How far from the teacher: mse, kl, cross-entropy. Or module:function, called with outputs, teacher's outputs, labels.",
        default="mse",
        metavar="LOSS",
    )
    features: tuple[str, ...] = option(
        "Modules that are to give what the teacher's do; repeatable.", default=(), metavar="GLOB"
    )
    feature_weight: float = option("What features count beside the loss.", default=1.0, needs=_ABOVE_ZERO)
    precision: Precision = option(
        "What the forward pass computes in; weights stay as they are. fp16 scales its loss; fp16-pure has weights and norms in "
        "half too. int8 rounds weights and activations to 8 bits; export --precision int8 uses the ranges it learns.",
        default="fp32",
    )
    accumulator: str = option(
        "What norms of fp16-pure sum in: fp32, or half:CHUNK: sums of CHUNK numbers are rounded to half and added up in half.",
        default="fp32",
        metavar="SUMS",
    )
    int8_gradients: bool = option("For int8: gradients on 8 bits too.", default=False)
    int8_ranges: RangesBy = option(
        "For int8: what ranges of activations follow, the 99.99th percentile by moving average or the loss's gradient.",
        default="percentile",
    )
    int8_keep: tuple[str, ...] = option(
        "For int8: modules to leave in fp32; `first` and `last` are the first and last layer. Repeatable.",
        default=(),
        metavar="GLOB",
    )
    freeze_statistics: bool = option(
        "Batch norms run on their running statistics, and leave them as they are.", default=False
    )
    dropout: bool | None = option("Dropout in training.  [default: with --labels]", default=None, off="--no-dropout")
    epochs: int | None = option("Times through the data.  [default: 6]", default=None, needs=_ABOVE_ZERO)
    steps: int | None = option("Updates, instead of epochs.", default=None, needs=_ABOVE_ZERO)
    lr: float = option("Learning rate at its highest.", default=1e-3, needs=_ABOVE_ZERO)
    batch_size: int = option("Inputs a batch, on each process.", default=64, needs=_ABOVE_ZERO)
    accumulate: int = option("Batches to an update.", default=1, needs=_ABOVE_ZERO)
    optimizer: Optimizer = option("", default="adamw")
    momentum: float = option("Of sgd, by Nesterov.", default=0.9, needs=_AT_LEAST_ZERO + _BELOW_ONE)
    weight_decay: float = option("", default=0.0, needs=_AT_LEAST_ZERO)
    weight_decay_as: WeightDecayAs = option(
        "lr: of sgd without Nesterov, as a growing learning rate of the weights in front of norms.", default="decay"
    )
    schedule: Schedule = option("", default="cosine")
    warmup: int = option(
        "Steps in which the learning rate rises.", default=0, metavar="STEPS", shown=False, needs=_AT_LEAST_ZERO
    )
    ema: float | None = option(
        "Average the weights, as in 0.999; the average is written.", default=None, metavar="DECAY", needs=_BELOW_ONE
    )
    clip: float | None = option("Largest norm of a gradient.", default=None, metavar="NORM", needs=_ABOVE_ZERO)
    flip: bool = option("Mirror images at random.", default=False)
    crop: int = option(
        "Shift images by up to so many pixels each way.", default=0, metavar="PIXELS", shown=False, needs=_AT_LEAST_ZERO
    )
    seed: int = option("", default=0, needs=_AT_LEAST_ZERO)
    deterministic: bool = option("Deterministic kernels alone.", default=False)
    save_every: int | None = option(
        "Steps between checkpoints.  [default: an epoch]", default=None, metavar="STEPS", needs=_ABOVE_ZERO, silent=True
    )


@options
class RecipeOptions(Processes, Choices, Validation):
    """How to train, as the command line and Python have it."""


@options
class Finetune(Validation, Choices, Processes, Pixels, Overwrite, Source):
    """Train a network on labels, or on what its original computes. Launch by torchrun or accelerate for several processes."""

    data: str = option(DATA, metavar="DATA", file=True)
    _pixels: ClassVar[Any] = Pixels
    strict: bool = option("Refuse a folder for one image that can't be read, instead of leaving it out.", default=False)
    val: str | None = option(
        "Data to validate on after every epoch: the best epoch's weights are written.",
        default=None,
        metavar="DATA",
        file=True,
    )
    _validation: ClassVar[Any] = Validation
    teacher: Path | None = option(
        "The original to learn from.  [default: had back from the twin itself]", default=None, file=True
    )
    _choices: ClassVar[Any] = Choices
    resume: bool = option("Go on from the last checkpoint, where there is one.", default=False, silent=True)
    _processes: ClassVar[Any] = Processes
    log: Path | None = option("Write TensorBoard logs here.", default=None, metavar="DIR", silent=True)
    output: Path | None = option(
        "Output file.  [default: MODEL.finetuned.pt beside the input]", default=None, short="-o", silent=True
    )
    _force: ClassVar[Any] = Overwrite
