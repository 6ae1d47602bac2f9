"""Norms that can't be exact, fitted to what the original computes at the same place: sequential least squares, no labels.

>>> fits = fit_(twin, original, data)                     # in place; one a site

Sites are walked in order of execution. At each, o is the output of the rewritten network up to there, with weight 1 and bias 0,
and r the original's output at the same site on the same inputs; then, by channel,

    weight = cov(o, r) / (var(o) + 1e-6)        bias = mean(r) - weight * mean(o)

Where torch.fx traces the model both networks are run in lockstep, once, node by node; else every site starts from the
inputs again, and the time grows with the square of the depth.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normrewrite import sites
from normrewrite.backends.families import wide
from normrewrite.data import Batch, Data
from normrewrite.errors import NormRewriteError
from normrewrite.execution import as_given, device_of, dtype_of, runner
from normrewrite.nn.parts import deepcopy
from normrewrite.nn.sample import RowNorm
from normrewrite.passes.fold_affine import as_affine
from normrewrite.passes.lift_functional import lift_
from normrewrite.sites import Site
from normrewrite.sites.graph import CheckedTracer, left_out
from normrewrite.sites.kinds import Kind, recognise
from normrewrite.sites.modes import evaluating

_RIDGE = 1e-6  # a channel without variance gets weight 0


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
    with evaluating(twin), evaluating(original):
        traced = _traced(original, pairs, batches)
        fits = (
            _lockstep(traced, original, twin, pairs, batches)
            if traced
            else _from_the_start(original, twin, pairs, batches)
        )
        done = {}
        for fit in fits:
            done[fit.name] = fit
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
    target: Callable[[Tensor], Tensor] = as_affine(old) if isinstance(kind, Kind) and kind.tail else old
    return _Pair(site, _norm(site.module), old, target)


# --- one site ---------------------------------------------------------------------------------------------------------


def _fit(pair: _Pair, inputs: Iterator[tuple[Tensor, Tensor]]) -> Fit:
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


def _remember(pair: _Pair) -> None:
    """The fitted tensors are what a rewrite gave: revert still finds the original behind them."""
    origin: Any = pair.site.module.origin
    for name in ("weight", "bias"):
        if f"{name}_converted" in origin.tensors:
            origin.converted(name, getattr(pair.norm, name), getattr(origin, name, None))


def shared_dims(norm: Any, rank: int) -> list[int]:
    """The dimensions of an output over which one weight of the norm holds."""
    shape = getattr(norm, "normalized_shape", None)
    if shape is not None and not getattr(norm, "channels_first", False):
        return list(range(rank - len(shape)))
    return [0, *range(2, rank)]


# --- traced: both networks in lockstep ---------------------------------------------------------------------------------


class _SiteTracer(CheckedTracer):
    """Sites are whole, and what holds one is opened, torch's own containers too."""

    def __init__(self, norms: set[int]) -> None:
        super().__init__()
        self.norms = norms

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if id(module) in self.norms:
            return True
        inside = any(id(child) in self.norms for child in module.modules())
        return not inside and super().is_leaf_module(module, name)


def _traced(original: nn.Module, pairs: list[_Pair], batches: Sequence[Batch]) -> Graph | None:
    """The original's graph for what the batches give, if every site is called in it."""
    norms = {id(pair.original) for pair in pairs}
    try:
        tracer = _SiteTracer(norms)
        inputs = {name for batch in batches for name in batch.inputs}
        tracer.fixed = {name: value for name, value in left_out(original, 0).items() if name not in inputs}
        traced = tracer.trace(original)
    except Exception:  # the model's own forward runs here, and may raise anything
        return None
    called = {id(original.get_submodule(str(node.target))) for node in traced.nodes if node.op == "call_module"}
    return traced if norms <= called else None


def _lockstep(
    traced: Graph, original: nn.Module, twin: nn.Module, pairs: list[_Pair], batches: Sequence[Batch]
) -> Iterator[Fit]:
    """Go through the graph once, all batches at each node; a value is dropped behind its last reader."""
    waiting = {id(pair.original): pair for pair in pairs}
    values: dict[Node, list[tuple[Any, Any]]] = {}
    last = {argument: node for node in traced.nodes for argument in node.all_input_nodes}
    for node in traced.nodes:
        module = original.get_submodule(str(node.target)) if node.op == "call_module" else None
        pair = waiting.pop(id(module), None)
        if pair is not None:
            yield _fit(pair, ((new, old) for old, new in values[node.all_input_nodes[0]]))
        values[node] = [
            (_value(original, node, values, batch, b, 0), _value(twin, node, values, batch, b, 1))
            for b, batch in enumerate(batches)
        ]
        for argument in node.all_input_nodes:
            if last[argument] is node:
                del values[argument]
        if not waiting:
            return


def _value(
    model: nn.Module, node: Node, values: dict[Node, list[tuple[Any, Any]]], batch: Batch, b: int, which: int
) -> Any:
    """What `node` gives for batch b in one of the two networks."""
    if node.op == "placeholder":
        default = node.args[0] if node.args else None
        value = batch.inputs.get(str(node.target), default)
        return value.clone() if isinstance(value, Tensor) else value
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return getattr(model.get_submodule(owner), name)
    arguments, named = map_arg((node.args, node.kwargs), lambda n: values[n][b][which])
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*arguments, **named)
    if node.op == "call_method":
        receiver, *others = arguments
        return getattr(receiver, str(node.target))(*others, **named)
    return node.target(*arguments, **named) if callable(node.target) else arguments[0]


# --- not traced: every site from the inputs ----------------------------------------------------------------------------


class _Reached(BaseException):
    """Carries a site's input out of a forward that need go no further; no error, so that nobody takes it for one."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _from_the_start(
    original: nn.Module, twin: nn.Module, pairs: list[_Pair], batches: Sequence[Batch]
) -> Iterator[Fit]:
    for pair in _in_order(original, pairs, batches[0]):
        inputs = (
            (_input_of(twin, pair.site.module, batch), _input_of(original, pair.original, batch)) for batch in batches
        )
        yield _fit(pair, inputs)


def _in_order(original: nn.Module, pairs: list[_Pair], batch: Batch) -> list[_Pair]:
    """The sites in order of their first call; those that are never called are left out."""
    order: dict[int, _Pair] = {}
    hooks = [
        pair.original.register_forward_pre_hook(
            lambda module, _, pair=pair: order.setdefault(id(module), pair) and None
        )
        for pair in pairs
    ]
    try:
        runner(original)(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(order.values())


def _input_of(model: nn.Module, module: nn.Module, batch: Batch) -> Tensor:
    def reached(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached(arguments[0].clone())

    hook = module.register_forward_pre_hook(reached)
    try:
        runner(model)(batch)
    except _Reached as stop:
        return stop.value
    finally:
        hook.remove()
    raise NormRewriteError(
        "a norm that one batch reaches is not reached by another: the model's path depends on its input."
    )
