"""What running an ONNX file would take, told before anything runs it: a few hundred bytes may ask for hours or for terabytes.

>>> check(onnx.load("loops.onnx"), "loops.onnx")
NormRewriteError: loops.onnx: 1,000,000,000 nodes would be run, ...
"""

import math
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from normrewrite.errors import NormRewriteError

_RUNS = 1_000_000  # nodes that loops may run, all together
_NODES, _SWELLED = (
    50_000,
    20,
)  # nodes when functions stand where they are called, and what more that is than in the file
_NUMBERS, _OF_INPUT = 1 << 28, 256  # numbers of one result, and what more that is than all inputs and weights have
_SMALL = 64  # numbers of a constant that may be a shape

_LOOPING = 5.0  # seconds of a run whose loops may have no end

Constants = Mapping[str, int]


def check(proto: Any, where: str) -> bool:
    """Raises NormRewriteError for a file that asks for too much; whether it has loops whose end only running them shows."""
    count = _Count({(function.domain, function.name): function for function in proto.functions})
    try:
        nodes, runs = count.of(proto.graph.node, _constants(proto.graph.initializer))
    except RecursionError:
        raise NormRewriteError(f"{where}: its functions call themselves.") from None
    written = len(proto.graph.node) + sum(len(function.node) for function in proto.functions)
    if nodes > max(_NODES, _SWELLED * written):
        raise NormRewriteError(f"{where}: it has more than {_NODES:,} nodes where its functions stand in their places.")
    if runs > max(_RUNS, _SWELLED * written):
        raise NormRewriteError(f"{where}: its loops would run more than {_RUNS:,} nodes. Give a file without them.")
    _check_results(proto, where)
    return count.open


@contextmanager
def limited(where: object, open_ended: bool) -> Iterator[Any]:
    """Options of a run that is ended after a time, where a loop may have no end of its own."""
    import onnxruntime

    how, late = onnxruntime.RunOptions(), threading.Event()

    def end() -> None:
        late.set()
        how.terminate = True

    timer = threading.Timer(_LOOPING, end)
    if open_ended:
        timer.start()
    try:
        yield how
    except Exception as error:
        if late.is_set():
            raise NormRewriteError(f"{where}: its loops did not end within {_LOOPING:g} s, and were ended.") from error
        raise
    finally:
        timer.cancel()


@dataclass
class _Count:
    """How many nodes there are with functions in their places, and how many are run; open: a loop's end is not known."""

    functions: Mapping[tuple[str, str], Any]
    open: bool = False
    known: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def of(self, nodes: Iterable[Any], outer: Constants) -> tuple[int, int]:
        nodes = list(nodes)
        constants = {**outer, **_values(nodes)}
        counts = [self._of_node(node, constants) for node in nodes]
        return sum(there for there, _ in counts), sum(run for _, run in counts)

    def _of_node(self, node: Any, constants: Constants) -> tuple[int, int]:
        inner = [
            self.of(graph.node, {**constants, **_constants(graph.initializer)})
            for attribute in node.attribute
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))
        ]
        called = (node.domain, node.op_type)
        if called in self.functions:
            if called not in self.known:
                self.known[called] = self.of(self.functions[called].node, {})
            inner.append(self.known[called])
        there, run = sum(each for each, _ in inner), sum(each for _, each in inner)
        return 1 + there, 1 + run * self._turns(node, constants)

    def _turns(self, node: Any, constants: Constants) -> int:
        if node.op_type != "Loop" or node.domain not in ("", "ai.onnx"):
            return 1
        turns = constants.get(node.input[0]) if node.input else None
        self.open |= turns is None
        return 1 if turns is None else max(turns, 1)


def _constants(initializers: Iterable[Any]) -> dict[str, int]:
    """The whole numbers among tensors, by name."""
    numbers = ((tensor.name, _number(tensor)) for tensor in initializers)
    return {name: number for name, number in numbers if number is not None}


def _values(nodes: Iterable[Any]) -> dict[str, int]:
    numbers = {}
    for node in nodes:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            number = attribute.i if attribute.name == "value_int" else _number(attribute.t)
            if number is not None:
                numbers[node.output[0]] = number
    return numbers


def _number(tensor: Any) -> int | None:
    import onnx

    if tensor.data_type != onnx.TensorProto.INT64 or math.prod(tensor.dims) != 1:
        return None
    try:
        return int(onnx.numpy_helper.to_array(tensor).reshape(-1)[0])
    except (ValueError, TypeError, OSError, IndexError):  # damaged, or outside
        return None


def _check_results(proto: Any, where: str) -> None:
    """No result may be far larger than all that is given, as far as its size shows before."""
    import onnx.inliner

    light, at_hand = _without_weights(proto)
    try:
        inferred = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(light), data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):  # damaged: the checker tells
        return
    for value in inferred.graph.value_info:
        numbers = math.prod(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
        if numbers > max(_NUMBERS, _OF_INPUT * at_hand):
            raise NormRewriteError(
                f"{where}: {value.name} would have {numbers:,} numbers. Give a file that makes less."
            )


def _without_weights(proto: Any) -> tuple[Any, int]:
    """The model with its large tensors as inputs, and how many numbers all inputs and tensors have."""
    import onnx

    graph = onnx.GraphProto(name=proto.graph.name, node=proto.graph.node, input=proto.graph.input)
    graph.output.extend(proto.graph.output)
    at_hand = sum(math.prod(dim.dim_value or 1 for dim in each.type.tensor_type.shape.dim) for each in graph.input)
    for tensor in proto.graph.initializer:
        at_hand += (numbers := math.prod(tensor.dims))
        if numbers <= _SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    light = onnx.ModelProto(ir_version=proto.ir_version, graph=graph, opset_import=proto.opset_import)
    light.functions.extend(proto.functions)
    return light, at_hand
