"""The manifest: the JSON record of a rewrite inside the saved file, enough to replay it, to check it and to undo it.

{"normrewrite": "0.1.0", "format": 1, "torch": "2.13.0", "versions": {...},
 "sites": [{"names": ["bn1"], "was": "BatchNorm2d", "to": "l1", "gain": "exact", "difference": 1.2e-07, "error": 1.4e-07}, ...],
 "report": {...}, "original": {"file": ..., "bytes": ..., "sha256": ...}, "arch": "zoo.py:resnet20", "steps": [...],
 "tensors": {"bn1.weight": "<sha256>", ...}, "sha256": "<of all this>"}

A norm that a layer took in has the `layer`; one whose original was forgotten is `forgotten`; one of each sample has the `offset`
that was asked for, or is what 0.1.0 made of it. difference, error: normrewrite.diagnostics.exactness; original, arch, steps:
normrewrite.provenance.history; tensors, sha256:
normrewrite.provenance.digests; what an int8 training learned is in "int8": normrewrite.provenance.ranges.
Older files have no `versions`, and nothing that stands behind `report`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite import sites
from normrewrite._version import __version__
from normrewrite.errors import NormRewriteError, first_line
from normrewrite.nn.affine import ChannelAffine
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.offset import Size
from normrewrite.nn.stand_in import StandIn
from normrewrite.norms import GAINS, Gain
from normrewrite.outside import CODE, endless, is_name
from normrewrite.passes import Rewrite
from normrewrite.passes.lift_functional import lift_
from normrewrite.passes.reversion import forget_
from normrewrite.passes.swap_metric import SCOPES
from normrewrite.provenance import digests, history, ranges
from normrewrite.provenance.history import History
from normrewrite.provenance.ranges import LearnedRanges
from normrewrite.provenance.report import Report
from normrewrite.sites import Site, Walk
from normrewrite.sites.neighbours import is_layer
from normrewrite.sites.refusal import Refusal
from normrewrite.targets import measures
from normrewrite.targets import rewrite as make

KEY = "normrewrite"
FORMAT = 1
TOLD = (
    "was",
    "to",
    "gain",
    "calibrated",
    "forgotten",
    "layer",
    "offset",
)  # what a twin tells of a site, beside figures


def describe(model: nn.Module, report: Report | None = None, learned: LearnedRanges | None = None) -> dict[str, Any]:
    """The manifest of a twin, read off the twin itself; the report of the rewrite, and the ranges that were learned, go
    along where they are at hand."""
    record: dict[str, Any] = {KEY: __version__, "format": FORMAT, "torch": str(torch.__version__), "sites": []}
    names = {id(module): name for name, module in model.named_modules()}
    for site in sites.find(model, lambda module: bool(entry_of(module))):
        layer = [names[id(each)] for each in getattr(site.module, "layer", ()) if id(each) in names]
        record["sites"].append(
            {"names": list(site.names), **entry_of(site.module), **({"layer": layer[0]} if layer else {})}
        )
    if report is not None:
        record["report"] = report.as_dict()
    if learned is not None:
        record[ranges.KEY] = learned.as_dict()
    return record


def seal(record: dict[str, Any], state: Mapping[str, Any], came: History | None = None) -> dict[str, Any]:
    """The record with where the twin came from, the versions, and the digests of the tensors in `state` and of itself."""
    made = {"versions": history.versions(), "tensors": digests.of_tensors(state)}
    whole = (came or History()).as_dict() | record | made  # a report of now stands before one of then
    return whole | {"sha256": digests.of_record(whole)}


def entry_of(module: nn.Module) -> dict[str, Any]:
    """What a module became, if it is a site of a rewrite. A layer that took a norm in is none: that norm's place tells."""
    origin = sites.origin_of(module)
    if origin is not None and origin.target:
        return {
            "was": origin.kind.__name__,
            "to": origin.target,
            "gain": origin.gain,
            "difference": origin.difference,
            "error": origin.error,
            "calibrated": hasattr(origin, "weight"),
            **({"forgotten": True} if origin.forgotten else {}),
            **({} if origin.offset_size is None else {"offset": origin.offset_size}),
        }
    was = module.folded if isinstance(module, StandIn | ChannelAffine) else ""
    return {"was": was, "to": "none", "gain": "exact"} if was else {}


def check(record: object, where: str) -> dict[str, Any]:
    """The record, if it is a manifest that can be believed; raises NormRewriteError with what is wrong."""
    if endless(record):
        raise NormRewriteError(
            f"{where}: its manifest is nested without end. The file is damaged or not normrewrite's."
        )
    if not isinstance(record, dict) or not isinstance(record.get("sites"), list):
        raise NormRewriteError(
            f"{where}: its manifest is no record of sites. The file is damaged or not normrewrite's."
        )
    if record.get("format") != FORMAT:
        raise NormRewriteError(
            f"{where}: its manifest has format {record.get('format')!r}, this version reads {FORMAT}. Update normrewrite."
        )
    for entry in record["sites"]:
        _check_site(entry, where)
    ranges.of_record(record, where)
    history.checked(record, where)
    return record


def read(path: Path) -> dict[str, Any]:
    """The manifest in a JSON file, checked; also where it is the `manifest` of a larger object, as `report --json` prints."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise NormRewriteError(f"{path}: can't be read as JSON ({first_line(error)}).") from error
    return check(content["manifest"] if isinstance(content, dict) and "manifest" in content else content, str(path))


def _check_site(entry: object, where: str) -> None:
    named = isinstance(entry, dict) and isinstance(entry.get("names"), list) and entry["names"]
    if not isinstance(entry, dict) or not named or not all(isinstance(name, str) for name in entry["names"]):
        raise NormRewriteError(f"{where}: a site of its manifest has no names. The file is damaged.")
    if unfit := next((name for name in entry["names"] if not is_name(name)), None):
        raise NormRewriteError(f"{where}: its manifest has a site {unfit!r:.80}: {CODE}.")
    figures = [entry.get(name) for name in ("difference", "error")]
    if not all(figure is None or isinstance(figure, int | float) for figure in figures):
        raise NormRewriteError(f"{where}: site {entry['names'][0]!r} of its manifest has figures that are no numbers.")
    if entry.get("gain") not in GAINS or not isinstance(entry.get("to"), str):
        raise NormRewriteError(f"{where}: site {entry['names'][0]!r} of its manifest has no valid target or gain.")
    try:
        make(entry["to"], entry["gain"], offset=entry.get("offset"))
    except NormRewriteError as error:
        raise NormRewriteError(f"{where}: site {entry['names'][0]!r} of its manifest: {error}") from error


def replay(model: nn.Module, record: dict[str, Any], where: str) -> nn.Module:
    """Rewrite `model` in place as the record says, without measuring anything; returns it, or its new root."""
    walk = Walk(model)
    if any(entry["names"][0] not in walk.by_name for entry in record["sites"]):
        model = lift_(model)
        walk = Walk(model)
    known = {key: _pass_and_sites(walk, *key) for key in dict.fromkeys(map(_asked, record["sites"]))}
    done: set[str] = set()
    for entry in record["sites"]:
        rewrite, places = known[_asked(entry)]
        site = places.get(entry["names"][0])
        if site is None:
            raise NormRewriteError(
                f"{where}: its manifest rewrites {entry['names'][0]!r}, and the architecture has no norm of that name. "
                "Is --arch the one that the file was converted with?"
            )
        site = _with_layer(model, site, entry.get("layer"), where)
        refusal = Refusal("it is rewritten already") if site.name in done else rewrite.refusal(site)
        done.add(site.name)
        if refusal is not None:
            raise NormRewriteError(f"{where}: {site.label} can't be rewritten as its manifest says: {refusal}")
        model, [rewritten] = rewrite.apply(model, [site])
        norm = rewritten.norm
        for module in (norm, *getattr(norm, "layer", ())) if entry.get("forgotten") else ():
            forget_(module)
        if entry.get("calibrated") and isinstance(norm, BatchNorm) and isinstance(norm.weight, Tensor):
            norm.origin.converted("weight", norm.weight, norm.weight)  # type: ignore[union-attr]  # room for what the file holds
    return model


def remember(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give a rewritten model the figures of its sites, as a record or a report tells them."""
    modules = dict(model.named_modules())
    for entry in record["sites"]:
        origin = None if entry["names"][0] not in modules else sites.origin_of(modules[entry["names"][0]])
        if origin is not None:
            origin.difference, origin.error = entry.get("difference"), entry.get("error")


def _asked(entry: Mapping[str, Any]) -> tuple[str, Gain, Size | None]:
    return entry["to"], entry["gain"], entry.get("offset")


def _pass_and_sites(walk: Walk, to: str, gain: Gain, offset: Size | None) -> tuple[Rewrite, dict[str, Site]]:
    rewrite = make(to, gain, SCOPES if measures(to) else ("batch",), offset=offset)
    seen = rewrite.look(walk.model, walk.find(rewrite.wants))
    return rewrite, {name: site for site in seen for name in site.names}


def _with_layer(model: nn.Module, site: Site, layer: object, where: str) -> Site:
    """The site with the layer that took it in: convert may have known it from example inputs, which no file holds."""
    if not layer or site.before is not None:
        return site
    before = next((each for each in sites.find(model, is_layer) if layer in each.names), None)
    if before is None:
        raise NormRewriteError(
            f"{where}: its manifest folds {site.label} into {layer!r}, and the architecture has no such layer. "
            "Is --arch the one that the file was converted with?"
        )
    return replace(site, before=before, alone="")
