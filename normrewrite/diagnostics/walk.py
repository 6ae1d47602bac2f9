"""Two networks side by side, from place to place: what goes into each norm of the one and of the other, on the same inputs.

>>> for index, inputs in walk(original, twin, [(original.bn1, twin.bn1), ...], batches):
...     for new, old in inputs: ...                      # may be gone through again; bn1 of the twin may be altered now

Where torch.fx traces the model both are run in lockstep, once, batch by batch from one place to the next: what lives there is all
that is held, and what is beyond a gigabyte is mapped to files. Else every place starts from the inputs again, and the time grows
with the square of the depth.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg

from normrewrite.data import Batch
from normrewrite.errors import NormRewriteError
from normrewrite.execution import runner
from normrewrite.sites.graph import CheckedTracer, left_out

Inputs = Iterable[tuple[Tensor, Tensor]]  # of the twin's place and of the original's, a batch each
Place = tuple[nn.Module, nn.Module]  # in the original, in the twin
_HELD = 1 << 30  # bytes held in memory


class _Again:
    """What a generator gives, from the start each time."""

    def __init__(self, generate: Callable[..., Iterator[tuple[Tensor, Tensor]]], *arguments: Any) -> None:
        self.generate = generate
        self.arguments = arguments

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.generate(*self.arguments)


def walk(
    original: nn.Module, twin: nn.Module, places: Sequence[Place], batches: Sequence[Batch]
) -> Iterator[tuple[int, Inputs]]:
    """Each place's index at its first call, in order of execution, and what goes into it.

    Both networks are in eval, and no gradients are asked for.
    """
    graph = traced(original, places, batches)
    if graph is None:
        return _from_the_start(original, twin, places, batches)
    return _lockstep(graph, original, twin, places, batches)


# --- traced: both networks in lockstep ---------------------------------------------------------------------------------


class _SiteTracer(CheckedTracer):
    """Sites are whole, and what holds one is opened, torch's own containers too."""

    def __init__(self, norms: set[int]) -> None:
        super().__init__()
        self.norms = norms

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if id(module) in self.norms:
            return True
        inside = any(id(child) in self.norms for child in module.modules())
        return not inside and super().is_leaf_module(module, name)


def traced(original: nn.Module, places: Sequence[Place], batches: Sequence[Batch]) -> Graph | None:
    """The original's graph for what the batches give, if every place is called in it."""
    norms = {id(norm) for norm, _ in places}
    try:
        tracer = _SiteTracer(norms)
        inputs = {name for batch in batches for name in batch.inputs}
        tracer.fixed = {name: value for name, value in left_out(original, 0).items() if name not in inputs}
        graph = tracer.trace(original)
    except Exception:  # the model's own forward runs here, and may raise anything
        return None
    called = {id(original.get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module"}
    return graph if norms <= called else None


Values = dict[Node, tuple[Any, Any]]  # of the original and of the twin, for one batch


def _lockstep(
    graph: Graph, original: nn.Module, twin: nn.Module, places: Sequence[Place], batches: Sequence[Batch]
) -> Iterator[tuple[int, Inputs]]:
    """Go through the graph once, from place to place; a value is dropped behind its last reader."""
    waiting = {id(norm): index for index, (norm, _) in enumerate(places)}
    last = {argument: node for node in graph.nodes for argument in node.all_input_nodes}
    held: list[Values] = [{} for _ in batches]
    segment: list[Node] = []
    for node in graph.nodes:
        index = None
        if node.op == "call_module":
            index = waiting.pop(id(original.get_submodule(str(node.target))), None)
        if index is not None:
            shelf = _Shelf()
            for values, batch in zip(held, batches, strict=True):
                _advance(segment, last, values, (original, twin), batch)
                shelf.keep(values)
            segment = []
            yield index, _Again(_held_at, node.all_input_nodes[0], held)
        segment.append(node)
        if not waiting:
            return


def _held_at(node: Node, held: list[Values]) -> Iterator[tuple[Tensor, Tensor]]:
    for values in held:
        old, new = values[node]
        yield new, old


def _advance(segment: list[Node], last: dict[Node, Node], values: Values, models: Place, batch: Batch) -> None:
    for node in segment:
        old, new = (_value(model, node, values, batch, which) for which, model in enumerate(models))
        values[node] = old, new
        for argument in node.all_input_nodes:
            if last[argument] is node:
                del values[argument]


def _value(model: nn.Module, node: Node, values: Values, batch: Batch, which: int) -> Any:
    """What `node` gives in one of the two networks."""
    if node.op == "placeholder":
        default = node.args[0] if node.args else None
        value = batch.inputs.get(str(node.target), default)
        return value.clone() if isinstance(value, Tensor) else value
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return getattr(model.get_submodule(owner), name)
    arguments, named = map_arg((node.args, node.kwargs), lambda n: values[n][which])
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*arguments, **named)
    if node.op == "call_method":
        receiver, *others = arguments
        return getattr(receiver, str(node.target))(*others, **named)
    return node.target(*arguments, **named) if callable(node.target) else arguments[0]


class _Shelf:
    """Keeps what lives at one place: up to a gigabyte in memory, mapped to files beyond, which go with the last reader."""

    def __init__(self) -> None:
        self.room = _HELD

    def keep(self, values: Values) -> None:
        for node in values:
            values[node] = map_aggregate(values[node], self._kept)

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "cpu" or not value.numel():
            return value
        self.room -= value.nbytes
        return value if self.room >= 0 else _mapped(value)


def _mapped(value: Tensor) -> Tensor:
    """The same numbers in a file without a name."""
    with tempfile.NamedTemporaryFile(prefix="normrewrite-") as file:
        mapped = torch.from_file(file.name, shared=True, size=value.numel(), dtype=value.dtype)
    return mapped.view(value.shape).copy_(value)


# --- not traced: every site from the inputs ----------------------------------------------------------------------------


class _Reached(BaseException):
    """Carries a site's input out of a forward that need go no further; no error, so that nobody takes it for one."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def _from_the_start(
    original: nn.Module, twin: nn.Module, places: Sequence[Place], batches: Sequence[Batch]
) -> Iterator[tuple[int, Inputs]]:
    for index in _in_order(original, places, batches[0]):
        yield index, _Again(_reached, (twin, original), places[index][::-1], batches)


def _reached(models: Place, norms: Place, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        new, old = (_input_of(model, norm, batch) for model, norm in zip(models, norms, strict=True))
        yield new, old


def _in_order(original: nn.Module, places: Sequence[Place], batch: Batch) -> list[int]:
    """The places in order of their first call; those that are never called are left out."""
    indices = {id(norm): index for index, (norm, _) in enumerate(places)}
    called: dict[int, None] = {}
    hooks = [norm.register_forward_pre_hook(lambda module, _: called.update({id(module): None})) for norm, _ in places]
    try:
        runner(original)(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [indices[norm] for norm in called]


def _input_of(model: nn.Module, module: nn.Module, batch: Batch) -> Tensor:
    def reached(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached(arguments[0].clone())

    hook = module.register_forward_pre_hook(reached)
    try:
        runner(model)(batch)
    except _Reached as stop:
        return stop.value
    finally:
        hook.remove()
    raise NormRewriteError(
        "a norm that one batch reaches is not reached by another: the model's path depends on its input."
    )
