"""Which tensors of an ONNX file have the ranges that an int8 training learned.

>>> reach, notes = tensors(proto, learned, model)                 # proto: exported from `model`, as normrewrite folds it
"""

from collections import Counter, defaultdict
from typing import Any

from torch import nn
from torch.fx import GraphModule

from normrewrite import sites
from normrewrite.deploy import onnx_file
from normrewrite.deploy.quantise import quantised_nodes
from normrewrite.provenance.ranges import SIDES, LearnedRanges, called, check, owner


def tensors(proto: Any, learned: LearnedRanges, model: nn.Module) -> tuple[dict[str, float], list[str]]:
    """How far tensors of a file reach that was exported from `model`, by tensor; and what is to be said of them.

    A node is found by the module that it came from and its place among that module's products, or adds. Where there is
    another number of them than was computed in training, none of them is taken.
    """
    check(learned, model)
    by_tensor: defaultdict[str, set[float]] = defaultdict(set)
    for sides in (("",), SIDES):
        names = [name for name in learned.amax if name.endswith(sides[0]) and ("+" in name) == (sides is SIDES)]
        times = Counter(map(owner, names))
        for module, nodes in _by_module(proto, model, adds=sides is SIDES).items():
            if times[module] and len(nodes) % times[module] == 0:  # a module that is called twice has each node twice
                for i, node in enumerate(nodes):
                    for tensor, side in zip(node.input, sides, strict=False):
                        by_tensor[tensor].add(learned.amax[called(module, i % times[module] + 1, side)])
    several = [name for name, values in by_tensor.items() if len(values) > 1]
    notes = [f"{len(several)} activations have several readers with ranges of their own: the widest serves them all"]
    return {name: max(values) for name, values in by_tensor.items()}, notes if several else []


def _by_module(proto: Any, model: nn.Module, adds: bool) -> dict[str, list[Any]]:
    """The quantised products, or adds, of each module in order, under the name that training calls the module by."""
    ids: dict[int, str] = {}
    first = {name: ids.setdefault(id(module), name) for name, module, _ in sites.registrations(model)}
    by_module: defaultdict[str, list[Any]] = defaultdict(list)
    for node in quantised_nodes(proto):
        if (node.op_type == "Add") == adds:
            scopes = [first.get(name, name) for name in onnx_file.scopes(node)]
            by_module[scopes[-1] if scopes and _runs_itself(model, scopes) else ""].append(node)
    return by_module


def _runs_itself(model: nn.Module, scopes: list[str]) -> bool:
    """Whether the innermost module is run, or what was once written in it stands in the graph of the whole."""
    if not isinstance(model, GraphModule):
        return True
    return any(node.op == "call_module" and node.target in scopes for node in model.graph.nodes)
