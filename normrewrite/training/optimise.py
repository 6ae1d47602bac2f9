"""Torch's optimisers, learning-rate schedules and averaged weights, as a recipe names them.

>>> optimizer = make_optimizer(recipe, model); scheduler = make_schedule(recipe, optimizer, total=600)
"""

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from normrewrite.errors import NormRewriteError
from normrewrite.training.recipe import Recipe


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """Over the parameters that aren't frozen."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learned:
        raise NormRewriteError(
            f"{type(model).__name__}: no parameter requires a gradient, so there is nothing to train."
        )
    if recipe.optimizer == "adamw":
        return AdamW(learned, recipe.lr, weight_decay=recipe.weight_decay)
    nesterov = recipe.momentum > 0
    return SGD(learned, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=nesterov)


def make_schedule(recipe: Recipe, optimizer: Optimizer, total: int) -> LRScheduler:
    """By step: up over `warmup` steps, then as the schedule says, to zero at `total` or level."""
    if recipe.warmup >= total:
        raise NormRewriteError(f"--warmup {recipe.warmup}: the whole training is {total} steps. Give fewer.")
    if not recipe.warmup:
        return _after(recipe, optimizer, total)
    up = LinearLR(optimizer, 1 / (recipe.warmup + 1), 1.0, recipe.warmup)
    return SequentialLR(optimizer, [up, _after(recipe, optimizer, total - recipe.warmup)], [recipe.warmup])


def _after(recipe: Recipe, optimizer: Optimizer, steps: int) -> LRScheduler:
    if recipe.schedule == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    return LinearLR(optimizer, 1.0, 0.0 if recipe.schedule == "linear" else 1.0, steps)


def averaged(decay: float | None, model: nn.Module) -> AveragedModel | None:
    """A copy that follows the model's parameters and running statistics by an exponential moving average."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
