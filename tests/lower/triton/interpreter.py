"""Triton's interpreter, as kernels are proved with it on a CPU: repairs and two memories, none of which a kernel can see."""

from functools import cache
from typing import Any

import numpy as np
import torch
from triton import language as tl
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


@cache
def mend() -> None:
    """Once is enough."""
    interpreter._patch_lang_tensor = _bounds_of_loops(interpreter._patch_lang_tensor)
    interpreter._convert_float = _rounded_to_nearest(interpreter._convert_float)
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # else it copies CPU tensors onto themselves
    # Asked for at every operation, and a third of the time if they are made anew each time.
    interpreter._get_np_dtype = _of_scalars_once(interpreter._get_np_dtype)
    core._type_for_tuple_values = _of_shapes_once(core._type_for_tuple_values)


def _of_scalars_once(dtype_of: Any) -> Any:
    """numpy's dtype of a tile is that of its elements. Pointers can't be hashed."""
    known = cache(dtype_of)

    def remembered(kind: Any) -> Any:
        return (dtype_of if isinstance(kind.scalar, tl.pointer_type) else known)(kind.scalar)

    return remembered


def _of_shapes_once(type_of: Any) -> Any:
    """The type of a tuple of whole numbers, as all shapes are, is made once for each."""
    known: dict[tuple[int, ...], Any] = {}

    def remembered(values: Any, fields: Any = None) -> Any:
        numbers = tuple(getattr(value, "value", value) for value in values)
        if fields is not None or not all(type(number) is int for number in numbers):
            return type_of(values, fields)
        if numbers not in known:
            known[numbers] = type_of(values)
        return known[numbers]

    return remembered


def _bounds_of_loops(patch: Any) -> Any:
    """From numpy 2.4 on int() refuses arrays of one element, which is what Triton 3.6 hands to loops as a bound."""

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patched


def _rounded_to_nearest(convert: Any) -> Any:
    """Triton 3.6 cuts fp32 off to bf16 here; compiled kernels round."""

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        values = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16)

    return converted


_patched: set[int] = set()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A kernel calls a function. Triton would patch its language anew for each such call, which is half of the time."""
    if id(self.fn.__globals__) not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(id(self.fn.__globals__))
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise InterpreterError(repr(error)) from error
