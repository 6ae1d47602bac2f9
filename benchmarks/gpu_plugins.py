"""The plugins' kernels on a GPU: right first, then RTX's runtime as it goes, then shares of a copy's bandwidth.

    python -m benchmarks.gpu_plugins               # under eight minutes; writes results/gpu_plugins.json
    python -m benchmarks.gpu_plugins --minutes 3   # what fits

In order: every operator, scope, dtype and format through enqueue of the Python plugin against float64; every operator ahead of
time, its PTX loaded by the driver and given QDP's arguments (x, weight, bias, samples, y); an engine of RTX with plugins, built
for this GPU and run, and what became of it, whatever it was; enqueue's time beside that of a copy. Without a GPU the first two
run small, by Triton's interpreter (the second without its PTX), and all else is written down as not measured.
"""

# ruff: noqa: E402 (Triton has to be told before it is imported)
import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from benchmarks.gpu_norms import copy_bandwidth, graphed, milliseconds
from benchmarks.gpu_traffic import moved
from benchmarks.stamp import markdown, write
from normrewrite.backends import onnx as nodes
from normrewrite.backends.triton import ahead as triton_ahead
from normrewrite.backends.triton import launch
from normrewrite.errors import NormRewriteError, first_line
from normrewrite.norms import METRICS, metric
from normrewrite.plugins import OPS, Op, ahead, v3
from normrewrite.plugins import compute as memory

NOT_MEASURED = "not measured: no GPU here"
EPS = 1e-3
ALLOWED = {"float32": 1e-5, "float16": 2e-3, "int8": 1.0}  # of the largest y; of int8, in steps
SCOPES = {"layer": (64, 1, 384, 1), "group": (4, 8, 4, 196), "instance": (4, 24, 1, 196), "batch": (1, 24, 1, 3136)}
SMALL = {"layer": (3, 1, 24, 1), "group": (2, 2, 3, 7), "instance": (2, 8, 1, 21), "batch": (1, 5, 1, 42)}
LARGE = {"layer": (32768, 1, 4096, 1), "group": (64, 32, 8, 3136), "instance": (64, 256, 1, 3136)}
_FORMATS = {"float32": ("LINEAR", "HWC"), "float16": ("LINEAR", "HWC8"), "int8": ("LINEAR",)}
_TYPES = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8"}


class _Field:
    def __init__(self, name: str, data: Any, _kind: Any) -> None:
        self.name, self.data = name, data


# What plugins/v3.py asks of TensorRT's module, so that enqueue can be called where no TensorRT is.
STAND_IN = SimpleNamespace(
    PluginField=_Field,
    PluginFieldCollection=list,
    PluginFieldType=SimpleNamespace(INT32=0, FLOAT32=1),
    **{
        name: type(name, (), {})
        for name in ("IPluginCreatorV3One", "IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime")
    },
)


# --- right first -----------------------------------------------------------------------------------------------------


def given_of(spec: str, op: Op, shape: tuple[int, ...]) -> dict[str, Any]:
    """An operator's attributes for a metric."""
    attributes = nodes.attributes(metric(spec), shape[2] * shape[3], eps=EPS)
    return op.parse({name: value for name, value in attributes.items() if name not in nodes.PLUGIN})


def drawn(shape: tuple[int, ...], dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; of int8 such that y spreads over it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2 + 3
    weight, bias = (torch.rand(*shape[1:3], 1, generator=generator) + 0.5 for _ in range(2))
    if dtype == "int8":
        return (x * 15).round().clamp(-128, 127).to(DEVICE, torch.int8), 30 * weight.to(DEVICE), bias.to(DEVICE)
    kind = getattr(torch, dtype)
    return x.to(DEVICE, kind), weight.to(DEVICE, kind), bias.to(DEVICE, kind)


def off(op: Op, values: Mapping[str, Any], output: Tensor, *inputs: Tensor) -> float:
    """The largest difference from float64, as ALLOWED counts it."""
    x, weight, bias = (value.cpu().double().numpy() for value in inputs)
    wanted = torch.from_numpy(op.reference(x, weight, bias, values))
    scale = 1.0 if op.int8 else max(1.0, float(wanted.abs().max()))
    return float((output.cpu().double() - wanted).abs().max()) / scale


def through_enqueue(op: Op, values: Mapping[str, Any], layout: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y, as the Python plugin computes it on memory that is described to it as TensorRT does."""
    plugin = v3.creator(STAND_IN, op).create_plugin("norm", [_Field(*one, 0) for one in values.items()], "runtime")
    seen, y = (_room(x, layout) for _ in range(2))
    tensors = [seen.copy_(x), weight, bias]
    described = [_described(seen, layout), *(_described(each, "LINEAR") for each in tensors[1:])]
    stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0
    plugin.on_shape_change(described, [_described(y, layout)])
    plugin.enqueue(described, [_described(y, layout)], [t.data_ptr() for t in tensors], [y.data_ptr()], 0, stream)
    return y


def _room(x: Tensor, layout: str) -> Tensor:
    return torch.empty_strided(
        x.shape, memory.strides(x.shape, multiple=v3._MULTIPLES[layout]), dtype=x.dtype, device=DEVICE
    )


def _described(values: Tensor, layout: str) -> Any:
    dtype = str(values.dtype).removeprefix("torch.")
    return SimpleNamespace(
        dims=tuple(values.shape), type=SimpleNamespace(name=_TYPES[dtype]), format=SimpleNamespace(name=layout)
    )


def through_ahead(op: Op, values: Mapping[str, Any], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y, by the kernel ahead of time in QDP's order; of a GPU by its PTX."""
    y = torch.empty_like(x)
    if DEVICE == "cuda":
        major, minor = torch.cuda.get_device_capability()
        _by_driver(
            ahead.kernel(op, values, x.shape, str(x.dtype).removeprefix("torch."), 10 * major + minor),
            x,
            weight,
            bias,
            y,
        )
        return y
    meta = [value.to("meta") for value in (x, weight.flatten(1), bias.flatten(1))]
    once = triton_ahead.once(*meta, op.row(values), values["eps"], bool(values["centred"]))  # type: ignore[call-arg]
    pointers = {"x_ptr": x, "weight_ptr": weight, "bias_ptr": bias, "samples": x.shape[0], "y_ptr": y}
    launch.run(once.kernel, once.programs, once.warps, once.arguments | pointers)
    return y


def _by_driver(kernel: ahead.Kernel, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> None:
    """One launch of its PTX, as an engine does it."""
    driver, module, function = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), kernel.ptx.encode()))
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.name.encode()))
    if kernel.shared > 48 * 1024:
        _check(driver.cuFuncSetAttribute(function, 8, kernel.shared))
    values = [
        *(ctypes.c_uint64(t.data_ptr()) for t in (x, weight, bias)),
        ctypes.c_int32(x.shape[0]),
        ctypes.c_uint64(y.data_ptr()),
    ]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    grid = -(-x.shape[0] // kernel.rows) * kernel.groups
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    _check(driver.cuLaunchKernel(function, grid, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, arguments, None))
    torch.cuda.synchronize()
    _check(driver.cuModuleUnload(module))


def _check(result: int) -> None:
    if result:
        raise AssertionError(f"CUDA's driver returned {result}")


def cases(scopes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Op, tuple[int, ...], str]]:
    """(metric, operator, shape, dtype): every metric and scope, in all dtypes."""
    for spec in METRICS:
        for shape in scopes.values():
            for dtype in ALLOWED:
                yield spec, OPS[nodes.operator(metric(spec)) + (nodes.INT8 if dtype == "int8" else "")], shape, dtype


def correctness(scopes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Largest difference by way and dtype; raises where one is beyond what its dtype allows."""
    worst: dict[str, dict[str, float]] = {"enqueue": {}, "ahead of time": {}}
    counted = dict.fromkeys(worst, 0)
    for spec, op, shape, dtype in cases(scopes):
        values, inputs = given_of(spec, op, shape), drawn(shape, dtype)
        layouts = [each for each in _FORMATS[dtype] if each == "LINEAR" or (shape[2] == 1 < shape[1] and shape[3] > 1)]
        outputs = [("enqueue", f"{spec} {layout}", through_enqueue(op, values, layout, *inputs)) for layout in layouts]
        outputs.append(("ahead of time", spec, through_ahead(op, values, *inputs)))
        for way, name, y in outputs:
            difference = off(op, values, y, *inputs)
            if not difference <= ALLOWED[dtype]:
                raise AssertionError(f"{way}, {name} {shape} {dtype}: off by {difference}, {ALLOWED[dtype]} allowed")
            worst[way][dtype], counted[way] = max(worst[way].get(dtype, 0.0), difference), counted[way] + 1
    return {"cases": counted, "largest difference": worst, "allowed": ALLOWED}


# --- TensorRT-RTX's runtime ------------------------------------------------------------------------------------------

_ENGINE = """
import sys
from pathlib import Path
import numpy as np, onnx, torch
from normrewrite.api.build import build
from normrewrite.deploy.engine import runner
from normrewrite.backends import onnx as nodes
from normrewrite.norms import metric
from normrewrite.plugins import OPS
folder, gpu, plugins = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
shape, given = (4, 8, 4, 196), nodes.attributes(metric("l1"), 784, eps=1e-3)
info = onnx.helper.make_tensor_value_info
inputs = [info("x", 1, shape), info("weight", 1, [8, 4, 1]), info("bias", 1, [8, 4, 1])]
node = onnx.helper.make_node("NormRewriteMean", ["x", "weight", "bias"], ["y"], "norm", domain=nodes.DOMAIN, **given)
opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(nodes.DOMAIN, 1)]
graph = onnx.helper.make_graph([node], "g", inputs, [info("y", 1, shape)])
proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
nodes.add_bodies(proto)
onnx.save(proto, folder / "model.onnx")
built = build(folder / "model.onnx", folder / "model.engine", gpus=[gpu], plugins=plugins)
x, weight, bias = (np.random.default_rng(0).normal(2, 1, s).astype(np.float32) for s in (shape, (8, 4, 1), (8, 4, 1)))
inputs = {name: torch.from_numpy(each) for name, each in (("x", x), ("weight", weight), ("bias", bias))}
y = runner(folder / "model.engine")(inputs)["y"]
wanted = OPS["NormRewriteMean"].reference(x, weight, bias, OPS["NormRewriteMean"].parse(given))
print(f"norm by {built.norms['norm']}, off by {abs(y.double().numpy() - wanted).max():.2e}")
"""


def rtx(library: str | None) -> dict[str, str]:
    """What became of an engine on this GPU, by who takes the norm; in processes of their own."""
    major, minor = torch.cuda.get_device_capability()
    return {
        plugins: _engine(f"sm{major}{minor}", plugins) for plugins in ("off", "auto", *([library] if library else []))
    }


def _engine(gpu: str, plugins: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _ENGINE, folder, gpu, plugins]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return "did not end within 120 s"
    said = (done.stdout.strip() or done.stderr.strip() or "said nothing").splitlines()[-1]
    return said if done.returncode == 0 else f"failed ({done.returncode}): {said}"


# --- the clock -------------------------------------------------------------------------------------------------------


def timed(spec: str, shape: tuple[int, ...], bandwidth: float) -> dict[str, Any]:
    """enqueue's work in fp16, beside what its bytes allow at the bandwidth of a copy."""
    op = OPS[nodes.operator(metric(spec))]
    values, (x, weight, bias) = given_of(spec, op, shape), drawn(shape, "float16")
    y, row = torch.empty_like(x), op.row(values)
    spent = milliseconds({"plugin": graphed(lambda: memory.compute(row, values, x, weight, bias, y))})["plugin"]
    with triton_ahead.recorded() as launches:
        meta = [value.to("meta") for value in (x, weight.flatten(1), bias.flatten(1), y)]
        launch.forward(meta[0], None, *meta[1:3], row, "exact", values["eps"], sample=True, out=meta[3])
    floor = 1e3 * moved(launches) / bandwidth
    return {"metric": spec, "shape": shape, "ms": spent, "floor ms": floor, "share of copy": floor / spent}


def table(cases: list[Mapping[str, Any]]) -> str:
    cells = [
        [c["metric"], "×".join(map(str, c["shape"])), f"{c['ms']:.3f}", f"{c['share of copy']:.0%}"] for c in cases
    ]
    return markdown(["metric", "shape", "ms", "share of a copy's bandwidth"], cells)


def measure(minutes: float, library: str | None) -> dict[str, Any]:
    """All of it on a GPU, as far as the time goes; what was left out is named."""
    deadline = time.monotonic() + 60 * minutes - 30
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "correct": correctness(SCOPES)}
    bandwidth, times, left = copy_bandwidth(), [], []
    for spec, shape in ((spec, shape) for shape in LARGE.values() for spec in METRICS):
        if time.monotonic() < deadline - 150:
            times.append(timed(spec, shape, bandwidth))
        else:
            left.append(f"{spec} {shape}")
    result |= {"copy bandwidth": bandwidth, "times": times, "left out": left}
    result["rtx"] = rtx(library) if time.monotonic() < deadline - 60 else "left out: no time"
    return result


def without_gpu() -> dict[str, Any]:
    """The comparison with float64 by the interpreter, and what was not measured."""
    from tests.backends.triton import interpreter

    interpreter.mend()
    memory.tensor_at, memory.on_stream = _on_cpu, lambda stream: nullcontext()  # type: ignore[assignment]
    unmeasured = dict.fromkeys(("copy bandwidth", "times", "rtx", "PTX ahead of time"), NOT_MEASURED)
    return {"gpu": None, "correct": correctness(SMALL), **unmeasured}


def _on_cpu(address: int, shape: Any, strides: Any, dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    held = (ctypes.c_char * (size * kind.itemsize)).from_address(address)
    return torch.frombuffer(held, dtype=kind).as_strided(shape, strides)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--library", help="the library of plugins in C++, as `normrewrite plugins path` prints it")
    asked = parser.parse_args()
    try:
        result = measure(asked.minutes, asked.library) if DEVICE == "cuda" else without_gpu()
    except NormRewriteError as error:
        print(first_line(error), file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    print(f"right: {result['correct']['cases']}, by {'the GPU' if DEVICE == 'cuda' else 'the interpreter'}")
    print(table(result["times"]) if DEVICE == "cuda" else f"times: {NOT_MEASURED}")
    print(write("gpu_plugins", result, "triton"))


if __name__ == "__main__":
    main()
