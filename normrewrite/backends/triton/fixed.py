"""How tensors are cut where kernels are compiled beforehand for all sizes: into tiles of few sizes, so that few kernels serve.

>>> with using(Fixed()), recorded() as launches:
...     forward(x, None, weight, bias, metric("l1"), "exact", 1e-5, sample=True)

Another tuning of the same kernels. It costs time where a tensor fits no tile; nothing of that has been measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from normrewrite.backends.triton import launch
from normrewrite.backends.triton.geometry import Cut, Geometry, Tuning


@dataclass(frozen=True)
class Fixed(Tuning):
    """The sizes that there are, each list rising."""

    sides: tuple[int, ...] = (8, 32, 128)  # of a tile, channels-last: lanes
    runs: tuple[int, ...] = (16, 64, 256)  # of a tile, channels-first: steps
    widths: tuple[int, ...] = (64, 256, 1024, 4096, 8192)  # of rows in registers
    extremes: tuple[int, ...] = (1, 16, 128)  # that a kernel may find
    searched_parts: tuple[int, ...] = (256, 64, 16)  # steps a part, for each of them
    part: int = 4096  # steps a part at most where nothing is searched
    members: int = 512  # parts that are combined, or searched, at once

    def cut(self, geometry: Geometry, bytes_each: int, iterations: int | None = None, k: int = 0) -> Cut:
        part = self.searched_parts[self.extremes.index(self.searched(k))] if k else self.part
        if geometry.columns:
            lanes = fitting(self.sides, geometry.width)
            steps = min(self.tile // lanes, part)
        else:
            steps = min(fitting(self.runs, geometry.width), part)
            lanes = self.tile // steps
        across = -(-geometry.channels // lanes) * (geometry.lanes // geometry.channels)
        blocks = across if geometry.columns else -(-geometry.lanes // lanes)
        tiles = -(-geometry.length // steps)
        whole = part // steps
        each = whole if k else min(iterations or whole, max(1, tiles))  # a searched part is always whole
        return Cut(lanes, steps, blocks, -(-tiles // each), each, access(geometry.width, bytes_each))

    def room(self, count: int, most: int) -> int:
        return self.members

    def searched(self, k: int) -> int:
        return fitting(self.extremes, k)

    def rows(self, samples: int, n: int, bytes_each: int) -> tuple[int, int, int]:
        width = fitting(self.widths, n)
        return max(1, self.tile // 4 // width), width, access(n, bytes_each)


def fitting(sizes: tuple[int, ...], n: int) -> int:
    """The least of the sizes that holds n, or the largest.

    >>> fitting((8, 32, 128), 9), fitting((8, 32, 128), 1000)
    (32, 128)
    """
    return next((size for size in sizes if size >= n), sizes[-1])


def access(width: int, bytes_each: int) -> int:
    """How many elements one access takes: 16 bytes of them, or one."""
    whole = 16 // bytes_each
    return 1 if width % whole else whole


@contextmanager
def using(tuning: Tuning) -> Iterator[None]:
    """Cut tensors so in the block, for every launch of this process."""
    kept, launch.TUNING = launch.TUNING, tuning
    try:
        yield
    finally:
        launch.TUNING = kept
