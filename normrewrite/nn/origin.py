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

    trained: Tensor

    def __init__(self, old: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.kind = type(old)
        self.attributes = parts.attributes(old)
        self.difference: float | None = None  # of the site in eval, as measured when it was rewritten
        self.training = False  # it has no mode
        self._buffers["trained"] = torch.zeros((), dtype=torch.bool)  # before its last calibration
        for name, (original, converted) in pairs.items():
            self.converted(name, converted, original)

    def converted(self, name: str, converted: Tensor, original: Tensor) -> None:
        """A rewrite has set `name`'s stand-in to `converted`; `original` is what a revert is to give back."""
        self._buffers[name] = original.detach().clone()
        self._buffers[f"{name}_converted"] = converted.detach().clone()

    def restore(self, live: dict[str, Tensor], nearest: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The originals, by channel: where all of `live` is unchanged since the rewrite; `nearest` elsewhere.

        Also whether that was everywhere. Names that were never converted come back as they are in `nearest`.
        """
        kept = [name for name in live if name in self._buffers]
        if not kept:
            return nearest, False
        same = torch.stack([live[name] == getattr(self, f"{name}_converted") for name in kept]).all(0)
        originals = {
            name: torch.where(same, getattr(self, name), nearest[name].to(getattr(self, name))) for name in kept
        }
        return nearest | originals, bool(same.all()) and not bool(self.trained)

    def extra_repr(self) -> str:
        return f"was {self.kind.__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Origin":
        names = [name for name in self._buffers if name.endswith("_converted")]
        return parts.keep_wide(self, names, lambda: super(Origin, self)._apply(fn, recurse))  # type: ignore[no-any-return, no-untyped-call]
