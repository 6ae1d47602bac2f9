"""Fine-tune a network, on labels or on what its original computes: repair what a rewrite could not keep, or train on.

>>> twin, result = finetune(twin, images, epochs=6)                      # no labels: the original in the twin teaches
>>> twin, result = finetune(twin, Data(Batch({"x": images}, labels)), labels=True, precision="bf16", flip=True, crop=4)
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normrewrite import sites
from normrewrite.data import Data, argument_names, as_data
from normrewrite.errors import NormRewriteError
from normrewrite.modes import same_flags
from normrewrite.report import table
from normrewrite.revert import untrained
from normrewrite.training import feed, machine, randomness
from normrewrite.training.checkpoints import Checkpoints
from normrewrite.training.loop import Loop, Step
from normrewrite.training.progress import Epoch, Progress
from normrewrite.training.recipe import Recipe, recipe

Examples = Tensor | Data | Iterable[Any]


@dataclass
class Finetuned:
    """What a fine-tuning came to. best: the epoch whose weights the model has, where there was validation; last: the
    weights at the end, where they are others."""

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

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "last"}

    @property
    def inputs_per_second(self) -> float:
        return self.inputs / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        told = "labels" if self.labels else "the original"
        head = (
            f"{self.steps} steps on {told} in {self.precision}: {self.inputs:,} inputs in {self.seconds:.0f} s, "
            f"{self.inputs_per_second:,.0f} a second"
        )
        share = "accuracy" if self.labels else "same class"
        titles = ("epoch", "step", "loss", share, "validation loss", share)
        return "\n".join([head, table(titles, map(_row, self.epochs)), *self._remarks(), *self.notes])

    def _remarks(self) -> list[str]:
        return [
            *(
                [f"{self.skipped_steps} steps were skipped, as loss or gradient were not finite"]
                * bool(self.skipped_steps)
            ),
            *(["stopped early: no progress in validation"] * self.stopped_early),
            *([f"the weights are those of epoch {self.best}, the best in validation"] * (self.best is not None)),
        ]


def _row(epoch: Epoch) -> tuple[str, ...]:
    losses = [f"{loss:.4g}" if loss is not None else "" for loss in (epoch.loss, epoch.val_loss)]
    shares = [f"{100 * share:.2f} %" if share is not None else "" for share in (epoch.accuracy, epoch.val_accuracy)]
    return (str(epoch.epoch), str(epoch.step), losses[0], shares[0], losses[1], shares[1])


def finetune(model: nn.Module, data: Examples, **options: Any) -> tuple[nn.Module, Finetuned]:
    """A trained copy of `model`, and what came of it; `finetune_` does it in place and names the options."""
    return finetune_(copy.deepcopy(model), data, **options)


def finetune_(
    model: nn.Module,
    data: Examples,
    *,
    teacher: nn.Module | None = None,
    val: Examples | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    log: Path | None = None,
    each: Callable[[Step], object] = lambda step: None,
    **options: Any,
) -> tuple[nn.Module, Finetuned]:
    """Train `model` on its own device: parameters stay the same objects, and training flags and random state as they were.

    data, val: (N, ...) inputs, Data, or an iterable of batches; with labels where `labels=True`.
    teacher: what to learn from without labels, or beside them; had back from a twin that was not trained since.
    checkpoints: folder to save to; resume: go on from what it holds, or start where it holds nothing. log: for TensorBoard.
    each: called after every step. options: see normrewrite.training.recipe.Recipe.
    Raises NormRewriteError where data, teacher and recipe don't fit, and where losses are no longer finite.
    """
    plan = recipe(options)
    teacher = _teacher(model, teacher, plan)
    examples, held_out = _examples(model, data, val, plan)
    with (
        machine.accelerator(model, plan, log) as accelerator,
        randomness.kept(),
        randomness.deterministic(plan.deterministic),
        same_flags(model),
    ):
        loop = Loop(accelerator, plan, model, teacher, examples, held_out, each)
        try:
            saver = None if checkpoints is None else Checkpoints(checkpoints, accelerator)
            if saver is not None:
                saver.begin(_run(plan, examples, loop), resume)
            progress = loop.run(saver)
            return model, _result(loop, progress, examples)
        finally:
            machine.release(accelerator, loop.network)


def _teacher(model: nn.Module, teacher: nn.Module | None, plan: Recipe) -> nn.Module | None:
    """In eval; the original out of the twin itself, where a teacher is needed and none is given."""
    if not plan.taught:
        if teacher is not None:
            raise NormRewriteError("--teacher beside --labels: say how much it counts, as in --distill 0.5.")
        return None
    if teacher is None and not any(map(sites.is_rewritten, model.modules())):
        raise NormRewriteError(
            f"{type(model).__name__} holds no rewritten norm, so no original to learn from. Give --teacher, or --labels."
        )
    found = (
        copy.deepcopy(teacher) if teacher is not None else untrained(model, "Give it as --teacher, or use --labels.")
    )
    return found.eval().requires_grad_(False)


def _examples(model: nn.Module, data: Examples, val: Examples | None, plan: Recipe) -> tuple[Data, Data | None]:
    """Checked, for training and validation."""
    names = argument_names(model)
    examples, held_out = as_data(data, names), None if val is None else as_data(val, names)
    feed.check(examples, model, plan.labels, "the data")
    if held_out is not None:
        feed.check(held_out, model, plan.labels, "the validation data")
    if plan.val_split and held_out is not None:
        raise NormRewriteError("--val and --val-split: give one of the two.")
    if plan.val_split:
        examples, held_out = feed.split(examples, plan.val_split, plan.seed)
    if plan.patience is not None and held_out is None:
        raise NormRewriteError("--patience watches validation: add --val DATA or --val-split 0.1.")
    return examples, held_out


def _run(plan: Recipe, examples: Data, loop: Loop) -> dict[str, Any]:
    """What a run is known by: with another of these a resumed run would not be the same one."""
    asked = {name: value for name, value in asdict(plan).items() if name != "save_every"}
    rows = None if examples.whole is None else len(examples.whole)
    return asked | {"inputs": rows, "steps_in_all": loop.total, "processes": loop.machine.num_processes}


def _result(loop: Loop, progress: Progress, examples: Data) -> Finetuned:
    """Puts the weights that the training was for into the model."""
    model, plan = loop.model, loop.recipe
    ends = loop.result.state_dict()
    best = progress.best is not None and progress.best != progress.epochs[-1].epoch
    last = {name: value.detach().cpu().clone() for name, value in ends.items()} if best else None
    model.load_state_dict(progress.weights if best else ends)
    return Finetuned(
        plan.precision,
        plan.labels,
        progress.step,
        progress.inputs,
        progress.seconds,
        progress.skipped,
        progress.stopped,
        progress.epochs,
        progress.best,
        [f"left out, as they can't be read: {_some(examples.skipped)}"] if examples.skipped else [],
        last,
    )


def _some(names: tuple[str, ...]) -> str:
    return f"{len(names)} files ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
