"""One training put together: teacher, data, machine, loop, and the weights that come of it.

>>> model, result = run(model, data, Recipe(epochs=6), progress=print)
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normrewrite import sites
from normrewrite.backends.accumulate import accumulator
from normrewrite.data import Data, argument_names, as_data
from normrewrite.errors import NormRewriteError, some
from normrewrite.nn.parts import deepcopy
from normrewrite.passes.reversion import untrained
from normrewrite.provenance.ranges import LearnedRanges
from normrewrite.sites.modes import same_flags
from normrewrite.training import feed, machine, pure, randomness, stability
from normrewrite.training.checkpoints import Checkpoints
from normrewrite.training.int8 import Int8, aside, int8, notes
from normrewrite.training.loop import Loop, Step
from normrewrite.training.progress import Progress
from normrewrite.training.recipe import Recipe
from normrewrite.training.result import Finetuned

Examples = Tensor | Data | Iterable[Any]


def run(
    model: nn.Module,
    data: Examples,
    plan: Recipe,
    *,
    teacher: nn.Module | None = None,
    val: Examples | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    log: Path | None = None,
    progress: Callable[[Step], object] = lambda step: None,
) -> tuple[nn.Module, Finetuned]:
    """`finetune_`, by a recipe."""
    teacher = _teacher(model, teacher, plan)
    examples, held_out = _examples(model, data, val, plan)
    with (
        machine.accelerator(model, plan, log) as accelerator,
        randomness.kept(),
        randomness.deterministic(plan.deterministic),
        same_flags(model),
        _on_8_bits(model, plan) as quantised,
    ):
        alone = accelerator.num_processes == 1
        with aside(quantised):
            rate, remarks = stability.at_start(model, plan, teacher, examples) if alone else (None, [])
        network = deepcopy(model) if machine.sharded(accelerator) else model  # sharding changes a module for good
        with pure.weights(network, plan, accelerator) as weights:
            loop = Loop(accelerator, plan, weights, teacher, examples, held_out, progress, quantised)
            try:
                saver = None if checkpoints is None else Checkpoints(checkpoints, accelerator)
                if saver is not None:
                    saver.begin(_run(plan, examples, loop), resume)
                course = loop.run(saver)
            finally:
                machine.release(accelerator, loop.network)
        if course.step and course.skipped == course.step:
            raise NormRewriteError(
                f"all {course.step} steps were skipped, as loss or gradient were not finite: nothing was learned. Look at the "
                "data, lower --lr, give --warmup, or another --precision.",
                exit_code=1,
            )
        result = _result(loop, course, examples, model)
        return model, replace(result, stable_lr=rate, notes=[*remarks, *result.notes])


def _on_8_bits(model: nn.Module, plan: Recipe) -> AbstractContextManager[Int8 | None]:
    return (
        int8(model, keep=plan.int8_keep, gradients=plan.int8_gradients, by=plan.int8_ranges)
        if plan.precision == "int8"
        else nullcontext()
    )


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
    network = deepcopy(teacher) if teacher is not None else untrained(model, "Give it as --teacher, or use --labels.")
    return network.eval().requires_grad_(False)


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
    inputs = None if examples.whole is None else len(examples.whole)
    return plan.identity() | {"inputs": inputs, "steps_in_all": loop.total, "processes": loop.machine.num_processes}


def _result(loop: Loop, progress: Progress, examples: Data, model: nn.Module) -> Finetuned:
    """Puts the weights that the training was for into the model."""
    plan, ends = loop.recipe, loop.weights.wide(loop.state)
    best = progress.best is not None and progress.best != progress.epochs[-1].epoch
    last = {name: value.detach().cpu().clone() for name, value in ends.items()} if best else None
    model.load_state_dict(loop.weights.wide(progress.weights) if best else ends)
    ranges = None if loop.quantised is None else loop.quantised.ranges
    skipped = examples.skipped + (loop.val.skipped if loop.val else ())
    return Finetuned(
        precision=plan.precision,
        labels=plan.labels,
        steps=progress.step,
        inputs=progress.inputs,
        seconds=progress.seconds,
        skipped_steps=progress.skipped,
        stopped_early=progress.stopped,
        epochs=progress.epochs,
        best=progress.best,
        notes=[
            *([f"left out, as they can't be read: {len(skipped)} files ({some(skipped, 3)})"] if skipped else []),
            *loop.weights.notes(),
            *([] if ranges is None or plan.freeze_statistics else notes(model)),
        ],
        last=last,
        accumulator=str(accumulator(plan.accumulator)) if plan.precision == "fp16-pure" else None,
        nonfinite_batches=progress.spoilt,
        ranges=LearnedRanges(progress.ranges, ranges.kept) if ranges is not None and best else ranges,
        last_ranges=ranges if best else None,
    )
