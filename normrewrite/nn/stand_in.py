"""What stands in the place of a norm that another class took over, or that its neighbour took in."""

from torch import Tensor, nn

from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import require_rank, through_tail
from normrewrite.nn.tracing import OneNode


class StandIn(OneNode):
    """Another norm or nothing, then what the norm itself applied to its result (a fused activation, dropout).

    >>> StandIn(nn.GroupNorm(4, 64), {"act": nn.ReLU()})(x)

    `origin` holds the norm that was here, for revert. `layer` is the one that the norm was folded into, where it was: in a
    tuple, so that it is not registered here too. `rank`: of the inputs at which that is the norm's function; other ranks are
    refused, as that norm would take another axis for the channels.
    """

    rank: int | None = None

    def __init__(self, norm: nn.Module | None, tail: dict[str, nn.Module]) -> None:
        super().__init__()
        self.site = ""  # the dotted name in a converted model
        self.origin: Origin | None = None
        self.layer: tuple[nn.Module, ...] = ()
        self.tail = tuple(tail)
        self.folded = ""  # the class of a norm that was folded away for good
        if norm is not None:
            self.norm = norm
        self._modules.update(tail)

    def forward(self, input: Tensor) -> Tensor:
        require_rank(self, input)
        norm = self._modules.get("norm")
        return through_tail(self, input if norm is None else norm(input))
