"""What the report tells of a network, as data. Statistics are those of `inspect --advise`: normrewrite.api.advise.study.

>>> facts = gather(twin, original, data)
>>> facts.sites[0].kappa, facts.sites[0].scale_before
(0.94, Spread(middle=0.71, low=0.22, high=1.9))
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from normrewrite import sites
from normrewrite.api.advise import Advice, SiteAdvice, study
from normrewrite.api.bench import Bench
from normrewrite.api.inspect import SiteFacts
from normrewrite.api.inspect import inspect as inspect_model
from normrewrite.api.verify import verify
from normrewrite.data import Data
from normrewrite.diagnostics.comparison import Comparison
from normrewrite.diagnostics.moments import Moments, Rows, every_row
from normrewrite.diagnostics.remeasure import had_back, measure
from normrewrite.errors import NormRewriteError
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.weights import WeightNorm
from normrewrite.norms import metric
from normrewrite.options.groups import BatchSize
from normrewrite.passes.fold_affine import scale_of
from normrewrite.provenance import manifest
from normrewrite.provenance.report import Report, SiteResult
from normrewrite.reporting.histograms import Counter
from normrewrite.sites import Site, neighbours


@dataclass(frozen=True)
class Spread:
    """One figure by channel: its median, smallest and largest."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor | None) -> "Spread | None":
        if values is None or not values.numel():
            return None
        return cls(float(values.median()), float(values.min()), float(values.max()))


@dataclass(frozen=True)
class SiteFigures:
    """One site. was: its class before; target: what it became, None where it stays, for the reason in `note`.

    scale_before, scale_after: what it divides by in eval; read: C * S of its real inputs over the standard deviation
    (kappa); weight_before, weight_after: the 2-norms of the weights in front, by output channel; advice: of
    normrewrite.api.advise, where there was data; histogram: shares of its inputs, see normrewrite.reporting.histograms.
    """

    name: str
    was: str
    target: str | None
    refused: bool
    channels: int | None
    note: str = ""
    difference: float | None = None
    error: float | None = None
    tolerance: float | None = None
    scale_before: Spread | None = None
    scale_after: Spread | None = None
    weight_before: Spread | None = None
    weight_after: Spread | None = None
    kappa: float | None = None
    advice: SiteAdvice | None = None
    histogram: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.name or "(the model itself)"


@dataclass
class Facts:
    """Everything that the report tells, but for the files: normrewrite.commands.report adds those."""

    model: nn.Module
    sites: list[SiteFigures]
    parameters: int
    came: str  # where the original comes from: `given`, `had back` from the twin, or `` where none is known
    advice: Advice | None = None
    comparison: Comparison | None = None
    bench: Bench | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def rewritten(self) -> list[SiteFigures]:
        return [site for site in self.sites if site.target is not None]

    @property
    def exact(self) -> list[SiteFigures]:
        """Rewritten sites that compute the same function in eval."""
        return [site for site in self.rewritten if site.difference is not None and site.tolerance is not None]

    @property
    def ok(self) -> bool:
        """Whether every site that can be the same function is."""
        return all((site.difference or 0.0) <= (site.tolerance or math.inf) for site in self.exact)

    @property
    def difference(self) -> float | None:
        """The largest of any exact site."""
        return max((site.difference for site in self.exact if site.difference is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": type(self.model).__name__,
            "parameters": self.parameters,
            "original": self.came,
            "rewritten": len(self.rewritten),
            "max_difference": self.difference,
            "sites": [asdict(site) for site in self.sites],
            "advice": None if self.advice is None else {**self.advice.as_dict(), "sites": None},
            "network": None if self.comparison is None else self.comparison.as_dict(),
            "latency": None if self.bench is None else self.bench.as_dict(),
            "notes": self.notes,
        }


def gather(
    model: nn.Module,
    original: nn.Module | None = None,
    data: Data | None = None,
    *,
    record: Mapping[str, Any] | None = None,
    batch_size: int = BatchSize.batch_size,
    progress: Callable[..., object] = lambda done, **_: None,
) -> Facts:
    """Measure a model, rewritten or not. original: by default what a twin itself gives back. data: inputs, labels optional.

    record: the twin's manifest, for the reasons of what was left. Raises NormRewriteError where data doesn't fit the model.
    """
    back, trained = had_back(model)
    if original is not None:
        _require_same(original, model)
        back = original
    first = model if back is None else back
    counter, notes = Counter(), []
    if trained:
        gone = (
            "" if original is not None else ", so the original is not in it any more: give it as --original to compare"
        )
        notes.append(f"Trained since the rewrite: {len(trained)} of the sites{gone}.")
    advice, moments = None, dict[str, Moments]()
    if data is not None and sites.find(first):
        advice, readings = study(
            first, data, batch_size=batch_size, rows=_rows_of(model), watch=counter.watch, progress=progress
        )
        moments = readings.by_site
    elif data is not None:
        notes.append("No batch norm is left to read the inputs of: give the original to have them measured.")
    figures = _Figures(model, first, measure(model, original), advice, moments, counter, record or {}).all()
    came = "given" if original is not None else "had back" if back is not None and not trained else ""
    # Without an original it tells the accuracy alone: the nearest norms of a trained twin are no original.
    other = first if came else model
    comparison = None if data is None else verify(model, other, data, batch_size=batch_size, progress=progress)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Facts(model, figures, count, came, advice, comparison, None, notes)


def _require_same(original: nn.Module, twin: nn.Module) -> None:
    """Raises where the original can't be what the twin was made from: other sites, of another class or width."""
    entries = {entry["names"][0]: entry["was"] for entry in manifest.describe(twin)["sites"]}
    modules, now = sites.by_name(original), sites.by_name(twin)
    norms = {name: modules[name] for name in entries if name in modules}  # a lifted norm is none of its
    wrong = [
        f"{name} was {entries[name]}, and is {type(old).__name__} there"
        for name, old in norms.items()
        if type(old).__name__ != entries[name]
    ]
    widths = [
        (name, getattr(now[name], "num_features", None), old.num_features)
        for name, old in norms.items()
        if hasattr(old, "num_features")
    ]
    wrong += [
        f"{name} has {here} channels, and {there} there" for name, here, there in widths if here not in (None, there)
    ]
    if entries and not norms:
        wrong = [f"it has none of the sites, such as {next(iter(entries))}"]
    if wrong:
        raise NormRewriteError(
            f"--original is another network than the one that was rewritten: {'; '.join(wrong[:4])}."
        )


def _rows_of(model: nn.Module) -> Callable[[Site, int], Rows]:
    """Every metric, and the twin's own at each site."""
    modules = sites.by_name(model)

    def rows(site: Site, n: int) -> Rows:
        twin = modules.get(site.name)
        known = list(every_row(site, n))
        own = [(metric(twin.metric), twin.gain)] if isinstance(twin, BatchNorm) else []
        return known + [(row, gain) for row, gain in own if str(row) not in {str(other) for other, _ in known}]

    return rows


@dataclass
class _Figures:
    """Everything that is known of the sites, put together by name."""

    model: nn.Module
    first: nn.Module
    report: Report
    advice: Advice | None
    moments: Mapping[str, Moments]
    counter: Counter
    record: Mapping[str, Any]

    def all(self) -> list[SiteFigures]:
        self.modules = sites.by_name(self.first), sites.by_name(self.model)
        self.measured = {site.names[0]: site for site in self.report.sites}
        self.advised = {site.name: site for site in self.advice.sites} if self.advice else {}
        attached = neighbours.attach(self.first, sites.find(self.first))
        self.layers = {site.name: site.before.name for site in attached if site.before is not None}
        inspected = {facts.names[0]: facts for facts in inspect_model(self.model).sites}
        order = {name: i for i, name in enumerate(self.modules[1])}
        names = sorted({*inspected, *self.measured}, key=lambda name: order.get(name, 0))
        return [self._of_site(name, inspected.get(name), self.measured.get(name)) for name in names]

    def _of_site(self, name: str, facts: SiteFacts | None, result: SiteResult | None) -> SiteFigures:
        advice = self.advised.get(name or "(the model itself)")
        scales = [scale_of(modules.get(name)) for modules in self.modules]
        weights = [self._weights(modules, name) for modules in self.modules]
        histogram = self.counter.by_site.get(name)
        common: dict[str, Any] = {
            "scale_before": Spread.of(scales[0]),
            "scale_after": Spread.of(scales[1]) if result is not None else None,
            "weight_before": weights[0],
            "weight_after": weights[1] if weights[1] != weights[0] else None,
            "kappa": self._kappa(name, str(advice and advice.target) if result is None else str(result.target)),
            "advice": advice,
            "histogram": [] if histogram is None else histogram.share(),
        }
        if result is None:
            assert facts is not None
            note = facts.refusal or self._reason(name)
            return SiteFigures(name, facts.kind, None, facts.refusal is not None, facts.channels, note, **common)
        figures = result.difference, result.error, result.tolerance
        channels = result.channels or (None if facts is None else facts.channels)
        return SiteFigures(name, result.was, result.target, False, channels, result.note, *figures, **common)

    def _reason(self, name: str) -> str:
        """Why the rewrite left it, as its manifest says."""
        entries = self.record.get("report", {}).get("sites", [])
        return next((str(entry.get("reason") or "") for entry in entries if entry["names"][0] == name), "")

    def _weights(self, modules: Mapping[str, nn.Module], name: str) -> Spread | None:
        layer: Any = modules.get(self.layers.get(name, name))
        if not isinstance(layer, neighbours.LAYERS) or layer.weight.is_meta:
            return None
        return Spread.of(WeightNorm(layer).right_inverse(layer.weight.detach())[1])

    def _kappa(self, name: str, target: str) -> float | None:
        """Of the metric that the site became, or that suits it."""
        moments = self.moments.get(name)
        if moments is None or target not in moments.scales:
            return None
        kappa = moments.kappa(target)
        return None if math.isnan(kappa) else kappa
