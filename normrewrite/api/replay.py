"""A manifest, carried out on another checkpoint of the same architecture.

>>> twin, report = rewritten_again(model, record, "model.l1.json")
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from normrewrite import sites
from normrewrite.diagnostics.remeasure import measure
from normrewrite.errors import NormRewriteError
from normrewrite.nn.parts import deepcopy
from normrewrite.provenance import manifest
from normrewrite.provenance.report import Report, SiteResult
from normrewrite.sites import Walk


def rewritten_again(model: nn.Module, record: Mapping[str, Any], where: str) -> tuple[nn.Module, Report]:
    """A copy of `model`, rewritten site by site as the record says, and each site measured against the norm that it was.

    Calibration is of the other checkpoint's tensors, so it is not carried over, and nothing is forgotten. where: for messages,
    whose record it is.
    Raises NormRewriteError, by name, where a site is missing, is of another class or width, or is not in the record.
    """
    if not record["sites"]:
        raise NormRewriteError(f"{where}: its manifest rewrites nothing, so there is nothing to replay.")
    wrong = list(_mismatches(model, record))
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise NormRewriteError(
            f"{where}: its sites are not this model's: {'; '.join(wrong[:4])}{more}. Replay is for another checkpoint of the "
            "same architecture; others are rewritten with --to."
        )
    fresh = [{**entry, "calibrated": False, "forgotten": False} for entry in record["sites"]]
    twin = manifest.replay(deepcopy(model), {**record, "sites": fresh}, where)
    report = measure(twin, model)
    manifest.remember(twin, report.as_dict())
    rewritten = {name for site in report.sites for name in site.names}
    left = [site for site in sites.find(model) if site.name not in rewritten]
    return twin, Report([*report.sites, *(SiteResult.kept(site, "not rewritten in the manifest") for site in left)])


def _mismatches(model: nn.Module, record: Mapping[str, Any]) -> Iterator[str]:
    walk = Walk(model)
    places = {name: walk.site(module) for name, module in walk.by_name.items()}
    lines = {line["names"][0]: line for line in record.get("report", {}).get("sites", [])}
    for entry in record["sites"]:
        name = entry["names"][0]
        site, channels = places.get(name), lines.get(name, {}).get("channels")
        if site is not None and site.kind != entry.get("was"):
            yield f"{name} was {entry.get('was')}, here {site.kind}"
        elif site is not None and channels is not None and site.channels not in (None, channels):
            yield f"{name} had {channels} channels, here {site.channels}"
    known = {*lines, *(entry["names"][0] for entry in record["sites"])}
    yield from (f"{site.name} is not in the manifest" for site in walk.find() if lines and site.name not in known)
