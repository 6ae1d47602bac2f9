"""What architectures are fed.

>>> images(64, (320, 240))                             # one candidate each
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.zoo_trial import Inputs

BATCH = 2


def draw(*shape: int) -> Tensor:
    """Inputs of order one, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def images(*sizes: int | Sequence[int], channels: int = 3) -> list[Inputs]:
    """One candidate for each size, each once; a single image where they are large."""
    shapes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    return [(draw(BATCH if max(shape) < 192 else 1, channels, *shape),) for shape in dict.fromkeys(shapes)]
