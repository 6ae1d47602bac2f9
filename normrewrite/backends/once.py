"""What is differentiated once, and refuses by name what is asked beyond: torch's `once_differentiable` in plain words.

>>> class Norm(Function):
...     @staticmethod
...     @once("half arithmetic", "Leave it for gradient penalties.")
...     def backward(ctx, g): ...
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normrewrite.backends.plain import transformed
from normrewrite.errors import NormRewriteError

Backward = Callable[..., tuple[Tensor | None, ...]]


def once(what: str, remedy: str) -> Callable[[Backward], Backward]:
    """A backward whose gradients raise NormRewriteError where they are differentiated, by whatever was saved, too."""

    def refusing(backward: Backward) -> Backward:
        @wraps(backward)
        def apply(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                gradients = backward(ctx, *cotangents)
            read = [value for value in (*cotangents, *ctx.saved_tensors) if isinstance(value, Tensor)]
            if not torch.is_grad_enabled() or not any(value.requires_grad for value in read):
                return gradients
            message = f"{what} has first derivatives alone, and a second was asked for. {remedy}"
            return tuple(None if value is None else _refused(value, message) for value in gradients)

        return apply

    return refusing


def refuse_transforms(what: str, remedy: str) -> None:
    """Raises under torch.func and in forward mode."""
    if transformed():
        raise NormRewriteError(f"{what} is neither for torch.func nor for forward-mode differentiation. {remedy}")


def _refused(value: Tensor, message: str) -> Tensor:
    return _Refusal.apply(value.detach().requires_grad_(), message)  # type: ignore[no-any-return, no-untyped-call]


class _Refusal(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, message: str) -> Tensor:
        ctx.message = message
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        raise NormRewriteError(ctx.message)
