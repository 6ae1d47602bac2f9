"""Re-estimation: batch norms' running statistics measured again, for inputs or weights that are no longer those of the training.

>>> print(reestimate_(model, images))                          # no labels; weights stay as they are
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normrewrite import sites
from normrewrite.api.update_norms import UpdateCall, measure_anew
from normrewrite.data import Batch, Data, argument_names, as_data
from normrewrite.diagnostics.moments import left_out
from normrewrite.diagnostics.training_mode import outputs, relative_difference
from normrewrite.errors import NormRewriteError
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.options.fields import takes
from normrewrite.results import Result, Summary, Table, shortened
from normrewrite.sites import Site

_UNLABELLED = "labels were not used: whether the network is the better for it, an accuracy on labelled inputs tells"
_ANOTHER_METRIC = (
    "Their scales were the original's standard deviations, and are now what their own metrics read: another number where inputs "
    "aren't Gaussian. Calibrate first, on inputs as the original's."
)


@dataclass(frozen=True)
class SiteStatistics:
    """One site. mean: |new - old| of its running mean, in units of the old scale, median over channels and largest; scale: new
    over old, median, smallest and largest; None: it stands as it was, or it has no scale. note: why, and what mean is in then.
    """

    name: str
    channels: int
    mean: tuple[float, float] | None = None
    scale: tuple[float, float, float] | None = None
    note: str = ""


@dataclass
class Reestimation(Result):
    """Every site with running statistics. moved: of the outputs in eval on the first batch, relative to what they were."""

    sites: list[SiteStatistics]
    inputs: int
    moved: float
    skipped_batches: int = 0
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> Summary:
        count = f"{sum(site.mean is not None for site in self.sites)} sites measured anew on {self.inputs} inputs"
        if self.skipped_batches:
            count += f"; {left_out(self.skipped_batches)}"
        table = Table(
            ("site", "mean moved by (largest)", "scale (smallest, largest)", "note"), list(map(_cells, self.sites))
        )
        return [count, table, f"outputs in eval have moved by {self.moved:.3f}, relative", *self.notes]


def _cells(site: SiteStatistics) -> tuple[str, ...]:
    mean = "" if site.mean is None else "{:.3f} ({:.3f})".format(*site.mean)
    scale = "" if site.scale is None else "x{:.3f} ({:.3f}, {:.3f})".format(*site.scale)
    return site.name, mean, scale, site.note


@takes(UpdateCall)
def reestimate_(options: UpdateCall) -> Reestimation:
    """Measure every batch norm's running statistics anew on the data, in place, and say how far they moved.

    >>> reestimate_(model, images, batch_size=250).sites[0].mean

    Of a network as it is to be used: `update_norms` trains in all else, dropout too, as torch's update_bn; here all but the
    norms runs as in eval, batches that are not finite and a smaller last batch are left out. What the network computes
    changes: `revert` then gives torch's norms with these statistics, the same function in eval, and not the original's.
    data: (N, ...) inputs, Data, or batches (a tensor, (tensor, labels) or a dict each); labels are not used.
    batch_size: of a tensor or Data; that of the training. progress: called with the number of inputs after every batch.
    Raises NormRewriteError where no norm has statistics to measure, no batch is finite, or the model can't run on the data;
    nothing is changed then.
    """
    model, feed = options.model, _Feed(as_data(options.data, argument_names(options.model)), options.batch_size)
    norms = sites.find(model, _tracks)
    before = {site.name: _statistics(site.module) for site in norms}
    uncalibrated = [site for site in norms if _is_as_converted(site.module)]
    first = list(islice(feed, 1))
    eval_before = outputs(model, first)
    reached = set(map(id, measure_anew(model, feed, options.progress, alone=True)))
    moved = relative_difference(outputs(model, first), eval_before)
    results = [_moved(site, before[site.name], id(site.module) in reached) for site in norms]
    strangers = [site.label for site in uncalibrated if id(site.module) in reached]
    notes = [_UNLABELLED, *([f"not calibrated: {shortened(strangers)}. {_ANOTHER_METRIC}"] if strangers else [])]
    return Reestimation(results, feed.inputs, moved, feed.skipped, notes)


@dataclass
class _Feed:
    """The finite batches, however often it is asked for them, and what was left out in the last round.

    The average over batches counts each alike, and some metrics read by the number of elements: the last has to be whole.
    """

    data: Data
    size: int
    inputs: int = 0
    skipped: int = 0

    def __iter__(self) -> Iterator[Batch]:
        self.inputs = self.skipped = 0
        for batch in self.data.batches(self.size):
            if self.inputs and self.data.whole is not None and len(batch) < self.size:
                continue
            if batch.finite:
                self.inputs += len(batch)
                yield batch
            else:
                self.skipped += 1
        if self.skipped and not self.inputs:
            raise NormRewriteError(f"there is nothing to measure: {self.skipped} batches were not finite.")


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm | MeanOnlyBatchNorm | _BatchNorm) and module.running_mean is not None


def _statistics(norm: Any) -> tuple[Tensor, Tensor | None]:
    """Running mean, and what eval divides by, float64."""
    mean = norm.running_mean.double()
    if isinstance(norm, MeanOnlyBatchNorm):
        return mean.clone(), None
    if isinstance(norm, BatchNorm):
        scale: Any = norm.running_scale
        return mean.clone(), scale.double() + norm.eps
    return mean.clone(), (norm.running_var.double() + norm.eps).sqrt()


def _moved(site: Site, before: tuple[Tensor, Tensor | None], reached: bool) -> SiteStatistics:
    mean, scale = _statistics(site.module)
    if not reached:
        return SiteStatistics(site.label, len(mean), note="as it was: frozen, or not reached by the data")
    shift = (mean - before[0]).abs() / (1 if before[1] is None else before[1])
    middle = float(shift.median()), float(shift.max())
    if scale is None or before[1] is None:
        return SiteStatistics(site.label, len(mean), middle, note="mean in units of its input: it has no scale")
    ratio = scale / before[1]
    return SiteStatistics(
        site.label, len(mean), middle, (float(ratio.median()), float(ratio.min()), float(ratio.max()))
    )


def _is_as_converted(norm: nn.Module) -> bool:
    """Whether its scale came from a norm of another metric, and neither from a calibration nor from training."""
    origin = sites.origin_of(norm)
    if origin is None or not isinstance(norm, BatchNorm) or norm.metric == "l2" or hasattr(origin, "weight"):
        return False
    return not issubclass(origin.kind, BatchNorm) and origin.unchanged({"running_var": norm.running_scale})
