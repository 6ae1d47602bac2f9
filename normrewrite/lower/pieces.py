"""Torch: large tensors in pieces that stay in a processor's cache, so that several small kernels read memory once.

>>> for x_piece, g_piece, mine in pieces((x, g), (mean,)): ...         # (N, C, *) each, of the same places, and (C,)
>>> cells = cut(x)                                         # sum, largest and smallest of every few hundred neighbours

Pieces are views. A GPU gets everything as one piece: there a launch costs more than a read.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from normrewrite.lower.families import wide_dtype

# Of fp32 a thread: two megabytes, few of which fit into a shared cache; smaller ones cost more to start.
_ELEMENTS = 1 << 19
_LONGEST, _SHORTEST = 256, 7  # elements of a cell


def pieces(tensors: tuple[Tensor, ...], of_channels: tuple[Tensor, ...] = ()) -> Iterator[tuple[Tensor, ...]]:
    """Parts of `tensors`, all (N, C, *) of one shape, and behind them the parts of `of_channels`, (C, *), that go with them.

    Cut along whatever is outermost in the first one's memory, so that its parts stay whole there: torch's kernels for batch
    norms copy what is not.
    """
    x, size = tensors[0], _ELEMENTS * torch.get_num_threads()
    outermost = sorted((dim for dim in range(x.dim()) if x.shape[dim] > 1), key=x.stride, reverse=True)
    if x.device.type != "cpu" or x.numel() <= size or not outermost:
        yield *tensors, *of_channels
        return
    dim = outermost[0]
    step = max(size * x.shape[dim] // x.numel(), 1)
    for start in range(0, x.shape[dim], step):
        length = min(step, x.shape[dim] - start)
        parts = tuple(tensor.narrow(dim, start, length) for tensor in tensors)
        mine = tuple(values.narrow(0, start, length) for values in of_channels) if dim == 1 else of_channels
        yield from pieces(parts, mine)


@dataclass
class Cells:
    """A channel's elements, in their own (N, *) order, cut into P cells of L neighbours.

    values: x as (N, C, P/N, L), or as (P, L, C) where channels are innermost; mean: (C,); high, low: (C, P).
    """

    values: Tensor
    length: int
    mean: Tensor
    high: Tensor
    low: Tensor

    def read(self, cells: Tensor) -> Tensor:
        """The elements of some cells, (C, k) -> (C, k * L), in the dtype of the statistics."""
        channels = torch.arange(len(cells), device=cells.device)[:, None]
        if self.values.dim() == 3:
            found = self.values[cells, :, channels]
        else:
            a_sample = self.values.shape[2]
            found = self.values[cells // a_sample, channels, cells % a_sample]
        return found.flatten(1).to(self.mean.dtype)

    def places(self, cells: Tensor, within: Tensor) -> Tensor:
        """Where elements stand in their channel's order. within: (C, m) columns of what `read` gave for cells (C, k)."""
        return cells.gather(1, within // self.length) * self.length + within % self.length


def cut(x: Tensor, k: int = 1) -> Cells | None:
    """x: (N, C, *) cut into cells in one read, short enough that most of a channel's lie without its k extremes; None where
    it has no length that cells could have."""
    longest = min(x.numel() // max(x.shape[1], 1) // (8 * k), _LONGEST)
    dtype, values = wide_dtype(x), _innermost(x, longest)
    if values is None:
        return None
    along = 1 if values.dim() == 3 else 3
    found = [
        (piece.amax(along), piece.amin(along), piece.sum((0, along) if along == 1 else (0, 2, 3), dtype=dtype))
        for (piece,) in _pieces_of_cells(values)
    ]
    high, low = (_by_channel(torch.cat(parts).to(dtype)) for parts in list(zip(*found, strict=True))[:2])
    total = torch.stack([sums for _, _, sums in found]).sum(0)
    return Cells(values, values.shape[along], total / (x.numel() // x.shape[1]), high, low)


def _pieces_of_cells(values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    step = _ELEMENTS * torch.get_num_threads() * len(values) // max(values.numel(), 1)
    return zip(values.split(max(step, 1) if values.device.type == "cpu" else len(values)), strict=True)


def _by_channel(of_cells: Tensor) -> Tensor:
    """(N, C, P/N) or (P, C) -> (C, P)."""
    return of_cells.transpose(0, 1).flatten(1)


def _innermost(x: Tensor, longest: int) -> Tensor | None:
    """x as cells, in whichever of the two orders its memory has; neither: x is copied into the first."""
    n, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    rows = x.movedim(1, -1)
    if rows.is_contiguous() and (positions == 1 or not x.is_contiguous()):
        length = _length(n * positions, longest)
        return None if length is None else rows.reshape(-1, length, channels)
    length = _length(positions, longest)
    return None if length is None else x.contiguous().view(n, channels, -1, length)


def _length(elements: int, longest: int) -> int | None:
    """The largest divisor that a cell may have."""
    fitting = [length for length in range(_SHORTEST, longest + 1) if elements % length == 0]
    return fitting[-1] if fitting else None
