"""Running a model in eval without leaving a trace on it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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


@contextmanager
def same_flags(model: nn.Module) -> Iterator[None]:
    """Every module's own training flag comes back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
