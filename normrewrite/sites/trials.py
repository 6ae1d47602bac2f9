"""What a module is given to show whether it is a plain norm: inputs at which one that does more would differ.

>>> [tuple(x.shape) for x in trials(8, rank=4, axis=1)][:2]
[(5, 8, 3, 2), (5, 8, 3, 2)]

Every rank from 1 to 5, the channels at every axis, to see what it takes at all; then at one layout: small, large, constant
and NaN values; no sample, one, and more; single positions, and many. No other size is that of the channels, so that nothing fits
by chance.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

RANKS = (1, 2, 3, 4, 5)
_SCALES = (1.0, 1e-2, 1e-4, 1e4, 1e8)  # eps outweighs the second and third; the others stand out of a clamp
_SIZES = (8, 33, 257)
_BATCHES = (1, 2, 3, 4, 8, 16, 33, 64)


def subject_of(module: nn.Module) -> Any:
    """A copy in float64 whose tensors are well-conditioned and of both signs; None where it can't be copied.

    What a module computes by chance (gamma 0 or 1, a fresh variance of 1) hides nothing then.
    """
    try:
        subject = copy.deepcopy(module).cpu().double()
    except Exception:  # whatever a foreign class raises
        return None
    generator = torch.Generator().manual_seed(0)
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(subject, name, None)
        if isinstance(tensor, Tensor):
            size = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
            if name == "running_var":
                tensor.data = 10 ** (4 * size - 6)  # 1e-4 to 1: eps shows, and so does a clamp
            else:
                tensor.data = size * (-1) ** torch.arange(size.numel(), device="cpu").view_as(size)
    return subject


def layouts(width: int) -> Iterator[tuple[int, int, Tensor]]:
    """(rank, axis, input) for every rank and every axis that the channels could stand at."""
    for rank in RANKS:
        for axis in range(rank):
            yield rank, axis, next(trials(width, rank, axis))


def trials(width: int, rank: int, axis: int) -> Iterator[Tensor]:
    """The inputs of one layout, float64; where the channels come first, they are one sample's, and there is no batch."""
    generator = torch.Generator().manual_seed(rank)

    def noise(sizes: list[int]) -> Tensor:
        shape = (*sizes[:axis], width, *sizes[axis:])
        return 0.5 + torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    base = noise([size for size in (5, 3, 2, 4, 7) if size != width][: rank - 1])
    yield from (scale * base for scale in _SCALES)
    if axis == 0:
        return
    yield torch.full_like(base, 2.0)
    yield base.masked_fill(torch.arange(base.numel(), device="cpu").view_as(base) == 0, torch.nan)
    yield from (base[:batch] for batch in (0, 1, 2))
    yield from (noise([batch, *[1] * (rank - 2)]) for batch in _BATCHES)
    yield from (noise([2 if width == 1 else 1, *sizes]) for sizes in _positions(rank - 2) if width not in sizes)


def _positions(dims: int) -> Iterator[list[int]]:
    """Sizes behind the channels that a forward may switch at: all of them larger, and one alone, up to long ones."""
    if dims > 0:
        yield [9] * dims
        yield from ([size if i == long else 1 for i in range(dims)] for size in _SIZES for long in range(dims))


def outcome(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What a call gives, by random numbers that are always the same; None where it raises."""
    torch.default_generator.manual_seed(
        0
    )  # torch.manual_seed would keep a stack trace for CUDA, which takes longer than x
    try:
        return call(x.clone())
    except Exception:  # the wrong rank, or whatever a foreign forward raises
        return None


def takes(call: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether x is an input: what comes back has its shape. Broadcasting makes something of most shapes."""
    y = outcome(call, x)
    return isinstance(y, Tensor) and y.shape == x.shape


def same(output: Any, expected: Any, tolerance: float, least: float = 0.0) -> bool:
    """Whether two outcomes are equal, to tolerance of the largest number in the second, which counts as `least` at least."""
    if output is None or expected is None:
        return output is expected
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    largest = float(expected.nan_to_num().abs().max()) if expected.numel() else 0.0
    limit = tolerance * max(least, largest)
    return torch.allclose(output.double(), expected.double(), rtol=0, atol=limit, equal_nan=True)
