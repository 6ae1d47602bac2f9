"""Which parts of a model run in eval, and their flags brought back."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from normrewrite import sites
from normrewrite.nn.parts import attributes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval; every module's own training flag comes back afterwards.

    >>> with evaluating(model), torch.no_grad():
    ...     logits = model(x)
    """
    with same_flags(model):
        for module in model.modules():
            module.training = False
        yield model


def freeze_statistics(model: nn.Module) -> None:
    """Let batch norms in a model that trains run as in eval: on their running statistics, which stay as they are."""
    for site in sites.find(model):
        site.module.training = False


def train(model: nn.Module, *, statistics: bool, dropout: bool) -> None:
    """Training mode; with batch norms, or dropout, as in eval where these are not to be at work."""
    model.train()
    if not statistics:
        freeze_statistics(model)
    if not dropout:
        without_dropout(model)


def without_dropout(model: nn.Module) -> None:
    """Let dropout in a model that trains run as in eval: torch's, and what timm and torchvision call so."""
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, _DropoutNd) or name.startswith("Drop") or name == "StochasticDepth":
            module.training = False


@contextmanager
def same_flags(model: nn.Module) -> Iterator[None]:
    """Every module's own training flag comes back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """What the buffers held, running statistics among them, comes back afterwards."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """Every module's plain attributes come back afterwards, and what its lists and dictionaries hold: a forward that runs
    on a trace's proxies may keep some of them."""
    before = [(module, attributes(module)) for module in model.modules()]
    containers = [
        (value, copy.copy(value)) for _, plain in before for value in plain.values() if type(value) in (dict, list)
    ]
    try:
        yield
    finally:
        for value, old in containers:
            _refill(value, old)
        for module, plain in before:
            for name in attributes(module).keys() - plain.keys():
                del vars(module)[name]
            vars(module).update(plain)


def _refill(value: Any, old: Any) -> None:
    value.clear()
    value.update(old) if isinstance(value, dict) else value.extend(old)
