"""A twin taken back whole: every site that a pass can give back, and which of them training has changed.

>>> original, names, trained = reverted(deepcopy(twin))
"""

from torch import nn

from normrewrite import sites
from normrewrite.errors import NormRewriteError
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import deepcopy
from normrewrite.nn.weights import WeightNorm
from normrewrite.passes.restore_native import RestoreNative


def reverted(twin: nn.Module) -> tuple[nn.Module, list[str], list[str]]:
    """In place; also the names of the sites that came back, and of those that had been trained since."""
    rewrite = RestoreNative()
    ours = sites.find(twin, lambda module: isinstance(module, BatchNorm) or rewrite.gives_back(module))
    if not ours:
        held = f"{type(twin).__name__} holds no norm of normrewrite's"
        why = "what its norms were was forgotten" if any(map(sites.is_rewritten, twin.modules())) else held
        raise NormRewriteError(f"{why}, so there is nothing to revert.")
    for site in ours:
        refusal = rewrite.why_not(site)
        if refusal:
            raise NormRewriteError(f"{site.label}: {refusal}")
    model, _ = rewrite.apply(twin, ours)
    return model, [site.name for site in ours], rewrite.trained


def untrained(twin: nn.Module, remedy: str) -> nn.Module:
    """What the twin was made from, out of the twin itself; `remedy` ends the error where training has lost it."""
    lost = sites.find(twin, lambda module: sites.is_rewritten(module) and not sites.gives_back(module))
    if lost:
        raise NormRewriteError(
            f"{lost[0].label}: what it was has been forgotten, so the original network is not in the twin any more. {remedy}"
        )
    original, _, trained = reverted(deepcopy(twin))
    if trained:
        raise NormRewriteError(
            f"{trained[0]}: was trained since the rewrite, so the original network is not in it any more. {remedy}"
        )
    return original


def forget_(twin: nn.Module) -> None:
    """No tensor stays of what the modules were, only class and settings; a weight norm needs no checksum then."""
    for module in twin.modules():
        if isinstance(module, Origin):
            module.tensors.clear()
        elif isinstance(module, WeightNorm):
            module._buffers.pop("checksum", None)
