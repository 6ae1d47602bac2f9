"""What a rewritten norm was, kept beside it so that `revert` can give the original's bits back."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from normrewrite.nn import parts


class Origin(nn.Module):
    """The class, the plain attributes and the tensors of a norm that a rewrite could not keep as they were.

    >>> origin = Origin(bn, {"running_var": (bn.running_var, twin.running_scale)})

    Each pair is (original, converted), both (C,). `restore` gives the original back wherever the live tensor still has
    the converted bits. As buffers they travel through state_dict, deepcopy and files. It is never called.
    """

    def __init__(self, old: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.kind = type(old)
        self.attributes = parts.attributes(old)
        self.difference: float | None = None  # of the site in eval, as measured when it was rewritten
        for name, (original, converted) in pairs.items():
            self._buffers[name] = original.detach().clone()
            self._buffers[f"{name}_converted"] = converted.detach().clone()

    def restore(self, name: str, live: Tensor, nearest: Tensor) -> tuple[Tensor, bool]:
        """The original of `name` where `live` is unchanged since the rewrite, `nearest` elsewhere; and whether it was all."""
        original, converted = getattr(self, name), getattr(self, f"{name}_converted")
        same = live == converted
        return torch.where(same, original, nearest.to(original.dtype)), bool(same.all())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Origin":
        names = [name for name in self._buffers if name.endswith("_converted")]
        return parts.keep_wide(self, names, lambda: super(Origin, self)._apply(fn, recurse))  # type: ignore[no-any-return, no-untyped-call]
