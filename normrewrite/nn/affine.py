"""A learnable affine by channel: what a norm with fixed statistics is, where it can't be folded into a neighbour."""

import torch
from torch import Tensor, nn

from normrewrite.backends.measuring import per_channel
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import require_rank, through_tail
from normrewrite.nn.tracing import OneNode


class ChannelAffine(OneNode):
    """y = weight * x + bias, one weight and one bias a channel. x: (N, C, *), weight and bias: (C,), any float dtype.

    >>> ChannelAffine(torch.ones(64), torch.zeros(64))(x)
    """

    rank: int | None = None  # of the inputs at which the layer in front holds the rest of the norm, if it does

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.site = ""  # the dotted name in a converted model
        self.origin: Origin | None = None  # the norm that it was before a rewrite
        self.tail: tuple[str, ...] = ()  # children that are applied behind it: a fused activation, dropout
        self.folded = ""  # the class of a norm that was folded away for good
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, input: Tensor) -> Tensor:
        require_rank(self, input)
        weight, bias = per_channel(self.weight, input.dim()), per_channel(self.bias, input.dim())
        return through_tail(self, torch.addcmul(bias, input, weight).to(input.dtype))

    def extra_repr(self) -> str:
        return str(len(self.weight))
