"""What norms are fed: moments of each site's own input, by channel, measured in eval on real data.

>>> moments = read(model, sites.find(model), as_data(images, ["x"]), every_row).by_site["bn1"]
>>> moments.n, moments.kappa("l1"), moments.noise("linf"), headroom(moments.squares)
(256000, 0.94, 0.062, -3.1)

Metrics are read call by call, as training will read them: an order statistic of n elements is not that of another n, so the
batch size must be that of the training to come. Sums of |d| and d*d are kept for the largest call of each channel: half
precision ends at 65504, and a call that overflows once spoils a training.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.backends import measuring
from normrewrite.backends.families import wide
from normrewrite.data import Batch, Data
from normrewrite.errors import NormRewriteError
from normrewrite.execution import runner
from normrewrite.norms import METRICS, Gain, Metric, metric
from normrewrite.sites import Site

FP16_MAX = 65504.0
INT8_MAX = 127
ENOUGH_CALLS = 4  # for a spread over calls: the median over channels of fewer is off by more than a tenth
_L1, _L2 = metric("l1"), metric("l2")
# Relative noise of the scale on n independent Gaussians, times sqrt(n): of rows that average over all elements.
_NOISE = {"l2": math.sqrt(1 / 2), "l1": math.sqrt(math.pi / 2 - 1)}

Rows = Sequence[tuple[Metric, Gain]]
Watch = Callable[[Site, Tensor], object]


@dataclass
class Scale:
    """C * S over calls, by channel: how often, its sum, and its sum of squares, (C,) float64."""

    calls: int = 0
    total: Any = 0.0
    squares: Any = 0.0

    def add(self, value: Tensor) -> None:
        self.calls += 1
        self.total = self.total + value
        self.squares = self.squares + value * value

    @property
    def mean(self) -> Tensor:
        mean: Tensor = self.total / self.calls
        return mean

    @property
    def noise(self) -> Tensor:
        """Standard deviation over calls, in units of the mean."""
        variance: Tensor = (self.squares / self.calls - self.mean**2).clamp_min(0) * self.calls / (self.calls - 1)
        return variance.sqrt() / self.mean


@dataclass
class Moments:
    """One site. n: elements that share statistics, the fewest of any call; every tensor (C,), float64 on the CPU.

    sums, squares: of |d| and d*d over a channel, largest call; largest, furthest: |x| and |d| of one element; dead: constant
    in every call, to the rounding of fp32. scales: C * S by metric.
    """

    calls: int = 0
    skipped: int = 0
    n: int = 0
    scales: dict[str, Scale] = field(default_factory=dict)
    sums: Any = 0.0
    squares: Any = 0.0
    largest: Any = 0.0
    furthest: Any = 0.0
    dead: Any = True
    _elements: int = 0
    _total: Any = 0.0
    _total_squares: Any = 0.0

    def add(self, x: Tensor, rows: Rows) -> None:
        """Read one input (N, C, *). A call that is not finite is left out and counted."""
        values = wide(x.detach())
        n, dims = values.numel() // values.shape[1], [0, *range(2, values.dim())]
        mean = values.mean(dims)
        mean = mean + (values - measuring.per_channel(mean, values.dim())).mean(dims)  # a constant channel's is exact
        spread = {row: measuring.measure(values, mean, row)[0] for row in (*(row for row, _ in rows), _L1, _L2)}
        scales = {str(row): _on_cpu(row.gain(n, gain) * spread[row]) for row, gain in rows}
        high, low = values.amax(dims), values.amin(dims)
        if not bool((mean + high - low).isfinite().all()):  # of x alone: squares may overflow where |d| does not
            self.skipped += 1
            return
        self._add(n, *map(_on_cpu, (mean, spread[_L1], spread[_L2], high, low)))
        for name, scale in scales.items():
            self.scales.setdefault(name, Scale()).add(scale)

    def _add(self, n: int, mean: Tensor, absolute: Tensor, sigma: Tensor, high: Tensor, low: Tensor) -> None:
        self.calls += 1
        self.n = min(self.n or n, n)
        self._elements += n
        self._total = self._total + n * mean
        self._total_squares = self._total_squares + n * (sigma**2 + mean**2)
        self.sums = (n * absolute).clamp_min(self.sums)
        self.squares = (n * sigma**2).clamp_min(self.squares)
        self.largest = torch.maximum(high.abs(), low.abs()).clamp_min(self.largest)
        self.furthest = torch.maximum(high - mean, mean - low).clamp_min(self.furthest)
        self.dead = (sigma <= 1e-6 * mean.abs() + 1e-12) & self.dead

    @property
    def mean(self) -> Tensor:
        """Over all calls together."""
        mean: Tensor = self._total / self._elements
        return mean

    @property
    def sigma(self) -> Tensor:
        """Over all calls together, about their common mean."""
        variance: Tensor = self._total_squares / self._elements - self.mean**2
        return variance.clamp_min(0).sqrt()

    @property
    def int8(self) -> float:
        """Powers of two between one step of a symmetric int8 tensor, its largest |x| over 127, and the standard deviation of
        the narrowest live channel: below 0 rounding takes that channel away. Infinite where all are dead."""
        live = self.sigma[~self.dead]
        if not live.numel() or float(live.min()) <= 0:
            return math.inf
        return math.log2(float(live.min()) * INT8_MAX) - math.log2(float(self.largest.max()))

    def kappa(self, name: str) -> float:
        """C * S over the standard deviation, call by call, median over live channels: 1 on Gaussians. NaN where all are dead."""
        return _median((self.scales[name].total / self.scales["l2"].total)[~self.dead])

    def noise(self, name: str) -> float | None:
        """Relative noise of C * S from call to call, median over live channels.

        With fewer than four calls that of n independent Gaussians, where it is known; else None.
        """
        scale = self.scales.get(name)
        if scale is not None and scale.calls >= ENOUGH_CALLS:
            return _median(scale.noise[~self.dead])
        return _NOISE[name] / math.sqrt(self.n) if name in _NOISE and self.n else None


def _on_cpu(values: Tensor) -> Tensor:
    """On the CPU first: not every device has float64."""
    return values.cpu().double()


def _median(values: Tensor) -> float:
    return float(values.median()) if values.numel() else math.nan


def headroom(values: Tensor) -> float:
    """Powers of two between 65504, where half precision ends, and the largest value; negative beyond."""
    largest = float(values.max())
    if largest <= 0:
        return math.inf
    return math.log2(FP16_MAX) - math.log2(largest) if largest < math.inf else -math.inf


def left_out(batches: int) -> str:
    """What is said of batches that would have spoilt every figure."""
    return f"{batches} batches left out, as they were not finite"


def every_row(site: Site, n: int) -> Rows:
    """All metrics that n elements suffice for: the registry's, and topk:1%, whose k grows with n."""
    rows = (*METRICS.values(), metric("topk:1%"))
    return [(row, "exact") for row in rows if n >= max(2, row.count or 0)]


@dataclass
class Readings:
    """Moments by site name, the inputs they come from, their largest batch, the batches left out as not finite, and the first
    two that were not."""

    by_site: dict[str, Moments]
    inputs: int = 0
    batch: int = 0
    skipped_batches: int = 0
    first: list[Batch] = field(default_factory=list)


def read(
    model: nn.Module,
    sites: Iterable[Site],
    data: Data,
    rows: Callable[[Site, int], Rows],
    *,
    batch_size: int = 250,
    watch: Watch | None = None,
    progress: Callable[..., object] = lambda done, **_: None,
) -> Readings:
    """Run the model in eval on every batch, and read the input of each site, metrics as `rows` says for its n.

    watch: called with each site and its input, too, where that is finite. A smaller last batch is left out.

    Raises NormRewriteError where no batch is finite or the data doesn't fit the model.
    """
    readings = Readings({site.name: Moments() for site in sites})
    hooks = [
        site.module.register_forward_pre_hook(_reader(site, readings.by_site[site.name], rows, watch), with_kwargs=True)
        for site in sites
    ]
    run = runner(model)
    try:
        for batch in data.batches(batch_size):
            if readings.inputs and data.whole is not None and len(batch) < batch_size:
                continue
            if batch.finite:
                run(batch)
                readings.first += [batch] if len(readings.first) < 2 else []
                readings.inputs += len(batch)
                readings.batch = max(readings.batch, len(batch))
            else:
                readings.skipped_batches += 1
            progress(len(batch))
    finally:
        for hook in hooks:
            hook.remove()
    if not readings.inputs:
        skipped = readings.skipped_batches
        raise NormRewriteError(
            f"there is nothing to measure: {skipped} batches were not finite." if skipped else "the data held no batch."
        )
    return readings


def _reader(
    site: Site, moments: Moments, rows: Callable[[Site, int], Rows], watch: Watch | None
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def read_input(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        x: Tensor = (*arguments, *named.values())[0]
        before = moments.calls
        try:
            moments.add(x, rows(site, x.numel() // x.shape[1]))
        except NormRewriteError as error:
            raise NormRewriteError(f"{site.label}: {error}") from error
        if watch is not None and moments.calls > before:
            watch(site, x)

    return read_input
