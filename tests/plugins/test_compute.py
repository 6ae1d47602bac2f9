"""What enqueue launches, by Triton's interpreter on a CPU: every metric, scope, dtype and format, against float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

from normrewrite.backends.call import Call
from normrewrite.backends.triton import launch, serving
from normrewrite.plugins import OPS, compute
from tests.backends import test_onnx_int8
from tests.backends.test_onnx import SPECS, TOLERANCE, drawn, node_model, off
from tests.backends.triton import interpreter
from tests.plugins.test_spec import given_of

interpreter.mend()
SCOPES = {"group": (2, 2, 3, 7), "layer": (3, 1, 24, 1), "instance": (2, 5, 1, 21), "batch": (1, 5, 1, 42)}
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


def room(shape: tuple[int, ...], dtype: torch.dtype, multiple: int) -> Tensor:
    """A tensor of NaN, in linear format or channels-last, padded to a multiple."""
    strides = compute.strides(shape, multiple=multiple)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return torch.full((size,), torch.nan, dtype=dtype).as_strided(shape, strides)


def check(name: str, shape: tuple[int, ...], dtype: type, multiple: int = 0, n: int | None = -1) -> Tensor:
    """Compute into memory that is given; what was written, after it was compared with the reference."""
    x, weight, bias = drawn(shape, dtype)
    proto = node_model(name, shape, dtype, shape[2] * shape[3] if n == -1 else n)
    op = OPS[proto.graph.node[0].op_type]
    given = op.parse(given_of(proto))
    seen, y = (room(shape, torch.from_numpy(x).dtype, multiple) for _ in range(2))
    seen.copy_(torch.from_numpy(x))
    compute.compute(op.row(given), given, seen, torch.from_numpy(weight), torch.from_numpy(bias), y)
    wanted = op.reference(x, weight, bias, given)
    assert off(y.numpy(), wanted) <= TOLERANCE[dtype]
    assert off(y.numpy() * dtype(1.01), wanted) > TOLERANCE[dtype]  # it can fail
    return y


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", SPECS)
def test_every_metric_and_scope(name: str, scope: str, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda *told: (launches.append(told[0].fn.__name__), run(*told)))
    check(name, SCOPES[scope], dtype)
    assert launches  # by the kernels, not by torch


@pytest.mark.parametrize("scope", [*SCOPES, "long"])
@pytest.mark.parametrize("name", ["l1", "l2", "topk:10", "range"])
def test_int8(name: str, scope: str) -> None:
    """Rounded as the reference is; the longest rows by torch."""
    shape = SCOPES.get(scope, (1, 1, 8200, 1))
    x, weight, bias = test_onnx_int8.drawn(shape)
    proto = test_onnx_int8.node_model(name, shape)
    op = OPS[proto.graph.node[0].op_type]
    given, y = op.parse(given_of(proto)), torch.zeros(shape, dtype=torch.int8)
    compute.compute(op.row(given), given, *map(torch.from_numpy, (x, weight, bias)), y)
    assert test_onnx_int8.apart(y.numpy(), op.reference(x, weight, bias, given)) < 0.02
    twice = op.reference(x, 2 * weight, bias, given)
    assert np.abs(twice).max() > 126 and np.abs(y.numpy() - twice).max() > 1  # saturated; and it can fail


@pytest.mark.parametrize(("dtype", "multiple"), [(np.float32, 1), (np.float16, 8)], ids=["HWC", "HWC8"])
@pytest.mark.parametrize("groups", [5, 8])
@pytest.mark.parametrize("name", ["l1", "topk:10"])
def test_channels_last(name: str, groups: int, dtype: type, multiple: int) -> None:
    check(name, (2, groups, 1, 21), dtype, multiple)


@pytest.mark.parametrize("name", ["l2", "range"])
def test_an_open_n(name: str) -> None:
    """The polynomial of the node, not the constant of the table."""
    check(name, (2, 2, 3, 7), np.float32, n=None)


def test_not_centred() -> None:
    x, weight, bias = drawn((3, 1, 24, 1), np.float32)
    proto = node_model("l1", x.shape, np.float32, 24, centred=0)
    op = OPS["NormRewriteMean"]
    given, y = op.parse(given_of(proto)), torch.empty(x.shape)
    compute.compute(op.row(given), given, *map(torch.from_numpy, (x, weight, bias)), y)
    assert off(y.numpy(), op.reference(x, weight, bias, given)) <= TOLERANCE[np.float32]
    assert off(y.numpy(), op.reference(x, weight, bias, given | {"centred": 1})) > TOLERANCE[np.float32]


def test_y_is_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy, where the kernels take the memory as it lies."""
    monkeypatch.setattr(Tensor, "copy_", None)
    x, y = torch.randn(2, 2, 3, 7), torch.empty(2, 2, 3, 7)
    given = OPS["NormRewriteMean"].parse({})
    compute.compute(OPS["NormRewriteMean"].row(given), given, x, torch.ones(2, 3, 1), torch.zeros(2, 3, 1), y)
    assert y.isfinite().all()


def test_what_the_kernels_refuse_torch_computes() -> None:
    assert serving.why_not(Call(torch.empty(1, 1, 9000, 1), OPS["NormRewriteMean"].base, sample=True))
    check("l1", (1, 1, 9000, 1), np.float32)


def test_strides_of_formats() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert compute.strides(x.shape) == x.stride()
    assert compute.strides(x.shape, multiple=1) == x.to(memory_format=torch.channels_last).stride()
    assert compute.strides(x.shape, multiple=8) == (160, 1, 40, 8)


def test_memory_is_described_as_others_do() -> None:
    described = compute._Memory(4096, (2, 3), (3, 1), "float16").__cuda_array_interface__
    assert described == {"data": (4096, False), "shape": (2, 3), "strides": (6, 2), "typestr": "<f2", "version": 3}
