"""What a plugin's enqueue does: the project's kernels on memory that is someone else's.

>>> compute(op.row(given), given, x, weight, bias, y)      # y is written; x: (B, G, K, S), weight and bias: (G, K, 1)
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from normrewrite.backends import torch_sample
from normrewrite.backends.call import Call
from normrewrite.backends.triton import serving
from normrewrite.norms import Metric


def compute(row: Metric, given: Mapping[str, Any], x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> None:
    """Write y, as x lies in memory. By the Triton kernels; by torch, on the same device, what those refuse by name.

    They refuse rows of more than 8192 elements at one position, or of 4096 that are searched, and powers above 2. y is rounded
    where x and y are int8.
    """
    weight, bias = weight.flatten(1), bias.flatten(1)
    call = Call(x, row, "exact", given["eps"], sample=True, centred=bool(given["centred"]), int8=True)
    if serving.why_not(call) is None:
        written = serving.forward(call, weight, bias, out=y)[0]
    elif x.dtype is torch.int8:
        written = torch_sample.forward(call._replace(x=x.float()), weight, bias)[0].round_().clamp_(-128, 127)
    else:
        written = torch_sample.forward(call, weight, bias)[0]
    if written.data_ptr() != y.data_ptr():
        y.copy_(written)


def tensor_at(address: int, shape: Sequence[int], strides: Sequence[int], dtype: str) -> Tensor:
    """Device memory as a tensor, without a copy."""
    return torch.as_tensor(_Memory(address, tuple(shape), tuple(strides), dtype), device="cuda")


class _Memory:
    """What numba, CuPy and torch agree on for memory of a GPU."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> None:
        size = getattr(torch, dtype).itemsize
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": tuple(stride * size for stride in strides),
            "typestr": "|i1" if dtype == "int8" else f"<f{size}",
            "version": 3,
        }


def on_stream(stream: int) -> AbstractContextManager[Any]:
    """The kernels, and torch's own memory, on TensorRT's stream."""
    return torch.cuda.stream(torch.cuda.ExternalStream(stream))


def strides(shape: Sequence[int], multiple: int = 0) -> tuple[int, ...]:
    """Of TensorRT's linear format, in elements; with a multiple, of HWC: axis 1 moves last, padded to that multiple.

    >>> strides((2, 3, 1, 5), multiple=8)
    (40, 1, 40, 8)
    """
    order = list(range(len(shape)))
    sizes = list(shape)
    if multiple:
        order.append(order.pop(1))
        sizes[1] = math.ceil(shape[1] / multiple) * multiple
    laid_out, step = [0] * len(shape), 1
    for axis in reversed(order):
        laid_out[axis], step = step, step * sizes[axis]
    return tuple(laid_out)
