"""Which target suits each norm of a network, told from its own inputs.

>>> print(advise(model, images, batch_size=250))          # no labels needed; nothing is changed

The rules, and why their thresholds stand where they do:

target    none where the norm is frozen: training never measures it. group where one element is all there is to a statistic,
          renorm below 16: the scale of 16 Gaussians is off by 19 % from batch to batch. Else l1: it reads every element, so
          that its noise is l2's, and needs no squares.
also      linf, topk and range where their scale moves by at most 5 % from batch to batch. On a trained ResNet-20 linf, at
          6 %, is in training still nearer to eval than the original batch norm was.
calibrate where the target's kappa is 5 % from 1: on these inputs it reads another scale than on Gaussians, and only a
          calibrated twin computes in training nearly what it does in eval. Eval is the same function either way. group is
          another function: it has to be fitted in any case, which calibrate does.
fp16      what half precision would do to a sum over one statistic's elements, for kernels and devices that sum in it (ours
          sums in fp32, whatever the model's dtype; `finetune --accumulator half:1` sums as is foreseen here). Where sums of
          d*d pass 65504 and those of |d| don't, l1 fits and l2 does not. Where both do, sum in fp32, or take linf or range,
          whose scale is no sum (the mean still is one). That is for partial sums, as parallel kernels add. One running half
          sum drops what is below half the step between its numbers: beyond 2048 elements it falls short before it overflows
          (on real inputs by 6 to 12 % at 4096, by half at 16384).
int8      how many powers of two the narrowest channel's standard deviation is above one step of a tensor with one scale. Below 0
          rounding takes the channel away; folding the norm, which evens the channels out, or a scale by channel mends that.
in eval   a norm that has a layer to itself in front folds into it, and any other with running statistics is one multiply
          and add, whatever its metric: targets differ in training alone.

Noise is measured over four batches or more, drawn at random from a tensor or a file, as training will draw them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite import sites
from normrewrite.api.traps import is_frozen
from normrewrite.data import Batch, Data, argument_names, as_data
from normrewrite.diagnostics.moments import (
    ENOUGH_CALLS,
    FP16_MAX,
    Moments,
    Readings,
    Rows,
    Watch,
    every_row,
    headroom,
    left_out,
    read,
)
from normrewrite.errors import NormRewriteError
from normrewrite.execution import device_of, dtype_of, fitted_to
from normrewrite.options.fields import callback, options, quiet, takes
from normrewrite.options.groups import BatchSize
from normrewrite.results import Result, Summary, Table
from normrewrite.sites import Site, neighbours
from normrewrite.sites.refusal import Refusal

FEW = 16  # elements a statistic
QUIET = 0.05  # relative noise of a scale
GAUSSIAN = 0.05  # |kappa - 1|
STUCK = 2048  # 2**11 equal elements: from there on half the step between half numbers is all that an element is


@dataclass(frozen=True)
class SiteAdvice:
    """One site. target: what suits it, None where it stays; also: other metrics that do; why: what speaks for it.

    n: elements a statistic; kappa, noise: by metric (Moments); dead: channels; fp16_*: powers of two between 65504 and the
    largest |x|, the largest d*d, and the largest sum of |d| and of d*d over a channel; int8: powers of two between one step of
    int8 and the narrowest channel's standard deviation (Moments.int8); folds_into: the layer in front.
    """

    name: str
    target: str | None
    also: tuple[str, ...]
    why: tuple[str, ...]
    channels: int | None
    folds_into: str | None
    n: int = 0
    calls: int = 0
    kappa: dict[str, float] | None = None
    noise: dict[str, float | None] | None = None
    dead: int = 0
    fp16_x: float = math.inf
    fp16_square: float = math.inf
    fp16_sums: float = math.inf
    fp16_squares: float = math.inf
    int8: float = math.inf


@dataclass(frozen=True)
class Advice(Result):
    """Every site of a model, and what was read."""

    sites: list[SiteAdvice]
    inputs: int
    batch_size: int
    skipped_batches: int = 0

    @property
    def options(self) -> str:
        """What `convert` takes to follow the advice: the commonest target, and a rule for every other site."""
        chosen = [site for site in self.sites if site.target is not None]
        if not chosen:
            return ""
        usual = Counter(site.target for site in chosen).most_common(1)[0][0]
        rules = [f"--rule '{site.name}={site.target}'" for site in chosen if site.target != usual]
        return " ".join([f"--to {usual}", *rules])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"options": self.options}

    def summary(self) -> Summary:
        head = f"advice for training in batches of {self.batch_size}, from {self.inputs} inputs"
        if self.skipped_batches:
            head += f"; {left_out(self.skipped_batches)}"
        return [head, Table(_HEADS, [_cells(site) for site in self.sites]), *self._notes()]

    def _notes(self) -> list[str]:
        calibrated = f" --calibrate DATA --batch-size {self.batch_size}" if any(map(_to_calibrate, self.sites)) else ""
        notes = [f"to follow it: convert {self.options}{calibrated}"] if self.options else []
        notes += [text.format(n=n, of=len(self.sites)) for holds, text in _NOTES if (n := sum(map(holds, self.sites)))]
        return [f"- {note}" for note in notes]


_HEADS = (
    "site",
    "target",
    "also",
    "n",
    "kappa",
    "noise: l1",
    "topk:10",
    "topk:1%",
    "linf",
    "fp16 sums",
    "fp16 squares",
    "int8",
    "dead",
    "why",
)


def _cells(site: SiteAdvice) -> tuple[str, ...]:
    if site.kappa is None or site.noise is None:
        return (site.name, site.target or "keep", *[""] * 11, "; ".join(site.why))
    kappa = site.kappa.get(site.target or "", site.kappa.get("l1", math.nan))
    return (
        site.name,
        site.target or "keep",
        " ".join(site.also),
        str(site.n),
        "" if math.isnan(kappa) else f"{kappa:.2f}",
        *(_percent(site.noise.get(name)) for name in ("l1", "topk:10", "topk:1%", "linf")),
        _bits(site.fp16_sums),
        _bits(site.fp16_squares),
        _bits(site.int8),
        f"{site.dead}/{site.channels}" if site.dead else "",
        "; ".join(site.why),
    )


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def _bits(value: float) -> str:
    return f"{value:+.1f} bits" if value < math.inf else ""


def _to_calibrate(site: SiteAdvice) -> bool:
    return "calibrate" in site.why


# What is the same at many sites is said once, with their number.
_NOTES: tuple[tuple[Callable[[SiteAdvice], bool], str], ...] = (
    (
        _to_calibrate,
        "calibrate, {n} of {of} sites: on these inputs the target reads another scale than on Gaussians",
    ),
    (
        lambda site: site.fp16_squares < 0 <= site.fp16_sums,
        "fp16, {n} of {of} sites: a half sum of squares is inf and one of |d| is not: l1 fits",
    ),
    (
        lambda site: site.fp16_sums < 0,
        "fp16, {n} of {of} sites: a half sum of |d| is inf too: sum in fp32 (normrewrite does), or take linf or range",
    ),
    (
        lambda site: site.fp16_square < 0,
        "fp16, {n} of {of} sites: the square of one element is inf, in whatever it is summed",
    ),
    (lambda site: site.fp16_x < 0, "fp16, {n} of {of} sites: inputs beyond 65504: the network can't run in half"),
    (
        lambda site: site.n > STUCK,
        "fp16, {n} of {of} sites: more than 2048 elements: one running half sum falls short (by half at 16384)",
    ),
    (
        lambda site: site.int8 < 0,
        "int8, {n} of {of} sites: the narrowest channel is below one step of its input: fold the norm first, as export does",
    ),
    (lambda site: site.dead > 0, "dead channels at {n} of {of} sites: constant on all inputs; harmless in eval"),
    (lambda site: site.folds_into is not None, "in eval {n} of {of} norms fold into the layer in front of them"),
    (
        lambda site: 0 < site.calls < ENOUGH_CALLS,
        "noise is that of Gaussians at {n} of {of} sites: give four batches or more to have it measured, also of linf and topk",
    ),
)


@options
class AdviseCall(BatchSize):
    """What `advise` takes in Python."""

    model: nn.Module = field(kw_only=False)
    data: Tensor | Data | Iterable[Any] = field(kw_only=False)
    progress: Callable[..., object] = callback(default=quiet)


@takes(AdviseCall)
def advise(options: AdviseCall) -> Advice:
    """Read every batch norm's input in eval, and say which target suits it and why. The model is left as it is.

    >>> advise(model, images, batch_size=64).options
    "--to l1 --rule 'head.norm=renorm'"

    data: (N, ...) inputs, Data, or an iterable of batches (a tensor, (tensor, labels) or a dict each), no labels needed.
    batch_size: that of the training to come; a smaller last batch is left out. progress: called with the inputs done.
    Raises NormRewriteError where the model holds no batch norm or the data doesn't fit it.
    """
    return study(options.model, options.data, batch_size=options.batch_size, progress=options.progress)[0]


@torch.no_grad()
def study(
    model: nn.Module,
    data: Tensor | Data | Iterable[Any],
    *,
    batch_size: int,
    rows: Callable[[Site, int], Rows] = every_row,
    watch: Watch | None = None,
    progress: Callable[..., object] = lambda done, **_: None,
) -> tuple[Advice, Readings]:
    """`advise`, with the readings that the advice is drawn from; rows, watch: as of normrewrite.diagnostics.moments.read."""
    norms = sites.find(model)
    if not norms:
        raise NormRewriteError(f"{type(model).__name__} holds no batch norm, so there is nothing to advise on.")
    examples = _drawn(as_data(data, argument_names(model)))
    readable = [site for site in norms if _why_not(site) is None]
    readings = read(model, readable, examples, rows, batch_size=batch_size, watch=watch, progress=progress)
    attached = neighbours.attach(model, norms, _example(model, examples))
    advised = [_advised(site, readings) for site in attached]
    return Advice(advised, readings.inputs, readings.batch, readings.skipped_batches), readings


def _drawn(data: Data) -> Data:
    """The inputs in a random order, always the same: files are often sorted, and training draws at random."""
    if data.whole is None:
        return data
    order = torch.randperm(len(data.whole), generator=torch.Generator().manual_seed(0))
    return Data(Batch({name: values[order] for name, values in data.whole.inputs.items()}))


def _example(model: nn.Module, data: Data) -> Sequence[Tensor]:
    """Two rows of every input, which tell the rank of linear layers' outputs."""
    device, dtype = device_of(model), dtype_of(model)
    return [fitted_to(dtype, values.to(device)) for values in data.first(2).positional(argument_names(model))]


def _why_not(site: Site) -> str | None:
    return str(site.norm) if isinstance(site.norm, Refusal) else None


def _advised(site: Site, readings: Readings) -> SiteAdvice:
    moments = readings.by_site.get(site.name)
    before = None if site.before is None or site.module.running_mean is None else site.before.name
    if moments is None or not moments.calls:
        left = _why_not(site) or ("no finite input" if moments and moments.skipped else "not reached by the data")
        return SiteAdvice(site.label, None, (), (left,), site.channels, before)
    target, reason = _target(site, moments.n)
    kappa = {name: moments.kappa(name) for name in moments.scales}
    noise = {name: moments.noise(name) for name in ("l2", "l1", *moments.scales)}
    far = target == "group" or abs(kappa.get(target, 1.0) - 1) > GAUSSIAN
    why = [reason, "calibrate" if far else "", _fp16(moments)]
    return SiteAdvice(
        site.label,
        target,
        _also(noise) if target == "l1" else (),
        tuple(word for word in why if word),
        site.channels,
        before,
        n=moments.n,
        calls=moments.calls,
        kappa=kappa,
        noise=noise,
        dead=int(moments.dead.sum()),
        fp16_x=headroom(moments.largest),
        fp16_square=headroom(moments.furthest**2),
        fp16_sums=headroom(moments.sums),
        fp16_squares=headroom(moments.squares),
        int8=moments.int8,
    )


def _target(site: Site, n: int) -> tuple[str, str]:
    if is_frozen(site):
        return "none", "frozen: training never measures it"
    if n < 2 or (n < FEW and site.module.running_mean is None):
        return "group", f"n = {n}: a batch is no sample of a channel"
    return ("renorm", f"n = {n}: the scale of a batch is mostly noise") if n < FEW else ("l1", "")


def _also(noise: dict[str, float | None]) -> tuple[str, ...]:
    """Metrics that read few elements, where that is quiet enough, the quietest first."""
    quiet = {
        name: value
        for name, value in noise.items()
        if name not in ("l2", "l1") and value is not None and value <= QUIET
    }
    return tuple(sorted(quiet, key=lambda name: quiet[name]))


def _fp16(moments: Moments) -> str:
    """What overflows in half precision, in a word; the notes below the table explain it."""
    if float(moments.largest.max()) > FP16_MAX:
        return "fp16: inputs overflow"
    if float(moments.furthest.max()) ** 2 > FP16_MAX:
        return "fp16: one square overflows"
    if float(moments.sums.max()) > FP16_MAX:
        return "fp16: both sums overflow"
    return "fp16: squares overflow" if float(moments.squares.max()) > FP16_MAX else ""
