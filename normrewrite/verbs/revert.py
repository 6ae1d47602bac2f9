"""The way back: torch's own norms from ours, to the bit where nothing was trained since."""

from torch import nn

from normrewrite import sites
from normrewrite.errors import NormRewriteError
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.parts import deepcopy, require_module
from normrewrite.passes import RestoreNative
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


def reverted(twin: nn.Module) -> tuple[nn.Module, list[str], list[str]]:
    """In place; also the names of the sites that came back, and of those that had been trained since."""
    rewrite = RestoreNative()
    found = sites.find(twin, lambda module: isinstance(module, BatchNorm) or rewrite.gives_back(module))
    if not found:
        raise NormRewriteError(f"{type(twin).__name__} holds no norm of normrewrite's, so there is nothing to revert.")
    for site in found:
        refusal = rewrite.why_not(site)
        if refusal:
            raise NormRewriteError(f"{site.label}: {refusal}")
    model, _ = rewrite.apply(twin, found)
    return model, [site.name for site in found], rewrite.trained


def untrained(twin: nn.Module, remedy: str) -> nn.Module:
    """What the twin was made from, out of the twin itself; `remedy` ends the error where training has lost it."""
    original, _, trained = reverted(deepcopy(twin))
    if trained:
        raise NormRewriteError(
            f"{trained[0]}: was trained since the rewrite, so the original network is not in it any more. {remedy}"
        )
    return original
