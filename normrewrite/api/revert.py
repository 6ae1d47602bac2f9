"""The way back: torch's own norms from ours, to the bit where nothing was trained since."""

from torch import nn

from normrewrite.nn.parts import deepcopy, require_module
from normrewrite.passes.reversion import reverted
from normrewrite.sites.undo import undone_on_error


def revert(twin: nn.Module) -> nn.Module:
    """A copy of `twin` with torch's norms; `revert_` does it in place.

    >>> back = revert(convert(model))          # the same bits as model, parameter by parameter

    After training the nearest native norm comes back: the same function in eval. Raises NormRewriteError where the model
    holds none of normrewrite's norms.
    """
    require_module(twin)
    return revert_(deepcopy(twin))


def revert_(twin: nn.Module) -> nn.Module:
    """`revert` in place. Returns the model, or the new root where the model itself is a norm. On an error it is as it was."""
    require_module(twin)
    with undone_on_error(twin):
        return reverted(twin)[0]
