"""FoldAffine: a norm with fixed statistics is an affine by channel; fold it into the layer beside it.

before:  conv -> norm          conv with weight W, bias c; norm in eval: y = a * x + b, a = weight/scale, b = bias - mean*a
after:   conv'                 W' = a * W by output channel, c' = a * c + b

before:  norm -> conv          without zero padding: W' = W * a by input channel, c' = c + sum W * b
before:  x -> norm             where neither is possible: y = a * x + b by channel (one Mul, one Add)

Convolutions, transposed convolutions (in front of a norm) and linear layers, of any group count. A layer is left alone if
it is used elsewhere too, is parametrised, has hooks, or overrides forward. A linear layer is folded only where the rank
of its output is known (`example_inputs`): with three dimensions torch's BatchNorm1d normalises another axis.
Statistics are fixed at their running values whatever the training flag: this is a pass for deployment.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from normrewrite import graph, sites
from normrewrite.kinds import Kind, recognise
from normrewrite.modes import evaluating
from normrewrite.nn.affine import ChannelAffine
from normrewrite.nn.batch import BatchNorm
from normrewrite.passes.base import Rewrite, own_parents
from normrewrite.passes.lift_functional import LiftFunctional, free_name
from normrewrite.sites import Site

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
Affine = tuple[Tensor, Tensor]


@dataclass
class Folded:
    """What became of the norms of a graph, by name."""

    into_neighbour: list[str]
    to_affine: list[str]


class FoldAffine(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply` (where every norm becomes a ChannelAffine).

    >>> FoldAffine()(torch.fx.symbolic_trace(model.eval())).graph_module
    """

    def __init__(self, example_inputs: Sequence[Tensor] | None = None) -> None:
        self.example_inputs = example_inputs
        self.folded = Folded([], [])

    def why_not(self, site: Site) -> str | None:
        kind = None if isinstance(site.module, BatchNorm) else recognise(site.module)
        if isinstance(kind, str):
            return kind
        if site.module.running_mean is None:
            return "has no running statistics, so nothing is fixed that could be folded"
        return None

    def rewrite(self, site: Site) -> nn.Module:
        a, b = affine_of(site.module)
        weight = site.module.weight
        like = weight if isinstance(weight, Tensor) else site.module.running_mean
        assert isinstance(like, Tensor)
        dtype = like.dtype
        self.folded.to_affine.append(site.name)
        affine = ChannelAffine(a.to(dtype), b.to(dtype))
        tail = tail_of(site.module)
        return affine if tail is None else nn.Sequential(affine, *tail)

    def __call__(self, graph_module: GraphModule) -> PassResult:
        self.folded = Folded([], [])
        own_parents(graph_module)
        LiftFunctional()(graph_module)
        ranks = _ranks(graph_module, self.example_inputs)
        norms = {id(site.module): site for site in sites.find(graph_module) if self.why_not(site) is None}
        called = False
        for node in list(graph_module.graph.nodes):
            module = graph.module_of(graph_module, node)
            if module is not None and id(module) in norms:
                self._fold_call(graph_module, node, module, ranks)
                called = True
        for name in self.folded.into_neighbour:
            if all(node.target != name for node in graph_module.graph.nodes):
                graph_module.delete_submodule(name)
        graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, called)

    def _fold_call(self, graph_module: GraphModule, node: Node, norm: nn.Module, ranks: dict[Node, int]) -> None:
        affine = affine_of(norm)
        before, after = node.args[0], next(iter(node.users), None)
        if not _has_hooks(norm) and isinstance(before, Node) and _may_fold(graph_module, before, node, ranks):
            _swap(graph_module, before, into_previous(graph_module.get_submodule(str(before.target)), affine))
        elif (
            not _has_hooks(norm)
            and isinstance(after, Node)
            and tail_of(norm) is None
            and len(node.users) == 1
            and _may_fold(graph_module, after, None, ranks)
            and after.args == (node,)
            and _takes_affine_input(graph_module.get_submodule(str(after.target)))
        ):
            _swap(graph_module, after, into_next(graph_module.get_submodule(str(after.target)), affine))
        else:
            self._leave_affine(graph_module, node, norm)
            return
        tail = tail_of(norm)
        if tail is None:
            node.replace_all_uses_with(before)  # type: ignore[arg-type]
            graph_module.graph.erase_node(node)
        else:
            name = free_name(graph_module, f"{node.target}_tail")  # another call of the norm still needs the norm
            graph_module.add_submodule(name, tail)
            self.folded.into_neighbour.append(str(node.target))
            node.target = name
            return
        self.folded.into_neighbour.append(str(node.target))

    def _leave_affine(self, graph_module: GraphModule, node: Node, norm: nn.Module) -> None:
        site = Site((str(node.target),), norm, ())
        new = self.rewrite(site)
        sites.carry_over(norm, new)
        graph_module.set_submodule(str(node.target), new)


def tail_of(norm: nn.Module) -> nn.Sequential | None:
    """What a norm applies to its own result (a fused activation), if anything."""
    if isinstance(norm, BatchNorm):
        names: tuple[str, ...] = norm.tail
    else:
        kind = recognise(norm)
        names = kind.tail if isinstance(kind, Kind) else ()
    return nn.Sequential(*(norm.get_submodule(name) for name in names)) if names else None


def affine_of(norm: Any) -> Affine:
    """(a, b), float64, with norm(x) = a*x + b in eval, before its tail."""
    if isinstance(norm, BatchNorm):
        assert norm.running_scale is not None
        scale = norm.running_scale.double() + norm.eps
    else:
        kind = recognise(norm)
        assert isinstance(kind, Kind)
        scale = (norm.running_var.double() + kind.eps).sqrt()
    a = scale.reciprocal() if norm.weight is None else norm.weight.detach().double() / scale
    bias = 0.0 if norm.bias is None else norm.bias.detach().double()
    return a, bias - norm.running_mean.double() * a


def into_previous(layer: nn.Module, affine: Affine) -> nn.Module:
    """A copy of conv, transposed conv or linear with the affine on its output folded in."""
    a, b = affine
    weight, bias = _parts(layer)
    if isinstance(layer, _ConvTransposeNd):  # (in, out/groups, *kernel): group g owns rows of in and columns of out
        grouped = weight.unflatten(0, (layer.groups, -1))
        folded = grouped * a.view(layer.groups, 1, -1, *(1,) * (weight.dim() - 2))
        return _with(layer, folded.flatten(0, 1), bias * a + b)
    return _with(layer, weight * a.view(-1, *(1,) * (weight.dim() - 1)), bias * a + b)


def into_next(layer: nn.Module, affine: Affine) -> nn.Module:
    """A copy of conv or linear with the affine on its input folded in."""
    a, b = affine
    weight, bias = _parts(layer)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    grouped = weight.unflatten(0, (groups, -1))  # (groups, out/groups, in/groups, *kernel)
    shape = (groups, 1, -1, *(1,) * (weight.dim() - 2))
    scaled, shifted = grouped * a.view(shape), grouped * b.view(shape)
    return _with(layer, scaled.flatten(0, 1), bias + shifted.flatten(2).sum(2).flatten())


def _parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.detach().double()
    return weight, torch.zeros(
        (), dtype=torch.float64, device=weight.device
    ) if layer.bias is None else layer.bias.detach().double()  # type: ignore[operator]


def _with(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    dtype = layer.weight.dtype
    new.weight = nn.Parameter(weight.to(dtype))  # type: ignore[arg-type]
    new.bias = nn.Parameter(bias.to(dtype))  # type: ignore[arg-type]
    return new


def _may_fold(graph_module: GraphModule, node: Node, only_user: Node | None, ranks: dict[Node, int]) -> bool:
    """Whether `node` calls a plain layer that nothing else depends on, and (if given) feeds `only_user` alone."""
    layer = graph.module_of(graph_module, node)
    if type(layer) not in _LAYERS or layer is None:
        return False
    if only_user is not None and list(node.users) != [only_user]:
        return False
    if isinstance(layer, nn.Linear) and ranks.get(node) != 2:
        return False
    if _read_elsewhere(graph_module, layer):
        return False
    plain = not (_has_hooks(layer) or is_parametrized(layer) or "forward" in vars(layer))
    return plain and graph.call_counts(graph_module)[id(layer)] == 1


def _read_elsewhere(graph_module: GraphModule, layer: nn.Module) -> bool:
    """Whether the graph reads a tensor of the layer itself, beside calling it."""
    own = {id(parameter) for parameter in layer.parameters()}
    reads = [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]
    return any(id(attrgetter(target)(graph_module)) in own for target in reads)


def _takes_affine_input(layer: nn.Module) -> bool:
    """Zero padding would pad the wrong number; other paddings repeat values, and commute with the affine."""
    if isinstance(layer, nn.Linear):
        return True
    if isinstance(layer, _ConvTransposeNd) or not isinstance(layer, _ConvNd):
        return False
    padded = layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
    return not padded or layer.padding_mode != "zeros"


def _swap(graph_module: GraphModule, node: Node, layer: nn.Module) -> None:
    graph_module.set_submodule(str(node.target), layer)


def _has_hooks(module: nn.Module) -> bool:
    return any("hooks" in name and "state_dict" not in name and value for name, value in vars(module).items())


def _ranks(graph_module: GraphModule, example_inputs: Sequence[Tensor] | None) -> dict[Node, int]:
    """The rank of each node's output, where example inputs tell it."""
    if example_inputs is None:
        return {}
    from torch.fx.passes.shape_prop import ShapeProp

    with torch.no_grad(), evaluating(graph_module):
        ShapeProp(graph_module).propagate(*example_inputs)
    return {
        node: len(node.meta["tensor_meta"].shape)
        for node in graph_module.graph.nodes
        if hasattr(node.meta.get("tensor_meta"), "shape")
    }
