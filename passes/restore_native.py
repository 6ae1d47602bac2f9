"""RestoreNative: torch's own batch norm back from one of ours.

before:  y = weight * (x - running_mean) / (running_scale + eps') + bias           any metric
after:   y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          the class that it once was

before:  any other module that a rewrite put in a norm's place, or a layer with a weight norm
after:   what it was

Wherever a tensor still has the bits that the rewrite gave it, the original's bits come back. Elsewhere (after training)
running_var = (running_scale + eps')^2 - eps, the nearest: the same function in eval. A norm that never was torch's gets the
class of its rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normrewrite import sites
from normrewrite.nn import batch
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.nn.parts import assemble, learns, shallow
from normrewrite.nn.sample import RowNorm
from normrewrite.nn.weights import original, unchanged, weight_norm_of
from normrewrite.passes import restore_sample
from normrewrite.passes.bake import bake
from normrewrite.passes.base import Pair, Rewrite
from normrewrite.sites import Site
from normrewrite.sites.refusal import Refusal

_NATIVE: dict[type[BatchNorm], type[nn.Module]] = {
    batch.BatchNorm1d: nn.BatchNorm1d,
    batch.BatchNorm2d: nn.BatchNorm2d,
    batch.BatchNorm3d: nn.BatchNorm3d,
}


class RestoreNative(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> back, _ = RestoreNative().apply(twin)

    `trained` names the sites whose tensors had changed since the rewrite, filled as sites are rewritten.
    """

    target = "l2"

    def __init__(self) -> None:
        self.trained: list[str] = []
        self._with_a_norm: set[int] = set()

    def wants(self, module: nn.Module) -> bool:
        return sites.is_norm(module) or self.gives_back(module)

    def gives_back(self, module: nn.Module) -> bool:
        """Whether the module stands for another, or is a norm within a sample that torch has too."""
        own = isinstance(module, RowNorm) and restore_sample.why_not(module) is None
        return sites.is_rewritten(module) or own

    def why_not(self, site: Site) -> Refusal | None:
        old = site.module
        if sites.is_rewritten(old):
            return None
        if isinstance(old, RowNorm):
            return restore_sample.why_not(old)
        if not isinstance(old, BatchNorm):
            return Refusal("is no norm of normrewrite's")
        if old.origin is None and type(old) not in _NATIVE:
            return Refusal(f"{site.kind} takes any rank, and torch has no such batch norm; use BatchNorm1d, 2d or 3d")
        return None

    def look(self, model: nn.Module, places: Sequence[Site]) -> list[Site]:
        """A layer with a norm in its weight has no function of its own to keep: the place of that norm stands for both."""
        self._with_a_norm = {id(layer) for site in places for layer in getattr(site.module, "layer", ())}
        return list(places)

    def inexact(self, site: Site) -> str:
        origin = sites.origin_of(site.module)
        return f"neither was the way here: {origin.inexact}" if origin is not None and origin.inexact else ""

    def halves(self, site: Site, before: nn.Module | None, new: nn.Module) -> tuple[Pair, Pair] | None:
        if id(site.module) in self._with_a_norm:
            return None
        layer = next(iter(getattr(site.module, "layer", ())), None)
        return (layer, site.module), (None if layer is None else _layer(layer)[0], new)

    def rewrite(self, site: Site) -> nn.Module:
        new = self._batch_norm(site.name, site.module) if isinstance(site.module, BatchNorm) else self._given_back(site)
        _learn_as_before(site.module, new)
        return new

    def _batch_norm(self, name: str, old: BatchNorm) -> nn.Module:
        children = {name: child for name, child in old._modules.items() if name != "origin"}
        if old.origin is not None and issubclass(old.origin.kind, BatchNorm):  # it was ours already, of another metric
            new = assemble(old.origin.kind, old.origin.attributes, old._parameters, old._buffers)
        else:
            tensors, exact = _tensors(old)
            if not exact:
                self.trained.append(name)
            parameters: dict[str, Any] = {name: tensors.pop(name) for name in ("weight", "bias") if name in tensors}
            frozen = {name: parameters.pop(name) for name in _frozen(old) if name in parameters}
            parameters = {name: _parameter(value) for name, value in parameters.items()}
            new = assemble(*_class(old), parameters, frozen | tensors)
        new._modules.update(children)
        return new  # type: ignore[no-any-return]

    def _given_back(self, site: Site) -> nn.Module:
        """What stood here before another module took its place; the nearest where that was trained since."""
        old: Any = site.module
        if weight_norm_of(old) is not None:
            new, exact = _layer(old)
        elif restore_sample.knows(old):
            new, exact = restore_sample.rewrite(old)
        else:
            new, exact = _norm(old)
            new._modules.update({name: old._modules[name] for name in getattr(old, "tail", ())})
        if not exact:
            self.trained.append(site.name)
        return new


def _learn_as_before(old: Any, new: nn.Module) -> None:
    """The parameters that the way back made learn where the original's did, and none where nothing learns by now."""
    origin = sites.origin_of(old)
    now = [value for module in (old, *getattr(old, "layer", ())) for value in module.parameters()]
    learning, fixed = not now or any(map(learns, now)), () if origin is None else origin.fixed
    for name, value in new._parameters.items():
        if value is not None and all(value is not live for live in now):
            value.requires_grad_(learning and name not in fixed)


def _layer(old: Any) -> tuple[nn.Module, bool]:
    """The layer behind a weight norm; with the weight that it computes now, where that was trained."""
    was = original(old) if unchanged(old) else None
    return (bake(old), False) if was is None else (was, True)


def _norm(old: Any) -> tuple[nn.Module, bool]:
    """The norm behind an affine, a folded place or a norm of another scope, and whether that is what it was."""
    origin, norm = old.origin, old._modules.get("norm", old)
    apart = all(map(unchanged, getattr(old, "layer", ())))  # then the layer gets back its weight as it was
    if apart and origin.unchanged(norm._parameters | norm._buffers | old._parameters):
        return origin.module(), True
    if isinstance(norm, RowNorm | nn.GroupNorm):
        return _nearest_sample_norm(old), False
    if apart and isinstance(old, MeanOnlyBatchNorm) and old.layer:
        return _with_its_scale(old), False
    return _nearest_batch_norm(old), False


def _nearest_sample_norm(old: Any) -> Any:
    """A norm within a sample that was a batch norm has no way back once it was trained: it stays as it is."""
    new: nn.Module = shallow(old)
    new._modules.pop("origin", None)
    return new


def _nearest_batch_norm(old: Any) -> nn.Module:
    """The batch norm that does in eval what an affine, a mean-only norm or nothing does here."""
    new = old.origin.module()
    ones, zeros = torch.ones_like(new.running_mean), torch.zeros_like(new.running_mean)
    tensors = {name: getattr(old, name, None) for name in ("weight", "bias")}
    new.weight = nn.Parameter(ones if tensors["weight"] is None else tensors["weight"].detach().clone())
    new.bias = nn.Parameter(zeros if tensors["bias"] is None else tensors["bias"].detach().clone())
    new.running_mean = getattr(old, "running_mean", zeros).clone()
    new.running_var = ones - getattr(new, "eps", 1e-5)
    new.affine = True
    return new  # type: ignore[no-any-return]


def _with_its_scale(old: MeanOnlyBatchNorm) -> Any:
    """The norm whose scale the layer in front had taken, with the mean and bias of now."""
    new: Any = old.origin.module()  # type: ignore[union-attr]
    scale = (new.running_var.double() + getattr(new, "eps", 1e-5)).sqrt()
    if new.weight is None:
        new.weight, new.affine = nn.Parameter(torch.ones_like(old.bias)), True
    mean = old.running_mean * scale / new.weight.detach().double()
    new.running_mean = torch.where(mean.isfinite(), mean, new.running_mean).to(new.running_mean.dtype)
    new.bias = nn.Parameter(old.bias.detach().clone())
    return new


def _frozen(old: BatchNorm) -> tuple[str, ...]:
    """Which of weight and bias the native norm keeps as buffers."""
    return tuple(old._buffers) if old.origin is None else old.origin.slots[1]


def _parameter(value: Any) -> nn.Parameter | None:
    return value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value)


def _class(old: BatchNorm) -> tuple[type[nn.Module], dict[str, Any]]:
    """What it was, with the plain attributes it had; a momentum set since then stays."""
    now = {name: getattr(old, name) for name in ("num_features", "eps", "momentum", "affine", "track_running_stats")}
    if old.origin is None:
        return _NATIVE[type(old)], now
    then = old.origin.attributes
    return old.origin.kind, then | {name: value for name, value in now.items() if name in then}


def _tensors(old: BatchNorm) -> tuple[dict[str, Any], bool]:
    """weight, bias and statistics of the native norm, in torch's order, and whether they are the original's bits."""
    tensors: dict[str, Any] = {"weight": old.weight, "bias": old.bias, "running_mean": None, "running_var": None}
    exact = True
    if old.running_mean is not None and old.running_scale is not None:
        live = {"running_var": old.running_scale} | ({} if old.weight is None else {"weight": old.weight.detach()})
        nearest = live | {"running_var": ((old.running_scale + old.eps) ** 2 - old.eps).clamp_min(0)}
        originals, exact = (nearest, False) if old.origin is None else old.origin.restore(live, nearest)
        var = originals["running_var"]
        tensors |= {"running_mean": old.running_mean.detach().to(var.dtype, copy=True), "running_var": var}
        if old.weight is not None:
            old.weight.data = originals["weight"]
    if old.num_batches_tracked is not None or old.origin is None or issubclass(old.origin.kind, _BatchNorm):
        tensors["num_batches_tracked"] = old.num_batches_tracked
    return tensors, exact
