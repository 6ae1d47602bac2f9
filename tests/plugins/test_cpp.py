"""The library of plugins in C++ without a GPU: what it launches is run by Triton's interpreter, against float64.

Its driver is one that writes launches down (cpp/libcuda.cpp); the kernels themselves are those of the Python plugins.
"""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

from normrewrite.backends import onnx as nodes
from normrewrite.backends.triton import forward, launch, resident
from normrewrite.backends.triton.geometry import why_not
from normrewrite.norms import metric
from normrewrite.plugins import OPS, embedded
from normrewrite.plugins.built import SOURCES
from normrewrite.plugins.compute import strides
from normrewrite.plugins.spec import INT8
from tests.backends import test_onnx_int8
from tests.backends.test_onnx import TOLERANCE, drawn, off
from tests.backends.triton import interpreter
from tests.conftest import ROOT
from tests.plugins.test_compute import room

interpreter.mend()
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: g++ is not installed"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]
HERE = Path(__file__).with_name("cpp")
KERNELS = {
    "moments": forward.moments,
    "deviations": forward.deviations,
    "settle": forward.settle,
    "select": forward.select,
    "apply": forward.apply,
    "row_forward": resident.row_forward,
}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cpp/harness.cpp with the library's own sources, all but its face to TensorRT."""
    folder = tmp_path_factory.mktemp("cpp")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-m", "tests.plugins.cpp_tables", str(folder)], cwd=ROOT, env=environment, check=True
    )
    sources = [HERE / "harness.cpp", *(SOURCES / name for name in ("norm.cpp", "driver.cpp", "code.cpp")), "tables.cpp"]
    compiler = ["g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}"]
    subprocess.run([*compiler, "-fPIC", "-shared", HERE / "libcuda.cpp", "-o", "libcuda.so.1"], cwd=folder, check=True)
    subprocess.run([*compiler, *sources, "-o", "harness", "-ldl"], cwd=folder, check=True)
    return folder / "harness"


def told(program: Path, *lines: str, **environment: str) -> list[list[dict[str, Any]]]:
    """What each line made of the library."""
    known = os.environ | {"LD_LIBRARY_PATH": str(program.parent)} | environment
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stderr
    found: list[list[dict[str, Any]]] = [[]]
    for event in map(json.loads, done.stdout.splitlines()):
        if "done" in event:
            found.append([])
        else:
            found[-1].append(event)
    return found[:-1]


def line(given: dict[str, Any], shape: tuple[int, ...], dtype: str, last: bool, operator: str) -> str:
    numbers = {name: ",".join(map(repr, np.ravel(value).tolist())) for name, value in given.items()}
    attributes = ";".join(f"{name}={text}" for name, text in numbers.items())
    sizes = ["x".join(map(str, each)) for each in (shape, (*shape[1:3], 1), (*shape[1:3], 1))]
    dtypes = INT8 if dtype == "int8" else [dtype] * 3
    return "|".join([operator, attributes, ",".join(sizes), ",".join(dtypes), str(int(last))])


class Memory:
    """x, weight, bias, y and a workspace, at the addresses that the harness gives."""

    def __init__(self, *tensors: Tensor, workspace: int) -> None:
        self.tensors = [
            *tensors,
            torch.full((workspace,), 255, dtype=torch.uint8),
        ]  # NaN, wherever it is read unwritten

    def at(self, address: int, name: str) -> Tensor:
        which, offset = (address >> 40) - 1, address & (1 << 40) - 1
        held = self.tensors[which]
        if which < 4:
            assert offset == 0
            return held
        return held[offset:].view(torch.int64 if name == "indices_ptr" else torch.float32)


def run(event: dict[str, Any], memory: Memory) -> None:
    if "loaded" in event:
        return
    if "cleared" in event:
        memory.at(event["cleared"], "mean_ptr")[: event["count"]] = 0
        return
    name, _, constants = re.fullmatch(r"(\w+) (\S+) (.*)", event["kernel"]).groups()  # type: ignore[union-attr]
    kernel, arguments = KERNELS[name], dict.fromkeys(KERNELS[name].arg_names)
    for key, value in re.findall(r"(\w+)=(.*?)(?= \w+=|$)", constants):
        arguments[key] = int(value) if value.isdigit() else value
    for key, value in event["arguments"].items():
        arguments[key] = memory.at(value, key) if key.endswith("_ptr") else value
    assert event["stream"] == 7 and event["hidden"]
    launch.run(kernel, event["programs"], event["threads"] // 32, arguments)


SHAPES = {  # of every way to be cut: (shape, channels-last)
    "group": ((2, 2, 3, 49), False),
    "layer": ((3, 1, 24, 1), False),
    "batch": ((1, 2, 1, 4300), False),
    "group of whole accesses": ((2, 2, 2, 64), False),
    "long layer": ((2, 1, 1000, 1), False),
    "instance": ((1, 5, 1, 300), False),
    "instance, channels-last": ((1, 40, 1, 12), True),
    "batch, channels-last": ((1, 8, 1, 4300), True),
}
SPECS = ("l1", "l2", "linf", "topk:10", "topk:5%", "range", "topk:3")
CASES = [
    (spec, scope) for scope in SHAPES for spec in (SPECS[:-1] if scope in ("group", "layer") else ("l1", "topk:3"))
]


def told_of(spec: str, shape: tuple[int, ...], centred: bool = True) -> dict[str, Any]:
    """A node's attributes, without those that name the plugin."""
    given = nodes.attributes(metric(spec), shape[2] * shape[3], eps=1e-5, centred=centred)
    return {name: value for name, value in given.items() if name not in nodes.PLUGIN}


@pytest.mark.parametrize(("spec", "scope"), [*CASES, ("l2", "batch"), ("range", "batch, channels-last")])
def test_what_is_launched_computes_the_reference(spec: str, scope: str, program: Path) -> None:
    (shape, last), op = SHAPES[scope], OPS[nodes.operator(metric(spec))]
    dtype: Any = np.float16 if (SPECS.index(spec) + len(scope)) % 2 else np.float32
    given = told_of(spec, shape, centred=len(scope) % 2 == 0)
    x, weight, bias = drawn(shape, dtype)
    seen, y = (room(shape, torch.from_numpy(x).dtype, 1 if last else 0) for _ in range(2))
    seen.copy_(torch.from_numpy(x))
    (events,) = told(program, line(given, shape, str(np.dtype(dtype)), last, op.name))
    memory = Memory(seen, torch.from_numpy(weight), torch.from_numpy(bias), y, workspace=events[-1]["workspace"])
    for event in events[:-1]:
        run(event, memory)
    wanted = op.reference(x, weight, bias, op.parse(given))
    assert off(y.numpy(), wanted) <= TOLERANCE[dtype]
    assert off(y.numpy() * dtype(1.01), wanted) > TOLERANCE[dtype]  # it can fail


@pytest.mark.parametrize("scope", ["group", "layer", "group of whole accesses"])
@pytest.mark.parametrize("spec", ["l1", "topk:3"])
def test_what_is_launched_on_int8(spec: str, scope: str, program: Path) -> None:
    shape, op = SHAPES[scope][0], OPS[nodes.operator(metric(spec)) + nodes.INT8]
    given, (x, weight, bias) = told_of(spec, shape), test_onnx_int8.drawn(shape)
    (events,) = told(program, line(given, shape, "int8", False, op.name))
    y = torch.zeros(shape, dtype=torch.int8)
    memory = Memory(*map(torch.from_numpy, (x, weight, bias)), y, workspace=events[-1]["workspace"])
    for event in events[:-1]:
        run(event, memory)
    assert test_onnx_int8.apart(y.numpy(), op.reference(x, weight, bias, op.parse(given))) < 0.02
    assert y.float().std() > 10  # it was written


def like_python(event: dict[str, Any], asked: Any) -> None:
    """The same kernel with the same constants, programs and numbers as Python would launch."""
    name, _, constants = re.fullmatch(r"(\w+) (\S+) (.*)", event["kernel"]).groups()  # type: ignore[union-attr]
    assert (name, event["programs"], event["threads"]) == (asked.kernel.__name__, asked.programs, 32 * asked.warps)
    for key, value in re.findall(r"(\w+)=(.*?)(?= \w+=|$)", constants):
        wanted = asked.arguments.get(key, 1)  # POSITIONS, where it is left to its default
        assert value == (str(int(wanted)) if isinstance(wanted, int) else wanted), key
    for key, value in event["arguments"].items():
        if not key.endswith("_ptr"):
            assert value == pytest.approx(asked.arguments[key], rel=1e-7), key


@pytest.mark.parametrize("spec", ["l1", "l2", "linf", "topk:10", "topk:2%", "range"])
def test_launches_are_those_of_python(spec: str, program: Path) -> None:
    """Kernels, programs and numbers, for sizes of all kinds, up to those of large networks."""
    drawing = random.Random(spec)
    cases = []
    while len(cases) < 40:
        shape = tuple(round(2 ** drawing.uniform(0, most)) for most in (6, 8, 7, 13))
        last = shape[1] > 1 and drawing.random() < 0.3
        shape = (*shape[:2], 1 if last else shape[2], 1 if not last and drawing.random() < 0.3 else shape[3])
        row, dtype = metric(spec), drawing.choice(["float32", "float16"])
        if last and (shape[3] == 1 or (dtype == "float16" and shape[1] % 8)):
            continue
        n = shape[2] * shape[3]
        if n >= max(2, row.count or 2) and row.k(n) <= 128 and why_not(shape, row, True) is None:
            cases.append((shape, last, dtype, drawing.random() < 0.8))
    op = OPS[nodes.operator(metric(spec))]
    found = told(
        program, *(line(told_of(spec, s, centred), s, dtype, last, op.name) for s, last, dtype, centred in cases)
    )
    for (shape, last, dtype, centred), events in zip(cases, found, strict=True):
        x = torch.empty_strided(shape, strides(shape, multiple=int(last)), dtype=getattr(torch, dtype), device="meta")
        row = op.row(op.parse(told_of(spec, shape, centred)))
        asked = embedded.launches(row, op.parse(told_of(spec, shape, centred))["eps"], centred, x)
        launched = [event for event in events if "kernel" in event]
        assert len(launched) == len(asked), (shape, events[-1])
        for event, each in zip(launched, asked, strict=True):
            like_python(event, each)
            with pytest.raises(AssertionError):  # it can fail
                like_python(event, each._replace(programs=each.programs + 1))


def test_a_workspace_serves_all_that_is_smaller(program: Path) -> None:
    drawing = random.Random(0)
    lines = []
    for _ in range(60):
        large = tuple(round(2 ** drawing.uniform(1, most)) for most in (5, 6, 6, 12))
        small = tuple(drawing.randint(2, size) for size in large)
        spec = drawing.choice(["l1", "range", "topk:3"])
        lines += [line(told_of(spec, s), s, "float32", False, nodes.operator(metric(spec))) for s in (small, large)]
    sizes = [events[-1]["workspace"] for events in told(program, *lines)]
    assert all(small <= large for small, large in zip(sizes[::2], sizes[1::2], strict=True))


def test_kernels_are_loaded_once(program: Path) -> None:
    one = line(told_of("l1", (2, 2, 3, 49)), (2, 2, 3, 49), "float32", False, "NormRewriteMean")
    first, second = told(program, one, one)
    assert [e["loaded"].split()[0] for e in first if "loaded" in e] == [
        "moments",
        "settle",
        "deviations",
        "settle",
        "apply",
    ]
    assert not [e for e in second if "loaded" in e] and len(second) == len(first) - 5


GOOD = {"eps": 1e-5, "reads": [1.0, 0, 0, 0, 0], "centred": 1}


@pytest.mark.parametrize(
    ("operator", "changed", "shape", "said"),
    [
        (
            "NormRewriteMean",
            {"eps": -1.0},
            "2x4x1x8",
            ": attribute eps is -1, out of range: it is a finite number from 0.",
        ),
        ("NormRewriteMean", {"eps": math.nan}, "2x4x1x8", ": attribute eps is nan, out of range"),
        ("NormRewriteMean", {"centred": 2}, "2x4x1x8", ": attribute centred is 2, out of range: it is 0 or 1."),
        ("NormRewriteMean", {"reads": [1.0, 2.0]}, "2x4x1x8", "out of range: it is 5 finite numbers."),
        ("NormRewriteMean", {"reads": [-1.0, 0, 0, 0, 0]}, "2x4x1x8", ": attribute reads gives -1 for 8 elements"),
        ("NormRewriteTop", {"count": 0.5}, "2x4x1x8", ": attribute count is 0.5, out of range: it is a whole number"),
        ("NormRewriteTop", {"count": 3, "percent": 5.0}, "2x4x1x8", ": count and percent exclude each other."),
        ("NormRewritePower", {"power": 2.5}, "2x4x1x8", ": power 2.5: the kernels know powers 1 and 2."),
        ("NormRewriteTop", {"count": 10}, "2x4x1x8", " needs 10 elements that share statistics, got 8."),
        ("NormRewriteTop", {"count": 200}, "2x4x1x512", " asks for 200 extremes, the kernels find up to 128."),
        ("NormRewriteMean", {}, "2x1x9000x1", " has rows of 9000 elements, the kernels keep up to 8192."),
        ("NormRewriteSpan", {}, "2x1x5000x1", " has rows of 5000 elements, the kernels keep up to 4096."),
        ("NormRewriteMean", {}, "2x4x1", " takes x of rank 4, got 2×4×1."),
        ("NormRewriteMean", {}, "2x4x1x8,5x1x1,4x1x1", " takes weight 4×1×1, got 5×1×1."),
        ("NormRewriteMean", {}, "2x4x1x8,4x1x1", " takes x, weight, bias, got 2 inputs."),
        ("NormRewriteMeanInt8", {}, "2x4x1x8", " takes int8, float32, float32, got float32, float32, float32."),
        (
            "NormRewriteMean",
            {},
            "2x4x1x8:int8",
            " takes float32 or float16 for all inputs alike, got int8, int8, int8.",
        ),
    ],
)
def test_what_no_kernel_takes_is_told(
    operator: str, changed: dict[str, Any], shape: str, said: str, program: Path
) -> None:
    sizes, _, dtype = shape.partition(":")
    shapes = sizes if "," in sizes else f"{sizes},4x1x1,4x1x1" if "x4x" in sizes else f"{sizes},{_parameter(sizes)}"
    text = line(GOOD | changed, (1, 1, 1, 1), "float32", False, operator).split("|")
    count = shapes.count(",") + 1
    text[2], text[3] = shapes, ",".join([dtype or "float32"] * count)
    (events,) = told(program, "|".join(text))
    assert said in events[-1]["refused"] and events[-1]["refused"].startswith("node norm"), events


def _parameter(sizes: str) -> str:
    one = "x".join([*sizes.split("x")[1:3], "1"])
    return f"{one},{one}"


def test_sizes_beyond_what_kernels_count_to(program: Path) -> None:
    shape = (70000, 70000, 1, 8)
    (events,) = told(program, line(GOOD, shape, "float32", False, "NormRewriteMean"))
    assert "is 4900000000, and kernels count to 2147483647" in events[-1]["refused"]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (
            {"CAPABILITY": "75"},
            "has no kernels for compute capability 7.5: build it with -DNORMREWRITE_CAPABILITIES=80",
        ),
        ({"FAILS": "200"}, "CUDA's driver says invalid image."),
        ({"LD_LIBRARY_PATH": ""}, "libcuda.so.1, NVIDIA's driver, can't be opened here"),
    ],
)
def test_drivers_that_fail_are_told(environment: dict[str, str], said: str, program: Path) -> None:
    if "LD_LIBRARY_PATH" in environment and torch.cuda.is_available():
        pytest.skip("there is a driver")
    one = line(GOOD, (2, 2, 3, 49), "float32", False, "NormRewriteMean")
    (events,) = told(program, one, **environment)
    assert said in events[-1]["refused"]
