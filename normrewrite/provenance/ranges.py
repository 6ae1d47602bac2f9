"""Ranges that an int8 training learned: how far each activation reaches, beside the network, and in the files it goes to.

>>> LearnedRanges({"conv1": 2.4, "layer1.0.conv1": 3.1, "layer1.0+left": 5.2, "layer1.0+right": 3.1})

A range is called after what reads the activation: a layer by its dotted name, the sides of a residual add by the module
that adds, `+left` and `+right`; what a module computes a second time has `#2` behind its name, and so on.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from normrewrite import sites
from normrewrite.errors import NormRewriteError, nearest

KEY = "int8"  # in the manifest
SIDES = ("+left", "+right")


@dataclass(frozen=True)
class LearnedRanges:
    """How far activations reach, as `finetune(..., precision="int8")` learned it.

    >>> export(model, example_inputs, "model.onnx", precision="int8", learned=LearnedRanges({"conv1": 2.4}))

    amax: how far |x| of each activation reaches, by name; its 8 bits reach from -amax to amax. kept: modules that were left in
    floating point on purpose. Raises NormRewriteError for a range that is no number from zero.
    """

    amax: dict[str, float]
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [name for name, value in self.amax.items() if not (math.isfinite(value) and value >= 0)]
        if wrong:
            raise NormRewriteError(
                f"learned ranges: {wrong[0]!r} is {self.amax[wrong[0]]}; a range is a number, at least zero. Train again, or "
                "calibrate instead."
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kept": list(self.kept)}

    @property
    def owners(self) -> set[str]:
        """The modules that read these activations."""
        return {owner(name) for name in self.amax}


def owner(name: str) -> str:
    """The module in a range's name: `layer1.0#2+left` -> `layer1.0`."""
    return name.partition("+")[0].partition("#")[0]


def called(module: str, time: int, side: str = "") -> str:
    """The name of a range. time: 1 for what the module computes first."""
    return f"{module}#{time}{side}" if time > 1 else f"{module}{side}"


def of_record(record: Mapping[str, Any] | None, where: str) -> LearnedRanges | None:
    """The ranges in a manifest, where there are some; raises NormRewriteError for what are none."""
    entry = None if record is None else record.get(KEY)
    if entry is None:
        return None
    amax, kept = (entry.get("amax"), entry.get("kept")) if isinstance(entry, dict) else (None, None)
    if not isinstance(amax, dict) or not isinstance(kept, list) or not _sound(amax, kept):
        raise NormRewriteError(f"{where}: the int8 ranges in its manifest are no numbers by name. The file is damaged.")
    return LearnedRanges(amax, tuple(kept))


def _sound(amax: dict[Any, Any], kept: list[Any]) -> bool:
    return all(isinstance(name, str) for name in [*amax, *kept]) and all(
        isinstance(value, int | float) for value in amax.values()
    )


def check(learned: LearnedRanges, model: nn.Module) -> None:
    """Raises where the ranges are another network's."""
    known = [name for name, _, _ in sites.registrations(model)]
    unknown = [name for name in sorted(learned.owners | set(learned.kept)) if name not in known]
    if unknown or not learned.amax:
        names = f"{unknown[0]!r}, which {type(model).__name__} has not" if unknown else "no layer"
        raise NormRewriteError(
            f"learned ranges: they know {names}.{nearest(unknown[0], known) if unknown else ''} Are they this network's? "
            "Train it with --precision int8, or calibrate instead."
        )
