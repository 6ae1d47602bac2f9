"""Weight norms taken off again: plain torch.nn layers with the weights that were computed, bit by bit.

>>> plain = bake(model)
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from normrewrite.errors import NormRewriteError
from normrewrite.nn.parts import deepcopy, require_module
from normrewrite.nn.weights import weight_norm_of


def bake(model: nn.Module) -> nn.Module:
    """A copy of the model without normrewrite's weight norms; `bake_` does it in place.

    >>> bake(twin).state_dict().keys() == model.state_dict().keys()
    True

    Each layer gets the class it had, and as its weight the very bits that it computed; everything else stays as it is.
    Raises NormRewriteError where the model holds no weight norm of normrewrite's.
    """
    require_module(model)
    return bake_(deepcopy(model))


def bake_(model: nn.Module) -> nn.Module:
    """`bake` in place: layers stay the same objects, their weights are new parameters."""
    require_module(model)
    layers = [module for module in model.modules() if weight_norm_of(module) is not None]
    if not layers:
        raise NormRewriteError(
            f"{type(model).__name__} holds no weight norm of normrewrite's, so there is nothing to bake."
        )
    for layer in layers:
        _bake(layer)
    return model


def _bake(layer: Any) -> None:
    """torch's remove_parametrizations deletes the property from a class that deep copies share, and breaks those."""
    learning = any(parameter.requires_grad for parameter in layer.parametrizations.weight.parameters())
    with torch.no_grad():
        weight = nn.Parameter(layer.weight, learning)
    del layer.parametrizations["weight"]
    if parametrize.is_parametrized(layer):  # by someone else, on another tensor
        namespace = {name: value for name, value in vars(type(layer)).items() if name != "weight"}
        layer.__class__ = type(type(layer).__name__, type(layer).__bases__, namespace)
    else:
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
    layer._parameters = {"weight": weight, **layer._parameters}
