"""Optimisers follow a model to its copy, with all that they remember."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from normrewrite.errors import NormRewriteError
from normrewrite.sites import Site


def parameters_of(*modules: nn.Module | Site | None) -> list[Parameter]:
    """The parameters of the modules in order; without those of a norm's origin, which has none."""
    owners = [module.module if isinstance(module, Site) else module for module in modules]
    return [parameter for module in owners if module is not None for parameter in module.parameters()]


def inherited(old: list[Parameter], new: list[Parameter]) -> dict[int, list[Parameter]]:
    """What takes the place of each parameter that a rewrite took away: the first of them leaves all new ones."""
    before, after = {id(parameter) for parameter in old}, {id(parameter) for parameter in new}
    gone = [parameter for parameter in old if id(parameter) not in after]
    born = [parameter for parameter in new if id(parameter) not in before]
    return {id(parameter): born if i == 0 else [] for i, parameter in enumerate(gone)}


def rebind(optimizers: Iterable[Optimizer], new: Mapping[int, Sequence[Parameter]]) -> None:
    """Let each optimiser step what took the place of its own parameters: `new` by the id of the old one.

    >>> rebind([optimizer], {id(old): [copied]})

    State (momentum, step counts) moves along where there is one heir of the same shape; parameters of other models stay.
    Raises NormRewriteError, with nothing changed, where an optimiser holds none of the model's parameters: it would go on
    stepping a model that is not trained.
    """
    optimizers = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for each in optimizers:
        if not hasattr(each, "param_groups"):
            raise NormRewriteError(
                f"optimizers: found a {type(each).__name__}; needed is a list of torch optimisers, as in [optimizer]."
            )
    for optimizer in optimizers:
        if not any(id(parameter) in new for group in optimizer.param_groups for parameter in group["params"]):
            raise NormRewriteError(
                f"optimizers: {type(optimizer).__name__} holds no parameter of the model. Make it from model.parameters()."
            )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [heir for old in group["params"] for heir in new.get(id(old), [old])]
        for old in list(optimizer.state):
            heirs = new.get(id(old), [old])
            state = optimizer.state.pop(old)
            if len(heirs) == 1 and heirs[0].shape == old.shape:
                optimizer.state[heirs[0]] = state
