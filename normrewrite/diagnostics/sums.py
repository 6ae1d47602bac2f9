"""What is kept of two forms of an output, number by number over all samples and sample by sample, for a judgement of each part.

>>> sums = Columns.of(torch.zeros(10))
>>> sums.add(b, gap, b.isfinite())
>>> sums.slices()                     # of every index along every axis of a sample
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_FAR = 1e3  # of a constant that stands for what is masked, to everything else


def masked(a: Tensor, b: Tensor) -> Tensor:
    """Where both have the same constant, one that is far larger than all else: it stands for a number that isn't there.

    >>> masked(torch.tensor([[1.0, -1e9, -1e9]]), torch.tensor([[2.0, -1e9, -1e9]]))
    tensor([[False,  True,  True]])
    """
    mask = torch.zeros_like(b, dtype=torch.bool)
    size = torch.where(b.isfinite(), torch.maximum(a.abs(), b.abs()), 0.0)
    while size.numel():
        top = size == size.max()
        rest = float(size[~top].max()) if not top.all() else 0.0
        same = bool((a[top] == b[top]).all()) and int(top.sum()) > 1
        if not same or not rest or float(size.max()) < _FAR * rest:
            break
        mask |= top
        size = torch.where(top, 0.0, size)
    return mask


@dataclass
class Columns:
    """Of each number of a sample: how many samples had it, sum, squares, noise (squares of gaps), largest, and largest gap."""

    count: Tensor
    total: Tensor
    squares: Tensor
    noise: Tensor
    largest: Tensor
    gap: Tensor

    @classmethod
    def of(cls, sample: Tensor) -> "Columns":
        return cls(*(torch.zeros(sample.shape, dtype=torch.float64) for _ in range(6)))

    def add(self, b: Tensor, gap: Tensor, counted: Tensor) -> None:
        """b, gap: (N, ...), zero where not counted."""
        if len(b):
            self.count += counted.sum(0)
            self.total += b.sum(0)
            self.squares += (b * b).sum(0)
            self.noise += (gap * gap).sum(0)
            self.largest = torch.maximum(self.largest, b.abs().amax(0))
            self.gap = torch.maximum(self.gap, gap.amax(0))

    @property
    def variation(self) -> Tensor:
        """Sum of squares of what varies from sample to sample."""
        return (self.squares - self.total.square() / self.count.clamp_min(1)).clamp_min(0)

    def slices(self) -> list["Slices"]:
        """The same of every index along each axis of a sample that is longer than one."""
        axes = [axis for axis, length in enumerate(self.count.shape) if length > 1]
        return [self._along(axis) for axis in axes]

    def _along(self, axis: int) -> "Slices":
        def flat(values: Tensor) -> Tensor:
            return values.movedim(axis, 0).flatten(1) if values.dim() > 1 else values[:, None]

        freedom = (self.count - 1).clamp_min(0)
        sums = (flat(x).sum(1) for x in (freedom, self.squares, self.variation, self.noise))
        return Slices(*sums, *(flat(x).amax(1) for x in (self.largest, self.gap)))


@dataclass(frozen=True)
class Slices:
    """Of each part of an output along one axis. freedom: numbers less the means that variation is taken from."""

    freedom: Tensor
    squares: Tensor
    variation: Tensor
    noise: Tensor
    largest: Tensor
    gap: Tensor

    def of_one_size(self) -> "list[tuple[float, ...]]":
        """Freedom, squares, variation and noise of all parts whose largest numbers lie within a factor of four: one alone may
        vary little by chance."""
        size = (self.largest.clamp_min(1e-300).log2() / 2).floor()
        sums = (self.freedom, self.squares, self.variation, self.noise)
        return [tuple(float(x[size == unit].sum()) for x in sums) for unit in size.unique()]


@dataclass
class Samples:
    """Of each sample: largest, largest gap, signal and noise; where it has classes, by how much A has another one largest."""

    parts: list[Tensor] = field(default_factory=list)
    short: list[Tensor] = field(default_factory=list)

    def add(self, b: Tensor, gap: Tensor) -> None:
        b, gap = (values.reshape(len(b), math.prod(b.shape[1:])) for values in (b, gap))
        if b.numel():
            self.parts.append(torch.stack([b.abs().amax(1), gap.amax(1), (b * b).sum(1), (gap * gap).sum(1)]))

    def add_classes(self, a: Tensor, b: Tensor, largest: Tensor) -> None:
        """By how much A's largest is above A's number at B's largest, in units of the sample's largest."""
        best = b.argmax(1)
        short = a.amax(1) - a.gather(1, best[:, None])[:, 0]
        self.short.append(torch.where(a.argmax(1) == best, 0.0, (short / largest).nan_to_num(nan=torch.inf)))

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        largest, gap, signal, noise = torch.cat(self.parts, 1) if self.parts else torch.zeros(4, 0)
        return largest, gap, signal, noise
