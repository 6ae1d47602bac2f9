"""The loop: steps in epochs, validation, early stop, checkpoints. Everything that a next step depends on has a state.

>>> progress = Loop(machine, recipe, weights, teacher, data, val).run()
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.data import Batch, Data, check_finite
from normrewrite.errors import NormRewriteError
from normrewrite.sites.modes import evaluating, train
from normrewrite.training import optimise, randomness
from normrewrite.training.augment import augmentation
from normrewrite.training.checkpoints import Checkpoints
from normrewrite.training.feed import Feed
from normrewrite.training.int8 import Int8, aside
from normrewrite.training.losses import Objective, counted
from normrewrite.training.machine import align_buffers, prepare, sharded, whole_weights
from normrewrite.training.progress import Epoch, Progress, Tally
from normrewrite.training.pure import Weights
from normrewrite.training.recipe import Recipe
from normrewrite.training.statistics import Statistics

_MOST_IN_A_ROW = 20  # fp16's loss scale needs up to sixteen halvings to settle


@dataclass(frozen=True)
class Step:
    """What `progress` is called with after every step. loss, accuracy: means over the epoch so far."""

    step: int
    of: int
    loss: float | None
    accuracy: float | None
    inputs_per_second: float


class Loop:
    """A training of `weights.model`, in place. teacher: in eval. Each step's randomness follows from its number, so nothing
    of it has to be saved."""

    def __init__(
        self,
        machine: Any,
        recipe: Recipe,
        weights: Weights,
        teacher: nn.Module | None,
        data: Data,
        val: Data | None,
        after_step: Callable[[Step], object] = lambda step: None,
        quantised: Int8 | None = None,
    ) -> None:
        self.machine, self.recipe, self.weights, self.val, self.after_step = machine, recipe, weights, val, after_step
        self.model = model = weights.model
        self.statistics, self.quantised = Statistics(model), quantised
        ranks = machine.num_processes
        self.feed = Feed(data, recipe.batch_size, recipe.accumulate, recipe.seed, machine.process_index, ranks)
        self.total = recipe.total(self.feed.steps)
        self.augment = augmentation(recipe.flip, recipe.crop)
        self.teacher = None if teacher is None else teacher.to(machine.device)
        self.ema = optimise.averaged(recipe.ema, model.to(machine.device), wide=recipe.precision == "fp16-pure")
        self.objective = Objective(recipe, model, self.teacher)
        self.judge = self.objective if self.ema is None else Objective(recipe, self.ema.module, self.teacher)
        optimizer = weights.optimised(optimise.make_optimizer(recipe, model))
        self.schedule = optimise.make_schedule(recipe, optimizer, self.total)
        self.network, self.optimizer = prepare(machine, model, optimizer, lambda: self._loss_of_two(data))
        self.progress = Progress()
        more = [stateful for stateful in (self.ema, quantised) if stateful is not None]
        machine.register_for_checkpointing(self.schedule, self.progress, *weights.saved, *more)

    def _loss_of_two(self, data: Data) -> Tensor:
        batch = next(iter(data.batches(2))).rows(slice(2))
        with evaluating(self.model), aside(self.quantised):
            return self.objective(self.model, batch.to(self.machine.device)).loss

    @property
    def result(self) -> nn.Module:
        """The network that the training is for: the averaged one, where there is one."""
        return self.machine.unwrap_model(self.network) if self.ema is None else self.ema.module

    @property
    def state(self) -> dict[str, Tensor]:
        """The result's state_dict, whole; every process has to ask."""
        return whole_weights(self.machine, self.result)

    def run(self, checkpoints: Checkpoints | None = None) -> Progress:
        """From where the progress is to the end, with a checkpoint every `save_every` steps, or every epoch, and at the end."""
        progress, every = self.progress, self.recipe.save_every or self.feed.steps
        self.network.train()
        train(self.model, statistics=not self.recipe.freeze_statistics, dropout=self.recipe.drops)
        while progress.step < self.total and not progress.stopped:
            epoch, done = divmod(progress.step, self.feed.steps)
            for batches in self._steps(epoch, done):
                self._step(batches)
                ends = progress.step == self.total or progress.step % self.feed.steps == 0
                if ends:
                    self._end_epoch(epoch)
                last = progress.step == self.total or progress.stopped
                if checkpoints is not None and (last or progress.step % every == 0):
                    checkpoints.save(progress.step)
        return progress

    def _steps(self, epoch: int, done: int) -> Iterator[list[Batch]]:
        """The rest of an epoch, or of the training. A stream that falls short would be asked for ever."""
        wanted = min(self.feed.steps - done, self.total - self.progress.step)
        count = 0
        for count, batches in enumerate(self.feed.epoch(epoch, done), 1):
            yield batches
            if count == wanted:
                return
        raise NormRewriteError(
            f"the data ended after {done + count} of {self.feed.steps} steps of epoch {epoch + 1}: they were more at first. "
            "Give data that can be gone through again."
        )

    # --- a step -----------------------------------------------------------------------------------------------------------

    def _step(self, batches: list[Batch]) -> None:
        started, progress = time.perf_counter(), self.progress
        randomness.seed(self.recipe.seed, progress.step, self.machine.process_index)
        before = [buffer.clone() for buffer in self.model.buffers()]
        ranges = None if self.quantised is None else self.quantised.state_dict()
        tally = self._learn(batches)
        progress.step += 1
        if tally is None:
            self._skip(before, ranges)
        else:
            self.schedule.step()
            if self.ema is not None:
                self.ema.update_parameters(self.machine.unwrap_model(self.network))
            progress.in_a_row = 0
            progress.tally += tally
        if sharded(self.machine):
            align_buffers(self.machine, self.model)  # DDP does at the next step
        self._tell(sum(map(len, batches)) * self.machine.num_processes, time.perf_counter() - started)

    def _tell(self, inputs: int, seconds: float) -> None:
        progress = self.progress
        progress.inputs += inputs
        progress.seconds += seconds
        done = Step(progress.step, self.total, progress.tally.mean, progress.tally.accuracy, inputs / seconds)
        self.machine.log({"loss": done.loss, "lr": self.schedule.get_last_lr()[0]}, progress.step)
        self.after_step(done)

    def _learn(self, batches: list[Batch]) -> Tally | None:
        """One update; None where loss or gradient were not finite, and nothing was changed but running statistics."""
        tally, norm = Tally(), torch.zeros(())
        for batch in batches:
            with self.machine.accumulate(self.network), self.statistics.kept_finite() as watch:
                outcome = self.objective(self.network, self.augment(batch.to(self.machine.device)))
                self.machine.backward(self.weights.scaled(outcome.loss))
                if self.machine.sync_gradients:
                    norm = self.machine.clip_grad_norm_(self.weights.gradients(), self.recipe.clip or math.inf)
            tally += counted(outcome)
            tally.spoilt += watch.spoilt
        tally = self._joined(tally)
        self.progress.spoilt += tally.spoilt
        scaled = self.machine.scaler is not None  # fp16's scaler looks at the gradients, and lowers the scale
        finite = math.isfinite(tally.loss) and (scaled or math.isfinite(norm))
        if finite:
            self.optimizer.step()
            if self.quantised is not None:
                self.quantised.step(optimise.factor(self.recipe, self.progress.step, self.total))
        self.weights.settle(finite)
        self.optimizer.zero_grad()
        return tally if finite and not self.machine.optimizer_step_was_skipped else None

    def _joined(self, tally: Tally) -> Tally:
        """Over all processes, so that they all judge alike."""
        if self.machine.num_processes == 1:
            return tally
        values = [tally.loss, tally.right, tally.rated, tally.inputs, tally.spoilt]
        loss, *counts = self.machine.reduce(torch.tensor(values, device=self.machine.device)).tolist()
        return Tally(loss, *map(int, counts))

    @torch.no_grad()
    def _skip(self, before: list[Tensor], ranges: dict[str, Any] | None) -> None:
        """Running statistics and ranges come back too: what is not finite would stay in them for ever."""
        if self.quantised is not None and ranges is not None:
            self.quantised.load_state_dict(ranges)
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)
        self.progress.skipped += 1
        self.progress.in_a_row += 1
        if self.progress.in_a_row >= _MOST_IN_A_ROW:
            raise NormRewriteError(
                f"step {self.progress.step}: loss or gradient were not finite {_MOST_IN_A_ROW} times in a row. Lower --lr, "
                "give --clip or --warmup, or another --precision.",
                exit_code=1,
            )

    # --- an epoch ---------------------------------------------------------------------------------------------------------

    def _end_epoch(self, number: int) -> None:
        progress = self.progress
        val = Tally() if self.val is None else self._validate(self.val)
        epoch = Epoch(number + 1, progress.step, progress.tally.mean, progress.tally.accuracy, val.mean, val.accuracy)
        progress.epochs.append(epoch)
        progress.tally = Tally()
        if epoch.val_loss is not None:
            self.machine.log({"val_loss": epoch.val_loss, "val_accuracy": epoch.val_accuracy}, progress.step)
            ranges = {} if self.quantised is None else self.quantised.ranges.amax
            progress.validated(self._score(epoch), self.state, ranges)
            progress.stopped = self.recipe.patience is not None and progress.stale >= self.recipe.patience

    def _score(self, epoch: Epoch) -> list[float]:
        """Higher is better: with labels accuracy counts, and the loss between equals. NaN is worse than all."""
        loss = epoch.val_loss if epoch.val_loss is not None and math.isfinite(epoch.val_loss) else math.inf
        return [epoch.val_accuracy, -loss] if self.recipe.labels and epoch.val_accuracy is not None else [-loss]

    @torch.no_grad()
    def _validate(self, val: Data) -> Tally:
        tally, network = Tally(), self.result
        align_buffers(self.machine, network)
        with evaluating(network):
            for batch, new in self._share(val.batches(self.recipe.batch_size)):
                if val.whole is None:
                    check_finite(batch, "the validation data")
                counts = counted(self.judge(network, batch.to(self.machine.device)))
                if new:
                    tally += counts
        return self._joined(tally)

    def _share(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
        """This process's part, as many batches as every other's, for sharded networks run on all at once: where none is left,
        one that is another's (False)."""
        rank, ranks = self.machine.process_index, self.machine.num_processes
        while group := list(islice(batches, ranks)):
            yield group[min(rank, len(group) - 1)], rank < len(group)
