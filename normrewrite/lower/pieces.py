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
_FEW, _ACROSS = 512, 16  # positions of a sample: then a cell lies across so many samples, in whole vectors, ...
_PLANE = 128  # ... unless a sample's positions are one good cell


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


def backwards(parts: Iterator[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The last pieces first: after one pass over a tensor, its end is what the cache still holds."""
    return reversed(list(parts))


@dataclass
class Cells:
    """A channel's elements cut into P cells of L: neighbours, or where neighbours are few, what stands at one position of L
    samples.

    values: x as (N, C, P/N, L), neighbours along the last, or as (P/Q, L, C, Q), for Q positions; mean: (C,);
    high, low: (C, P).
    """

    values: Tensor
    along: int
    mean: Tensor
    high: Tensor
    low: Tensor

    def read(self, cells: Tensor) -> Tensor:
        """The elements of some cells, (C, k) -> (C, k * L), in the dtype of the statistics."""
        channels = torch.arange(len(cells), device=cells.device)[:, None]
        outer, inner = cells // self._inner, cells % self._inner
        found = self.values[outer, :, channels, inner] if self.along == 1 else self.values[outer, channels, inner]
        return found.flatten(1).to(self.mean.dtype)

    def places(self, cells: Tensor, within: Tensor) -> Tensor:
        """Where elements stand in their channel's (N, *) order. within: (C, m) columns of what `read` gave for (C, k)."""
        length = self.values.shape[self.along]
        cell, offset = cells.gather(1, within // length), within % length
        if self.along == 3:
            return cell * length + offset
        return (cell // self._inner * length + offset) * self._inner + cell % self._inner

    @property
    def _inner(self) -> int:
        return self.values.shape[2 if self.along == 3 else 3]


def cut(x: Tensor, k: int = 1) -> Cells | None:
    """x: (N, C, *) cut into cells in one read, short enough that most of a channel's lie without its k extremes; None where
    it has no length that cells could have."""
    longest = min(x.numel() // max(x.shape[1], 1) // (8 * k), _LONGEST)
    dtype, values, along = wide_dtype(x), *_in_order(x, longest)
    if values is None:
        return None
    outermost = (
        0 if len(values) > 1 else (2 if along == 1 else 1)
    )  # samples, or channels where all samples are one cell
    read = [_read(piece, along, dtype) for piece in _parts(values, outermost)]
    high, low, total = (torch.cat(parts, min(outermost, 1)) for parts in zip(*read, strict=True))
    channels = total.sum(0).sum(-1)  # across samples first, in whole vectors
    return Cells(
        values, along, channels / (x.numel() // x.shape[1]), *(_by_channel(each.to(dtype)) for each in (high, low))
    )


def _read(values: Tensor, along: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The largest, the smallest and the sum of each cell, (A, C, B)."""
    return values.amax(along), values.amin(along), values.sum(along, dtype=dtype)


def _parts(values: Tensor, dim: int) -> tuple[Tensor, ...]:
    step = _ELEMENTS * torch.get_num_threads() * values.shape[dim] // max(values.numel(), 1)
    return tuple(values.split(max(step, 1) if values.device.type == "cpu" else values.shape[dim], dim))


def _by_channel(of_cells: Tensor) -> Tensor:
    """(A, C, B) -> (C, A * B)."""
    return of_cells.transpose(0, 1).flatten(1)


def _in_order(x: Tensor, longest: int) -> tuple[Tensor | None, int]:
    """x as cells in the order of its memory, and the dimension along which a cell lies; of neither order, x is copied."""
    n, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    rows = x.movedim(1, -1)
    if rows.is_contiguous() and (positions == 1 or not x.is_contiguous()):
        samples, across = rows.reshape(-1, channels, 1), _length(n * positions, longest)
    else:
        samples = x.contiguous().view(n, channels, positions)
        few = positions < _FEW and not _PLANE <= positions <= longest
        across = _length(n, min(longest, _ACROSS)) if few else None
    if across is not None:
        return samples.unflatten(0, (-1, across)), 1
    length = _length(positions, longest)
    return None if length is None else samples.unflatten(2, (-1, length)), 3


def _length(elements: int, longest: int) -> int | None:
    """The largest divisor that a cell may have."""
    fitting = [length for length in range(_SHORTEST, longest + 1) if elements % length == 0]
    return fitting[-1] if fitting else None
