"""Torch's optimisers, learning-rate schedules and averaged weights, as a recipe names them.

>>> optimizer = make_optimizer(recipe, model); scheduler = make_schedule(recipe, optimizer, total=600)
"""

import math
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from normrewrite.errors import NormRewriteError
from normrewrite.sites.invariance import param_groups, scale_invariant
from normrewrite.training.recipe import Recipe
from normrewrite.weight_decay import ExponentialSchedule


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """Over the parameters that aren't frozen."""
    groups = _undecayed(recipe, model) if recipe.weight_decay_as == "lr" else [{"params": list(model.parameters())}]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise NormRewriteError(
            f"{type(model).__name__}: no parameter requires a gradient, so there is nothing to train. Unfreeze some "
            "(requires_grad_())."
        )
    if recipe.optimizer == "adamw":
        return AdamW(groups, recipe.lr, weight_decay=recipe.weight_decay)
    return SGD(groups, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov)


def _undecayed(recipe: Recipe, model: nn.Module) -> list[dict[str, Any]]:
    invariant = scale_invariant(model)
    if not invariant.weights:
        why = invariant.untraceable or "none of its layers feeds norms alone"
        raise NormRewriteError(
            f"--weight-decay-as lr: {type(model).__name__} has no scale-invariant weight ({why}). Use --weight-decay-as decay."
        )
    return param_groups(model, weight_decay=0.0, rest=recipe.weight_decay)


def make_schedule(recipe: Recipe, optimizer: Optimizer, total: int) -> LRScheduler:
    """By step: up over `warmup` steps, then as the schedule says, to zero at `total` or level."""
    if recipe.warmup >= total:
        raise NormRewriteError(f"--warmup {recipe.warmup}: the whole training is {total} steps. Give fewer.")

    def by_step(step: int) -> float:
        return factor(recipe, step, total)

    if recipe.weight_decay_as == "lr":
        return ExponentialSchedule(optimizer, recipe.weight_decay, by_step)
    return LambdaLR(optimizer, by_step)


def factor(recipe: Recipe, step: int, total: int) -> float:
    """What the learning rate is multiplied by at a step."""
    if step < recipe.warmup:
        return (step + 1) / (recipe.warmup + 1)
    done = min((step - recipe.warmup) / (total - recipe.warmup), 1.0)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[recipe.schedule]


def averaged(decay: float | None, model: nn.Module, *, wide: bool = False) -> AveragedModel | None:
    """A copy that follows the model's parameters and running statistics by an exponential moving average.

    wide: of a half model, in fp32: half would lose what a step adds to the average.
    """
    if decay is None:
        return None
    if not wide:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    follow = get_ema_avg_fn(decay)
    ema = AveragedModel(
        model, avg_fn=lambda mine, new, count: follow(mine, new.to(mine.dtype), count), use_buffers=True
    )
    for tensor in chain(ema.module.parameters(), ema.module.buffers()):
        tensor.data = tensor.data.float() if tensor.dtype is torch.float16 else tensor.data
    return ema
