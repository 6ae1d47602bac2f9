"""A training under one of the rules for weight decay, with the norms, effective steps and turns of its weights.

>>> epochs, norms = train(model, images, test, {"rule": "correction", ...}, seed=0, reference=norms)

Rules, all for scale-invariant weights alone: `decay`, weight decay as usual; `none`, without; `correction`, without, each step
scaled by ||w||^2 / ||w_ref||^2; `norms`, without, norms set to ||w_ref||; w_ref: of the run with decay and the same seed. All
other parameters are decayed in every run. Hoffer et al. 2018, section 2; normrewrite.weight_decay.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

import normrewrite as nr
from benchmarks.norm_matters.run import Run
from normrewrite.data import Batch, Data
from normrewrite.training.augment import augmentation
from normrewrite.weight_decay import NormRecord, NormSchedule, StepSizeCorrection

FOLLOWERS: dict[str, Any] = {"correction": StepSizeCorrection, "norms": NormSchedule}
RULES = ("decay", "none", *FOLLOWERS)


def leader(run: Run) -> Run:
    """The run whose norms this one follows; itself for rules that follow none."""
    return replace(run, recipe={**run.recipe, "rule": "decay"}) if run.recipe["rule"] in FOLLOWERS else run


def train(
    model: nn.Module,
    images: Data,
    test: Callable[[], float],
    recipe: Mapping[str, Any],
    seed: int,
    reference: Mapping[str, Tensor] | None,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A record an epoch, and the weights' norms. SGD with momentum 0.9; lr falls tenfold at 60 % and at 85 % of the epochs."""
    weights = nr.scale_invariant(model).weights
    decay = recipe["weight_decay"] if recipe["rule"] == "decay" else 0.0
    optimizer = SGD(nr.param_groups(model, decay, rest=recipe["rest"]), recipe["lr"], momentum=0.9)
    schedule = MultiStepLR(optimizer, [round(share * recipe["epochs"]) for share in (0.6, 0.85)])
    norms = NormRecord(weights)
    follower = None if reference is None else FOLLOWERS[recipe["rule"]](optimizer, weights, reference)
    epochs = []
    for epoch in range(recipe["epochs"]):
        torch.manual_seed(1000 * seed + epoch)  # order, flips and crops are the same under every rule
        start = [weight.parameter.detach().clone() for weight in weights]
        wanted = _lengths(weights) if follower is None else reference_row(reference, epoch)
        lr = schedule.get_last_lr()[0]
        loss = _epoch(model.train(), images, optimizer, recipe)
        angles = [_angle(a, weight.parameter) for a, weight in zip(start, weights, strict=True)]
        measured = {
            "norm": geometric(_lengths(weights)),
            "step": lr / geometric(wanted) ** 2,
            "turn": statistics.mean(angles),
        }
        epochs.append({"epoch": epoch + 1, "loss": loss, "val_accuracy": test(), **measured})
        schedule.step()
        norms.step()
        if follower is not None:
            follower.step()
    return epochs, norms.reference()


def _epoch(model: nn.Module, images: Data, optimizer: SGD, recipe: Mapping[str, Any]) -> float:
    """The mean loss of one pass in random order; an incomplete batch is left out."""
    whole, device = images.whole, next(model.parameters()).device
    assert whole is not None and whole.labels is not None
    x = next(iter(whole.inputs.values()))
    augment, size = augmentation(recipe["flip"], recipe["crop"]), recipe["batch_size"]
    losses = []
    for chosen in torch.randperm(len(x))[: len(x) // size * size].split(size):
        batch = augment(Batch({"x": x[chosen]}).to(device))
        loss = F.cross_entropy(model(batch.inputs["x"]), whole.labels[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def _lengths(weights: Any) -> Tensor:
    """Of every channel of every weight, at the start of an epoch or at its end, (channels,)."""
    return torch.cat([weight.norms().cpu() for weight in weights])


def reference_row(reference: Mapping[str, Tensor] | None, epoch: int) -> Tensor:
    assert reference is not None
    return torch.cat([rows[min(epoch, len(rows) - 1)] for rows in reference.values()])


def _angle(before: Tensor, after: Tensor) -> float:
    """By how many degrees an epoch turned the channels of a weight, on average."""
    cosines = F.cosine_similarity(before.flatten(1).double(), after.detach().flatten(1).double())
    return float(cosines.clamp(-1, 1).acos().mean()) * 180 / math.pi


def geometric(values: Tensor) -> float:
    return float(values.double().clamp_min(1e-30).log().mean().exp())
