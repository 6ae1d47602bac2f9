"""ONNX: a norm between Q/DQ as one node on int8, so that neither side of it is read or written in floating point.

>>> absorb(proto)                                          # by node: what it became
{'node_NormRewriteMean_3': 'NormRewriteMeanInt8'}

    before:  q -> DQ(x_scale) -> ... -> norm -> ... -> Q(y_scale) -> r       ... views: reshapes and transposes, or none
    after:   q -> ... -> normInt8 -> ... -> r                                 eps / x_scale, weight / y_scale, bias / y_scale

Scales are of a tensor, with zero-point 0, as TensorRT wants them. A norm whose output, or a view on the way, has another reader
stays what it is; one whose input has keeps that reader's DQ.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from normrewrite.backends import onnx as nodes

_VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
_FLOAT, _INT8 = 1, 3  # onnx.TensorProto's


class _Site(NamedTuple):
    """A norm, the views before and behind it, and its Q/DQ."""

    norm: Any
    dequantise: Any
    before: list[Any]
    behind: list[Any]
    quantise: Any


def absorb(proto: Any) -> dict[str, str]:
    """Put an operator for int8 in the place of every norm between DQ and Q, and its body. proto: changed in place."""
    made = {site.norm.name: _replace(proto, site) for site in list(_sites(proto))}
    if made:
        used = {name for node in proto.graph.node for name in node.input}
        idle = [n for n in proto.graph.node if n.op_type == "DequantizeLinear" and not used & set(n.output)]
        for node in idle:
            proto.graph.node.remove(node)
        nodes.add_bodies(proto)
    return made


def _sites(proto: Any) -> Iterator[_Site]:
    made_by = {name: node for node in proto.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in proto.graph.output}
    for norm in proto.graph.node:
        if norm.domain != nodes.DOMAIN or norm.op_type.endswith(nodes.INT8):
            continue
        before, there = _upwards(norm.input[0], made_by, readers)
        behind, back = _downwards(norm.output[0], readers, outputs)
        if _plain(proto, there, "DequantizeLinear") and _plain(proto, back, "QuantizeLinear"):
            yield _Site(norm, there, before, behind, back)


def _upwards(name: str, made_by: dict[str, Any], readers: dict[str, list[Any]]) -> tuple[list[Any], Any]:
    """The views that make a tensor, nearest first, and what stands before them; views that others read end the way."""
    views, node = [], made_by.get(name)
    while node is not None and node.op_type in _VIEWS and len(readers[node.output[0]]) == 1:
        views.append(node)
        node = made_by.get(node.input[0])
    return views, node


def _downwards(name: str, readers: dict[str, list[Any]], outputs: set[str]) -> tuple[list[Any], Any]:
    """The views that read a tensor, nearest first, and the one node behind them; None where there are more readers."""
    views: list[Any] = []
    while len(readers.get(name, [])) == 1 and name not in outputs:
        (node,) = readers[name]
        if node.op_type not in _VIEWS:
            return views, node
        views.append(node)
        name = node.output[0]
    return views, None


def _plain(proto: Any, node: Any, kind: str) -> bool:
    """Whether it is Q or DQ of a whole tensor in int8, with zero-point 0."""
    if node is None or node.op_type != kind:
        return False
    scale, zero = (_constant(proto, name) for name in (*node.input[1:], *("",) * (3 - len(node.input))))
    return scale is not None and scale.size == 1 and zero is not None and zero.dtype == np.int8 and not zero.any()


def _constant(proto: Any, name: str) -> Any:
    import onnx

    held = next((tensor for tensor in proto.graph.initializer if tensor.name == name), None)
    return None if held is None else onnx.numpy_helper.to_array(held)


def _replace(proto: Any, site: _Site) -> str:
    """The node's new operator."""
    norm = site.norm
    scales = [float(_constant(proto, node.input[1]).item()) for node in (site.dequantise, site.quantise)]
    _move(site.before, norm, site.dequantise.input[0])
    last = site.behind[-1] if site.behind else norm
    for place in (1, 2):
        norm.input[place] = _over(proto, norm, norm.input[place], scales[1])
    last.output[0] = site.quantise.output[0]
    proto.graph.node.remove(site.quantise)
    for given in norm.attribute:
        if given.name == "eps":
            given.f = given.f / scales[0]
    norm.op_type += nodes.INT8
    stale = {name for view in (*site.before, norm, *site.behind) for name in view.output}
    kept = [value for value in proto.graph.value_info if value.name not in stale]  # of another type now
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    return str(norm.op_type)


def _move(views: list[Any], norm: Any, source: str) -> None:
    """Let the views, or the norm where there are none, read the int8 tensor itself."""
    (views[-1] if views else norm).input[0] = source


def _over(proto: Any, norm: Any, name: str, scale: float) -> str:
    """The name of a parameter in fp32, divided by the scale, right before the norm."""
    import onnx

    graph, made = proto.graph, f"{name}_of_{norm.name}"
    place = list(graph.node).index(norm)
    graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(scale, np.float32), f"{made}_scale"))
    wide = onnx.helper.make_node("Cast", [name], [f"{made}_wide"], f"{made}_wide", to=_FLOAT)
    graph.node.insert(place, onnx.helper.make_node("Div", [f"{made}_wide", f"{made}_scale"], [made], made))
    graph.node.insert(place, wide)
    return made
