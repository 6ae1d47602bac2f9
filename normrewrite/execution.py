"""What runs a network: a torch module in eval, an ONNX file in onnxruntime, an engine on its GPU; and what comes out, by name.

>>> runner(model)(Batch({"x": images}))["output"].shape
torch.Size([8, 10])
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.masked import MaskedTensor

from normrewrite.data import Batch, argument_names
from normrewrite.deploy import onnx_bounds, onnx_file
from normrewrite.errors import NormRewriteError, first_line
from normrewrite.sites.modes import evaluating

_DEEPEST = 100  # of outputs in outputs
Network = nn.Module | str | Path
Outputs = dict[str, Tensor]


# --- what comes out ---------------------------------------------------------------------------------------------------


def leaves(outputs: object, name: str = "") -> dict[str, object]:
    """Everything in what forward returns, by name: of mappings and dataclasses their own names, of sequences the place.

    >>> list(leaves({"logits": x, "states": [y, z], "cache": None}))
    ['logits', 'states_0', 'states_1', 'cache']

    Where two would have the same name, all that have it are named by their whole path, as in `['a'][0]`. Raises
    NormRewriteError where outputs lie in one another without end.
    """
    paths = list(_paths(outputs, name, ()))
    count = Counter(leaf for leaf, _, _ in paths)
    return {leaf if count[leaf] == 1 else "".join(f"[{key!r}]" for key in path): value for leaf, path, value in paths}


def _paths(outputs: object, name: str, path: tuple[object, ...]) -> Iterator[tuple[str, tuple[object, ...], object]]:
    """Name, keys on the way, and value."""
    parts: list[tuple[str, object, object]]
    outputs = _plain(outputs)
    if (named := _named(outputs)) is not None:
        parts = [(f"{name}.{key}" if name else str(key), key, value) for key, value in named.items()]
    elif (listed := _listed(outputs)) is not None:
        parts = [(f"{name or 'output'}_{i}", i, value) for i, value in enumerate(listed)]
    else:
        yield name or "output", path, outputs
        return
    if len(path) == _DEEPEST:
        raise NormRewriteError(
            f"forward returns lists in lists, {_DEEPEST} deep and more, or one that holds itself. Return its tensors side by "
            "side."
        )
    for part, key, value in parts:
        yield from _paths(value, part, (*path, key))


def _plain(value: Any) -> Any:
    """A tensor without the code of its subclass, where it has numbers of its own: no wrapper of other tensors."""
    kind = type(value)
    if not isinstance(value, Tensor) or kind in (Tensor, nn.Parameter):
        return value
    if kind.__torch_dispatch__ != Tensor.__torch_dispatch__:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def _named(outputs: Any) -> Mapping[Any, object] | None:
    if isinstance(outputs, Mapping):
        return outputs
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return None


def _listed(outputs: Any) -> Sequence[object] | None:
    if isinstance(outputs, Tensor):
        return outputs.unbind() if outputs.is_nested else None
    return outputs if isinstance(outputs, Sequence) and not isinstance(outputs, str | bytes) else None


def flat(outputs: object) -> Outputs:
    """Every tensor in what forward returns, by name."""
    return {name: value for name, value in leaves(outputs).items() if isinstance(value, Tensor)}


# --- what runs it -----------------------------------------------------------------------------------------------------


def require_network(network: object) -> None:
    """Raises where a function is given something else for a network."""
    if not isinstance(network, nn.Module | str | os.PathLike):
        raise NormRewriteError(
            f"the network is a {type(network).__name__}; needed is a torch.nn.Module, or the path of an ONNX file or an engine."
        )


def runner(network: Network, of: Callable[[object], dict[str, Any]] = flat) -> Callable[[Batch], dict[str, Any]]:
    """What runs a batch: a module in eval, an ONNX file in onnxruntime, or an engine on its GPU.

    of: what is wanted of the outputs: `flat`, its tensors, or all its `leaves`.
    """
    if isinstance(network, nn.Module):
        return _torch_runner(network, of)
    if Path(network).suffix == ".engine":
        from normrewrite.deploy import engine

        return engine.runner(Path(network))
    return _onnx_runner(Path(network), of)


def _torch_runner(model: nn.Module, of: Callable[[object], dict[str, Any]]) -> Callable[[Batch], dict[str, Any]]:
    names, device = argument_names(model), device_of(model)

    def run(batch: Batch) -> dict[str, Any]:
        with evaluating(model), torch.inference_mode():
            return {name: _dense(value) for name, value in of(call(model, batch.to(device), names)).items()}

    return run


def _dense(value: Any) -> Any:
    """A dense tensor of sparse ones, which can't be made of inference tensors once inference mode is left."""
    sparse = isinstance(value, Tensor) and not isinstance(value, MaskedTensor) and value.layout != torch.strided
    return value.to_dense() if sparse and not value.is_meta else value


def call(model: nn.Module, batch: Batch, names: Sequence[str]) -> Any:
    """What forward returns, its arguments given by name where they are called `names`; a failure is told in plain words.

    forward gets copies, as it may work in place on what the next network is to be given, too; of floats in the model's own dtype.
    """
    inputs = {name: values.clone() for name, values in as_given(batch, dtype_of(model)).inputs.items()}
    try:
        return model(**inputs) if set(inputs) <= set(names) else model(*inputs.values())
    except NormRewriteError:
        raise
    except (Exception, SystemExit) as error:  # the model's code runs here, and may raise anything
        shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in batch.inputs.items())
        raise NormRewriteError(f"the model can't run on {shapes}: {first_line(error)}") from error


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """What a model is to be given: the one dtype of all floating parameters of its layers of torch's kinds; None where there
    are several, or none, as a module with parameters of its own alone may well cast."""
    layers = [module for module in model.modules() if any(map(_of_torch, type(module).__mro__))]
    dtypes = {p.dtype for layer in layers for p in layer.parameters(recurse=False) if p.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _of_torch(kind: type) -> bool:
    return kind is not nn.Module and kind.__module__.startswith("torch.nn.modules.")


def fitted_to(dtype: torch.dtype | None, values: Tensor) -> Tensor:
    """Floats in that dtype; whole numbers as they are."""
    return values if dtype is None or not values.is_floating_point() else values.to(dtype)


def as_given(batch: Batch, dtype: torch.dtype | None) -> Batch:
    """A batch with its floats in a model's dtype."""
    inputs = {name: fitted_to(dtype, values) for name, values in batch.inputs.items()}
    return dataclasses.replace(batch, inputs=inputs)


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: the device of its first tensor."""
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


_FLOATS = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}


def _onnx_runner(path: Path, of: Callable[[object], dict[str, Any]]) -> Callable[[Batch], dict[str, Any]]:
    onnx_file.require_file(path)
    open_ended = onnx_file.has_open_loops(path)
    session = _session(path)
    wanted = {node.name: node.type for node in session.get_inputs()}
    outputs = [node.name for node in session.get_outputs()]

    def run(batch: Batch) -> dict[str, Any]:
        arrays = {
            name: value.astype(_FLOATS[wanted[name]]) if value.dtype.kind == "f" and wanted[name] in _FLOATS else value
            for name, value in onnx_file.feed(batch, list(wanted), path).items()
        }
        try:
            with onnx_bounds.limited(path, open_ended) as how:
                results = session.run(outputs, arrays, how)
        except NormRewriteError:
            raise
        except Exception as error:  # onnxruntime has a class of its own for every fault
            raise NormRewriteError(f"{path}: onnxruntime can't run it: {_cause(error, path)}") from error
        return of({name: _tensor(value) for name, value in zip(outputs, results, strict=True)})

    return run


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" else value


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, too
    options.intra_op_num_threads = torch.get_num_threads()
    if onnx_file.holds(
        path, "fp16"
    ):  # changing layouts, onnxruntime 1.32 dies of some, those of recurrent layers among them
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise NormRewriteError(f"{path}: onnxruntime can't load it: {_cause(error, path)}") from error


def _cause(error: Exception, path: Path) -> str:
    hint = " Its CPU kernels have no bf16: run such a file on a GPU." if onnx_file.holds(path, "bf16") else ""
    return f"{first_line(error)}{hint}"
