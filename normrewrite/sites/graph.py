"""The torch.fx graph of a model, where it has one."""

from collections import Counter
from collections.abc import Collection
from operator import attrgetter
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer

from normrewrite.errors import NormRewriteError, first_line
from normrewrite.outside import CODE, is_name
from normrewrite.sites.modes import same_attributes


class Untraceable(NormRewriteError):
    """torch.fx can't trace the model; the message carries its reason."""


class CheckedTracer(Tracer):
    """torch.fx's own, where names can't be read as code: it writes them into the source that it makes, as they are."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        check_names(root)
        return super().trace(root, concrete_args)


def check_names(model: nn.Module) -> None:
    """Raises Untraceable for a model that has a name which could be read as code."""
    for module in model.modules():
        names = [*vars(module), *module._modules.keys(), *module._parameters.keys(), *module._buffers.keys()]
        if unfit := next((name for name in names if not is_name(name)), None):
            raise Untraceable(f"{type(model).__name__} has a part called {unfit!r}: {CODE}")


def symbolic_trace(model: nn.Module, concrete_args: dict[str, Any] | None = None) -> GraphModule:
    """torch.fx's own, where names can't be read as code."""
    return GraphModule(model, CheckedTracer().trace(model, concrete_args), type(model).__name__)


class _Tracer(CheckedTracer):
    def __init__(self, whole: Collection[int]) -> None:
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return id(module) in self.whole or super().is_leaf_module(module, name)


def trace(model: nn.Module, whole: Collection[int] = ()) -> GraphModule:
    """The model as a GraphModule that shares its modules; itself if it is one already.

    >>> gm = trace(model.eval())

    whole: modules, by id, that are one node each, whatever their class.
    Raises Untraceable with torch.fx's own reason, on one line.
    """
    if isinstance(model, GraphModule):
        check_names(model)
        return model
    try:
        with same_attributes(model):
            return GraphModule(model, _Tracer(whole).trace(model), type(model).__name__)
    except Exception as error:  # a model's own forward runs here, and may raise anything
        raise Untraceable(f"torch.fx can't trace {type(model).__name__}: {first_line(error)}") from error


def module_of(graph_module: GraphModule, node: object) -> nn.Module | None:
    """The module that a call_module node calls, else None."""
    if isinstance(node, Node) and node.op == "call_module":
        return graph_module.get_submodule(str(node.target))
    return None


def call_counts(graph_module: GraphModule) -> Counter[int]:
    """How often each module (by id) is called in the graph: a shared one can't be altered for one caller."""
    return Counter(
        id(graph_module.get_submodule(str(node.target)))
        for node in graph_module.graph.nodes
        if node.op == "call_module"
    )


def read_past_modules(graph_module: GraphModule) -> set[int]:
    """Tensors (by id) that the graph reads itself, past the modules that hold them."""
    reads = [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]
    return {id(attrgetter(target)(graph_module)) for target in reads}
