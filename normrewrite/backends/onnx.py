"""ONNX: the node of a norm that measures at inference, and a local-function body that any runtime can run.

>>> attributes(metric("l1"), None, eps=1e-5)["reads"]
>>> add_bodies(program.model_proto)                       # modules become such nodes in deploy/onnx_nodes.py

A node takes x: (B, G, K, S), statistics over the last two axes, and weight and bias: (G, K, 1); it gives y like x:

    y = weight * (x - mean) / (C(n) * spread + eps) + bias        n = K * S

There is one operator a family of norms.METRICS, named so that no other operator in the world is called the same
(TensorRT's parser ignores domains), and its attributes are the row's numbers, all explicit:

    NormRewriteMean    mean |d|
    NormRewritePower   (mean |d|^power)^(1/power)      power
    NormRewriteTop     mean of the k largest |d|       k = max(1, count + round(percent * n / 100))
    NormRewriteSpan    max d - min d

and for all: reads (1/C(n) as a polynomial in t, constant term first; t is sqrt(1 - 1/n) for the first two operators,
sqrt(ln n) for the others), eps, centred (0: x itself is measured, as
RMSNorm does), plugin_namespace and plugin_version, by which TensorRT finds a plugin. Bodies compute in fp32, and centre
twice: the rounding of a constant row's mean would be divided by eps alone.

Each has a twin for int8, `NormRewriteMeanInt8` and so on, whose x and y are int8 and whose weight and bias are fp32. It needs no
scales of its own: with x = x_scale * q and y_scale of what reads y, a norm of x is one of q itself,

    y / y_scale = (weight / y_scale) * (q - mean q) / (C(n) * spread(q) + eps / x_scale) + bias / y_scale

rounded to even and kept within -128 to 127. onnx_int8.py puts such nodes where a norm stands between Q and DQ.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from normrewrite.errors import NormRewriteError
from normrewrite.norms import Gain, Metric

DOMAIN = "normrewrite"
PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
_DEGREE = 4
_SMALLEST, _LARGEST = 20, 4_000_000  # of n, in the fit of 1/C(n)


# --- rows to attributes ----------------------------------------------------------------------------------------------


INT8 = "Int8"  # how the operators for int8 end


def operator(row: Metric) -> str:
    """The operator that computes a row's family in floating point."""
    return "NormRewritePower" if row.family == "mean" and row.power != 1 else f"NormRewrite{row.family.title()}"


def attributes(row: Metric, n: int | None, *, gain: Gain = "exact", eps: float, centred: bool = True) -> dict[str, Any]:
    """A node's attributes; n is None where the number of elements is known only when the node runs.

    >>> attributes(metric("l2"), 64, eps=1e-5)["reads"]
    [1.0, 0.0, 0.0, 0.0, 0.0]
    """
    known = {"reads": list(reads(row, n, gain)), "eps": eps, "centred": int(centred), **PLUGIN}
    if operator(row) == "NormRewritePower":
        return {"power": float(row.power), **known}
    if row.family != "top":
        return known
    if n is not None or row.percent is None:
        return {"count": row.k(n or _LARGEST), "percent": 0.0, **known}
    return {"count": 0, "percent": row.percent, **known}


@lru_cache(maxsize=256)
def reads(row: Metric, n: int | None, gain: Gain = "exact") -> tuple[float, ...]:
    """1/C(n), what S reads on n unit Gaussians, as the coefficients of a polynomial in t(n), degree 4.

    A constant for a known n. Else exact for means, and fitted for the others from max(20, 4k) to 4e6 elements, where it
    errs by 0.05 % at most (a percentage by 4 % at small n, where its k goes in steps).
    """
    if n is not None:
        return (1 / row.gain(n, gain), *(0.0,) * _DEGREE)
    degree = 1 if row.family == "mean" else _DEGREE
    least = max(_SMALLEST, 4 * (row.count or 0))
    sizes = [round(size) for size in np.geomspace(least, max(_LARGEST, 8 * least), 80)]
    gains = np.array([row.gain(size, gain) for size in sizes])
    powers = np.vander([variable(row, size) for size in sizes], degree + 1, increasing=True)
    fitted = np.linalg.lstsq(powers * gains[:, None], np.ones(len(sizes)), rcond=None)[0]  # the error is relative
    return tuple(float(value) for value in fitted) + (0.0,) * (_DEGREE - degree)


def variable(row: Metric, n: int) -> float:
    """t(n): means depend on n by the sample's own mean, extremes by the Gaussian's tail."""
    return math.sqrt(1 - 1 / n) if row.family == "mean" else math.sqrt(math.log(n))


# --- bodies ----------------------------------------------------------------------------------------------------------

_OWN_MEAN = """
    share_of_one = Reciprocal (number)
    unity = Constant <value_float = 1.0> ()
    left = Sub (unity, share_of_one)
    t = Sqrt (left)
"""
_TAIL = """
    log = Log (number)
    t = Sqrt (log)
"""
_SPREAD = {  # by operator: its own attributes; s: (B, G, 1, 1) from d: (B, G, K, S), the number n and the axes; t(n)
    "NormRewriteMean": ("", "size = Abs (d)  s = ReduceMean <keepdims = 1> (size, axes)", _OWN_MEAN),
    "NormRewritePower": (
        "power: float = 2.0,",
        """
        size = Abs (d)
        power = Constant <value_float: float = @power> ()
        raised = Pow (size, power)
        raised_mean = ReduceMean <keepdims = 1> (raised, axes)
        root = Reciprocal (power)
        s = Pow (raised_mean, root)
        """,
        _OWN_MEAN,
    ),
    "NormRewriteTop": (
        "count: int = 1, percent: float = 0.0,",
        """
        size = Abs (d)
        flat = Constant <value_ints = [0, 0, 1, -1]> ()
        list = Reshape (size, flat)
        percent = Constant <value_float: float = @percent> ()
        hundred = Constant <value_float = 100.0> ()
        percents = Mul (percent, number)
        part = Div (percents, hundred)
        near = Round (part)
        share = Cast <to = 7> (near)
        count = Constant <value_int: int = @count> ()
        asked = Add (count, share)
        one = Constant <value_ints = [1]> ()
        k = Max (asked, one)
        largest, where = TopK (list, k)
        last = Constant <value_ints = [3]> ()
        s = ReduceMean <keepdims = 1> (largest, last)
        """,
        _TAIL,
    ),
    "NormRewriteSpan": (
        "",
        """
        high = ReduceMax <keepdims = 1> (d, axes)
        low = ReduceMin <keepdims = 1> (d, axes)
        s = Sub (high, low)
        """,
        _TAIL,
    ),
}

_BODY = """
<domain: "normrewrite", opset_import: ["" : {opset}]>
{operator} <{numbers} reads: floats = [1.0, 0.0, 0.0, 0.0, 0.0], eps: float = 1e-5, centred: int = 1,
    plugin_namespace: string = "normrewrite", plugin_version: string = "1"> (x, weight, bias) => (y)
{{
    wide = Cast <to = 1> (x)
    axes = Constant <value_ints = [2, 3]> ()
    average = ReduceMean <keepdims = 1> (wide, axes)
    centred = Constant <value_int: int = @centred> ()
    used = Cast <to = 1> (centred)
    mean = Mul (average, used)
    about = Sub (wide, mean)
    rest = ReduceMean <keepdims = 1> (about, axes)
    rounding = Mul (rest, used)
    d = Sub (about, rounding)
    members = Shape <start = 2, end = 3> (x)
    places = Shape <start = 3, end = 4> (x)
    elements = Mul (members, places)
    number = Cast <to = 1> (elements)
    {spread}
    {variable}
    exponents = Constant <value_floats = [0.0, 1.0, 2.0, 3.0, 4.0]> ()
    powers = Pow (t, exponents)
    reads = Constant <value_floats: floats = @reads> ()
    terms = Mul (powers, reads)
    first = Constant <value_ints = [0]> ()
    unit = ReduceSum <keepdims = 1> (terms, first)
    measured = Div (s, unit)
    eps = Constant <value_float: float = @eps> ()
    scale = Add (measured, eps)
    normal = Div (d, scale)
    w = Cast <to = 1> (weight)
    b = Cast <to = 1> (bias)
    scaled = Mul (normal, w)
    shifted = Add (scaled, b)
    {result}
}}
"""
_RESULT = {  # by whether x is int8
    False: "y = CastLike (shifted, x)",
    True: """
    least = Constant <value_float = -128.0> ()
    most = Constant <value_float = 127.0> ()
    whole = Round (shifted)
    kept = Clip (whole, least, most)
    y = CastLike (kept, x)
    """,
}


def body(name: str, opset: int) -> Any:
    """The onnx.FunctionProto of an operator at a model's opset (TensorRT wants both to be the same)."""
    import onnx.parser

    numbers, spread, variable = _SPREAD[name.removesuffix(INT8)]
    result = _RESULT[name.endswith(INT8)]
    text = _BODY.format(operator=name, opset=opset, numbers=numbers, spread=spread, variable=variable, result=result)
    return onnx.parser.parse_function(text)


def add_bodies(proto: Any) -> None:
    """Append the body of every operator of ours that the model calls. proto: an onnx.ModelProto, changed in place."""
    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    present = {function.name for function in proto.functions}
    for name in sorted(used(proto) - present):
        proto.functions.append(body(name, opset))


def used(proto: Any) -> set[str]:
    """The operators of ours that a model's graph calls."""
    return {node.op_type for node in proto.graph.node if node.domain == DOMAIN}


def fitted(proto: Any) -> list[str]:
    """The nodes of ours whose C(n) is a fitted formula, because n is open; that of means is exact."""
    return [node.name for node in proto.graph.node if node.domain == DOMAIN and any(attribute(node, "reads")[2:])]


def is_fitted(proto: Any) -> bool:
    """Whether any C(n) is a fitted formula, in nodes of ours or in bodies that stand in their place."""
    constants = (node for node in proto.graph.node if node.op_type == "Constant")
    lists = (list(attribute(node, "value_floats", ())) for node in constants)
    formulas = any(len(values) == _DEGREE + 1 and any(values[2:]) and values != _EXPONENTS for values in lists)
    return formulas or bool(fitted(proto))


_EXPONENTS = [float(exponent) for exponent in range(_DEGREE + 1)]


def inlined(proto: Any) -> Any:
    """The model with the bodies in the place of their nodes: standard operators alone."""
    import onnx.inliner

    plain = onnx.inliner.inline_local_functions(proto)
    kept = [entry for entry in plain.opset_import if entry.domain != DOMAIN]
    del plain.opset_import[:]
    plain.opset_import.extend(kept)
    return plain


# --- nodes of a file -------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """What an attribute may be, in words and numbers; all of them finite."""

    words: str
    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # whether the least is itself too little
    whole: bool = False
    length: int = 1

    def holds(self, value: Any) -> bool:
        """Whether a number, or a sequence of them where the length is not 1, lies within."""
        numbers = [value] if self.length == 1 else list(value)
        return len(numbers) == self.length and all(map(self._holds, numbers))

    def _holds(self, number: float) -> bool:
        fits = self.least <= number <= self.most and not (self.above and number == self.least)
        return fits and math.isfinite(number) and not (self.whole and number % 1)


RANGES = {  # what the operators' attributes may be
    "count": Range("a whole number from 0", least=0, whole=True),
    "percent": Range("0 to 100", least=0, most=100),
    "power": Range("above 0", least=0, above=True),
    "eps": Range("a finite number from 0", least=0),
    "centred": Range("0 or 1", least=0, most=1, whole=True),
    "reads": Range(f"{_DEGREE + 1} finite numbers", length=_DEGREE + 1),
}


def check(proto: Any) -> None:
    """Raises NormRewriteError where a node of ours has an attribute that no norm can have."""
    import onnx

    for node in proto.graph.node:
        for given in node.attribute if node.domain == DOMAIN else ():
            value = onnx.helper.get_attribute_value(given)
            if given.name in RANGES and not RANGES[given.name].holds(value):
                raise NormRewriteError(
                    f"node {node.name or node.op_type}: attribute {given.name} is {value}, out of range: it is "
                    f"{RANGES[given.name].words}. Export the model again with normrewrite."
                )


def name_of(node: Any) -> str:
    """As TensorRT's parser calls a node: one without a name goes by what it gives."""
    return node.name or (f"node_of_{node.output[0]}" if node.output else node.op_type)


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
