"""Norms that can't be exact, fitted to what the original computes at the same place: sequential least squares, no labels.

>>> fits = fit_(twin, original, data)                     # in place; one a site

Sites are walked in order of execution. At each, o is the output of the rewritten network up to there, with weight 1 and bias 0,
and r the original's output at the same site on the same inputs; then, by channel,

    weight = cov(o, r) / (var(o) + 1e-6)        bias = mean(r) - weight * mean(o)

A norm with an affine in front of it gets the four of them that normrewrite.diagnostics.offset finds, unless what it had, with
weight and bias so fitted, explains more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite import sites
from normrewrite.backends.families import wide
from normrewrite.data import Data
from normrewrite.diagnostics import offset
from normrewrite.diagnostics.offset import Affines, Form, Tables
from normrewrite.diagnostics.walk import Inputs, walk
from normrewrite.errors import NormRewriteError
from normrewrite.execution import as_given, device_of, dtype_of, runner
from normrewrite.nn.offset import OffsetNorm, Size, largest, unfitted
from normrewrite.nn.parts import deepcopy
from normrewrite.nn.sample import RowNorm
from normrewrite.options.convert import AUTO
from normrewrite.passes.fold_affine import as_affine
from normrewrite.passes.lift_functional import lift_
from normrewrite.sites import Site
from normrewrite.sites.kinds import Kind, recognise
from normrewrite.sites.modes import evaluating

_RIDGE = 1e-6  # a channel without variance gets weight 0
_WELL = 0.95  # a site of which less is explained may have the larger offset of those that aren't fitted
_TOGETHER = 32  # inputs run at once where tables are made: what is between two norms is held for no more


@dataclass(frozen=True)
class Fit:
    """One site. copied, explained: share of the original's variance that the twin gives, before and after the fit."""

    name: str
    copied: float
    explained: float
    channels: int
    note: str = ""


@dataclass
class _Pair:
    """One site: the twin's norm whose affine is fitted, and the original's function, without what follows the norm."""

    site: Site
    norm: Any
    original: nn.Module
    target: Callable[[Tensor], Tensor]

    @property
    def offset(self) -> bool:
        """Whether there is an affine in front of the norm."""
        return isinstance(self.site.module, OffsetNorm)


@dataclass
class _Moments:
    """Sums over inputs and positions, by channel, float64."""

    count: int = 0
    sums: Any = 0.0

    def add(self, o: Tensor, r: Tensor, dims: list[int]) -> None:
        """Products in the inputs' own precision, fp32 at least: o and r are of order one, and their sums are not."""
        o, r = wide(o), wide(r)
        self.count += math.prod(o.shape[dim] for dim in dims)
        sums = [values.sum(dims, dtype=torch.float64).flatten() for values in (o, r, o * o, o * r, r * r)]
        self.sums = self.sums + torch.stack(sums)

    def fit(self, intercept: bool) -> tuple[Tensor, Tensor]:
        o, r, oo, cross, _ = self.sums / self.count
        if not intercept:
            return cross / (oo + _RIDGE), torch.zeros_like(o)
        weight = (cross - o * r) / (oo - o * o + _RIDGE)
        return weight, r - weight * o

    def explained(self, weight: Tensor, bias: Tensor) -> float:
        """1 - mean (weight * o + bias - r)^2 / var(r), over all channels together."""
        o, r, oo, cross, rr = self.sums / self.count
        residual = weight**2 * oo + 2 * weight * bias * o + bias**2 - 2 * weight * cross - 2 * bias * r + rr
        return float(1 - residual.sum() / (rr - r * r).sum().clamp_min(1e-30))


def fittable(twin: nn.Module) -> list[Site]:
    """The sites that measure each sample, and so compute another function than the original."""
    return sites.find(twin, lambda module: sites.is_rewritten(module) and isinstance(_norm(module), _SAMPLE_NORMS))


_SAMPLE_NORMS = (nn.GroupNorm, RowNorm)


def _norm(module: nn.Module) -> Any:
    """The norm itself, where a tail follows it in the same place."""
    return module._modules.get("norm", module)


@torch.no_grad()
def fit_(
    twin: nn.Module,
    original: nn.Module,
    data: Data,
    *,
    batch_size: int = 250,
    progress: Callable[..., object] = lambda done, **_: None,
) -> list[Fit]:
    """Fit weight and bias of every inexact site of `twin`, in place, in eval; both networks keep their training flags.

    Batches that are not finite are left out. progress: called with 1 at every site, `of` their number.
    Raises NormRewriteError where no batch is left, the data doesn't fit the model, or the original is another network.
    """
    norms = fittable(twin)
    if any(site.name not in sites.by_name(original) for site in norms):  # a call of F.batch_norm is no module yet
        original = lift_(deepcopy(original))
    pairs = [_pair(site, original) for site in norms]
    everything = list(data.batches(batch_size))
    device, dtype = device_of(original), dtype_of(original)
    batches = [as_given(batch.to(device), dtype) for batch in everything if batch.finite]
    if not batches:
        raise NormRewriteError(
            f"there is nothing to fit on: {len(everything)} batches were not finite."
            if everything
            else "the data held no batch. Give at least one input."
        )
    runner(original)(batches[0])  # input that doesn't fit is told in plain words
    if any(pair.offset for pair in pairs):
        batches = [batch.rows(slice(at, at + _TOGETHER)) for batch in batches for at in range(0, len(batch), _TOGETHER)]
    with evaluating(twin), evaluating(original):
        done = {}
        for index, inputs in walk(original, twin, [(pair.original, pair.site.module) for pair in pairs], batches):
            pair = pairs[index]
            done[pair.site.label] = (_fit_around if pair.offset else _fit_behind)(pair, inputs)
            progress(1, of=len(pairs))
    missing = [
        Fit(pair.site.label, 0.0, 0.0, 0, "not reached by the data") for pair in pairs if pair.site.label not in done
    ]
    return [*done.values(), *missing]


def _pair(site: Site, original: nn.Module) -> _Pair:
    old = sites.by_name(original).get(site.name)
    widths = {site.channels, getattr(old, "num_features", None)} - {None}
    if old is None or len(widths) > 1:
        raise NormRewriteError(
            f"{site.label}: the original has no norm of that name and width. Give the network that was rewritten; an untrained "
            "twin gives it back itself."
        )
    kind = None if not sites.is_norm(old) else recognise(old)
    norm = _norm(site.module)
    bare = old if norm is site.module else old.forward  # hooks are on what holds the norm, and not on the norm in it
    target: Callable[[Tensor], Tensor] = as_affine(old) if isinstance(kind, Kind) and kind.tail else bare
    return _Pair(site, norm, old, target)


# --- one site ---------------------------------------------------------------------------------------------------------


def _fit_behind(pair: _Pair, inputs: Inputs) -> Fit:
    """Fit one norm from its own input and the original's at the same place, batch by batch."""
    norm = pair.norm
    learned = [norm.weight.detach().clone(), None if norm.bias is None else norm.bias.detach().clone()]
    norm.weight.fill_(1)
    if norm.bias is not None:
        norm.bias.zero_()
    moments = _Moments()
    for new, old in inputs:
        o = norm(new)
        moments.add(o, pair.target(old), shared_dims(norm, o.dim()))
    copied = [torch.zeros(()).double() if value is None else value.double().flatten() for value in learned]
    weight, bias = moments.fit(norm.bias is not None)
    norm.weight.copy_(weight.view_as(norm.weight))
    if norm.bias is not None:
        norm.bias.copy_(bias.view_as(norm.bias))
    _remember(pair)
    return Fit(pair.site.label, moments.explained(*copied), moments.explained(weight, bias), norm.weight.numel())


def _fit_around(pair: _Pair, inputs: Inputs) -> Fit:
    """Fit the affine in front of a norm and the one behind it together."""
    front: Any = pair.site.module
    held = [front.scale, front.offset, pair.norm.weight, pair.norm.bias]
    tables, form = Tables.joined(Tables.of(new, pair.target(old)) for new, old in inputs), Form.of(pair.norm)
    present = [value.detach().double() for value in held]
    copied = offset.explained(tables, form, *present)
    best = _best(tables, form, front.origin.offset_size or AUTO)
    if not best.explained >= copied:  # the copy's offset may be larger than a fit's
        best = offset.regressed(tables, form, *present[:2])
    for value, found in zip(held, (best.scale, best.offset, best.weight, best.bias), strict=True):
        value.copy_(found)
    _remember(pair)
    return Fit(pair.site.label, copied, best.explained, len(best.weight))


def _best(tables: Tables, form: Form, asked: Size) -> Affines:
    """Within the size that was asked for; where nobody asked and that explains little, the better of it and a larger one."""
    best = offset.fitted(tables, form, largest(asked))
    if asked != AUTO or best.explained >= _WELL:
        return best
    return max(best, offset.fitted(tables, form, unfitted(AUTO)), key=lambda affines: affines.explained)


def _remember(pair: _Pair) -> None:
    """The fitted tensors are what a rewrite gave: revert still finds the original behind them."""
    origin: Any = pair.site.module.origin
    for name, value in {**pair.site.module._parameters, **pair.norm._parameters}.items():
        if f"{name}_converted" in origin.tensors:
            origin.converted(name, value, origin.tensors.get(name))


def shared_dims(norm: Any, rank: int) -> list[int]:
    """The dimensions of an output over which one weight of the norm holds."""
    shape = getattr(norm, "normalized_shape", None)
    if shape is not None and not getattr(norm, "channels_first", False):
        return list(range(rank - len(shape)))
    return [0, *range(2, rank)]
