"""What a rewritten norm was, kept beside it so that `revert` can give the original's bits back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Origin(nn.Module):
    """The class, the plain attributes and the tensors of a norm that a rewrite could not keep as they were.

    >>> origin = Origin(bn, {"running_var": (bn.running_var, twin.running_scale)})

    Each pair is (original, converted), both (C,). `restore` gives the original back wherever the live tensor still has
    the converted bits. As buffers they travel through state_dict, deepcopy and files. It is never called.
    """

    def __init__(self, old: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.kind = type(old)
        self.attributes: dict[str, Any] = {
            name: value for name, value in vars(old).items() if not name.startswith("_") and name != "training"
        }
        self.difference: float | None = None  # of the site in eval, as measured when it was rewritten
        for name, (original, converted) in pairs.items():
            self.register_buffer(name, original.detach().clone())
            self.register_buffer(f"{name}_converted", converted.detach().clone())

    def restore(self, name: str, live: Tensor, nearest: Tensor) -> tuple[Tensor, bool]:
        """The original of `name` where `live` is unchanged since the rewrite, `nearest` elsewhere; and whether it was all."""
        original, converted = getattr(self, name), getattr(self, f"{name}_converted")
        same = live == converted
        return torch.where(same, original, nearest.to(original.dtype)), bool(same.all())

    def rebuild(self) -> nn.Module:
        """An empty module of the original class with its plain attributes; parameters and buffers are still to be set."""
        module: nn.Module = self.kind.__new__(self.kind)
        nn.Module.__init__(module)
        vars(module).update(self.attributes)
        return module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Origin":
        names = [name for name in self._buffers if name.endswith("_converted")]
        return keep_wide(self, names, lambda: super(Origin, self)._apply(fn, recurse))


def keep_wide(module: Any, names: list[str], apply: Callable[[], Any]) -> Any:
    """Run a `.half()` or `.to(...)` on module, but leave the named fp32 or float64 buffers in their dtype, to the bit."""
    before = {name: getattr(module, name) for name in names}
    apply()
    for name, old in before.items():
        new = getattr(module, name)
        if new is not None and new.dtype != old.dtype and torch.finfo(new.dtype).bits < torch.finfo(old.dtype).bits:
            setattr(module, name, old.to(device=new.device, dtype=max(new.dtype, torch.float32, key=_bits)))
    return module


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits
