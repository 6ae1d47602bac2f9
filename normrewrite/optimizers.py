"""Optimisers follow a model to its copy, with all that they remember."""

from collections.abc import Iterable, Mapping

from torch.nn import Parameter
from torch.optim import Optimizer

from normrewrite.errors import NormRewriteError


def rebind(optimizers: Iterable[Optimizer], new: Mapping[int, Parameter]) -> None:
    """Let each optimiser step the parameter that took the place of its own: `new` by the id of the old one.

    >>> rebind([optimizer], {id(old): copied})

    State (momentum, step counts) moves along; parameters of other models stay. Raises NormRewriteError, with nothing
    changed, where an optimiser holds none of the model's parameters: it would go on stepping a model that is not trained.
    """
    optimizers = list(optimizers)
    for optimizer in optimizers:
        if not any(id(parameter) in new for group in optimizer.param_groups for parameter in group["params"]):
            raise NormRewriteError(
                f"optimizers: {type(optimizer).__name__} holds no parameter of the model. Make it from model.parameters()."
            )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new.get(id(parameter), parameter) for parameter in group["params"]]
        for parameter in list(optimizer.state):
            if id(parameter) in new:
                optimizer.state[new[id(parameter)]] = optimizer.state.pop(parameter)
