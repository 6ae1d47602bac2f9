"""Every target trains from scratch: a fresh network, converted, learns scikit-learn's digits in a few epochs."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from examples.digits import Block, conv_bn
from normrewrite.nn.weights import gain_of
from tests.forms import FORMS, FROM_OURS

TEST_IMAGES = 497  # of 1797; ten classes, so that chance is 10 %
LEARNT, CHANCE = 0.8, 0.3
BATCH = 32
QUICK = (0.05, 70)  # learning rate, steps
# Without statistics in training, torch's own initialisation lets the signal shrink from layer to layer, and it takes a larger
# rate and a while until it comes through. Data-dependent initialisation does away with that.
PATIENT = (0.2, 130)
UNSCALED = {"frozen", "none", "bwn", "wn"}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Standardised images (N, 1, 8, 8) and labels, in random order."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return ((images - images.mean()) / images.std())[order], torch.from_numpy(labels)[order]


def learn(model: nn.Module, rate: float, steps: int, shuffled: bool = False) -> float:
    """The share of test images that is right after training, in eval."""
    images, labels = digits()
    train, targets = images[TEST_IMAGES:], labels[TEST_IMAGES:]
    targets = targets[torch.randperm(len(targets))] if shuffled else targets
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(train), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model.train()(train[batch]), targets[batch]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((model.eval()(images[:TEST_IMAGES]).argmax(1) == labels[:TEST_IMAGES]).float().mean())


def fresh(form: str) -> nn.Module:
    """Four norms, one of them on the shortcut of a residual block."""
    body = conv_bn(1, 8), nn.ReLU(), Block(8, 16, 2), nn.AdaptiveAvgPool2d(2)
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(64, 10))
    return nr.convert(nr.convert(model, "l1") if form in FROM_OURS else model, form)


def _has_gains(form: str) -> bool:
    return any(gain_of(layer) is not None for layer in fresh(form).modules())


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_model_learns(form: str) -> None:
    pace = PATIENT if form.partition(":")[0] in UNSCALED else QUICK
    assert learn(fresh(form), *pace) >= LEARNT


@pytest.mark.parametrize("form", [form for form in FORMS if _has_gains(form)])
def test_a_fresh_weight_norm_learns_after_data_dependent_initialisation(form: str) -> None:
    model = fresh(form)
    nr.initialise_(model.train(), digits()[0][-200:])
    assert learn(model, *QUICK) >= LEARNT


def test_shuffled_labels_teach_nothing() -> None:
    """The control: the figures above are not to be had without the labels."""
    assert learn(fresh("l1"), *QUICK, shuffled=True) <= CHANCE
