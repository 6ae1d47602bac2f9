"""Twins that keep nothing of their original: smaller files, that give away no weights but their own."""

from torch import nn

from normrewrite import sites
from normrewrite.errors import NormRewriteError
from normrewrite.nn.parts import deepcopy, require_module
from normrewrite.passes import reversion


def forget(twin: nn.Module) -> nn.Module:
    """A copy of `twin` without what the way back needs; `forget_` does it in place.

    >>> nr.save(nr.forget(twin), "twin.pt")     # smaller: by half where weights are parametrised

    It computes what the twin computes, and its manifest says what was forgotten. Afterwards `revert` gives the nearest batch
    norms for those of a metric, and leaves the rest as it is; `calibrate` and `finetune` have to be given the original where
    they need one. Raises NormRewriteError where the model holds no rewritten norm.
    """
    require_module(twin)
    return forget_(deepcopy(twin))


def forget_(twin: nn.Module) -> nn.Module:
    """`forget` in place. Returns the model."""
    require_module(twin)
    if not any(map(sites.is_rewritten, twin.modules())):
        raise NormRewriteError(f"{type(twin).__name__} holds no rewritten norm, so there is nothing to forget.")
    reversion.forget_(twin)
    return twin
