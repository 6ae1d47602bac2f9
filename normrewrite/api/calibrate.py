"""Bring training nearer to eval: scale each norm to what its metric really reads on the network's own data.

>>> twin, calibration = calibrate(twin, images, batch_size=250)          # no labels needed

A conversion assumes Gaussian inputs in training. Here S_c, the metric's scale by channel, is measured in eval mode at each
site's own input, and running_scale = S_c - eps, weight' = weight * S_c / (old running_scale + eps). Eval computes the same
function as before, and each norm in training matches that on average, so that a network in training comes nearer to its
original's eval; to its original's training it may come nearer or not, and both are measured. S depends on the number of
elements, so the batch size must be that of the training to come; scales are averaged over the calls, and batches that are not
finite are left out.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite import sites
from normrewrite.data import Batch, Data, argument_names, as_data
from normrewrite.diagnostics.exactness import Probe, in_eval, tolerance
from normrewrite.diagnostics.least_squares import Fit, fit_, fittable
from normrewrite.diagnostics.moments import Moments, Rows, headroom, left_out, read
from normrewrite.diagnostics.training_mode import TrainingDistance, TrainingMode
from normrewrite.errors import NormRewriteError
from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.nn.parts import deepcopy
from normrewrite.norms import metric
from normrewrite.options.fields import callback, options, quiet, takes
from normrewrite.options.groups import BatchSize
from normrewrite.passes.reversion import untrained
from normrewrite.results import Result, Summary, Table
from normrewrite.sites import Site
from normrewrite.tolerances import worst

# Weight norms, affines and frozen norms are exact; the strict form is not, but has no gain that could take a fit.
NOTHING = "there is nothing to calibrate: no rewritten site measures its input, in training or in eval."


@dataclass(frozen=True)
class SiteCalibration:
    """One site. kappa: C * S over the standard deviation of its real inputs, median over live channels (1 on Gaussians);
    ratio: the factor on weight, median, smallest and largest; headroom: powers of two between 65504 and the largest sum of
    |d| and of d*d over the elements of a channel, negative where fp16 would overflow; difference: of eval, before and after.
    """

    name: str
    calls: int
    kappa: float | None
    ratio: tuple[float, float, float] | None
    dead: int
    channels: int
    headroom_sums: float | None
    headroom_squares: float | None
    difference: float | None
    note: str = ""


@dataclass
class Calibration(Result):
    """Every site of a calibration, what of the data was left out, and what it did to training (None: that wasn't measured)."""

    sites: list[SiteCalibration]
    fits: list[Fit] = field(default_factory=list)
    inputs: int = 0
    skipped_batches: int = 0
    notes: list[str] = field(default_factory=list)
    training: TrainingDistance | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> Summary:
        training = [] if self.training is None else self.training.summary()
        return [*self._fitted(), *self._matched(), *training, *self.notes]

    def _fitted(self) -> Summary:
        if not self.fits:
            return []
        lines = [
            (fit.name, str(fit.channels or ""), f"{100 * fit.copied:.1f} %", f"{100 * fit.explained:.1f} %", fit.note)
            for fit in self.fits
        ]
        heads = ("site", "channels", "explained as copied", "explained", "note")
        return [f"{len(self.fits)} sites fitted to the original on {self.inputs} inputs", Table(heads, lines)]

    def _matched(self) -> Summary:
        if not self.sites:
            return []
        count = f"{sum(site.ratio is not None for site in self.sites)} sites calibrated on {self.inputs} inputs"
        if self.skipped_batches:
            count += f"; {left_out(self.skipped_batches)}"
        return [count, Table(_HEADS, [_cells(site) for site in self.sites])]


_HEADS = (
    "site",
    "kappa",
    "ratio (smallest, largest)",
    "dead",
    "fp16 sums",
    "fp16 squares",
    "eval difference",
    "note",
)


def _cells(site: SiteCalibration) -> tuple[str, ...]:
    if site.kappa is None or site.ratio is None:
        return (site.name, "", "", "", "", "", "", site.note)
    middle, low, high = site.ratio
    return (
        site.name,
        f"{site.kappa:.3f}",
        f"{middle:.3f} ({low:.3f}, {high:.3f})",
        f"{site.dead}/{site.channels}" if site.dead else "",
        f"{site.headroom_sums:+.1f} bits",
        f"{site.headroom_squares:+.1f} bits",
        f"{site.difference:.1e}",
        site.note,
    )


@options
class CalibrateCall(BatchSize):
    """What `calibrate` and `calibrate_` take in Python."""

    twin: nn.Module = field(kw_only=False)
    data: Tensor | Data | Iterable[Any] = field(kw_only=False)
    original: nn.Module | None = None
    progress: Callable[..., object] = callback(default=quiet)


@takes(CalibrateCall)
def calibrate(options: CalibrateCall) -> tuple[nn.Module, Calibration]:
    """A copy of `twin` whose norms in training compute on average what they do in eval; `calibrate_` does it in place.

    >>> twin, calibration = calibrate(convert(model, to="l1"), images, batch_size=64)

    Norms that can't be exact (group, layer, ...) are fitted to what the original computes
    (normrewrite.diagnostics.least_squares); it is had back from the twin, or given as `original` where the twin was
    trained since.
    data: (N, ...) inputs, Data, or an iterable of batches (a tensor, (tensor, labels) or a dict each), no labels needed.
    What it does to training is measured on the first two batches: Calibration.training.
    batch_size: that of the training to come; a smaller last batch is left out. progress: called with the inputs done.
    Raises NormRewriteError where no site can be calibrated or the data doesn't fit the model.
    """
    return _calibrated(replace(options, twin=deepcopy(options.twin)))


@takes(CalibrateCall)
def calibrate_(options: CalibrateCall) -> tuple[nn.Module, Calibration]:
    """`calibrate` in place: parameters stay the same objects."""
    return _calibrated(options)


def _calibrated(options: CalibrateCall) -> tuple[nn.Module, Calibration]:
    twin, batch_size, original, progress = options.twin, options.batch_size, options.original, options.progress
    if not calibratable(twin) and any(map(sites.is_rewritten, twin.modules())):
        raise NormRewriteError(NOTHING)
    examples = as_data(options.data, argument_names(twin))
    fits: list[Fit] = []
    if fittable(twin):
        teacher = original or untrained(twin, "Give that one as `original`.")
        fits = fit_(twin, teacher, examples, batch_size=batch_size, progress=progress)
    norms = [site for site in sites.find(twin) if isinstance(site.module, BatchNorm)]
    if not norms and fits:
        return twin, _fits_alone(fits, examples, batch_size)
    if not norms:
        raise NormRewriteError(f"{type(twin).__name__} holds no norm of normrewrite's. Convert it first.")
    shared = sites.shared_parameters(twin)
    usable = [site for site in norms if _why_not(site, shared) is None]
    if not usable:
        raise NormRewriteError(f"no site can be calibrated. {norms[0].label}: {_why_not(norms[0], shared)}.")
    readings = read(twin, usable, examples, _rows, batch_size=batch_size, progress=progress)
    probe, calibrated = Probe(), list[SiteCalibration]()

    def apply() -> None:
        calibrated.extend(
            _apply(site, readings.by_site.get(site.name), probe, _why_not(site, shared)) for site in norms
        )

    distance, notes = _around(apply, twin, original, readings.first)
    return twin, Calibration(calibrated, fits, readings.inputs, readings.skipped_batches, notes, distance)


def _around(
    apply: Callable[[], None], twin: nn.Module, original: nn.Module | None, batches: list[Batch]
) -> tuple[TrainingDistance | None, list[str]]:
    """Calibrates, and says how far training is from the original before and after; or why that can't be said."""
    try:
        mode = TrainingMode(batches, twin, original or _original_in(twin))
        before = mode.apart(twin)
    except NormRewriteError as error:  # training needs two values a channel, say
        apply()
        return None, [f"training was not measured: {error}"]
    apply()
    return mode.distance(before, mode.apart(twin)), []


def _original_in(twin: nn.Module) -> nn.Module | None:
    try:
        return untrained(twin, "")
    except NormRewriteError:  # it was trained since, or is none of ours
        return None


def calibratable(twin: nn.Module) -> bool:
    """Whether any site can be matched or fitted at all."""
    return bool(fittable(twin)) or any(isinstance(module, BatchNorm) for module in twin.modules())


def _fits_alone(fits: list[Fit], data: Data, batch_size: int) -> Calibration:
    sizes = [len(batch) if batch.finite else 0 for batch in data.batches(batch_size)]
    skipped = sizes.count(0)
    notes = [left_out(skipped)] if skipped else []
    return Calibration([], fits, sum(sizes), skipped, notes)


def _why_not(site: Site, shared: set[int]) -> str | None:
    norm = site.module
    if norm.weight is not None and id(norm.weight) in shared:
        return "its weight is shared with another module"
    if isinstance(norm, FrozenBatchNorm):
        return "frozen: training never measures it"
    if norm.running_mean is None:
        return "live statistics: eval measures them too"
    return "no affine parameters that could take the factor" if norm.weight is None else None


def _rows(site: Site, n: int) -> Rows:
    norm = site.module
    assert isinstance(norm, BatchNorm)
    return [(metric(norm.metric), norm.gain), (metric("l2"), "exact")]


@torch.no_grad()
def _apply(site: Site, reading: Moments | None, probe: Probe, refusal: str | None) -> SiteCalibration:
    norm = site.module
    assert isinstance(norm, BatchNorm)
    if reading is None or not reading.calls or norm.running_scale is None or norm.weight is None:
        note = refusal or "not reached by the data"
        return SiteCalibration(site.label, 0, None, None, 0, norm.num_features, None, None, None, note)
    x = probe.input(norm)
    before = in_eval(norm, x)
    measured = reading.scales[norm.metric].mean.to(norm.running_scale)
    ratio = (measured + norm.eps) / (norm.running_scale + norm.eps)
    _remember(norm, measured, (norm.weight * ratio).to(norm.weight.dtype))
    difference, limit = worst(in_eval(norm, x), before), tolerance(norm)
    if difference > limit:
        raise NormRewriteError(
            f"{site.label}: eval differs by {difference:.2g} after calibration, tolerance {limit:.2g}.", exit_code=1
        )
    return SiteCalibration(
        site.label,
        reading.calls,
        reading.kappa(norm.metric),
        (float(ratio.median()), float(ratio.min()), float(ratio.max())),
        int(reading.dead.sum()),
        norm.num_features,
        headroom(reading.sums),
        headroom(reading.squares),
        difference,
        f"{reading.skipped} calls were not finite" if reading.skipped else "",
    )


def _remember(norm: BatchNorm, scale: Tensor, weight: Tensor) -> None:
    """Set the calibrated tensors, and keep what revert is to give back: the originals, or the nearest where trained since."""
    assert norm.running_scale is not None and norm.weight is not None
    before = {"running_var": norm.running_scale.clone(), "weight": norm.weight.detach().clone()}
    norm.running_scale.copy_(scale)
    norm.weight.copy_(weight)
    origin = norm.origin
    if origin is None or origin.forgotten or issubclass(origin.kind, BatchNorm):  # the last: it was ours before
        return
    nearest = before | {"running_var": ((before["running_var"] + norm.eps) ** 2 - norm.eps).clamp_min(0)}
    originals, exact = origin.restore(before, nearest)
    origin.trained.fill_(not exact)
    origin.converted("running_var", norm.running_scale, originals["running_var"])
    origin.converted("weight", norm.weight, originals["weight"])
