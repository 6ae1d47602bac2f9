"""The torch.fx graph of a model, where it has one."""

import inspect
from collections.abc import Callable, Collection, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.node import map_aggregate

from normrewrite.errors import NormRewriteError, first_line
from normrewrite.outside import CODE, is_name
from normrewrite.sites.modes import same_attributes
from normrewrite.sites.values import Value


class Untraceable(NormRewriteError):
    """torch.fx can't trace the model; the message carries its reason."""


class CheckedTracer(Tracer):
    """torch.fx's own, where names can't be read as code: it writes them into the source that it makes, as they are.

    Values answer `isinstance` as tensors do (normrewrite.sites.values). fixed: optional arguments that keep these values.
    """

    fixed: Mapping[str, Any] = MappingProxyType({})

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        check_names(root)
        return super().trace(root, concrete_args)

    def proxy(self, node: Node) -> Proxy:
        return Value(node, self)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, values = super().create_args_for_root(*args, **kwargs)
        return function, [self._as_fixed(value) if isinstance(value, Proxy) else value for value in values]

    def _as_fixed(self, value: Proxy) -> Any:
        name = str(value.node.target)
        if name not in self.fixed:
            return value
        default = self.fixed[name]
        self.create_proxy("call_function", keeps, (value, name, default), {})
        return {} if name.startswith("**") else default


def keeps(value: Any, name: str, default: Any) -> None:
    """What a graph asserts of an argument that it was traced without."""
    if name.startswith("**") and not value:  # torch.fx's interpreter gives an empty tuple
        return
    if value is not default and not (type(value) is type(default) and value == default):
        raise NormRewriteError(
            f"argument {name}: the network was traced with {default!r} for it, and can't take another."
        )


def check_names(model: nn.Module) -> None:
    """Raises Untraceable for a model that has a name which could be read as code."""
    for module in model.modules():
        names = [*vars(module), *module._modules.keys(), *module._parameters.keys(), *module._buffers.keys()]
        if unfit := next((name for name in names if not is_name(name)), None):
            raise Untraceable(f"{type(model).__name__} has a part called {unfit!r}: {CODE}")


class _Tracer(CheckedTracer):
    def __init__(self, whole: Collection[int], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.whole, self.fixed = whole, fixed

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return id(module) in self.whole or super().is_leaf_module(module, name)


def trace(model: nn.Module, whole: Collection[int] = (), given: int | None = None) -> GraphModule:
    """The model as a GraphModule that shares its modules; itself if it is one already.

    >>> gm = trace(model.eval())

    whole: modules, by id, that are one node each, whatever their class. given: how many of forward's arguments, in order, are;
    the others keep their defaults, and the graph raises where it is given them. By default any may be given.
    Raises Untraceable with torch.fx's own reason, on one line, or where one trace can't tell what the model does.
    """
    if isinstance(model, GraphModule):
        check_names(model)
        return model
    return symbolic_trace(model, whole) if given is None else _traced(model, whole, left_out(model, given))


def symbolic_trace(model: nn.Module, whole: Collection[int] = ()) -> GraphModule:
    """`trace`, of a GraphModule too."""
    first, *others = _ways(model, whole)
    if others:
        names = [name for way, _ in others for name in way]
        raise Untraceable(
            f"{type(model).__name__} does other things by its optional arguments {', '.join(dict.fromkeys(names))}, which a "
            "trace would fix"
        )
    return first[1]


def traces(model: nn.Module, whole: Collection[int] = ()) -> list[GraphModule]:
    """The model's ways, one a GraphModule, where optional arguments lead to several: the first with all of them given.

    Raises Untraceable where one of them can't be traced.
    """
    if isinstance(model, GraphModule):
        return [trace(model, whole)]
    return [traced for _, traced in _ways(model, whole)]


def _ways(model: nn.Module, whole: Collection[int]) -> list[tuple[list[str], GraphModule]]:
    """The traces that differ: with all arguments given, and with some or all of the optional ones left out (those named)."""
    ways: list[tuple[list[str], GraphModule]] = [([], _traced(model, whole, {}))]
    fixed = left_out(model, 0)
    if not fixed:
        return ways
    known = shape(ways[0][1], fixed)
    least = _traced(model, whole, fixed)
    if shape(least, fixed) == known:
        return ways
    singly = [({name: value}, _traced(model, whole, {name: value})) for name, value in fixed.items() if len(fixed) > 1]
    differing = [(list(left), gm) for left, gm in singly if shape(gm, fixed) != known]
    return [*ways, *differing, (list(fixed) if not differing else [], least)]


def left_out(model: nn.Module, given: int) -> dict[str, Any]:
    """The defaults of forward's optional arguments behind the first ones, by the names that torch.fx has for them."""
    fixed: dict[str, Any] = {}
    for place, (name, each) in enumerate(inspect.signature(model.forward).parameters.items()):
        if each.kind is each.VAR_KEYWORD:
            fixed[f"**{name}"] = {}
        elif each.default is not each.empty and (place >= given or each.kind is each.KEYWORD_ONLY):
            fixed[name] = each.default
    return fixed


def _traced(model: nn.Module, whole: Collection[int], fixed: Mapping[str, Any]) -> GraphModule:
    try:
        with same_attributes(model):
            return GraphModule(model, _Tracer(whole, fixed).trace(model), type(model).__name__)
    except Untraceable:
        raise
    except Exception as error:  # a model's own forward runs here, and may raise anything
        raise Untraceable(f"torch.fx can't trace {type(model).__name__}: {first_line(error)}") from error


def _arguments_of(node: Node) -> Mapping[str, Any]:
    return {"args": node.args, "kwargs": node.kwargs}


def shape(
    graph_module: GraphModule, fixed: Mapping[str, Any], arguments: Callable[[Node], Mapping[str, Any]] = _arguments_of
) -> list[tuple[Any, ...]]:
    """The graph as data: what each node is and is told. fixed: inputs that stand for these values, and are no nodes of it."""
    nodes = [node for node in graph_module.graph.nodes if node.target is not keeps and node.op != "placeholder"]
    place: dict[Node, Any] = {node: f"%{i}" for i, node in enumerate(nodes)}
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    place |= {node: fixed.get(str(node.target), f"%{node.target}") for node in inputs}

    def named(value: Any) -> str:
        return repr(map_aggregate(value, lambda leaf: place[leaf] if isinstance(leaf, Node) else leaf))

    return [
        (node.op, str(node.target), *((key, named(value)) for key, value in arguments(node).items())) for node in nodes
    ]


def module_of(graph_module: GraphModule, node: object) -> nn.Module | None:
    """The module that a call_module node calls, else None."""
    if isinstance(node, Node) and node.op == "call_module":
        return graph_module.get_submodule(str(node.target))
    return None


def read_past_modules(graph_module: GraphModule) -> set[int]:
    """Tensors (by id) that the graph reads itself, past the modules that hold them."""
    reads = [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]
    return {id(attrgetter(target)(graph_module)) for target in reads}
