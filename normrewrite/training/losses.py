"""Losses: how far outputs are from the teacher's, from labels, or both.

>>> loss = Objective(recipe, model, teacher)(model, batch)          # Outcome: .loss, .right, .inputs
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normrewrite.data import Batch, argument_names
from normrewrite.errors import NormRewriteError, first_line, nearest
from normrewrite.execution import call, flat
from normrewrite.files import arch
from normrewrite.training.feed import check_labels
from normrewrite.training.progress import Tally
from normrewrite.training.recipe import Recipe

Distance = Callable[[Tensor, Tensor], Tensor]


def kl(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the classes' probabilities, per input."""
    return F.kl_div(outputs.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1).mean()


def cross_entropy(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's probabilities as the labels."""
    return F.cross_entropy(outputs, teacher.softmax(1))


DISTANCES: Mapping[str, Distance] = {"mse": F.mse_loss, "kl": kl, "cross-entropy": cross_entropy}


@dataclass
class Outcome:
    """Of one batch. right: inputs whose class is the label's, or the teacher's without labels; None where there is none."""

    loss: Tensor
    right: Tensor | None
    inputs: int


def counted(outcome: Outcome) -> Tally:
    rated = 0 if outcome.right is None else outcome.inputs
    right = 0 if outcome.right is None else int(outcome.right)
    return Tally(float(outcome.loss.detach()) * outcome.inputs, right, rated, outcome.inputs)


class Objective:
    """The loss of a model on a batch, as the recipe says; the teacher is run in eval, in its own precision."""

    def __init__(self, recipe: Recipe, model: nn.Module, teacher: nn.Module | None) -> None:
        self.recipe, self.teacher, self.names = recipe, teacher, argument_names(model)
        self.distance = DISTANCES.get(recipe.loss)
        self.function = None if self.distance else _function(recipe.loss)
        names = _matching(recipe.features, model, teacher) if teacher is not None and recipe.features else []
        self.featured = [model.get_submodule(name) for name in names]
        self.teachers = [teacher.get_submodule(name) for name in names] if teacher is not None else []

    def __call__(self, model: nn.Module, batch: Batch) -> Outcome:
        with recorded(self.teachers) as goals:
            taught = self._taught(batch)
        with recorded(self.featured) as features:
            outputs = call(model, batch, self.names)
        mine, goal = _floats(outputs), None if taught is None else _floats(taught)
        if self.recipe.labels:
            check_labels(batch, next(iter(mine.values()), None), "the data")
        if self.function is not None:
            loss = _whole(self.function(outputs, taught, batch.labels), self.recipe.loss)
        else:
            loss = self._loss(mine, goal, batch.labels)
        if self.featured:
            loss = loss + self.recipe.feature_weight * feature_distance(features, goals)
        return Outcome(loss, _right(mine, goal, batch.labels), len(batch))

    def _taught(self, batch: Batch) -> Any:
        if self.teacher is None:
            return None
        with torch.no_grad():
            return call(self.teacher, batch, self.names)

    def _loss(self, mine: dict[str, Tensor], goal: dict[str, Tensor] | None, labels: Tensor | None) -> Tensor:
        taught = None if goal is None else self._distance(mine, goal)
        if not self.recipe.labels:
            assert taught is not None
            return taught
        assert labels is not None  # check_labels has seen them
        own = F.cross_entropy(next(iter(mine.values())), labels)
        share = self.recipe.distill
        return own if taught is None or not share else (1 - share) * own + share * taught

    def _distance(self, mine: dict[str, Tensor], goal: dict[str, Tensor]) -> Tensor:
        assert self.distance is not None
        shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (mine, goal)]
        if shapes[0] != shapes[1] or not mine:
            raise NormRewriteError(
                f"outputs {shapes[0]} can't be compared to the teacher's {shapes[1]}. Give a teacher with the same outputs, or "
                "--loss module:function."
            )
        if self.recipe.loss != "mse" and any(value.dim() < 2 for value in mine.values()):
            raise NormRewriteError(f"--loss {self.recipe.loss} needs logits (N, classes). Use --loss mse.")
        return torch.stack([self.distance(mine[name], goal[name]) for name in mine]).mean()


def _floats(outputs: object) -> dict[str, Tensor]:
    """In fp32 at least: a loss in half would round away what is left to learn."""
    floats = {name: value for name, value in flat(outputs).items() if value.is_floating_point()}
    return {name: value if value.dtype == torch.float64 else value.float() for name, value in floats.items()}


def _right(mine: dict[str, Tensor], goal: dict[str, Tensor] | None, labels: Tensor | None) -> Tensor | None:
    """How many inputs get the class of their label; without labels, the teacher's class."""
    outputs = next(iter(mine.values()), None)
    if outputs is None or outputs.dim() != 2 or outputs.shape[1] < 2:
        return None
    expected = next(iter(goal.values())).argmax(1) if labels is None and goal else labels
    return None if expected is None else (outputs.detach().argmax(1) == expected).sum()


# --- a function of the user's -----------------------------------------------------------------------------------------


def _function(name: str) -> Callable[..., Any]:
    if ":" not in name:
        raise NormRewriteError(
            f"--loss {name}: there is no such loss.{nearest(name, DISTANCES)} Write {', '.join(DISTANCES)} or module:function."
        )
    loss = arch.find(name, "--loss", "Write PATH.py:function or module:function.")

    def function(*arguments: object) -> Any:
        try:
            return loss(*arguments)
        except Exception as error:  # the user's code runs here
            raise NormRewriteError(f"--loss {name}: raised {first_line(error)}") from error

    return function


def _whole(loss: object, name: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.requires_grad != torch.is_grad_enabled():
        outcome = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise NormRewriteError(
            f"--loss {name}: gave {outcome}; one number with a gradient is needed, a tensor of shape ()."
        )
    return loss.reshape(())


# --- features by module -----------------------------------------------------------------------------------------------


def _matching(patterns: tuple[str, ...], model: nn.Module, teacher: nn.Module) -> list[str]:
    """Modules of both networks that the patterns name, in the model's order."""
    theirs = {name for name, _ in teacher.named_modules()}
    shared = [name for name, _ in model.named_modules() if name and name in theirs]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in shared):
            raise NormRewriteError(
                f"--features {pattern}: matches no module that model and teacher both have.{nearest(pattern, shared)}"
            )
    return [name for name in shared if any(fnmatchcase(name, pattern) for pattern in patterns)]


@contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """The output of each module while the model is run inside, in order of `modules`."""
    by_module: dict[int, list[Tensor]] = {}
    outputs: list[Tensor] = []

    def keep(module: nn.Module, _: object, output: object) -> None:
        by_module[id(module)] = [value.clone() for value in flat(output).values()]  # the next layer may work in place

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
        outputs += [value for module in modules for value in by_module.get(id(module), [])]
    finally:
        for hook in hooks:
            hook.remove()


def feature_distance(features: list[Tensor], goals: list[Tensor]) -> Tensor:
    """Mean over modules of the mean square error in units of the teacher's variance, so that every depth counts alike."""
    shapes = [[tuple(value.shape) for value in values] for values in (features, goals)]
    if shapes[0] != shapes[1]:
        raise NormRewriteError(
            f"--features: outputs {shapes[0]}, the teacher's {shapes[1]}. Name modules that give the same."
        )
    errors = [
        F.mse_loss(mine.float(), goal.float()) / goal.float().var().clamp_min(1e-12)
        for mine, goal in zip(features, goals, strict=True)
    ]
    return torch.stack(errors).mean()
