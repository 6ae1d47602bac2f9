"""Make training match: scale each norm to what its metric really reads on the network's own data.

>>> twin, calibration = calibrate(twin, images, batch_size=250)          # no labels needed

A conversion assumes Gaussian inputs in training. Here S_c, the metric's scale by channel, is measured in eval mode at each
site's own input, and running_scale = S_c - eps, weight' = weight * S_c / (old running_scale + eps). Eval computes the same
function as before, and training now matches it on average. S depends on the number of elements, so the batch size must be
that of the training to come; scales are averaged over the calls, and batches that are not finite are left out.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite import sites
from normrewrite.data import Batch, Data, argument_names, as_data
from normrewrite.errors import NormRewriteError
from normrewrite.exactness import Probe, in_eval, tolerance
from normrewrite.least_squares import Fit, fit_, fittable
from normrewrite.lower import eager
from normrewrite.lower.families import wide
from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.nn.origin import Origin
from normrewrite.norms import metric
from normrewrite.report import table
from normrewrite.revert import reverted
from normrewrite.sites import Site
from normrewrite.tolerances import worst
from normrewrite.verify import runner

_FP16_MAX = 65504.0


@dataclass
class Reading:
    """What one site's metric read, summed over its calls; every tensor (C,), fp32 or float64."""

    calls: int = 0
    skipped: int = 0
    spread: Any = 0.0
    sigma: Any = 0.0
    sums: float = 0.0
    squares: float = 0.0
    dead: Any = None

    def add(self, norm: BatchNorm, x: Tensor) -> None:
        values = wide(x.detach())
        n = values.numel() // values.shape[1]
        row = metric(norm.metric)
        mean = values.mean([0, *range(2, values.dim())])
        spread = row.gain(n, norm.gain) * eager.measure(values, mean, row)[0]
        if not torch.isfinite(spread).all():
            self.skipped += 1
            return
        sigma, absolute = (eager.measure(values, mean, metric(name))[0] for name in ("l2", "l1"))
        dead = spread <= 1e-6 * mean.abs() + 1e-12  # constant, to the rounding of fp32
        self.dead = dead if self.dead is None else self.dead & dead
        self.calls += 1
        self.spread = self.spread + spread
        self.sigma = self.sigma + sigma
        self.sums = max(self.sums, n * float(absolute.max()))
        self.squares = max(self.squares, n * float(sigma.max()) ** 2)


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
class Calibration:
    """Every site of a calibration, and what of the data was left out."""

    sites: list[SiteCalibration]
    fits: list[Fit] = field(default_factory=list)
    inputs: int = 0
    skipped_batches: int = 0
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(part for part in (self._fitted(), self._matched(), *self.notes) if part)

    def _fitted(self) -> str:
        if not self.fits:
            return ""
        rows = [
            (fit.name, str(fit.channels or ""), f"{100 * fit.copied:.1f} %", f"{100 * fit.explained:.1f} %", fit.note)
            for fit in self.fits
        ]
        head = ("site", "channels", "explained as copied", "explained", "note")
        return f"{len(self.fits)} sites fitted to the original on {self.inputs} inputs\n{table(head, rows)}"

    def _matched(self) -> str:
        if not self.sites:
            return ""
        head = (
            "site",
            "kappa",
            "ratio (smallest, largest)",
            "dead",
            "fp16 sums",
            "fp16 squares",
            "eval difference",
            "note",
        )
        lines = [f"{sum(site.ratio is not None for site in self.sites)} sites calibrated on {self.inputs} inputs"]
        if self.skipped_batches:
            lines[0] += f"; {self.skipped_batches} batches left out, as they were not finite"
        return "\n".join([*lines, table(head, [_row(site) for site in self.sites])])


def _row(site: SiteCalibration) -> tuple[str, ...]:
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


def calibrate(
    twin: nn.Module,
    data: Tensor | Data | Iterable[Any],
    *,
    batch_size: int = 250,
    original: nn.Module | None = None,
    each: Callable[..., object] = lambda done, **_: None,
) -> tuple[nn.Module, Calibration]:
    """A copy of `twin` whose norms read 1 where the original's did; `calibrate_` does it in place.

    Norms that can't be exact (group, layer, ...) are fitted to what the original computes (normrewrite.least_squares); it is
    had back from the twin, or given as `original` where the twin was trained since.
    data: (N, ...) inputs, Data, or an iterable of batches (a tensor, (tensor, labels) or a dict each), no labels needed.
    batch_size: that of the training to come; a smaller last batch is left out. each: called with the inputs done.
    Raises NormRewriteError where no site can be calibrated or the data doesn't fit the model.
    """
    return calibrate_(copy.deepcopy(twin), data, batch_size=batch_size, original=original, each=each)


def calibrate_(
    twin: nn.Module,
    data: Tensor | Data | Iterable[Any],
    *,
    batch_size: int = 250,
    original: nn.Module | None = None,
    each: Callable[..., object] = lambda done, **_: None,
) -> tuple[nn.Module, Calibration]:
    """`calibrate` in place: parameters stay the same objects."""
    if not calibratable(twin) and any(map(sites.is_rewritten, twin.modules())):
        raise NormRewriteError("every rewritten site is exact as it is: there is nothing to calibrate.")
    examples = as_data(data, argument_names(twin))
    fits = fit_(twin, original or _original(twin), examples, batch_size=batch_size, each=each) if fittable(twin) else []
    found = [site for site in sites.find(twin) if isinstance(site.module, BatchNorm)]
    if not found and fits:
        return twin, Calibration([], fits, sum(len(batch) for batch in examples.batches(batch_size)))
    if not found:
        raise NormRewriteError(f"{type(twin).__name__} holds no norm of normrewrite's. Convert it first.")
    shared = sites.shared_parameters(twin)
    usable = [site for site in found if _why_not(site, shared) is None]
    if not usable:
        raise NormRewriteError(f"no site can be calibrated. {found[0].label}: {_why_not(found[0], shared)}.")
    readings = {site.name: Reading() for site in usable}
    inputs, skipped = _run(twin, usable, readings, examples, batch_size, each)
    if not inputs:
        raise NormRewriteError(
            f"nothing to calibrate on: {skipped} batches were not finite." if skipped else "the data held no batch."
        )
    probe = Probe()
    rows = [_apply(site, readings.get(site.name), probe, _why_not(site, shared)) for site in found]
    return twin, Calibration(rows, fits, inputs, skipped)


def calibratable(twin: nn.Module) -> bool:
    """Whether any site can be matched or fitted at all."""
    return bool(fittable(twin)) or any(isinstance(module, BatchNorm) for module in twin.modules())


def _original(twin: nn.Module) -> nn.Module:
    """What the twin was made from, out of the twin itself."""
    original, _, trained = reverted(copy.deepcopy(twin))
    if trained:
        raise NormRewriteError(
            f"{trained[0]}: was trained since the rewrite, so the network it is to be fitted to is not in it any more. "
            "Give that one as `original`."
        )
    return original


def _why_not(site: Site, shared: set[int]) -> str | None:
    norm = site.module
    if norm.weight is not None and id(norm.weight) in shared:
        return "its weight is shared with another module"
    if isinstance(norm, FrozenBatchNorm):
        return "frozen: training never measures it"
    if norm.running_mean is None:
        return "live statistics: eval measures them too"
    return "no affine parameters that could take the factor" if norm.weight is None else None


def _run(
    twin: nn.Module,
    usable: list[Site],
    readings: dict[str, Reading],
    data: Data,
    batch_size: int,
    each: Callable[..., object],
) -> tuple[int, int]:
    """Read every site on every batch, in eval. Returns the inputs used and the batches left out."""
    hooks = [
        site.module.register_forward_pre_hook(_reader(site, readings[site.name]), with_kwargs=True) for site in usable
    ]
    run, inputs, skipped = runner(twin), 0, 0
    try:
        for batch in data.batches(batch_size):
            if inputs and data.whole is not None and len(batch) < batch_size:
                continue
            if _finite(batch):
                run(batch)
                inputs += len(batch)
            else:
                skipped += 1
            each(len(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, skipped


def _finite(batch: Batch) -> bool:
    return all(bool(torch.isfinite(values).all()) for values in batch.inputs.values())


def _reader(site: Site, reading: Reading) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def read(norm: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(norm, BatchNorm)
        try:
            reading.add(norm, *arguments, *named.values())
        except NormRewriteError as error:
            raise NormRewriteError(f"{site.label}: {error}") from error

    return read


@torch.no_grad()
def _apply(site: Site, reading: Reading | None, probe: Probe, refusal: str | None) -> SiteCalibration:
    norm = site.module
    assert isinstance(norm, BatchNorm)
    if reading is None or not reading.calls or norm.running_scale is None or norm.weight is None:
        note = refusal or "not reached by the data"
        return SiteCalibration(site.label, 0, None, None, 0, norm.num_features, None, None, None, note)
    x = probe.input(norm)
    before = in_eval(norm, x)
    measured = (reading.spread / reading.calls).clone()
    ratio = (measured + norm.eps) / (norm.running_scale + norm.eps)
    _remember(norm, measured, (norm.weight * ratio).to(norm.weight.dtype))
    difference, limit = worst(in_eval(norm, x), before), tolerance(norm)
    if difference > limit:
        raise NormRewriteError(
            f"{site.label}: eval differs by {difference:.2g} after calibration, tolerance {limit:.2g}.", exit_code=1
        )
    alive = ~reading.dead
    kappa = (reading.spread / reading.sigma)[alive]
    return SiteCalibration(
        site.label,
        reading.calls,
        float(kappa.median()) if kappa.numel() else math.nan,
        (float(ratio.median()), float(ratio.min()), float(ratio.max())),
        int(reading.dead.sum()),
        norm.num_features,
        _headroom(reading.sums),
        _headroom(reading.squares),
        difference,
        f"{reading.skipped} calls were not finite" if reading.skipped else "",
    )


def _headroom(largest: float) -> float:
    return math.log2(_FP16_MAX / largest) if largest > 0 else math.inf


def _remember(norm: BatchNorm, scale: Tensor, weight: Tensor) -> None:
    """Set the calibrated tensors, and keep what revert is to give back: the originals, or the nearest where trained since."""
    assert norm.running_scale is not None and norm.weight is not None
    before = {"running_var": norm.running_scale.clone(), "weight": norm.weight.detach().clone()}
    norm.running_scale.copy_(scale)
    norm.weight.copy_(weight)
    origin = norm.origin
    if not isinstance(origin, Origin) or issubclass(
        origin.kind, BatchNorm
    ):  # ours from the start: it stays as calibrated
        return
    nearest = before | {"running_var": ((before["running_var"] + norm.eps) ** 2 - norm.eps).clamp_min(0)}
    originals, exact = origin.restore(before, nearest)
    origin.trained.fill_(not exact)
    origin.converted("running_var", norm.running_scale, originals["running_var"])
    origin.converted("weight", norm.weight, originals["weight"])
