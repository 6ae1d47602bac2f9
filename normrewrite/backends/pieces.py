"""Torch: large tensors in pieces that stay in a processor's cache, so that several small kernels read memory once.

>>> parts = Pieces(x)                                                            # x, and what has its shape: (N, C, *)
>>> for x_piece, g_piece, middle in zip(parts.of(x), parts.of(g), parts.each(mean)): ...
>>> cells = cut(x)                                    # sum, largest and smallest of every few hundred neighbours

Pieces are views. A GPU gets everything as one piece: there a launch costs more than a read.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, repeat

import torch
from torch import Tensor

from normrewrite.backends.families import mean_dtype, wide_dtype

# Of fp32 a thread: two megabytes, few of which fit into a shared cache; smaller ones cost more to start.
_ELEMENTS = 1 << 19
# Elements that a kernel adds up one after the other, and, of lines, numbers that it adds up side by side.
_STRETCH, _SIDE_BY_SIDE = 8192, 256
_LONGEST, _SHORTEST = 256, 7  # elements of a cell
FEW, _ACROSS = 512, 16  # positions of a sample: then a cell lies across so many samples, in whole vectors, ...
_PLANE = 128  # ... unless a sample's positions are one good cell


class Pieces:
    """How (N, C, *) is cut: pieces lie whole in memory, as torch's kernels for batch norms copy what does not.

    Where planes lie together, each stretch of a plane of each sample is a channel of its own, (1, R, positions). Where channels
    do, several lines of memory side by side are, (1, fold * C, M, 1), channels-last: those kernels add up fp32 numbers one after
    the other, and lose digits where these are many. What is neither is one piece. short: whether that is kept to.
    """

    def __init__(self, x: Tensor) -> None:
        self.samples, self.channels = x.shape[:2]
        size, positions = _ELEMENTS * torch.get_num_threads(), math.prod(x.shape[2:])
        here = x.device.type == "cpu" and x.numel() > 0
        self.planes = here and positions > 1 and x.is_contiguous() and (x.numel() > size or positions > _STRETCH)
        self.innermost = here and not self.planes and x.movedim(1, -1).is_contiguous()
        self.fold, width = 1, max(self.channels, 1)
        self.height = x.numel() // width
        if self.planes:
            self.fold = _parts_of(positions)
            width = positions // self.fold
        elif self.innermost:
            self.fold = max(min(min(_SIDE_BY_SIDE, size) // width, math.isqrt(self.height)), 1)
            width *= self.fold
        self.step = max(size // width, 1)
        longest = width if self.planes else positions
        self.short = self.innermost or (x.is_contiguous() and x.dim() > 2 and x.numel() > 0 and longest <= _STRETCH)

    def of(self, values: Tensor) -> tuple[Tensor, ...]:
        """The pieces of x, or of what has its shape; views of what is laid out as x is."""
        if self.planes:
            return tuple(values.reshape(1, self.samples * self.channels * self.fold, -1).split(self.step, 1))
        if not self.innermost:
            return (values,)
        lines = values.movedim(1, -1).contiguous().view(-1, self.channels)
        wide = lines[: len(lines) // self.fold * self.fold].view(-1, self.fold * self.channels)
        rest = lines[len(wide) * self.fold :]
        return tuple(piece.t()[None, :, :, None] for piece in (*wide.split(self.step), rest) if len(piece))

    def each(self, of_channels: Tensor) -> Iterable[Tensor]:
        """What of (C,) goes with each piece."""
        if self.planes:
            of_planes = of_channels.view(1, -1, 1).expand(self.samples, -1, self.fold)
            parts: tuple[Tensor, ...] = of_planes.reshape(-1).split(self.step)
            return parts
        if not self.innermost:
            return (of_channels,)
        wide = -(-(self.height // self.fold) // self.step)
        return chain(repeat(of_channels.repeat(self.fold), wide), (of_channels,))

    def total(self, sums: Sequence[Tensor]) -> Tensor:
        """Sums by channel, (C,), of those of each piece, in their order; added up in float64."""
        if self.planes:
            planes = torch.cat(list(sums)).view(self.samples, -1).sum(0, dtype=torch.float64)
            return planes.view(self.channels, -1).sum(1)
        return torch.cat([piece.view(-1, self.channels) for piece in sums]).sum(0, dtype=torch.float64)


@cache
def _parts_of(positions: int) -> int:
    """The fewest equal parts of a plane that are short; 1 where there are none, or tiny ones."""
    least, most = -(-positions // _STRETCH), positions // 64
    return next((parts for parts in range(least, most + 1) if positions % parts == 0), 1)


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
        outer, inner = divided(cells, self._inner)
        if self.along == 1:
            elements = self.values[outer, :, channels, inner]
        else:  # whole lines of memory, twice as fast as by three indices
            lines = (outer * len(cells) + channels) * self._inner + inner
            elements = self.values.flatten(0, 2).index_select(0, lines.flatten()).view(*cells.shape, -1)
        return elements.flatten(1).to(self.mean.dtype)

    def places(self, cells: Tensor, within: Tensor) -> Tensor:
        """Where elements stand in their channel's (N, *) order. within: (C, m) columns of what `read` gave for (C, k)."""
        length = self.values.shape[self.along]
        which, offset = divided(within, length)
        cell = cells.gather(1, which)
        if self.along == 3:
            return cell * length + offset
        outer, inner = divided(cell, self._inner)
        return (outer * length + offset) * self._inner + inner

    @property
    def _inner(self) -> int:
        return self.values.shape[2 if self.along == 3 else 3]


def divided(places: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """places // by and places % by, of 0 to 2^52: doubles hold these exactly, and torch divides them four times as fast."""
    quotient = (places.double() / by).long()
    return quotient, places - quotient * by


def cut(x: Tensor, k: int = 1) -> Cells | None:
    """x: (N, C, *) cut into cells in one read, short enough that most of a channel's lie without its k extremes; None where
    that takes longer than to look at every element, or where it has no length that cells could have."""
    if x.numel() <= _ELEMENTS // 4:
        return None
    longest = min(x.numel() // max(x.shape[1], 1) // (8 * k), _LONGEST)
    dtype, values, along = wide_dtype(x), *_in_order(x, longest)
    if values is None:
        return None
    of_channels = 2 if along == 1 else 1
    outermost = (
        of_channels if len(values) == 1 else 0
    )  # of one sample, or where a cell has all of them, channels are parted
    read = [_read(piece, along, mean_dtype(x)) for piece in _parts(values, outermost)]
    high, low, total = (torch.cat(parts, min(outermost, 1)) for parts in zip(*read, strict=True))
    channels = total.sum(0).sum(-1)  # across samples first, in whole vectors
    return Cells(
        values,
        along,
        (channels / (x.numel() // x.shape[1])).to(dtype),
        *(_by_channel(each.to(dtype)) for each in (high, low)),
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
    lines = x.movedim(1, -1)
    if lines.is_contiguous() and (positions == 1 or not x.is_contiguous()):
        samples, across = lines.reshape(-1, channels, 1), _length(n * positions, longest)
    else:
        samples = x.contiguous().view(n, channels, positions)
        few = positions < FEW and not _PLANE <= positions <= longest
        across = _length(n, min(longest, _ACROSS)) if few else None
    if across is not None:
        return samples.unflatten(0, (-1, across)), 1
    length = _length(positions, longest)
    return None if length is None else samples.unflatten(2, (-1, length)), 3


def _length(elements: int, longest: int) -> int | None:
    """The largest divisor that a cell may have."""
    fitting = [length for length in range(_SHORTEST, longest + 1) if elements % length == 0]
    return fitting[-1] if fitting else None
