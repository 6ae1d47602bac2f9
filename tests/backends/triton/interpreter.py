"""Triton's interpreter, as kernels are proved with it on a CPU: repairs and two memories, none of which a kernel can see."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from triton import language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError


@cache
def mend() -> None:
    """Once is enough."""
    interpreter._patch_lang_tensor = _bounds_of_loops(interpreter._patch_lang_tensor)
    interpreter._convert_float = _rounded_to_nearest(interpreter._convert_float)
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.GridExecutor._restore_args_dev = lambda *_: None  # else it copies CPU tensors onto themselves
    TritonSemantic.binary_op_sanitize_overflow_impl = _overflow
    # Asked for at every operation, and half of the time if they are made anew each time.
    interpreter._get_np_dtype = _of_scalars_once(interpreter._get_np_dtype)
    core._type_for_tuple_values = _of_shapes_once(core._type_for_tuple_values)
    core.block_type.__init__ = _of_blocks_once(core.block_type.__init__)
    core.tensor.__init__ = _tensor
    TritonSemantic.broadcast_impl_value = _alike_as_they_are(TritonSemantic.broadcast_impl_value)
    TritonSemantic.cast = _cast_where_needed(TritonSemantic.cast)


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


def _of_blocks_once(init: Any) -> Any:
    """So is the type of a tile, by its elements and its shape."""
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def remembered(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple(getattr(size, "value", size) for size in shape)
        if key not in known:
            init(self, element_ty, shape)
            known[key] = self.__dict__
        self.__dict__ = known[key]

    return remembered


@cache
def _sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))


def _tensor(self: Any, handle: Any, type: Any) -> None:
    """A tile, whose shape is made once for all of that shape."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _sizes(tuple(type.shape.values) if type.is_block() else ())


def _alike_as_they_are(broadcast: Any) -> Any:
    """Tiles of one shape need no broadcasting."""

    def broadcasted(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    return broadcasted


def _cast_where_needed(cast: Any) -> Any:
    """Nearly all are of their type already."""

    def casted(self: Any, input: Any, dst_ty: Any, *rounding: Any) -> Any:
        return input if input.dtype is dst_ty.scalar else cast(self, input, dst_ty, *rounding)

    return casted


def _overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """Triton computes everything a second time in int64 and a third time as comparisons, to look at it in debugging alone."""
    kind = lhs.type.scalar
    if self.builder.options.sanitize_overflow and kind.int_bitwidth < 64:
        wide = _IN_NUMPY[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        assert kind.get_int_min_value() <= wide.min() and wide.max() <= kind.get_int_max_value(), f"{kind} overflows"


_IN_NUMPY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


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
