"""A norm, a residual and ReLU in one pass over memory, where the kernels serve: `nr.nn.norm_relu(self.bn, x, identity)`."""

from torch import Tensor, nn
from torch.fx import Proxy

from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.functional import rectified
from normrewrite.nn.sample import GroupNorm
from normrewrite.nn.tracing import as_one_function


def norm_relu(norm: nn.Module, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(input) + residual), for any norm; residual: of input's shape, or None.

    >>> out = norm_relu(self.bn3, self.conv3(out), identity)       # in place of relu(self.bn3(self.conv3(out)) + identity)

    Our batch norms and group norms without hooks compute it by one operator on CUDA, which keeps no second activation for
    the backward; everything else, and the CPU, by the norm, an addition and torch.relu. The same function either way.
    """
    if isinstance(input, Proxy):
        return as_one_function(norm_relu, norm, input, *(() if residual is None else (residual,)))
    if together(norm) and (residual is None or residual.shape == input.shape):
        return norm.forward_relu(input, residual)  # type: ignore[operator, no-any-return]
    return rectified(norm(input), residual)


def together(norm: nn.Module) -> bool:
    """Whether the norm has a form with ReLU and residual of its own, and nothing that listens to its output."""
    if not isinstance(norm, BatchNorm | GroupNorm) or (isinstance(norm, BatchNorm) and norm.tail):
        return False
    before, behind = norm._forward_pre_hooks, norm._forward_hooks
    return not (before or behind or norm._backward_hooks or norm._backward_pre_hooks)
