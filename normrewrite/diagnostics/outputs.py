"""Which output of one network is which of another, and what of it can be compared.

>>> pairs, left = matched({"logits": torch.ones(2, 3)}, {"logits": torch.ones(2, 3)}, files=False)
>>> pairs[0][0], left
('logits', {})
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.masked import MaskedTensor

from normrewrite.errors import NormRewriteError

_UNNAMED = re.compile(r"output(_\d+)*")


def matched(
    a: Mapping[str, object], b: Mapping[str, object], files: bool
) -> tuple[list[tuple[str, Tensor, Tensor]], dict[str, str]]:
    """Outputs of two networks in pairs, and what can't be compared, with its kind, by name.

    By name where both have the same names; else in order, where one has none or is a file, which has its own. Raises
    NormRewriteError where one has outputs that the other has not.
    """
    tensors = [{name: comparable(value) for name, value in each.items()} for each in (a, b)]
    left = {name: type((a, b)[i][name]).__name__ for i in (0, 1) for name, value in tensors[i].items() if value is None}
    sides = [{name: value for name, value in each.items() if value is not None} for each in tensors]
    one, other = sides
    if set(one) == set(other):
        return [(name, values, other[name]) for name, values in one.items()], left
    shared = set(one) & set(other)
    in_place = all(list(one).index(name) == list(other).index(name) for name in shared)
    unnamed = any(all(map(_UNNAMED.fullmatch, side)) for side in sides)
    if len(one) != len(other) or not ((files and in_place) or (unnamed and not shared)):
        names = [", ".join(side) or "none" for side in sides]
        raise NormRewriteError(
            f"A has {len(one)} outputs and B {len(other)}, so they can't be compared: A gives {names[0]}; B gives {names[1]}."
            if len(one) != len(other)
            else f"the outputs have other names, so they can't be compared: A gives {names[0]}; B gives {names[1]}."
        )
    return [(name, *pair) for name, pair in zip(one, zip(one.values(), other.values(), strict=True), strict=True)], left


def comparable(value: object) -> Tensor | None:
    """An output as a dense tensor on the CPU, of numbers too; None where it is none."""
    if isinstance(value, bool | int | float | complex | np.generic | np.ndarray):
        array = np.asarray(value)
        return torch.from_numpy(array.copy()) if array.dtype.kind in "biufc" else None
    if not isinstance(value, Tensor) or isinstance(value, MaskedTensor) or value.is_meta:
        return None
    value = value.detach()
    if value.is_quantized:
        value = value.dequantize()
    return (value if value.layout == torch.strided else value.to_dense()).cpu()


def check_labels(labels: Tensor, outputs: Sequence[Tensor]) -> None:
    """Raises where labels are given that no output has classes for."""
    classes = [output for output in outputs if has_classes(output)]
    lengths = {len(output) for output in classes}
    if classes and len(labels) not in lengths:
        raise NormRewriteError(
            f"{len(labels)} labels for outputs of {sorted(lengths)} rows. One label a row is needed."
        )
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    most = max((output.shape[1] for output in classes), default=high + 1)
    if low < 0 or high >= most:
        raise NormRewriteError(
            f"labels from {low} to {high}, and the outputs have {most} classes (0 to {most - 1}). Renumber them."
        )


def has_classes(output: Tensor) -> bool:
    return output.dim() == 2 and output.shape[1] > 1
