"""How a tensor is cut for the kernels: lanes, groups of lanes that share statistics, and tiles. Nothing here needs triton.

>>> of_batch(x), of_samples(viewed)      # x: (N, C, *); viewed: (B, G, K, S), as backends/torch_sample.py sees its input
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from normrewrite.norms import Metric


@dataclass(frozen=True)
class Geometry:
    """`lanes` runs of `length` elements (see tiles.py), and the groups of `members` lanes that share statistics.

    Group g consists of lanes g * lane_of_group + j * lane_of_member, j < members; its elements are in this order.
    """

    lanes: int
    length: int
    channels: int
    columns: bool  # channels-last: a lane is a column
    sample: bool  # a group is of one sample; else group = channel
    members: int
    lane_of_group: int
    lane_of_member: int

    @property
    def groups(self) -> int:
        return self.lanes // self.members

    @property
    def n(self) -> int:
        """How many elements share statistics."""
        return self.members * self.length

    @property
    def width(self) -> int:
        """How many elements lie side by side in memory."""
        return self.channels if self.columns else self.length

    @property
    def height(self) -> int:
        """Rows of the matrix."""
        return self.lanes * self.length // self.width

    @property
    def bits(self) -> tuple[int, int]:
        """The shape of one bit an element, in bytes."""
        return self.height, _quotient(self.width, 8)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """What kernels are told of it."""
        names = ("lanes", "length", "channels", "members", "lane_of_group", "lane_of_member")
        return {name: getattr(self, name) for name in names} | {"COLUMNS": self.columns, "SAMPLE": self.sample}


def of(x: Tensor, sample: bool) -> Geometry:
    """x: (N, C, *), or (B, G, K, S) where statistics are of a sample."""
    return of_samples(x) if sample else of_batch(x)


def of_batch(x: Tensor) -> Geometry:
    """x: (N, C, *), channels-last or contiguous: statistics by channel, over all samples."""
    samples, channels, length = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if channels > 1 and x.movedim(1, -1).is_contiguous():
        return Geometry(channels, samples * length, channels, True, False, 1, 1, 1)
    return Geometry(samples * channels, length, channels, False, False, samples, 1, channels)


def of_samples(x: Tensor) -> Geometry:
    """x: (B, G, K, S), channels-last or contiguous: statistics over K channels at S positions, by sample."""
    samples, groups, each, length = x.shape
    last = groups * each > 1 and x.permute(0, 3, 1, 2).is_contiguous()
    return Geometry(samples * groups * each, length, groups * each, last, True, each, each, 1)


def laid_out(x: Tensor, sample: bool) -> Tensor:
    """x where it lies in memory as one of the two, else a contiguous copy."""
    if sample and x.shape[3] > 1 and x.permute(0, 3, 1, 2).is_contiguous():
        return x
    return x if not sample and x.movedim(1, -1).is_contiguous() else x.contiguous()


def why_not(shape: Sequence[int], row: Metric, sample: bool) -> str | None:
    """Why the kernels can't compute a row of the table on this shape, or None if they can."""
    if row.family == "mean" and row.power > 2:
        return f"the kernels know powers 1 and 2, {row} has {row.power}"
    if not (sample and shape[3] == 1):
        return None
    limits = Tuning()  # rows that are kept in registers
    longest = limits.row_width if row.family == "mean" else limits.sparse_width
    if shape[2] > longest:
        return f"the kernels keep rows of up to {longest} elements, got {shape[2]}"
    if row.family == "top" and row.k(shape[2]) > limits.largest_k:
        return f"the kernels find up to {limits.largest_k} extremes of such a row, {row} asks for {row.k(shape[2])}"
    return None


def family(row: Metric) -> str:
    """What kernels call the row's family: `l1`, `l2`, `top` or `span`."""
    return f"l{row.power}" if row.family == "mean" else row.family


@dataclass(frozen=True)
class Cut:
    """A geometry cut into `blocks` of lanes and `parts` of `iterations` tiles each."""

    lanes: int  # of a tile
    steps: int  # of a tile
    blocks: int
    parts: int
    iterations: int
    vector: int

    @property
    def programs(self) -> int:
        return self.blocks * self.parts

    @property
    def part(self) -> int:
        """Steps of a part."""
        return self.steps * self.iterations

    @property
    def sizes(self) -> dict[str, int]:
        """What kernels are told of it."""
        names = {"LANES": self.lanes, "STEPS": self.steps, "VEC": self.vector}
        return names | {"blocks": self.blocks, "parts": self.parts, "iterations": self.iterations}

    @property
    def warps(self) -> int:
        return max(1, min(8, self.lanes * self.steps // 256))


@dataclass(frozen=True)
class Tuning:
    """What may be changed without changing a result by more than rounding; never measured at run time: same bits every run."""

    tile: int = 2048  # elements a program holds at once
    across: int = 128  # of them side by side in memory at most, channels-last
    along: int = 512  # the same, channels-first
    programs: int = 2048  # aimed at by kernels that reduce: some eight for each of 132 multiprocessors
    repeat: int = 4  # tiles a program of the others takes, as it reads its parameters once
    members: int = 1024  # parts that are combined at once
    peaks: int = 4096  # parts that are searched at once
    row_width: int = 8192  # the longest row that is kept in registers
    sparse_width: int = 4096  # the same where a family reads few elements: their places need registers, too
    row_programs: int = 512  # in the backward of rows: as many sums of columns are written
    largest_k: int = 128  # a larger k is torch's to find
    candidates: int = 4096  # elements that are read again to find extremes, of each side

    def cut(self, geometry: Geometry, bytes_each: int, iterations: int | None = None, k: int = 0) -> Cut:
        """Tiles for a kernel that takes `iterations` tiles a program; None: as few parts as keep the machine busy.

        k > 0: parts as short as a search for k extremes wants them, a power of two. Each costs 24 bytes a lane to write and
        read its sums, and k of them a side are read again, channels-last in sectors of 32 bytes: sqrt(24 n / 64 k) is least.
        """
        most = self.candidates // power_of_two(k) if k else self.tile
        lanes, steps = self._tile(geometry, most)
        across = _quotient(geometry.channels, lanes) * (geometry.lanes // geometry.channels)
        blocks = across if geometry.columns else _quotient(geometry.lanes, lanes)
        tiles = _quotient(geometry.length, steps)
        if k:
            iterations = min(power_of_two(int(math.sqrt(24 * geometry.n / (64 * k)))), most) // steps
        elif iterations is None:
            iterations = _quotient(tiles * blocks, self.programs)
        iterations = max(1, min(iterations, tiles if not k else power_of_two(tiles)))
        return Cut(lanes, steps, blocks, _quotient(tiles, iterations), iterations, vector(geometry.width, bytes_each))

    def _tile(self, geometry: Geometry, most: int) -> tuple[int, int]:
        """(lanes, steps <= most): at least eight elements side by side, as bits are packed."""
        if geometry.columns:
            lanes = max(8, min(self.across, power_of_two(geometry.width)))
            return lanes, max(1, min(self.tile // lanes, power_of_two(geometry.length), most))
        steps = max(8, min(self.along, power_of_two(geometry.width), most))
        return max(1, min(self.tile // steps, power_of_two(geometry.lanes))), steps

    def room(self, count: int, most: int) -> int:
        """How many of `count` a kernel takes at once: a power of eight or `most`, so that few kernels serve all counts."""
        return min(most, 1 << 3 * math.ceil(math.log(max(2, count), 8)))

    def searched(self, k: int) -> int:
        """For how many extremes a kernel is made that finds k."""
        return power_of_two(k)

    def rows(self, samples: int, n: int, bytes_each: int) -> tuple[int, int, int]:
        """Of rows of n elements in registers: how many a program takes, in how many columns, elements an access."""
        width = max(16, power_of_two(n))
        return max(1, min(self.tile // 4 // width, power_of_two(samples))), width, vector(n, bytes_each)


def vector(width: int, bytes_each: int) -> int:
    """How many elements one access may take, 16 bytes at most, for every row to begin at a multiple of them."""
    return math.gcd(width, 16 // bytes_each)


def power_of_two(n: int) -> int:
    """The next from n on."""
    return 1 << max(0, n - 1).bit_length()


def _quotient(a: int, b: int) -> int:
    return -(-a // b)
