"""From ONNX to an engine of TensorRT-RTX or TensorRT, and whether it computes in the precision that was asked for.

>>> build("model.fp16.onnx", "model.engine", gpus=["sm89"]).honoured
21
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normrewrite.backends import onnx as nodes
from normrewrite.deploy import onnx_file, precision
from normrewrite.errors import NormRewriteError
from normrewrite.files import check_outputs, write_atomically
from normrewrite.options.build import BuildOptions
from normrewrite.options.fields import callback, options, quiet, takes
from normrewrite.plugins import OPS, check_library, placed
from normrewrite.plugins.runtimes import RUNTIMES, Runtime
from normrewrite.results import Result, Summary

Shape = tuple[int, ...]
_ENDS = ("min", "opt", "max")  # of a profile,
_BATCHES = (1, 8, 32)  # and that of an open batch: smallest, the one tuned for, largest
_LARGEST_K = 3840  # of TensorRT's TopK
_WORKER = Path(__file__).parents[1] / "deploy" / "build_worker.py"
_OURS = "normrewrite: "  # how the library of plugins in C++ begins what it has against a node
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What a product's input is called in ONNX, and in the list of an engine's layers.
_ENGINE_TYPES = {"FLOAT": "Float", "FLOAT16": "Half", "BFLOAT16": "BFloat16", "INT8": "Int8"}


@dataclass
class Built(Result):
    """An engine: for which GPUs, how many products compute as the ONNX file says, and which could not be checked."""

    path: str
    runtime: str
    version: str
    gpus: list[str]
    precision: str
    profile: dict[str, list[Shape]]
    size: int
    seconds: float
    honoured: int
    unchecked: list[str]
    norms: dict[str, str] = field(default_factory=dict)  # those that measure at inference: `plugin` or `function`
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)  # of those that plugins in Python took

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> Summary:
        where = ", ".join(self.gpus) or "the GPU of this machine"
        lines = [
            f"{self.path}: {self.runtime} {self.version} for {where}, {self.size:,} bytes in {self.seconds:.1f} s",
            *(f"{name}: {' to '.join('×'.join(map(str, shape)) for shape in s)}" for name, s in self.profile.items()),
            f"{self.precision}: {self.honoured} of {self.honoured + len(self.unchecked)} products compute as the file says",
        ]
        for path, took in (("plugin", "a plugin"), ("function", "their function body")):
            names = [name for name, taken in self.norms.items() if taken == path]
            lines += [f"{len(names)} norms by {took}: {', '.join(names)}"] if names else []
        if "plugin" in self.norms.values():
            lines.append("this engine runs only where those plugins are registered")
        if self.unchecked:
            lines.append(f"the engine doesn't tell of {len(self.unchecked)}: {', '.join(self.unchecked[:6])}")
        return [*lines, "not run: that needs the GPU"]


@options
class BuildCall(BuildOptions):
    """What `build` takes in Python."""

    model: str | Path = field(kw_only=False)
    output: str | Path = field(kw_only=False)
    gpus: Sequence[str] = ()
    shapes: Mapping[str, Sequence[str]] | None = None
    progress: Callable[[str], object] = callback(default=quiet)


@takes(BuildCall)
def build(options: BuildCall) -> Built:
    """Build an engine from an ONNX file; TensorRT-RTX does so without a GPU, for the ones named.

    gpus: `sm86`, `sm89`, ...; TensorRT takes none, it builds for the GPU it finds. shapes: `min`, `opt` and `max`, each
    as in `1,3,32,32` or `input:1,3,32,32`; by default an open batch is 1 to 32, tuned for 8. plugins: `off`; `auto`: those
    of normrewrite.plugins take the norms that ask for one, and the engine runs only where they are registered; or the path
    of a library of plugins. progress: called with TensorRT's own progress. Raises NormRewriteError, with exit code 1 where the
    engine does not keep the file's precision, a norm is left that should have been folded or is not taken as the file asks,
    with 2 for all that can't be built. Nothing is written then.
    """
    path, output, force = Path(options.model), Path(options.output), options.force
    runtime, gpus, timing_cache = options.runtime, options.gpus, options.timing_cache
    check_outputs({"-o": output}, force, {"MODEL": path, "--timing-cache": timing_cache})
    if timing_cache is not None:  # what was measured before is kept, and added to
        check_outputs({"--timing-cache": timing_cache}, True, {"MODEL": path})
    proto = onnx_file.read(path)
    builder = _builder(runtime, gpus, timing_cache)
    asked = _plugins(options.plugins, runtime)
    _check_nodes(proto, path, placed.expected(proto, OPS if asked else ()))
    profile = profile_of(proto, options.shapes or {})
    builder.require()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        engine, measured = Path(folder) / "engine", Path(folder) / "measured"
        files = {"onnx": str(path.resolve()), "engine": str(engine), "measured": str(measured)}
        cache = None if timing_cache is None else str(timing_cache.resolve())
        wishes = {"gpus": list(gpus), "profile": profile, "timing_cache": cache, "plugins": asked}
        request = {"module": builder.module, **files, **wishes}
        last = _run(request, builder, Path(folder), options.progress)
        if timing_cache is not None:
            write_atomically(timing_cache, lambda temporary: shutil.copyfile(measured, temporary), True)
        norms = placed.check(placed.expected(proto, last["registered"]), placed.found(last["parsed"]))
        honoured, unchecked = check_precision(proto, last["layers"])
        write_atomically(output, lambda temporary: shutil.copyfile(engine, temporary), force)
        seconds = time.perf_counter() - start
    return Built(
        path=str(output),
        runtime=builder.title,
        version=str(last["version"]),
        gpus=list(gpus),
        precision=precision.of(proto),
        profile=profile,
        size=output.stat().st_size,
        seconds=seconds,
        honoured=honoured,
        unchecked=unchecked,
        norms=dict(norms),
        attributes=last["attributes"],
    )


def _plugins(asked: str, runtime: str) -> dict[str, Any] | None:
    """What is registered before a file is parsed, as arguments of plugins.register."""
    if asked == "off":
        return None
    if asked == "auto":
        return {"kind": "python", "runtime": runtime}
    return {"kind": "library", "runtime": runtime, "library": str(check_library(Path(asked)))}


def _builder(runtime: str, gpus: Sequence[str], timing_cache: Path | None) -> Runtime:
    builder = RUNTIMES.get(runtime)
    if builder is None:
        raise NormRewriteError(f"runtime {runtime!r} is unknown. Known: {', '.join(RUNTIMES)}.")
    if builder.names_gpus and not gpus:
        raise NormRewriteError(f"{builder.title} builds for GPUs by name: give --gpu, as in --gpu sm86,sm89,sm120.")
    if gpus and not builder.names_gpus:
        raise NormRewriteError(f"{builder.title} builds for the GPU of the machine it runs on: leave --gpu out.")
    if timing_cache is not None and builder.names_gpus:
        raise NormRewriteError(f"{builder.title} times nothing while it builds, so it keeps no --timing-cache.")
    return builder


# --- what TensorRT can't do, told before it tries --------------------------------------------------------------------


def _check_nodes(proto: Any, path: Path, norms: Mapping[str, str]) -> None:
    left = [nodes.name_of(node) for node in proto.graph.node if node.op_type == "BatchNormalization"]
    if left:
        raise NormRewriteError(
            f"{path}: {len(left)} batch norms are left that should have been folded ({', '.join(left[:4])}). Export the "
            "model with normrewrite export, which folds them.",
            exit_code=1,
        )
    for node in proto.graph.node:
        if node.op_type.removesuffix(nodes.INT8) == "NormRewriteTop" and norms.get(nodes.name_of(node)) != "plugin":
            _check_k(node, nodes.attribute(node, "count", 0), nodes.attribute(node, "percent", 0.0))
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "TopK" and node.input[1] in constants:  # a body that was folded in
            _check_k(node, _largest(constants[node.input[1]]), 0.0)


def _check_k(node: Any, count: int, percent: float) -> None:
    if count > _LARGEST_K:
        raise NormRewriteError(
            f"{nodes.name_of(node)}: reads the {count} largest of its elements, TensorRT's TopK {_LARGEST_K} at most. Convert "
            f"with --to topk:{_LARGEST_K} or less, a smaller percentage, or --to l1; or build with --plugins auto."
        )
    if percent:
        raise NormRewriteError(
            f"{nodes.name_of(node)}: reads {percent:g} % of as many elements as come, and TensorRT needs to know k. Export "
            "with --static-batch and fixed sizes, or convert with a count, as --to topk:10; or build with --plugins auto."
        )


def _largest(tensor: Any) -> int:
    import onnx

    return int(onnx.numpy_helper.to_array(tensor).max())


# --- shapes ----------------------------------------------------------------------------------------------------------


def profile_of(proto: Any, shapes: Mapping[str, Sequence[str]]) -> dict[str, list[Shape]]:
    """min, opt and max of every input with an open size; {} where all are fixed."""
    inputs = {value.name: _sizes(value) for value in proto.graph.input}
    asked = {end: _by_input(end, texts, inputs) for end, texts in shapes.items()}
    for end, wanted in asked.items():
        for name, shape in wanted.items():
            _check_shape(f"--{end}", name, shape, inputs[name])
    opened = {name: sizes for name, sizes in inputs.items() if None in sizes}
    return {
        name: _profile(name, sizes, {end: asked.get(end, {}).get(name) for end in _ENDS})
        for name, sizes in opened.items()
    }


def _sizes(value: Any) -> list[int | None]:
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]


def _by_input(end: str, texts: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for text in texts:
        name, colon, sizes = text.rpartition(":")
        name = name if colon else next(iter(inputs))
        if name not in inputs:
            raise NormRewriteError(f"--{end} {text}: the model has no input {name!r}; it has {', '.join(inputs)}.")
        if not re.fullmatch(r"[1-9]\d{0,9}(,[1-9]\d{0,9})*", sizes):
            raise NormRewriteError(f"--{end} {text}: write whole numbers, as in 1,3,32,32 or {name}:1,3,32,32.")
        shapes[name] = tuple(int(size) for size in sizes.split(","))
    return shapes


def _check_shape(option: str, name: str, shape: Shape, sizes: Sequence[int | None]) -> None:
    fits = len(shape) == len(sizes) and all(size in (None, length) for length, size in zip(shape, sizes, strict=True))
    if not fits:
        wanted = ",".join("?" if size is None else str(size) for size in sizes)
        raise NormRewriteError(
            f"{option} {','.join(map(str, shape))}: input {name} of the file is {wanted}. Only ? may be chosen; export with "
            "--dynamic-size for more."
        )


def _profile(name: str, sizes: Sequence[int | None], asked: Mapping[str, Shape | None]) -> list[Shape]:
    if None in sizes[1:] and not all(asked.values()):
        raise NormRewriteError(
            f"input {name}: sizes beside the batch are open, for which there is no sensible default. Give --min, --opt, --max."
        )
    low, middle, high = (
        asked[end] or tuple(batch if n is None else n for n in sizes)
        for end, batch in zip(_ENDS, _BATCHES, strict=True)
    )
    if asked["max"] is None:
        high = tuple(map(max, high, low, asked["opt"] or low))
    if asked["min"] is None:
        low = tuple(map(min, low, high))
    if asked["opt"] is None:
        middle = tuple(min(max(m, a), b) for m, a, b in zip(middle, low, high, strict=True))
    if not all(a <= m <= b for a, m, b in zip(low, middle, high, strict=True)):
        raise NormRewriteError(
            f"input {name}: --opt {middle} lies outside --min {low} to --max {high}. Let every size grow from min to max."
        )
    return [low, middle, high]


# --- the build itself ------------------------------------------------------------------------------------------------


def _run(request: dict[str, Any], builder: Runtime, folder: Path, progress: Callable[[str], object]) -> dict[str, Any]:
    """The worker's last event. Whatever becomes of the worker becomes an error here."""
    command = [sys.executable, "-P", str(_WORKER)]  # -P: its folder is no place to import from
    links = folder / "links"
    links.mkdir()
    with (folder / "stderr").open("w+") as said:
        process = subprocess.Popen(
            command,
            env=builder.environment(links),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        last = _listen(process, json.dumps(request), progress)
        said.seek(0)
        lines = said.read().strip().splitlines()
    if "error" in last:
        ours = [line.removeprefix(_OURS) for line in lines if line.startswith(_OURS)]
        raise NormRewriteError(f"{builder.title} can't build {request['onnx']}: {'; '.join(ours) or last['error']}")
    if "done" not in last:
        end = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        raise NormRewriteError(
            f"{builder.title} broke down while it built {request['onnx']} ({end}): {' '.join(lines[-2:]) or 'it said nothing'}"
        )
    return last


def _listen(process: subprocess.Popen[str], request: str, progress: Callable[[str], object]) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    last: dict[str, Any] = {}
    try:
        process.stdin.write(request)
        process.stdin.close()
        for line in process.stdout:
            last = json.loads(line)
            if "phase" in last:
                progress(f"{last['phase']} {last['step']}/{last['steps']}")
    except BrokenPipeError:  # it was gone before it read its request
        pass
    finally:
        process.stdout.close()
        if sys.exc_info()[0] is not None:
            process.kill()
        process.wait()
    return last


# --- precision -------------------------------------------------------------------------------------------------------


def check_precision(proto: Any, layers: str) -> tuple[int, list[str]]:
    """How many products compute in the type that the file gives them, and the names of those the engine doesn't tell of.

    layers: the engine's layer information, one layer a line. Raises NormRewriteError where another type was used.
    """
    types = _inputs_by_node(layers)
    wrong, honoured, unchecked = [], 0, []
    for name, wanted in _products(proto).items():
        used = types.get(name)
        if not used:
            unchecked.append(name)
        elif _ENGINE_TYPES.get(wanted, wanted) in used:
            honoured += 1
        else:
            wrong.append(f"{name} wants {_ENGINE_TYPES.get(wanted, wanted)} and computes in {'/'.join(sorted(used))}")
    if wrong:
        raise NormRewriteError(
            f"the engine doesn't keep the file's precision: {'; '.join(wrong[:4])} ({len(wrong)} of {honoured + len(wrong)} "
            "products). Nothing was written.",
            exit_code=1,
        )
    return honoured, unchecked


def _inputs_by_node(layers: str) -> dict[str, set[str]]:
    """By ONNX node, the types that go into the engine's layers that it became."""
    types: dict[str, set[str]] = {}
    for line in layers.splitlines():
        inputs = re.search(r"Inputs: \[(.*?)\], (?:Constants|Outputs): \[", line)
        used = set(re.findall(r"Datatype: (\w+)", inputs[1])) if inputs else set()
        for name in re.findall(r"\[ONNX Layer: ([^\]]+)\]", line):
            types.setdefault(name, set()).update(used)
    return types


def _products(proto: Any) -> dict[str, str]:
    """Convolutions and matrix products by name, with the element type of their input as ONNX calls it."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(proto).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    dequantised = {node.output[0] for node in inferred.node if node.op_type == "DequantizeLinear"}
    type_name = onnx.TensorProto.DataType.Name
    return {
        nodes.name_of(node): "INT8" if node.input[0] in dequantised else type_name(types.get(node.input[0], 1))
        for node in inferred.node
        if node.op_type in _PRODUCTS
    }
