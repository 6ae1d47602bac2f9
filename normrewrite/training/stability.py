"""The largest learning rate at which SGD is stable, as a training by a recipe begins.

>>> float(measured(model, recipe, teacher, data))
0.0219

SGD with momentum m on a loss of curvature λ swings up in its steepest direction unless

    lr < 2(1 + m)/λ                     torch.optim.SGD
    lr < 2(1 + m)/((1 + 2m)λ)           with nesterov=True

as the roots of z² - (1 + m - h)z + m and z² - (1 + m)(1 - h)z + m(1 - h), with h = lr·λ, then leave the unit circle at z = -1.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from normrewrite.data import Batch, Data
from normrewrite.diagnostics.curvature import Curvature, curvature, drawn
from normrewrite.errors import NormRewriteError, first_line
from normrewrite.execution import device_of, runner
from normrewrite.results import Result, Summary
from normrewrite.sites.modes import same_flags, train
from normrewrite.training import randomness
from normrewrite.training.losses import Objective
from normrewrite.training.recipe import Recipe

_BATCH = 64  # inputs at most
_ITERATIONS = 8
_SECONDS = 10.0
_LONG = 1.0  # seconds of eval for as many inputs, as a few tell: a first gradient alone would take too long, and much memory
_STILL_MOVING = 0.01


@dataclass(frozen=True)
class StableLearningRate(Result):
    """What `float()` gives: the largest learning rate at which SGD is stable, for the curvature that was measured. As λ is known
    from below, the true one is no larger; curvature.change tells whether λ had settled."""

    curvature: Curvature
    momentum: float
    nesterov: bool

    def __float__(self) -> float:
        steepness = (1 + 2 * self.momentum if self.nesterov else 1) * self.curvature.value
        return 2 * (1 + self.momentum) / steepness if steepness > 0 else math.inf

    def as_dict(self) -> dict[str, Any]:
        """limit: None where it is infinite, as no direction bends upwards."""
        return {"limit": float(self) if math.isfinite(float(self)) else None, **asdict(self)}

    def summary(self) -> Summary:
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        momentum, of = f"{'Nesterov ' if self.nesterov else ''}momentum {self.momentum:g}", self.curvature
        where = f"curvature {of.value:.3g} on {of.inputs} inputs in batches of {of.batch_size}"
        yield f"largest stable learning rate of SGD with {momentum}: {float(self):.3g} ({where})"
        if of.change > _STILL_MOVING:
            yield (
                f"the last of {of.iterations} iterations raised the curvature by {100 * of.change:.0f} %, and more may raise it "
                "further: the limit is lower"
            )


def at_start(
    model: nn.Module, recipe: Recipe, teacher: nn.Module | None, data: Data
) -> tuple[StableLearningRate | None, list[str]]:
    """What people should know of a training before its first step: of sgd alone. That it can't be measured is no error."""
    if recipe.optimizer != "sgd":
        return None, []
    try:
        rate = measured(model, recipe, teacher, data)
    except NormRewriteError as error:
        return None, [f"the largest stable learning rate was not measured: {error}"]
    except Exception as error:  # code of the user's runs here, in ways that its training may never ask for
        return None, [f"the largest stable learning rate was not measured: {first_line(error)}"]
    if recipe.lr <= float(rate):
        return rate, []
    return rate, [f"--lr {recipe.lr:g} is above it: the loss may rise instead of falling. Lower --lr, or give --warmup"]


def measured(model: nn.Module, recipe: Recipe, teacher: nn.Module | None, data: Data) -> StableLearningRate:
    """Of the loss and the modes of a training by the recipe, on inputs that are not augmented, in the model's own precision.

    Raises where it can't be measured in some seconds.
    """
    objective = Objective(recipe, model, None if teacher is None else teacher.to(device_of(model)))
    with same_flags(model), randomness.kept():
        randomness.seed(recipe.seed)
        batches = drawn(data, min(recipe.batch_size, _BATCH))
        _check_size(model, batches)
        train(model, statistics=not recipe.freeze_statistics, dropout=recipe.drops)
        found = curvature(
            model,
            lambda batch: objective(model, batch.to(device_of(model))).loss,
            batches,
            iterations=_ITERATIONS,
            seconds=_SECONDS,
        )
    return StableLearningRate(found, recipe.momentum, recipe.nesterov)


def _check_size(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Raises for networks that a few inputs tell to be large, before a first gradient of all takes its time and memory."""
    run, few = runner(model), batches[0].rows(slice(4))
    started = time.perf_counter()
    run(few)
    seconds = (time.perf_counter() - started) / len(few) * sum(map(len, batches))
    if seconds > _LONG:
        raise NormRewriteError("it takes too long. nr.stable_lr takes its time, or fewer inputs.")
