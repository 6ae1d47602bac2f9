"""Sums of half numbers, by a stated accumulator: what hardware adds in, and when it rounds.

>>> accumulator("half:64").sum(torch.full((1, 5000), 16.0).half())         # 80,000 is beyond half
tensor([inf], dtype=torch.float16)

    fp32         every sum is taken in fp32, and its result rounded to half: torch's own, and tensor cores'
    half:CHUNK   each CHUNK numbers in a row are summed in fp32 and the partial sum is rounded to half; partial sums are added
                 in half, every addition rounded: neighbours by pairs, then pairs of pairs, ..., an odd one out is carried

CHUNK is what a unit adds before it hands a number on: 1 is an accumulator that is half throughout, and `half` alone is
half:64 (Wang et al. 2018, arXiv:1812.08011, whose chunks are of 64). The order is that of parallel kernels, and of
`advise`'s forecast; one running half sum would stop at 2048 equal numbers. A mean is the sum, as rounded, over n; for fp32 the
quotient alone is rounded. Half ends at 65504: a partial sum beyond is inf.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from normrewrite.errors import NormRewriteError
from normrewrite.outside import count

CHUNK = 64


@dataclass(frozen=True)
class Accumulator:
    """chunk: how many numbers are summed in fp32 before a partial sum is rounded to half; None: all of them."""

    chunk: int | None = None

    def __str__(self) -> str:
        return "fp32" if self.chunk is None else f"half:{self.chunk}"

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the last dimension of half numbers, in their order; half."""
        if self.chunk is None or values.shape[-1] <= self.chunk:
            return _wide_sum(values).half()
        return _tree(_partial(values, self.chunk))

    def mean(self, values: Tensor) -> Tensor:
        n = values.shape[-1]
        return (_wide_sum(values) / n).half() if self.chunk is None else (self.sum(values).float() / n).half()


def accumulator(spec: str) -> Accumulator:
    """`fp32`, `half` or `half:CHUNK`; raises NormRewriteError for anything else."""
    name, colon, chunk = spec.strip().lower().partition(":")
    if name == "fp32" and not colon:
        return Accumulator()
    if name == "half" and not colon:
        return Accumulator(CHUNK)
    if name == "half" and (number := count(chunk)) is not None:
        return Accumulator(number)
    raise NormRewriteError(
        f"accumulator {spec!r}: write fp32, half ({CHUNK} numbers to a partial sum) or half:CHUNK, with a whole number from 1."
    )


def _wide_sum(values: Tensor) -> Tensor:
    return values.sum(-1, dtype=torch.float32)


def _partial(values: Tensor, chunk: int) -> Tensor:
    """(..., n) -> (..., chunks): zeros fill the last."""
    if chunk == 1:
        return values
    return _wide_sum(pad(values, (0, -values.shape[-1] % chunk)).unflatten(-1, (-1, chunk))).half()


def _tree(sums: Tensor) -> Tensor:
    """(..., n) -> (...), every addition rounded to half."""
    while sums.shape[-1] > 1:
        sums = pad(sums, (0, sums.shape[-1] % 2))
        sums = sums[..., ::2] + sums[..., 1::2]
    return sums[..., 0]
