"""What stands where a norm was that now works inside its neighbour."""

from torch import Tensor, nn
from torch.fx import Proxy

from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import through_tail
from normrewrite.nn.tracing import as_one_node


class Folded(nn.Module):
    """The identity, then the tail: children named in `tail`, as an activation that was fused with the norm.

    >>> Folded(origin=Origin(bn, {}))(x) is x
    True

    Any input. `origin` holds the norm that stood here, for `revert`; `site` its dotted name in a converted model.
    """

    def __init__(self, origin: Origin | None = None) -> None:
        super().__init__()
        self.site = ""
        self.origin = origin
        self.tail: tuple[str, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        return as_one_node(self, input) if isinstance(input, Proxy) else through_tail(self, input)
