"""A twin's sites, measured again: against the norms that they were, as the conversion measured them.

>>> measure(twin).max_difference
2.4e-07
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from normrewrite import sites
from normrewrite.diagnostics.exactness import Probe, measured, tolerance
from normrewrite.nn.parts import deepcopy
from normrewrite.passes.reversion import reverted
from normrewrite.provenance import manifest
from normrewrite.provenance.report import Report, SiteResult
from normrewrite.sites import Site


def had_back(twin: nn.Module) -> tuple[nn.Module | None, list[str]]:
    """What the twin was made from, out of itself, and the sites trained since; None where nothing of it is left."""
    if not any(map(sites.gives_back, twin.modules())):
        return None, []
    model, _, trained = reverted(deepcopy(twin))
    return model, trained


def measure(twin: nn.Module, original: nn.Module | None = None) -> Report:
    """Each rewritten site of a twin against the norm that it was, measured now: a Report as that of the conversion.

    original: what to compare with; by default what the twin itself gives back. Sites trained since have no tolerance, and
    no figure without the original.
    """
    back, trained = had_back(twin)
    now, first, nearest = ({} if model is None else sites.by_name(model) for model in (twin, original, back))
    probe = Probe()
    results = []
    for entry in manifest.describe(twin)["sites"]:
        name, layer = entry["names"][0], entry.get("layer")
        site = Site(tuple(entry["names"]), now[name], ())
        since = "trained since the rewrite" if name in trained else ""
        old = first.get(name) or (None if since else nearest.get(name))
        if old is None:
            note = since or ("the original was forgotten" if entry.get("forgotten") else "folded away for good")
            results.append(SiteResult(site.names, entry["was"], site.channels, entry["to"], None, None, None, note))
            continue
        layers = (None, None) if layer is None else (first.get(layer) or nearest.get(layer), now.get(layer))
        result = _measured(site, old, layers, entry, probe)
        results.append(replace(result, tolerance=None, note=since) if since else result)
    return Report(results)


def _measured(
    site: Site,
    old: nn.Module,
    layers: tuple[nn.Module | None, nn.Module | None],
    entry: Mapping[str, Any],
    probe: Probe,
) -> SiteResult:
    """layers: the one in front, before and now, where the norm was folded into it; entry: the site's, of a manifest."""
    origin = sites.origin_of(site.module)
    inexact = "" if origin is None else origin.inexact
    difference, error = measured((layers[0], old), (layers[1], site.module), inexact, probe)
    channels = site.channels or getattr(old, "num_features", None)
    limit = None if inexact else tolerance(old)
    return SiteResult(site.names, entry["was"], channels, entry["to"], difference, limit, None, inexact, error)
