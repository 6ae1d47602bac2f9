"""FoldAffine: a norm with fixed statistics is an affine by channel; fold it into the layer beside it.

before:  conv -> norm          conv with weight W, bias c; norm in eval: y = a * x + b, a = weight/scale, b = bias - mean*a
after:   conv'                 W' = a * W by output channel, c' = a * c + b

before:  norm -> conv          without zero padding: W' = W * a by input channel, c' = c + sum W * b
before:  x -> norm             where neither is possible: y = a * x + b by channel (one Mul, one Add)

Convolutions, transposed convolutions (in front of a norm) and linear layers, of any group count. A layer is left alone if
it is used elsewhere too, is parametrised, has hooks, or overrides forward. A linear layer is folded only where the rank
of its output is known (`example_inputs`): with three dimensions torch's BatchNorm1d normalises another axis.
Statistics are fixed at their running values whatever the training flag: this is a pass for deployment.

On a GraphModule the norm's call disappears. The tree driver keeps the model's own class: an identity stands in the norm's
place, and norms that no layer in front can take become an affine by channel.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normrewrite import sites
from normrewrite.nn.affine import ChannelAffine
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.nn.parts import learns
from normrewrite.nn.sample import InstanceNorm
from normrewrite.nn.stand_in import StandIn
from normrewrite.passes.base import Replacement, Rewrite, own_parents
from normrewrite.passes.lift_functional import LiftFunctional, free_name
from normrewrite.sites import Norm, Site, graph, neighbours, read
from normrewrite.sites.kinds import Kind
from normrewrite.sites.refusal import Refusal

Affine = tuple[Tensor, Tensor]


@dataclass
class Outcome:
    """What became of the norms of a graph, by name."""

    into_neighbour: list[str]
    to_affine: list[str]


class FoldAffine(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> FoldAffine()(torch.fx.symbolic_trace(model.eval())).graph_module

    forwards: into the layer behind, where there is none in front.
    """

    target = "none"

    def __init__(self, example_inputs: Sequence[Tensor] | None = None, *, forwards: bool = True) -> None:
        self.example_inputs, self.forwards = example_inputs, forwards
        self.outcome = Outcome([], [])

    def look(self, model: nn.Module, places: Sequence[Site]) -> list[Site]:
        return neighbours.attach(model, places, self.example_inputs)

    def wants(self, module: nn.Module) -> bool:
        return sites.is_norm(module) or isinstance(module, MeanOnlyBatchNorm)

    def why_not(self, site: Site) -> Refusal | None:
        if not isinstance(site.norm, Kind) and not isinstance(site.module, MeanOnlyBatchNorm):
            return site.norm if isinstance(site.norm, Refusal) else Refusal("is a norm within a sample")
        if site.module.running_mean is None:
            return Refusal("has no running statistics, so nothing is fixed that could be folded")
        if site.module.running_mean.is_meta:
            return Refusal("its statistics are on the meta device, and have no values yet")
        return why_not_fixed(site)

    def rewrite(self, site: Site) -> Replacement:
        (self.outcome.to_affine if site.before is None else self.outcome.into_neighbour).append(site.name)
        if site.before is not None:
            layer = into_previous(site.before.module, affine_of(site.module, site.norm), site.module)
            rest = _rest(site, layer)
            rest.layer = (layer,)
            return Replacement(rest, layer)
        new, tail = as_affine(site.module, site.norm), _tail(site.module, site.norm)
        new.site, new.tail, new.folded = site.name, tuple(tail), site.kind
        new.rank = getattr(site.module, "rank", None)
        new._modules.update(tail)
        return Replacement(new)

    def __call__(self, graph_module: GraphModule) -> PassResult:
        self.outcome = Outcome([], [])
        own_parents(graph_module, self.wants)
        lifted = LiftFunctional()(graph_module).modified
        ranks = neighbours.ranks_of(graph_module, self.example_inputs)
        norms = {id(site.module): site for site in sites.find(graph_module, self.wants) if self.refusal(site) is None}
        called = False
        for node in list(graph_module.graph.nodes):
            module = graph.module_of(graph_module, node)
            if module is not None and id(module) in norms:
                site = replace(norms[id(module)], names=(str(node.target),))
                self._fold_call(graph_module, node, site, ranks)
                called = True
        for name in self.outcome.into_neighbour:
            if all(node.target != name for node in graph_module.graph.nodes):
                graph_module.delete_submodule(name)
        graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, lifted or called)

    def _fold_call(self, graph_module: GraphModule, node: Node, site: Site, ranks: dict[Node, int]) -> None:
        taker = self._taker(graph_module, node, site, ranks)
        if taker is None:
            new = self.replacement(site).norm
            sites.carry_over(site.module, new)
            graph_module.set_submodule(site.name, new)
            return
        call, fold = taker
        layer = str(call.target)
        taken = graph_module.get_submodule(layer)
        graph_module.set_submodule(layer, fold(taken, affine_of(site.module, site.norm), site.module))
        self.outcome.into_neighbour.append(site.name)
        if not tail_names(site.module, site.norm) and not _may_be_unbatched(site, taken):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph_module.graph.erase_node(node)
        else:
            name = free_name(graph_module, f"{site.name}_tail")  # another call of the norm still needs the norm
            graph_module.add_submodule(name, _rest(site, taken))
            node.target = name

    def _taker(
        self, graph_module: GraphModule, node: Node, site: Site, ranks: dict[Node, int]
    ) -> tuple[Node, Callable[[nn.Module, Affine, nn.Module], nn.Module]] | None:
        """The call of a layer beside the norm's that can take its affine, in front or else behind, and how it does."""
        if neighbours.has_hooks(site.module):
            return None
        before = node.args[0]
        if isinstance(before, Node) and _may_fold(graph_module, before, node, ranks):
            return before, into_previous
        if not self.forwards or len(node.users) != 1 or tail_names(site.module, site.norm):
            return None
        after = next(iter(node.users))
        alone = _may_fold(graph_module, after, None, ranks) and after.args == (node,)
        takes = alone and _takes_affine_input(graph_module.get_submodule(str(after.target)))
        return (after, into_next) if takes else None


def _rest(site: Site, layer: nn.Module) -> StandIn:
    """What stands where a norm was folded into the layer beside it."""
    new = StandIn(None, _tail(site.module, site.norm))
    new.rank, new.site, new.folded = neighbours.rank_of(layer), site.name, site.kind
    return new


def _tail(norm: nn.Module, kind: Norm | Refusal | None = None) -> dict[str, nn.Module]:
    return {name: norm.get_submodule(name) for name in tail_names(norm, kind)}


def _may_be_unbatched(site: Site, layer: nn.Module) -> bool:
    """Whether a norm could take the layer's output without a batch, another axis for its channels: then that is to be refused."""
    ranks = site.norm.ranks if isinstance(site.norm, Kind) else None
    return ranks is None or neighbours.rank_of(layer) - 1 in ranks


def tail_names(norm: nn.Module, kind: Norm | Refusal | None = None) -> tuple[str, ...]:
    """The children that a norm applies to its own result (a fused activation), if any. kind: of a norm that was read."""
    if isinstance(norm, BatchNorm | MeanOnlyBatchNorm):
        return norm.tail
    kind = read(norm) if kind is None else kind
    return kind.tail if isinstance(kind, Kind) else ()


def tail_of(norm: nn.Module, kind: Norm | Refusal | None = None) -> nn.Sequential | None:
    """The same, as one module."""
    tail = _tail(norm, kind)
    return nn.Sequential(*tail.values()) if tail else None


def as_affine(norm: Any, kind: Norm | Refusal | None = None) -> ChannelAffine:
    """The norm's affine, without its tail, as a module of the norm's dtype. kind: of a norm that was read."""
    a, b = affine_of(norm, kind)
    like = next(t for t in (norm.weight, norm.bias, norm.running_mean) if t is not None)
    new = ChannelAffine(a.to(like.dtype), b.to(like.dtype))
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(learns(getattr(norm, name)))
    return new


def affine_of(norm: Any, kind: Norm | Refusal | None = None) -> Affine:
    """(a, b), float64, with norm(x) = a*x + b in eval, before its tail. kind: of a norm that was read."""
    mean_only = isinstance(norm, MeanOnlyBatchNorm)
    scale = torch.ones_like(norm.running_mean, dtype=torch.float64) if mean_only else scale_of(norm, kind)
    assert scale is not None
    a = scale.reciprocal() if norm.weight is None else norm.weight.detach().double() / scale
    bias = 0.0 if norm.bias is None else norm.bias.detach().double()
    return a, bias - norm.running_mean.double() * a


def why_not_fixed(site: Site) -> Refusal | None:
    """Why no layer should take in a norm's affine: one channel's NaN would be there for good."""
    if all(values.isfinite().all() for values in affine_of(site.module, site.norm)):
        return None
    return Refusal("its statistics, weight or bias are not finite, and what it computes in eval is not either")


def scale_of(norm: Any, kind: Norm | Refusal | None = None) -> Tensor | None:
    """What a norm divides by in eval, (C,) float64; None where it keeps no statistics, or is not read.

    kind: of a norm that was read.
    """
    if getattr(norm, "running_mean", None) is None:
        return None
    if isinstance(norm, BatchNorm | InstanceNorm):
        return None if norm.running_scale is None or norm.eps is None else norm.running_scale.double() + norm.eps
    if getattr(norm, "running_var", None) is None:
        return None
    kind = read(norm) if kind is None else kind
    eps = None if isinstance(kind, Refusal) else kind.eps
    return None if eps is None else (norm.running_var.double() + eps).sqrt()


def into_previous(layer: nn.Module, affine: Affine, norm: nn.Module | None = None) -> nn.Module:
    """A copy of conv, transposed conv or linear with the affine on its output folded in; norm: whose it is, if a norm's."""
    a, b = affine
    weight, bias = _parts(layer)
    if isinstance(layer, _ConvTransposeNd):  # (in, out/groups, *kernel): group g owns rows of in and columns of out
        grouped = weight.unflatten(0, (layer.groups, -1))
        folded = grouped * a.view(layer.groups, 1, -1, *(1,) * (weight.dim() - 2))
        return _with(layer, folded.flatten(0, 1), bias * a + b, norm)
    return _with(layer, weight * a.view(-1, *(1,) * (weight.dim() - 1)), bias * a + b, norm)


def into_next(layer: nn.Module, affine: Affine, norm: nn.Module | None = None) -> nn.Module:
    """A copy of conv or linear with the affine on its input folded in; norm: whose it is, if a norm's."""
    a, b = affine
    weight, bias = _parts(layer)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    grouped = weight.unflatten(0, (groups, -1))  # (groups, out/groups, in/groups, *kernel)
    shape = (groups, 1, -1, *(1,) * (weight.dim() - 2))
    scaled, shifted = grouped * a.view(shape), grouped * b.view(shape)
    return _with(layer, scaled.flatten(0, 1), bias + shifted.flatten(2).sum(2).flatten(), norm)


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach().double()
    if layer.bias is None:
        return weight, torch.zeros((), dtype=torch.float64, device=weight.device)
    return weight, layer.bias.detach().double()  # type: ignore[operator]


def _with(layer: nn.Module, weight: Tensor, bias: Tensor, norm: nn.Module | None) -> nn.Module:
    """The layer with these; each learns where the layer's own or the norm's did."""
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    for name, value in (("weight", weight), ("bias", bias)):
        learning = any(learns(getattr(module, name, None)) for module in (layer, norm))
        new._parameters[name] = nn.Parameter(value.to(layer.weight.dtype), learning)  # type: ignore[arg-type]
    return new


def _may_fold(graph_module: GraphModule, node: Node, reader: Node | None, ranks: dict[Node, int]) -> bool:
    return neighbours.Way(graph_module, ranks).why_not_fold(node, reader) is None


def _takes_affine_input(layer: nn.Module) -> bool:
    """Zero padding would pad the wrong number; other paddings repeat values, and commute with the affine."""
    if isinstance(layer, nn.Linear):
        return True
    if isinstance(layer, _ConvTransposeNd) or not isinstance(layer, _ConvNd):
        return False
    padded = layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
    return not padded or layer.padding_mode != "zeros"
