"""A norm within a sample with an affine in front of it, which keeps what a network did before it lost its batch."""

import math

import torch
from torch import Tensor, nn

from normrewrite.backends.measuring import per_channel
from normrewrite.errors import NormRewriteError
from normrewrite.nn.parts import require_rank, through_tail
from normrewrite.nn.stand_in import StandIn
from normrewrite.options.convert import AUTO, FREE

# B, the root mean square of an offset within a group, in units of what the norm measured before: a small one leaves the norm
# alive in training, a large one is nearer to the network's old function and costs digits.
Size = float | str
_UNFITTED = {AUTO: 30.0, FREE: 30.0}
_FITTED = {AUTO: 5.0, FREE: math.inf}


class OffsetNorm(StandIn):
    """y = norm(scale * x + offset), one scale and one offset a channel. x: (N, C, *), scale and offset: (C,), any float dtype.

    >>> OffsetNorm(nn.GroupNorm(4, 64), torch.ones(64), torch.zeros(64), {})(x)

    What is in front folds into a layer in front (normrewrite.passes.fold_offset). tail: what the norm's result goes through.
    """

    def __init__(self, norm: nn.Module, scale: Tensor, offset: Tensor, tail: dict[str, nn.Module]) -> None:
        super().__init__(norm, tail)
        self.scale = nn.Parameter(scale)
        self.offset = nn.Parameter(offset)

    def forward(self, input: Tensor) -> Tensor:
        require_rank(self, input)
        scale, offset = per_channel(self.scale, input.dim()), per_channel(self.offset, input.dim())
        return through_tail(self, self.norm(torch.addcmul(offset, input, scale)))

    def extra_repr(self) -> str:
        return str(len(self.scale))


def size_of(given: object) -> Size:
    """What people write for the size of an offset: `auto`, `free`, or a number from 0. Raises NormRewriteError."""
    if given in (AUTO, FREE):
        return str(given)
    try:
        number = float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number < math.inf:
        raise NormRewriteError(
            f"--offset {given!r} is no size. Give a number from 0, as in 5, or {AUTO!r}, or {FREE!r}."
        )
    return number


def unfitted(size: Size) -> float:
    """B where nothing but a batch norm's own statistics is known."""
    return _UNFITTED[size] if isinstance(size, str) else size


def largest(size: Size) -> float:
    """The largest B that a fit may give."""
    return _FITTED[size] if isinstance(size, str) else size
