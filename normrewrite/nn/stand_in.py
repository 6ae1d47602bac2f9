"""What stands in the place of a norm that another class took over, or that its neighbour took in."""

from torch import Tensor, nn

from normrewrite.nn.origin import Origin


class StandIn(nn.Module):
    """Another norm or nothing, then what the norm itself applied to its result (a fused activation, dropout).

    >>> StandIn(nn.GroupNorm(4, 64), {"act": nn.ReLU()})(x)

    `origin` holds the norm that was here, for revert. `layer` is the one that the norm was folded into, where it was: in a
    tuple, so that it is not registered here too.
    """

    def __init__(self, norm: nn.Module | None, tail: dict[str, nn.Module]) -> None:
        super().__init__()
        self.origin: Origin | None = None
        self.layer: tuple[nn.Module, ...] = ()
        self.tail = tuple(tail)
        if norm is not None:
            self.norm = norm
        self._modules.update(tail)

    def forward(self, input: Tensor) -> Tensor:
        for name in ("norm", *self.tail):
            module = self._modules.get(name)
            input = input if module is None else module(input)
        return input
