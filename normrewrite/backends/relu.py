"""What ReLU lets through, told from x or packed into bits: for a norm, a residual and ReLU as one operator (operators.py)."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from normrewrite.backends import torch_batch
from normrewrite.backends.families import wide
from normrewrite.backends.triton.geometry import Geometry


def passed(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor) -> Tensor:
    """Which elements of norm(x) ReLU lets through, as torch's does NaN. mean and scale: (C,), or (B, G) of (B, G, K, S)."""
    if mean.dim() == 2:
        y = (wide(x) - mean[:, :, None, None]) / scale[:, :, None, None]
        y = y if weight is None else y * weight[:, :, None]
        y = y if bias is None else y + bias[:, :, None]
    else:
        y = torch_batch.centred_affine(x, mean, scale, weight, bias)
    live: Tensor = ~(y <= 0)
    return live


_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack(flags: Tensor, shape: Geometry) -> Tensor:
    """One bit an element, in the order of memory: (height, ceil(width / 8)) bytes, the first in the lowest bit."""
    matrix = _channels_last(flags, shape.sample) if shape.columns else flags
    bits = pad(matrix.reshape(shape.height, shape.width).byte(), (0, -shape.width % 8)).unflatten(1, (-1, 8))
    packed: Tensor = (bits * bits.new_tensor(_BITS)).sum(2, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, shape: Geometry, like: torch.Size) -> Tensor:
    """`pack` undone: truth values in the shape `like`."""
    bits = (packed[:, :, None] & packed.new_tensor(_BITS)) != 0
    matrix = bits.flatten(1)[:, : shape.width]
    if not shape.columns:
        return matrix.reshape(like)
    if shape.sample:  # (B, S, G, K) -> (B, G, K, S)
        return matrix.reshape(like[0], like[3], like[1], like[2]).permute(0, 2, 3, 1)
    return matrix.reshape(like[0], *like[2:], like[1]).movedim(-1, 1)


def _channels_last(values: Tensor, sample: bool) -> Tensor:
    return values.permute(0, 3, 1, 2) if sample else values.movedim(1, -1)
