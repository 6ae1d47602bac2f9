"""What a rewritten norm was, kept beside it so that `revert` can give the original's bits back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.nn import parts


class Origin(nn.Module):
    """The class, the plain attributes and the tensors of a module that a rewrite could not keep as they were.

    >>> origin = Origin(bn, {"running_var": (bn.running_var, twin.running_scale)})

    Each pair is (original, converted), of one shape; (None, converted) where the original has no such tensor. `restore` gives
    the original back wherever the live tensor still has the converted bits. `tensors` travel through state_dict, deepcopy,
    `.to` and files under a buffer's name, and are no buffers of the modules above: what trains a network has nothing to do
    with them, and Opacus takes no trainable module with any. It is never called.
    """

    tensors: dict[str, Tensor | None]
    trained: Tensor
    fixed: tuple[str, ...] = ()  # parameters that did not train
    offset_size: float | str | None = (
        None  # of what is in front of a norm within a sample, as it was asked for; 0.1.0 had none
    )
    error: float | None = None  # of the site in eval against float64, as `difference`; older files have none

    def __init__(self, old: nn.Module, pairs: Mapping[str, tuple[Tensor | None, Tensor]]) -> None:
        super().__init__()
        self.tensors = {}
        self.kind = type(old)
        self.attributes = parts.attributes(old)
        self.slots = tuple(old._parameters), tuple(old._buffers)
        self.fixed = tuple(name for name, value in old._parameters.items() if not parts.learns(value))
        self.target = ""  # what it became, as people write it
        self.gain = "exact"
        self.inexact = ""  # why eval can't be the same function, where it can't
        self.difference: float | None = None  # of the site in eval, as measured when it was rewritten
        self.training = old.training  # it has no mode, but some count the modules that are in eval
        self.tensors["trained"] = torch.zeros((), dtype=torch.bool, device="cpu")  # before its last calibration
        for name, (original, converted) in pairs.items():
            self.converted(name, converted, original)

    def converted(self, name: str, converted: Tensor, original: Tensor | None) -> None:
        """A rewrite has set `name`'s stand-in to `converted`; `original` is what a revert is to give back, None: nothing."""
        if original is not None:
            self.tensors[name] = original.detach().clone()
        self.tensors[f"{name}_converted"] = converted.detach().clone()

    def keep(self, old: nn.Module) -> "Origin":
        """Keep every further tensor of `old` too, where nothing live stands for it."""
        for name, value in (old._parameters | old._buffers).items():
            if isinstance(value, Tensor) and name not in self.tensors:
                self.tensors[name] = value.detach().clone()
        return self

    def restore(self, live: dict[str, Tensor], nearest: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The originals, by channel: where all of `live` is unchanged since the rewrite; `nearest` elsewhere.

        Also whether that was everywhere. Names that were never converted come back as they are in `nearest`.
        """
        names = [name for name in live if name in self.tensors]
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

    @property
    def forgotten(self) -> bool:
        """Whether no tensor is left of what it was: `forget`."""
        return "trained" not in self.tensors

    def unchanged(self, live: Mapping[str, Any]) -> bool:
        """Whether each live tensor that stands for a kept one still has the bits that a rewrite gave it."""
        converted = {name: value for name, value in live.items() if f"{name}_converted" in self.tensors}
        return not (self.forgotten or self.trained) and all(
            bool(self._same(name, value).all()) for name, value in converted.items()
        )

    def module(self) -> Any:
        """The original, put together from what was kept of it; its children are the caller's to add."""
        parameters = {name: self.tensors.get(name) for name in self.slots[0]}
        learned = {
            name: None if value is None else nn.Parameter(value, name not in self.fixed)
            for name, value in parameters.items()
        }
        buffers = {name: self.tensors.get(name) for name in self.slots[1]}
        return parts.assemble(self.kind, self.attributes, learned, buffers)

    def extra_repr(self) -> str:
        return f"was {self.kind.__name__}"

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """torch saves, loads, moves and casts a module's buffers."""
        self._buffers = self.tensors
        try:
            yield
        finally:
            self._buffers = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Origin":
        names = [name for name in self.tensors if name.endswith("_converted")]
        with self._as_buffers():
            return parts.keep_wide(self, names, lambda: super(Origin, self)._apply(fn, recurse))  # type: ignore[no-any-return, no-untyped-call]

    def _save_to_state_dict(self, *arguments: Any) -> None:
        with self._as_buffers():
            super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        with self._as_buffers():
            super()._load_from_state_dict(*arguments)

    def named_buffers(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
        """torch's distributed checkpoints, and FSDP, ask each module for its own; above it nobody sees them."""
        with self._as_buffers():
            return iter(list(super().named_buffers(*arguments, **options)))

    def __getattr__(self, name: str) -> Any:
        tensors = vars(self).get("tensors", {})  # none yet while it is made or unpickled
        return tensors[name] if name in tensors else super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """As buffers: pickled modules of every version are alike."""
        state = vars(self) | {"_buffers": self.tensors}
        del state["tensors"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.tensors, self._buffers = self._buffers, {}
