"""Engines run on the GPU they were built for, through TensorRT's own API and torch's CUDA tensors. Not run yet anywhere.

>>> outputs = runner(Path("model.engine"))(batch)
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normrewrite.data import Batch
from normrewrite.deploy.onnx_file import feed, require_file
from normrewrite.errors import NormRewriteError
from normrewrite.plugins.registry import known, register
from normrewrite.plugins.runtimes import RUNTIMES

_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


def runner(path: Path) -> Callable[[Batch], dict[str, Tensor]]:
    """What runs a batch through an engine. Raises NormRewriteError where there is no GPU, or the engine is for another."""
    require_file(path)
    if not torch.cuda.is_available():
        raise NormRewriteError(
            f"{path}: an engine runs only on the GPU it was built for, and torch sees none here. Verify its ONNX file instead."
        )
    runtime = next((r for r in RUNTIMES.values() if find_spec(r.module)), None)
    if runtime is None:
        raise NormRewriteError(
            f"{path}: no TensorRT is installed: pip install 'normrewrite[rtx]' or 'normrewrite[tensorrt]'."
        )
    trt: Any = importlib.import_module(runtime.module)
    if not known(trt.get_plugin_registry()):  # the engine may have been built with them
        register("python", runtime.name)
    engine = _loaded(trt, path, runtime.module)
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    wanted = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]

    def run(batch: Batch) -> dict[str, Tensor]:
        held = {}
        for name, values in feed(batch, wanted, path).items():
            held[name] = torch.from_numpy(values).to("cuda", _TYPES[engine.get_tensor_dtype(name).name]).contiguous()
            if not context.set_input_shape(name, tuple(values.shape)):
                raise NormRewriteError(
                    f"{path}: input {name} {tuple(values.shape)} lies outside the engine's profile. Build it with other --min "
                    "and --max."
                )
        for name in names:
            if name not in held:
                dtype = _TYPES[engine.get_tensor_dtype(name).name]
                held[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            context.set_tensor_address(name, held[name].data_ptr())
        stream = torch.cuda.current_stream()
        context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        return {name: held[name].cpu() for name in names if name not in wanted}

    return run


def _loaded(trt: Any, path: Path, module: str) -> Any:
    said: list[str] = []
    runtime, plan = trt.Runtime(_logger(trt, said)), path.read_bytes()
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        if hasattr(runtime, "get_engine_validity"):  # it reads the header alone, and logs what is wrong there
            runtime.get_engine_validity(plan)
        or_else = "" if any("created with" in message for message in said) else ", or for another GPU"
        raise NormRewriteError(
            f"{path}: {module} can't load it: built by another version{or_else}. Build it again from its ONNX file."
        )
    return engine


def _logger(trt: Any, said: list[str]) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, _severity: Any, message: str) -> None:
            said.append(message)

    return Log()
