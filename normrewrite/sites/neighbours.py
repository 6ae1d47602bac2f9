"""What stands beside a norm in the graph: the layer that feeds it alone, and can take its affine.

>>> [site.before.name for site in attach(model, sites.find(model)) if site.before]
['conv1', 'layer1.0.conv1']
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.utils.parametrize import is_parametrized

from normrewrite import sites
from normrewrite.errors import NormRewriteError, first_line
from normrewrite.sites import Site, graph
from normrewrite.sites.calls import why_computed
from normrewrite.sites.modes import evaluating

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def is_layer(module: nn.Module) -> bool:
    """A convolution, transposed convolution or linear layer, just as torch has it: a subclass may do anything."""
    return type(module) in LAYERS and "forward" not in vars(module)


def rank_of(layer: Any) -> int:
    """The rank at which a layer's channels are at dimension 1, where a batch norm takes them to be; unbatched they are not."""
    return 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)


def attach(model: nn.Module, places: Sequence[Site], example_inputs: Sequence[Tensor] | None = None) -> list[Site]:
    """The sites with what stands before them: `before`, a layer that may be changed for this norm's sake, or `alone`.

    example_inputs tell the rank of linear layers' outputs. Where torch.fx can't trace the model every site stays alone.
    """
    try:
        with evaluating(model):
            whole = {id(site.module) for site in places}
            traced = graph.traces(model, whole)
            run = traced[0] if example_inputs is None else graph.trace(model, whole, len(example_inputs))
    except graph.Untraceable as error:
        return [replace(site, alone=str(error)) for site in places]
    known = {str(node.target): rank for node, rank in ranks_of(run, example_inputs).items() if node.op == "call_module"}
    ways = [
        Way(gm, {node: known[str(node.target)] for node in gm.graph.nodes if str(node.target) in known})
        for gm in traced
    ]
    shared = sites.shared_parameters(model)
    layers = {id(site.module): site for site in sites.find(model, is_layer)}
    attached = []
    for site in places:
        reason = next(filter(None, (way.why_alone(site) for way in ways)), None)
        fronts = set() if reason else {id(way.in_front(site)) for way in ways}
        before = layers[fronts.pop()] if len(fronts) == 1 else None
        if fronts:
            reason, before = "stands behind other layers by what forward is given", None
        if before is not None and any(id(parameter) in shared for parameter in before.module.parameters()):
            reason, before = f"{before.name} shares its weight with another layer", None
        attached.append(replace(site, before=before, alone=reason or ""))
    return attached


class Way:
    """One trace of a model, as it stands, with the calls of each module, by id. ranks: of nodes' outputs, where known."""

    def __init__(self, graph_module: GraphModule, ranks: Mapping[Node, int]) -> None:
        self.graph_module, self.ranks = graph_module, ranks
        self.calls: dict[int, list[Node]] = {}
        for node in graph_module.graph.nodes:
            module = graph.module_of(graph_module, node)
            if module is not None:
                self.calls.setdefault(id(module), []).append(node)

    @cached_property
    def _read(self) -> set[int]:
        return graph.read_past_modules(self.graph_module)

    def in_front(self, site: Site) -> nn.Module | None:
        return graph.module_of(self.graph_module, self.calls[id(site.module)][0].args[0])

    def why_alone(self, site: Site) -> str | None:
        calls = self.calls.get(id(site.module), [])
        if len(calls) != 1:
            return "is used at several places" if calls else self._why_uncalled(site)
        if has_hooks(site.module):
            return "has hooks"
        before = calls[0].args[0] if calls[0].args else None
        if not isinstance(before, Node):
            return "its input is no plain argument"
        return self.why_not_fold(before, calls[0])

    def _why_uncalled(self, site: Site) -> str:
        called = [f"{node.target}." for calls in self.calls.values() for node in calls]
        inside = any(name.startswith(outer) for outer in called for name in site.names)
        return "is inside a module that torch.fx takes as a whole" if inside else "is never called in eval"

    def why_not_fold(self, node: Node, reader: Node | None) -> str | None:
        """Why the layer that `node` calls can't be changed for the sake of its one `reader` (if given), or None if it can."""
        layer = graph.module_of(self.graph_module, node)
        if layer is None or not (is_layer(layer) or is_parametrized(layer)):
            return f"stands behind {node.target if isinstance(node.target, str) else node.name}, no convolution or linear layer"
        if reader is not None and list(node.users) != [reader]:
            return f"the output of {node.target} is read elsewhere too"
        if len(self.calls[id(layer)]) != 1:
            return f"{node.target} is called at several places"
        if isinstance(layer, nn.Linear) and node not in self.ranks:
            return f"the rank of {node.target}'s output is unknown: give an example input"
        if self.ranks.get(node, rank_of(layer)) != rank_of(layer):
            return f"the output of {node.target} has its channels elsewhere than the norm"
        if is_parametrized(layer):
            return f"{node.target} is parametrised"
        if has_hooks(layer):
            return f"{node.target} has hooks"
        if why_computed(layer) is not None:
            return f"the weight of {node.target} is computed anew"
        elsewhere = any(id(parameter) in self._read for parameter in layer.parameters())
        return f"a tensor of {node.target} is read elsewhere too" if elsewhere else None


def has_hooks(module: nn.Module) -> bool:
    return any("hooks" in name and "state_dict" not in name and value for name, value in vars(module).items())


def ranks_of(graph_module: GraphModule, example_inputs: Sequence[Tensor] | None) -> dict[Node, int]:
    """The rank of each node's output, where example inputs tell it."""
    if example_inputs is None:
        return {}
    ranks = _Ranks(graph_module)
    try:
        with torch.no_grad(), evaluating(graph_module):
            ranks.run(*(value.clone() for value in example_inputs))  # the model may work in place
    except Exception as error:  # the model's code runs here, and may raise anything
        shapes = ", ".join(str(tuple(value.shape)) for value in example_inputs)
        raise NormRewriteError(f"the model can't run on inputs of shapes {shapes}: {first_line(error)}") from error
    return ranks.ranks


class _Ranks(Interpreter):
    """Runs a graph, and notes the rank of each tensor; torch's ShapeProp would print a traceback where the model raises."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.ranks: dict[Node, int] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.ranks[n] = result.dim()
        return result
