"""Plugins that live inside an engine (TensorRT's quickly deployable ones, ahead of time): PTX, and no library where it runs.

>>> define(tensorrt.plugin, capability=89)

Full TensorRT alone; TensorRT-RTX has no such plugins. Each operator is registered with its shapes and types, and as one launch of
ahead.py's kernel, whose numbers are compiled in: arguments are x, weight, bias, samples, y. The batch may be open, K and S not.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normrewrite.errors import NormRewriteError
from normrewrite.plugins import ahead
from normrewrite.plugins.spec import INPUTS, NAMESPACE, OPS, Op

_KINDS: dict[str, Any] = {"int": int, "float": float, "floats": NDArray[np.float32]}
_TYPES = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8"}


def define(quick: Any, capability: int) -> None:
    """Register every operator. quick: the module tensorrt.plugin; capability: of the GPU that is built for, 89 for 8.9."""
    for op in OPS.values():
        name = f"{NAMESPACE}::{op.name}"
        quick.register(name)(_described(quick, op))
        quick.aot_impl(name)(_implemented(quick, op, capability))


def _described(quick: Any, op: Op) -> Callable[..., Any]:
    """What tells of the output: it is like x. TensorRT reads the attributes off its signature."""

    def describe(x: Any, *_others: Any, **_attributes: Any) -> Any:
        return x.like()

    tensors = dict.fromkeys(INPUTS, quick.TensorDesc)
    return _signed(describe, tensors | {a.name: _KINDS[a.kind] for a in op.attributes}, quick.TensorDesc)


def _implemented(quick: Any, op: Op, capability: int) -> Callable[..., Any]:
    """What gives the kernel, how it is launched, and its further argument."""

    def implement(x: Any, weight: Any, bias: Any, *numbers: Any) -> tuple[str, str, Any, Any]:
        named = {attribute.name: value for attribute, value in zip(op.attributes, numbers, strict=False)}
        shapes, dtypes = [tuple(t.shape) for t in (x, weight, bias)], [_dtype(t) for t in (x, weight, bias)]
        values = op.parse(named)
        problem = op.why_not(shapes, dtypes, values) or _open_n(shapes[0])
        if problem:
            raise NormRewriteError(f"{op.name} ahead of time {problem}.")
        tuned_for = x.shape.opt if x.shape.is_dynamic else shapes[0]
        one = ahead.kernel(op, values, tuned_for, dtypes[0], capability)
        samples = x.shape_expr[0]
        launch = quick.KernelLaunchParams()
        launch.grid_x = quick.cdiv(samples, one.rows) * one.groups
        launch.block_x, launch.shared_mem = one.threads, one.shared
        further = quick.SymIntExprs(1)
        further[0] = quick.SymInt32(samples)
        return one.name, one.ptx, launch, further

    returned = tuple[str, str, quick.KernelLaunchParams, quick.SymIntExprs]
    return _signed(implement, dict.fromkeys([*INPUTS, *(a.name for a in op.attributes), "outputs", "tactic"]), returned)


def _open_n(shape: tuple[int, ...]) -> str | None:
    if -1 not in shape[1:]:
        return None
    return f"needs fixed sizes behind the batch, got {'×'.join(map(str, shape))}; export with --static-size"


def _dtype(tensor: Any) -> str:
    return _TYPES.get(tensor.dtype.name, str(tensor.dtype.name).lower())


def _signed(function: Callable[..., Any], arguments: dict[str, Any], returned: Any) -> Callable[..., Any]:
    """The function as if it had been written with these arguments; None: without an annotation."""
    empty, kind = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind, annotation=empty if t is None else t) for n, t in arguments.items()]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return function
