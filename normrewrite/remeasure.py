"""A twin's sites, measured again: against the norms that they were, as the conversion measured them.

>>> measure(twin).max_difference
2.4e-07
"""

from contextlib import suppress

from torch import nn

from normrewrite import manifest, sites
from normrewrite.exactness import Probe, measured, tolerance
from normrewrite.nn.parts import deepcopy
from normrewrite.report import Report, SiteResult
from normrewrite.revert import reverted
from normrewrite.sites import Site


def had_back(twin: nn.Module) -> tuple[nn.Module | None, list[str]]:
    """What the twin was made from, out of itself, and the sites trained since; None where nothing of it is left."""
    if not any(map(sites.is_rewritten, twin.modules())):
        return None, []
    model, _, trained = reverted(deepcopy(twin))
    return model, trained


def measure(twin: nn.Module, original: nn.Module | None = None) -> Report:
    """Each rewritten site of a twin against the norm that it was, measured now: a Report as that of the conversion.

    original: what to compare with; by default what the twin itself gives back. Sites trained since have no figure.
    """
    back, trained = had_back(twin)
    names = {id(module): name for name, module in twin.named_modules()}
    probe = Probe()
    results = []
    for site in sites.find(twin, lambda module: bool(manifest.entry_of(module))):
        (was, to), label = (manifest.entry_of(site.module)[key] for key in ("was", "to")), site.name
        layer = next((names[id(each)] for each in getattr(site.module, "layer", ()) if id(each) in names), None)
        old = _at(label, original, back)
        note = "trained since the rewrite" if label in trained else "" if old is not None else "folded away for good"
        if note or old is None:
            results.append(SiteResult(site.names, was, site.channels, to, None, None, None, note))
            continue
        results.append(_measured(site, old, _at(layer, original, back), _at(layer, twin), (was, to), probe))
    return Report(results)


def _measured(
    site: Site, old: nn.Module, before: nn.Module | None, now: nn.Module | None, entry: tuple[str, str], probe: Probe
) -> SiteResult:
    origin = sites.origin_of(site.module)
    inexact = "" if origin is None else origin.inexact
    difference, error = measured((before, old), (now, site.module), inexact, probe)
    channels = site.channels or getattr(old, "num_features", None)
    limit = None if inexact else tolerance(old)
    return SiteResult(site.names, entry[0], channels, entry[1], difference, limit, None, inexact, error)


def _at(name: str | None, *models: nn.Module | None) -> nn.Module | None:
    """The module of that name in the first model that has it."""
    for model in models:
        with suppress(AttributeError):
            if name is not None and model is not None:
                return model.get_submodule(name)
    return None
