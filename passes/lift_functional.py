"""LiftFunctional: give a call of F.batch_norm a module, so that the other passes find it.

before:  F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
after:   norm(x)                   a batch norm of torch's that holds the same tensors, its training flag alive

On a GraphModule every call is lifted whose tensors are attributes of the graph's module. `lift_` walks any model and traces
only the modules whose own forward makes such calls; each comes out as a GraphModule, and its parents keep their class. Such
a module is refused where its forward does other things by training flag than to hand it to batch_norm, as a trace would
bake them in.
"""

import dis
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.operator_schemas import normalize_function
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from normrewrite import sites
from normrewrite.nn.native import AnyBatchNorm
from normrewrite.nn.parts import assemble, attributes
from normrewrite.sites import Site, Walk, graph
from normrewrite.sites.calls import why_called_otherwise, why_computed
from normrewrite.sites.modes import same_flags
from normrewrite.sites.refusal import Refusal

_TENSORS = ("running_mean", "running_var", "weight", "bias")


class LiftFunctional:
    """A torch.fx pass.

    >>> LiftFunctional()(torch.fx.symbolic_trace(model)).modified
    """

    def __call__(self, graph_module: GraphModule) -> PassResult:
        calls = [node for node in _calls(graph_module) if _why_not(node) is None]
        # A flag that is not the graph's means a norm that works in one way whatever the mode.
        lifted = [_lift(graph_module, node) for node in calls if _arguments(node)["training"] == graph_module.training]
        graph_module.graph.lint()
        graph_module.recompile()
        return PassResult(graph_module, bool(lifted))


def _calls(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if node.op == "call_function" and node.target is F.batch_norm]


def _arguments(node: Node) -> dict[str, Any]:
    call = normalize_function(F.batch_norm, node.args, node.kwargs, normalize_to_only_use_kwargs=True)
    assert call is not None
    return dict(call.kwargs)


def _why_not(node: Node) -> str | None:
    arguments = _arguments(node)
    for name in _TENSORS:
        value = arguments[name]
        if value is not None and not (isinstance(value, Node) and value.op == "get_attr"):
            return f"{name} of its F.batch_norm is computed, and no tensor of the module"
    if not isinstance(arguments["training"], bool) or not isinstance(arguments["momentum"], float):
        return "training or momentum of its F.batch_norm is computed"
    return None


def _lift(graph_module: GraphModule, node: Node) -> str:
    """Put a module in the place of one call. Returns its name."""
    arguments = _arguments(node)
    tensors = {name: _tensor(graph_module, arguments[name]) for name in _TENSORS}
    norm = _norm(tensors, arguments)
    name = free_name(graph_module, _wanted_name(graph_module, arguments))
    graph_module.add_submodule(name, norm)
    with graph_module.graph.inserting_before(node):
        call = graph_module.graph.call_module(name, (arguments["input"],))
    node.replace_all_uses_with(call)
    graph_module.graph.erase_node(node)
    for value in arguments.values():
        if isinstance(value, Node) and value.op == "get_attr" and not value.users:
            _forget(graph_module, value)
    return name


def _tensor(graph_module: GraphModule, node: Node | None) -> Any:
    if node is None:
        return None
    holder, _, name = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(holder), name)


def _norm(tensors: dict[str, Any], arguments: dict[str, Any]) -> nn.Module:
    mean = tensors["running_mean"]
    width = next((len(value) for value in tensors.values() if value is not None), 0)
    plain = {
        "num_features": width,
        "eps": arguments["eps"],
        "momentum": arguments["momentum"],
        "affine": tensors["weight"] is not None,
        "track_running_stats": mean is not None,
    }
    buffers = {"running_mean": mean, "running_var": tensors["running_var"], "num_batches_tracked": None}
    parameters = {name: _parameter(tensors[name]) for name in ("weight", "bias")}
    norm: nn.Module = assemble(AnyBatchNorm, plain, parameters, buffers)
    return norm.train(arguments["training"])


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


def _wanted_name(graph_module: GraphModule, arguments: dict[str, Any]) -> str:
    """`batch_norm`, beside the tensors of the call where they stand in a module of the trace's own making."""
    first = next((arguments[name] for name in _TENSORS if arguments[name] is not None), None)
    holder = "" if first is None else str(first.target).rpartition(".")[0]
    return f"{holder}.batch_norm" if holder and not _called(graph_module, holder) else "batch_norm"


def _called(graph_module: GraphModule, holder: str) -> bool:
    """Whether the graph calls this module or one around it: then it is the original's own, and must not be altered."""
    calls = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    return any(holder == call or holder.startswith(f"{call}.") for call in calls)


def free_name(graph_module: GraphModule, wanted: str) -> str:
    """`wanted`, counted on where that is taken."""
    taken = {name for name, _ in graph_module.named_modules()}
    return next(name for i in range(len(taken) + 1) if (name := f"{wanted}{i or ''}") not in taken)


def _forget(graph_module: GraphModule, node: Node) -> None:
    """Drop an attribute that the new module holds now, so that it stands in the state_dict once."""
    target = str(node.target)
    graph_module.graph.erase_node(node)
    holder, _, name = target.rpartition(".")
    unread = all(other.op != "get_attr" or other.target != target for other in graph_module.graph.nodes)
    if unread and not (holder and _called(graph_module, holder)):
        delattr(graph_module.get_submodule(holder), name)


# --- any model -------------------------------------------------------------------------------------------------------


def candidates(walk: Walk) -> list[Site]:
    """The outermost modules whose own forward calls F.batch_norm, and that are no norm which can be taken over whole."""
    outermost: dict[int, Site] = {}
    for name, module, home in walk.registrations:
        if id(module) in outermost:
            old = outermost[id(module)]
            outermost[id(module)] = Site((*old.names, name), module, (*old.homes, *home))
        elif _runs_batch_norm(module) and not _inside(name, outermost) and not _is_whole(walk.site(module)):
            outermost[id(module)] = Site((name,), module, tuple(home))
    return list(outermost.values())


def _inside(name: str, outermost: dict[int, Site]) -> bool:
    return any(outer == "" or name.startswith(f"{outer}.") for site in outermost.values() for outer in site.names)


def _is_whole(site: Site) -> bool:
    return sites.is_norm(site.module) and not isinstance(site.norm, Refusal)


def _runs_batch_norm(module: nn.Module) -> bool:
    return _calls_batch_norm(getattr(type(module), "forward", None))  # TorchScript's modules have none


@lru_cache(maxsize=4096)
def _calls_batch_norm(forward: Any) -> bool:
    """Whether the code of forward loads F.batch_norm, under whatever name; `self.batch_norm` is another thing."""
    module = getattr(forward, "__module__", None) or ""  # code that was generated, as torch.fx's, has none
    if module.startswith("torch.nn.") or not hasattr(forward, "__code__"):
        return False
    loaded: Any = None
    for instruction in dis.get_instructions(forward.__code__):
        if instruction.opname == "LOAD_GLOBAL":
            loaded = forward.__globals__.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and loaded is not None:
            loaded = getattr(loaded, instruction.argval, None)
        else:
            loaded = None
        if loaded is F.batch_norm:
            return True
    return False


def lifted(module: nn.Module) -> GraphModule | Refusal:
    """The module as a GraphModule without calls of F.batch_norm, sharing its tensors; or the reason why not."""
    name = type(module).__name__
    taken_over = why_called_otherwise(module) or why_computed(module)
    if taken_over is not None:
        return Refusal(taken_over)
    if getattr(module, "momentum", 0.0) is None:
        return Refusal(f"{name} calls F.batch_norm with a cumulative average of its own")
    traces = []
    for training in (False, True):
        try:
            with _undisturbed(module, training):
                traces.append(graph.symbolic_trace(module))
        except graph.Untraceable as error:
            return Refusal(f"{name} calls F.batch_norm, and can't be traced: {error}")
    evaluated, trained = traces
    calls = list(zip(_calls(evaluated), _calls(trained), strict=False))
    if not calls:
        return Refusal(f"{name} names batch_norm, but does not call torch.nn.functional.batch_norm on its input")
    if graph.shape(evaluated, {}, _untrained) != graph.shape(trained, {}, _untrained):
        return Refusal(f"{name} does other things by training flag than F.batch_norm, which a trace would bake in")
    for old, new in calls:
        reason = _why_not(new) or _flag(_arguments(old)["training"], _arguments(new)["training"])
        if reason is not None:
            return Refusal(f"{name}: {reason}")
    result: GraphModule = LiftFunctional()(trained).graph_module
    for key, value in attributes(module).items():
        vars(result).setdefault(key, value)
    for part in result.modules():  # what the trace made itself; the module's own children keep their flags
        if part is result or isinstance(part, AnyBatchNorm):
            part.training = module.training
    return result


def _flag(in_eval: bool, in_training: bool) -> str | None:
    if (in_eval, in_training) == (False, True):
        return None
    return f"its F.batch_norm has training={in_training} whatever the mode"


@contextmanager
def _undisturbed(module: nn.Module, training: bool) -> Iterator[None]:
    """The module in a mode for the time of a trace, in which its Python runs for real: flags and counters come back."""
    counters = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_floating_point()]
    try:
        with same_flags(module):
            module.train(training)
            yield
    finally:
        for buffer, before in counters:
            buffer.copy_(before)


def _untrained(node: Node) -> dict[str, Any]:
    """What a node is told, but for what F.batch_norm is told of training."""
    arguments = _arguments(node) if node.target is F.batch_norm else {"args": node.args, "kwargs": node.kwargs}
    return {key: value for key, value in arguments.items() if key not in ("training", "momentum")}


@torch.no_grad()
def lift_(model: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """Lift the candidates of the model that can be (or those named), in place. Returns the model, or its new root."""
    for site in candidates(Walk(model)):
        new = lifted(site.module) if names is None or site.name in names else None
        if isinstance(new, GraphModule):
            sites.replace(site, new)
            model = new if site.module is model else model
    return model
