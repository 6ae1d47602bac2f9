"""What is differentiated once, and refuses by name what is asked beyond: torch's `once_differentiable` in plain words.

>>> class Norm(Function):
...     @staticmethod
...     @once("half arithmetic", "Leave it for gradient penalties.")
...     def backward(ctx, g): ...
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

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
            values = [value for value in (*cotangents, *ctx.saved_tensors) if isinstance(value, Tensor)]
            variables = [value for value in values if value.requires_grad]
            if not torch.is_grad_enabled() or not variables:
                return gradients
            message = f"{what} has first derivatives alone, and a second was asked for. {remedy}"
            return tuple(None if value is None else _refused(message, value, *variables) for value in gradients)

        return apply

    return refusing


def refuse_transforms(what: str, remedy: str) -> None:
    """Raises under torch.func and in forward mode."""
    if transformed():
        raise NormRewriteError(f"{what} is neither for torch.func nor for forward-mode differentiation. {remedy}")


def _refused(message: str, value: Tensor, *variables: Tensor) -> Tensor:
    return _Refusal.apply(message, value, *variables)  # type: ignore[no-any-return, no-untyped-call]


class _Refusal(Function):
    """The value itself, and a way back to what it follows from: autograd.grad goes no other ways than those to its inputs."""

    @staticmethod
    def forward(ctx: Any, message: str, value: Tensor, *variables: Tensor) -> Tensor:
        ctx.message = message
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> NoReturn:
        raise NormRewriteError(ctx.message)
