"""One spec an operator: what its node takes and gives, its attributes with types and ranges, and its reference.

>>> op = OPS["NormRewriteTop"]
>>> values = op.parse({"count": 10, "percent": 0.0, "reads": [1.9, 0, 0, 0, 0], "eps": 1e-5, "centred": 1})
>>> y = op.reference(x, weight, bias, values)             # x: (B, G, K, S); weight, bias: (G, K, 1); float64

Nothing is stated twice: operators follow from the rows of norms.METRICS, names, types and defaults of attributes from the
operator's body in backends/onnx.py, ranges from the table there. Plugins are made from these specs alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from normrewrite.backends import onnx as nodes
from normrewrite.backends import reference
from normrewrite.errors import NormRewriteError
from normrewrite.norms import METRICS, Metric

NAMESPACE, VERSION = nodes.PLUGIN["plugin_namespace"], nodes.PLUGIN["plugin_version"]
INPUTS = ("x", "weight", "bias")
RANKS = (4, 3, 3)  # of the inputs: (B, G, K, S), (G, K, 1), (G, K, 1)
DTYPES = ("float32", "float16")  # of all of them alike, and of y
INT8 = ("int8", "float32", "float32")  # of an operator for int8, whose y is int8, too
Kind = Literal["int", "float", "floats"]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Attribute:
    """A number, or several, that a node carries."""

    name: str
    kind: Kind
    default: Any
    range: nodes.Range

    def parse(self, value: Any, where: str) -> Any:
        """The value as its kind has it, from one number or an array. Raises NormRewriteError beyond the range."""
        numbers = np.asarray(value).reshape(-1).tolist()
        several = self.kind == "floats"
        if not (several or len(numbers) == 1) or not self.range.holds(numbers if several else numbers[0]):
            raise NormRewriteError(
                f"{where}: attribute {self.name} is {value}, out of range: it is {self.range.words}."
            )
        return tuple(map(float, numbers)) if several else {"int": int, "float": float}[self.kind](numbers[0])


@dataclass(frozen=True)
class Op:
    """An operator of domain normrewrite. `base`: a row of its family, whose numbers a node's attributes replace."""

    name: str
    base: Metric
    attributes: tuple[Attribute, ...]
    int8: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        """That x, and y, may have."""
        return INT8[:1] if self.int8 else DTYPES

    @property
    def metrics(self) -> list[str]:
        """Those of the table that it computes."""
        return [row.name for row in METRICS.values() if nodes.operator(row) == self.name.removesuffix(nodes.INT8)]

    def parse(self, values: Values, where: str = "") -> dict[str, Any]:
        """All attributes in order, defaults for those that are missing. Raises NormRewriteError out of a range."""
        where = where or self.name
        parsed = {a.name: a.parse(values.get(a.name, a.default), where) for a in self.attributes}
        if parsed.get("count") and parsed.get("percent"):
            raise NormRewriteError(
                f"{where}: count {parsed['count']} and percent {parsed['percent']:g} exclude each other."
            )
        if parsed.get("power", 1.0) % 1:
            raise NormRewriteError(
                f"{where}: power {parsed['power']:g}: a plugin takes whole powers. Build with --plugins off."
            )
        return parsed

    def row(self, values: Values) -> Metric:
        """The row of the table that a node describes; its C(n) is the node's `reads`."""

        def gain(n: int, k: int) -> float:
            t = nodes.variable(self.base, n)
            read = math.fsum(value * t**power for power, value in enumerate(values["reads"]))
            if read <= 0:
                raise NormRewriteError(
                    f"{self.name}: attribute reads gives {read:g} for {n} elements, and must be above 0."
                )
            return 1 / read

        row = replace(self.base, exact=gain, paper=gain, power=int(values.get("power", 1)))
        if self.base.family != "top":
            return row
        if values["percent"]:
            return replace(row, count=None, percent=values["percent"])
        return replace(row, count=max(1, values["count"]), percent=None)

    def reference(
        self, x: npt.NDArray[Any], weight: npt.NDArray[Any], bias: npt.NDArray[Any], values: Values
    ) -> npt.NDArray[Any]:
        """y: (B, G, K, S), float64; whole numbers where it is int8."""
        weight, bias = (parameter.reshape(x.shape[1:3]) for parameter in (weight, bias))
        centred = bool(values["centred"])
        y = reference.row_norm(x, self.row(values), weight, bias, values["eps"], centred=centred)[0]
        return np.clip(np.round(y), -128, 127) if self.int8 else y

    def why_not(self, shapes: Sequence[Sequence[int]], dtypes: Sequence[str], values: Values) -> str | None:
        """Why a node can't take inputs of these shapes (-1: open) and dtypes, or None."""
        return self.why_not_dtypes(dtypes) or self._why_not_ranks(shapes) or self._too_few(shapes[0], values)

    def why_not_dtypes(self, dtypes: Sequence[str]) -> str | None:
        """The same of the dtypes alone, which are known first."""
        if len(dtypes) != len(INPUTS):
            return f"takes {', '.join(INPUTS)}, got {len(dtypes)} inputs"
        if self.int8:
            return None if tuple(dtypes) == INT8 else f"takes {', '.join(INT8)}, got {', '.join(dtypes)}"
        if len(set(dtypes)) > 1 or dtypes[0] not in DTYPES:
            return f"takes {' or '.join(DTYPES)} for all inputs alike, got {', '.join(dtypes)}"
        return None

    def _why_not_ranks(self, shapes: Sequence[Sequence[int]]) -> str | None:
        for name, shape, rank in zip(INPUTS, shapes, RANKS, strict=True):
            if len(shape) != rank:
                return f"takes {name} of rank {rank}, got {'×'.join(map(str, shape))}"
        return self._misfit(shapes)

    def _misfit(self, shapes: Sequence[Sequence[int]]) -> str | None:
        wanted = (*shapes[0][1:3], 1)
        for name, shape in zip(INPUTS[1:], shapes[1:], strict=True):
            if any(a != b and -1 not in (a, b) for a, b in zip(shape, wanted, strict=True)):
                return f"takes {name} {'×'.join(map(str, wanted))}, got {'×'.join(map(str, shape))}"
        return None

    def _too_few(self, shape: Sequence[int], values: Values) -> str | None:
        n, row = shape[2] * shape[3], self.row(values)
        least = max(2, (row.count or 2) if row.family == "top" else 2)
        return f"needs {least} elements that share statistics, got {n}" if -1 not in shape[2:] and n < least else None


@cache
def _op(name: str) -> Op:
    base = next(row for row in METRICS.values() if nodes.operator(row) == name.removesuffix(nodes.INT8))
    return Op(name, base, tuple(_attributes(name)), name.endswith(nodes.INT8))


def _attributes(name: str) -> list[Attribute]:
    """As the body declares them; those that name the plugin are TensorRT's own."""
    import onnx

    kinds: dict[int, Kind] = {1: "float", 2: "int", 6: "floats"}  # onnx.AttributeProto's FLOAT, INT, FLOATS
    declared = [proto for proto in nodes.body(name, 20).attribute_proto if proto.name in nodes.RANGES]
    values = {proto.name: onnx.helper.get_attribute_value(proto) for proto in declared}
    return [
        Attribute(proto.name, kinds[proto.type], values[proto.name], nodes.RANGES[proto.name]) for proto in declared
    ]


_NAMES = dict.fromkeys(nodes.operator(row) for row in METRICS.values())
OPS = {name: _op(name) for name in (*_NAMES, *(f"{name}{nodes.INT8}" for name in _NAMES))}
