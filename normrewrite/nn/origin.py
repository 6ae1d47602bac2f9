"""What a rewritten norm was, kept beside it so that `revert` can give the original's bits back."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.nn import parts


class Origin(nn.Module):
    """The class, the plain attributes and the tensors of a module that a rewrite could not keep as they were.

    >>> origin = Origin(bn, {"running_var": (bn.running_var, twin.running_scale)})

    Each pair is (original, converted), of one shape; (None, converted) where the original has no such tensor. `restore` gives
    the original back wherever the live tensor still has the converted bits. As buffers they travel through state_dict,
    deepcopy and files. It is never called.
    """

    trained: Tensor
    fixed: tuple[str, ...] = ()  # parameters that did not train
    offset: float | str | None = None  # in front of a norm within a sample, as it was asked for; 0.1.0 had none
    error: float | None = None  # of the site in eval against float64, as `difference`; older files have none

    def __init__(self, old: nn.Module, pairs: Mapping[str, tuple[Tensor | None, Tensor]]) -> None:
        super().__init__()
        self.kind = type(old)
        self.attributes = parts.attributes(old)
        self.slots = tuple(old._parameters), tuple(old._buffers)
        self.fixed = tuple(name for name, value in old._parameters.items() if not parts.learns(value))
        self.target = ""  # what it became, as people write it
        self.gain = "exact"
        self.inexact = ""  # why eval can't be the same function, where it can't
        self.difference: float | None = None  # of the site in eval, as measured when it was rewritten
        self.training = old.training  # it has no mode, but some count the modules that are in eval
        self._buffers["trained"] = torch.zeros((), dtype=torch.bool, device="cpu")  # before its last calibration
        for name, (original, converted) in pairs.items():
            self.converted(name, converted, original)

    def converted(self, name: str, converted: Tensor, original: Tensor | None) -> None:
        """A rewrite has set `name`'s stand-in to `converted`; `original` is what a revert is to give back, None: nothing."""
        if original is not None:
            self._buffers[name] = original.detach().clone()
        self._buffers[f"{name}_converted"] = converted.detach().clone()

    def keep(self, old: nn.Module) -> "Origin":
        """Keep every further tensor of `old` too, where nothing live stands for it."""
        for name, value in (old._parameters | old._buffers).items():
            if isinstance(value, Tensor) and name not in self._buffers:
                self._buffers[name] = value.detach().clone()
        return self

    def restore(self, live: dict[str, Tensor], nearest: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The originals, by channel: where all of `live` is unchanged since the rewrite; `nearest` elsewhere.

        Also whether that was everywhere. Names that were never converted come back as they are in `nearest`.
        """
        names = [name for name in live if name in self._buffers]
        if not names:
            return nearest, False
        same = torch.stack([self._same(name, live[name]) for name in names]).all(0)
        originals = {
            name: torch.where(same, getattr(self, name), nearest[name].to(getattr(self, name))) for name in names
        }
        return nearest | originals, bool(same.all()) and not bool(self.trained)

    def _same(self, name: str, live: Tensor) -> Tensor:
        converted: Tensor = getattr(self, f"{name}_converted")
        return live.detach() == converted.to(live.dtype)

    def unchanged(self, live: Mapping[str, Any]) -> bool:
        """Whether each live tensor that stands for a kept one still has the bits that a rewrite gave it."""
        converted = {name: value for name, value in live.items() if f"{name}_converted" in self._buffers}
        return not self.trained and all(bool(self._same(name, value).all()) for name, value in converted.items())

    def module(self) -> Any:
        """The original, put together from what was kept of it; its children are the caller's to add."""
        parameters = {name: self._buffers.get(name) for name in self.slots[0]}
        learned = {
            name: None if value is None else nn.Parameter(value, name not in self.fixed)
            for name, value in parameters.items()
        }
        buffers = {name: self._buffers.get(name) for name in self.slots[1]}
        return parts.assemble(self.kind, self.attributes, learned, buffers)

    def extra_repr(self) -> str:
        return f"was {self.kind.__name__}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Origin":
        names = [name for name in self._buffers if name.endswith("_converted")]
        return parts.keep_wide(self, names, lambda: super(Origin, self)._apply(fn, recurse))  # type: ignore[no-any-return, no-untyped-call]
