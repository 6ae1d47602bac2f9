"""Specs: they follow from the table, keep their ranges, and their reference is what onnxruntime makes of the body."""

from typing import Any

import numpy as np
import onnx
import pytest

from normrewrite.backends import onnx as nodes
from normrewrite.errors import NormRewriteError
from normrewrite.norms import METRICS, metric
from normrewrite.plugins import OPS, spec
from tests.backends.test_onnx import SPECS, TOLERANCE, drawn, node_model, off, run

FULL = {"reads": [1.0, 0, 0, 0, 0], "eps": 1e-5, "centred": 1}


def given_of(proto: onnx.ModelProto) -> dict[str, Any]:
    """A node's attributes, as a creator gets them: all but those that name the plugin."""
    helper = onnx.helper.get_attribute_value
    return {a.name: helper(a) for a in proto.graph.node[0].attribute if a.name not in nodes.PLUGIN}


def test_every_row_of_the_table_has_a_spec() -> None:
    assert {name for op in OPS.values() for name in op.metrics} == set(METRICS)
    for row in METRICS.values():
        declared = set(nodes.attributes(row, 64, eps=1e-5)) - set(nodes.PLUGIN)
        for name in (nodes.operator(row), nodes.operator(row) + nodes.INT8):
            assert {attribute.name for attribute in OPS[name].attributes} == declared


@pytest.mark.parametrize("open_n", [False, True], ids=["known n", "open n"])
@pytest.mark.parametrize("name", SPECS)
def test_the_reference_is_what_the_body_computes(name: str, open_n: bool) -> None:
    x, weight, bias = drawn((3, 2, 4, 49), np.float32)
    proto = node_model(name, x.shape, np.float32, None if open_n else 196)
    op = OPS[proto.graph.node[0].op_type]
    wanted = op.reference(x, weight, bias, op.parse(given_of(proto)))
    found = run(proto, x=x, weight=weight, bias=bias)
    limit = 10 * TOLERANCE[np.float32] if open_n else TOLERANCE[np.float32]  # the polynomial's terms cancel, in fp32
    assert wanted.dtype == np.float64 and off(found, wanted) <= limit
    assert off(found * np.float32(1.01), wanted) > limit  # it can fail


@pytest.mark.parametrize("name", ["l1", "topk:10", "topk:5%", "range", "l2"])
def test_a_nodes_row_is_the_tables(name: str) -> None:
    given = nodes.attributes(metric(name), 200, eps=1e-5)
    row = OPS[nodes.operator(metric(name))].row(given)
    assert (row.family, row.power, row.k(200)) == (metric(name).family, metric(name).power, metric(name).k(200))
    assert row.gain(200) == pytest.approx(metric(name).gain(200))


def test_missing_attributes_have_the_bodys_defaults() -> None:
    assert OPS["NormRewriteMean"].parse({}) == {"reads": (1.0, 0, 0, 0, 0), "eps": pytest.approx(1e-5), "centred": 1}


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("NormRewriteMean", {"eps": -1.0}, "attribute eps is -1.0, out of range: it is a finite number from 0"),
        ("NormRewriteMean", {"eps": float("nan")}, "attribute eps is nan, out of range"),
        ("NormRewriteMean", {"centred": 2}, "attribute centred is 2, out of range: it is 0 or 1"),
        ("NormRewriteMean", {"centred": 0.5}, "attribute centred is 0.5, out of range"),
        ("NormRewriteMean", {"reads": [1.0, 2.0]}, ".*out of range: it is 5 finite numbers"),
        ("NormRewriteMean", {"eps": [1e-5, 1e-5]}, "attribute eps .*out of range"),
        ("NormRewriteTop", {"count": -1}, "attribute count is -1, out of range: it is a whole number from 0"),
        ("NormRewriteTop", {"count": float("nan")}, "attribute count is nan, out of range"),
        ("NormRewriteTop", {"count": 3, "percent": 5.0}, "count 3 and percent 5 exclude each other"),
        ("NormRewriteTop", {"percent": 101.0}, "attribute percent is 101.0, out of range: it is 0 to 100"),
        ("NormRewritePower", {"power": 0.0}, "attribute power is 0.0, out of range: it is above 0"),
        ("NormRewritePower", {"power": 2.5}, "power 2.5: a plugin takes whole powers. Build with --plugins off"),
    ],
)
def test_attributes_out_of_range(name: str, changed: dict[str, Any], said: str) -> None:
    extra = {"count": 0, "percent": 0.0} if name == "NormRewriteTop" else {}
    with pytest.raises(NormRewriteError, match=f"node norm: {said}"):
        OPS[name].parse(FULL | extra | changed, "node norm")


def test_a_gain_that_is_no_gain() -> None:
    row = OPS["NormRewriteMean"].row(OPS["NormRewriteMean"].parse({"reads": [-1.0, 0, 0, 0, 0]}))
    with pytest.raises(NormRewriteError, match="attribute reads gives -1 for 64 elements, and must be above 0"):
        row.gain(64)


FP32 = ("float32",) * 3


@pytest.mark.parametrize(
    ("shapes", "dtypes", "said"),
    [
        (((2, 4, 1), (4, 1, 1), (4, 1, 1)), FP32, "takes x of rank 4, got 2×4×1"),
        (((2, 4, 1, 8), (4, 1), (4, 1, 1)), FP32, "takes weight of rank 3, got 4×1"),
        (((2, 4, 1, 8), (4, 1, 1), (5, 1, 1)), FP32, "takes bias 4×1×1, got 5×1×1"),
        (((2, 4, 1, 8), (4, 1, 1)), FP32[:2], "takes x, weight, bias, got 2 inputs"),
        (((2, 4, 1, 8), (4, 1, 1), (4, 1, 1)), ("int8",) * 3, "takes float32 or float16 .*got int8"),
        (((2, 4, 1, 8), (4, 1, 1), (4, 1, 1)), ("float16", "float32", "float32"), "for all inputs alike"),
        (((2, 4, 1, 1), (4, 1, 1), (4, 1, 1)), FP32, "needs 10 elements that share statistics, got 1"),
    ],
)
def test_inputs_that_do_not_fit(shapes: Any, dtypes: Any, said: str) -> None:
    op = OPS["NormRewriteTop"]
    given = op.parse({"count": 10})
    assert op.why_not(((-1, 4, 1, 16), (4, 1, 1), (4, 1, 1)), FP32, given) is None
    assert op.why_not(((-1, -1, -1, -1), (-1, -1, 1), (4, 1, 1)), ("float16",) * 3, given) is None
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(op.why_not(shapes, dtypes, given))


def test_namespace_and_version_are_those_of_exported_nodes() -> None:
    exported = nodes.attributes(metric("l1"), 64, eps=1e-5)
    assert (exported["plugin_namespace"], exported["plugin_version"]) == (spec.NAMESPACE, spec.VERSION)
