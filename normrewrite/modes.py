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
    flags = [(module, module.training) for module in model.modules() if module.training]
    for module, _ in flags:
        module.training = False
    try:
        yield model
    finally:
        for module, training in flags:
            module.training = training
