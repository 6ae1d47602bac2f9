"""NormaliseWeights: norms taken over by the weights in front: weight norm, plain or bounded.

before:  conv -> norm          norm in eval: y = a * x + b by channel
after:   conv'                 w'_i = a_i * w_i as direction and length (nn/weights.py), the bias takes b; an identity behind

before:  conv -> norm          with mean_bn
after:   conv' -> mean-only    w' takes a alone; y = x - running_mean + bias, the mean of each batch in training

before:  x -> norm             where no layer can take it (norm after ReLU, a layer that is read or called elsewhere too)
after:   x -> affine           y = a * x + b, learnable

before:  conv                  every convolution that no norm stands behind
after:   conv'                 the same weight as direction and length

Eval is the same function, to rounding; not so in the strict form, which gives all channels of a layer one norm. Linear
layers are rewritten only where a norm is folded into them: the paper leaves its classifier plain.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from normrewrite import sites
from normrewrite.backends.families import statistics_dtype
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import learns
from normrewrite.nn.stand_in import StandIn
from normrewrite.nn.weights import normalise_weight, remember
from normrewrite.passes.base import Replacement, Rewrite
from normrewrite.passes.fold_affine import affine_of, as_affine, into_previous, why_not_fixed
from normrewrite.sites import Site, neighbours
from normrewrite.sites.calls import why_computed
from normrewrite.sites.kinds import Kind
from normrewrite.sites.refusal import Refusal


@dataclass(frozen=True)
class Form:
    """bounded: the layer's norm is fixed; strict: so is each channel's; mean_bn: batch means stay; p of the weights' norm."""

    bounded: bool = True
    strict: bool = False
    mean_bn: bool = False
    p: float = 2


class NormaliseWeights(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> NormaliseWeights(Form(bounded=True))(torch.fx.symbolic_trace(model)).modified
    True
    """

    def __init__(self, form: Form, target: str = "", example_inputs: Sequence[Tensor] | None = None) -> None:
        self.form = form
        self.target = target or ("bwn" if form.bounded else "wn")
        self.example_inputs = example_inputs

    def wants(self, module: nn.Module) -> bool:
        return sites.is_norm(module) or _is_convolution(module)

    def look(self, model: nn.Module, places: Sequence[Site]) -> list[Site]:
        """Norms with the layer that takes them, and the convolutions that are nobody's."""
        norms = neighbours.attach(model, [site for site in places if sites.is_norm(site.module)], self.example_inputs)
        taken = {id(site.before.module) for site in norms if site.before is not None}
        shared = sites.shared_parameters(model)
        alone = [
            replace(site, alone="shares its weight with another layer" if _weight(site.module) in shared else "")
            for site in places
            if _is_convolution(site.module) and id(site.module) not in taken
        ]
        return norms + alone

    def why_not(self, site: Site) -> Refusal | None:
        if _is_convolution(site.module):
            return Refusal.of(site.alone or self._unfit(site.module))
        norm = site.native(tracked=True)
        if isinstance(norm, Refusal):
            return norm
        fixed = None if site.module.running_mean.is_meta else why_not_fixed(site)
        return fixed or (None if site.before is None else Refusal.of(self._unfit(site.before.module)))

    def _unfit(self, layer: nn.Module) -> str | None:
        """One norm for a layer can't hold a weight without a norm, nor keep one bad channel to itself."""
        computed = why_computed(layer)
        if computed is not None:
            return computed
        weight = cast(Tensor, layer.weight).detach()
        if weight.is_meta:
            return "its weight is on the meta device, and has no direction yet"
        if self.form.bounded and not weight.isfinite().all():
            return "its weight is not finite"
        return "its weight is all zero, and would stay so" if self.form.bounded and not weight.any() else None

    def inexact(self, site: Site) -> str:
        layer = _is_convolution(site.module) or site.before is not None
        return "one norm for all channels of the layer" if self.form.strict and layer else ""

    def rewrite(self, site: Site) -> Replacement:
        if _is_convolution(site.module):
            return Replacement(self._normalised(site.module, site.module))
        layer = None if site.before is None else self._with_affine(site, site.before.module)
        return Replacement(self._rest(site, layer), layer)

    def _rest(self, site: Site, layer: nn.Module | None) -> nn.Module:
        """What stands in the norm's place: what the layer in front did not take."""
        old: Any = site.module
        assert isinstance(site.norm, Kind)
        if layer is None:
            new: Any = as_affine(old, site.norm)
        else:
            new = _mean_only(old, site.norm) if self.form.mean_bn else StandIn(None, {})
            new.rank, new.layer = neighbours.rank_of(layer), (layer,)
        moving = {name: getattr(new, name, None) for name in ("weight", "bias", "running_mean")}
        pairs = {name: (getattr(old, name), value) for name, value in moving.items() if value is not None}
        new.origin, new.site, new.tail = Origin(old, pairs).keep(old), site.name, site.norm.tail
        new._modules.update({name: old._modules[name] for name in site.norm.tail})
        return new  # type: ignore[no-any-return]

    def _with_affine(self, site: Site, was: Any) -> nn.Module:
        """The layer in front of a norm with that norm's affine in it."""
        a, b = affine_of(site.module, site.norm)
        layer: Any = into_previous(was, (a, torch.zeros_like(b) if self.form.mean_bn else b), site.module)
        if self.form.mean_bn:  # the norm's bias stays with the means
            layer.bias = None if was.bias is None else layer.bias.requires_grad_(was.bias.requires_grad)
        return self._normalised(layer, was)

    def _normalised(self, layer: nn.Module, was: nn.Module) -> nn.Module:
        form = self.form
        return normalise_weight(layer, bounded=form.bounded, strict=form.strict, p=form.p, origin=remember(was))


def _weight(layer: nn.Module) -> int:
    return id(layer._parameters.get("weight"))


def _is_convolution(module: nn.Module) -> bool:
    return neighbours.is_layer(module) and not isinstance(module, nn.Linear)


def _mean_only(old: Any, kind: Kind) -> MeanOnlyBatchNorm:
    """The part of a batch norm that a layer's weight can't take."""
    a, _ = affine_of(old, kind)
    like = old.running_mean if old.weight is None else old.weight
    new = MeanOnlyBatchNorm(len(a), getattr(old, "momentum", 0.1), device=like.device, dtype=like.dtype)
    new.synchronised, new.process_group = isinstance(old, nn.SyncBatchNorm), getattr(old, "process_group", None)
    new.track_running_stats = getattr(old, "track_running_stats", True)
    new.running_mean.copy_(old.running_mean.double() * a).to(statistics_dtype(like.dtype))
    new.bias.requires_grad_(learns(old.bias))
    if old.bias is not None:
        new.bias = old.bias if isinstance(old.bias, nn.Parameter) else nn.Parameter(old.bias.clone(), False)
    return new
