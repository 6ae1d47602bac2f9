"""FuseActivation: a norm, the residual added to it and the ReLU behind it as one call, for GPUs.

before:  norm -> relu                          nn.ReLU, F.relu, torch.relu, .relu(); in place or not
after:   norm_relu(norm, x)

before:  norm -> add(., residual) -> relu      +, +=, torch.add, .add()
after:   norm_relu(norm, x, residual)

Our batch norms and group norms whose output nothing else reads. The same function, forward and backward; on CUDA one
operator (backends/relu.py) that reads and writes less and keeps no second activation. Norms stay registered under their own
names: state_dict keys don't change, `revert` and every pass still find them, and a call computes whatever stands there then.
A pass for speed: run it last, on the graph that is to be trained or compiled.
"""

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from normrewrite.nn.rectify import norm_relu, together
from normrewrite.sites import graph
from normrewrite.sites.neighbours import has_hooks

_RELUS: tuple[Any, ...] = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_ADDITIONS: tuple[Any, ...] = (operator.add, torch.add, "add")
_INTO_THE_FIRST: tuple[Any, ...] = (operator.iadd, "add_")  # which overwrite their first operand


class FuseActivation:
    """A torch.fx pass.

    >>> FuseActivation()(torch.fx.symbolic_trace(nr.convert(model, "l1"))).modified
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        fused = [_fuse(graph_module, node) for node in list(graph_module.graph.nodes) if _is_relu(graph_module, node)]
        graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, any(fused))


def _is_relu(graph_module: GraphModule, node: Node) -> bool:
    module = graph.module_of(graph_module, node)
    if module is not None:
        return type(module) is nn.ReLU and not has_hooks(module)
    return node.op in ("call_function", "call_method") and node.target in _RELUS


def _fuse(graph_module: GraphModule, relu: Node) -> bool:
    """Put one call in the place of a ReLU, the norm before it and the addition between them, if they are so."""
    calls = _norm_and_residual(graph_module, relu.args[0])
    if calls is None:
        return False
    norm, *residual = calls
    with graph_module.graph.inserting_before(relu):
        module = graph_module.graph.get_attr(str(norm.target))
        call = graph_module.graph.call_function(norm_relu, (module, norm.args[0], *residual))
    call.meta = dict(relu.meta)
    added = relu.args[0]
    relu.replace_all_uses_with(call)
    for node in dict.fromkeys((relu, added, norm)):
        graph_module.graph.erase_node(node)  # type: ignore[arg-type]
    return True


def _norm_and_residual(graph_module: GraphModule, node: Any) -> tuple[Node, ...] | None:
    """The norm whose output a ReLU reads, and what is added to it in between, if anything."""
    if not isinstance(node, Node) or len(node.users) != 1:
        return None
    if _is_norm(graph_module, node):
        return (node,)
    additions = node.op in ("call_function", "call_method") and node.target in (*_ADDITIONS, *_INTO_THE_FIRST)
    if not additions or len(node.args) != 2 or node.kwargs or not all(isinstance(arg, Node) for arg in node.args):
        return None
    first, second = node.args
    pairs = [(first, second)] if node.target in _INTO_THE_FIRST else [(first, second), (second, first)]
    return next((pair for pair in pairs if _is_norm(graph_module, pair[0])), None)  # type: ignore[arg-type, return-value]


def _is_norm(graph_module: GraphModule, node: Node) -> bool:
    """A call of a norm that has a form with ReLU, and whose output one node alone reads, once."""
    norm = graph.module_of(graph_module, node)
    alone = len(node.users) == 1 and sum(arg is node for user in node.users for arg in user.args) == 1
    return norm is not None and together(norm) and alone and len(node.args) == 1 and not node.kwargs
