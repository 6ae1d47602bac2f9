"""The one table of tolerances of the torch backend against float64, and the one comparison."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Largest difference from float64, in units of the largest wanted value of the same tensor."""

    y: float
    statistics: float  # mean and C * S
    dx: float
    sums: float  # dweight and dbias, in units of the sum of the absolute terms


# Wanted values come from float64 on the very x, weight and upstream gradient that the backend sees, so only the
# backend's own roundings count, never those of its inputs. All figures stay below 1e-2: a factor of 1.01 shows.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    # eps = 2.2e-16; d = x - mean loses a digit where the mean is ten times the spread, sums of thousands another one.
    torch.float64: Tolerance(y=1e-14, statistics=1e-14, dx=1e-14, sums=1e-14),
    # eps = 1.2e-7 and the same: some twenty roundings.
    torch.float32: Tolerance(y=2e-6, statistics=5e-7, dx=3e-6, sums=1e-6),
    # Statistics and sums are fp32: as above. y and dx are rounded once more at the end, by half of eps = 9.8e-4.
    torch.float16: Tolerance(y=5e-4, statistics=5e-7, dx=5e-4, sums=1e-6),
    # The same with eps = 7.8e-3.
    torch.bfloat16: Tolerance(y=4e-3, statistics=5e-7, dx=4e-3, sums=1e-6),
}


def wide(values: Any) -> Tensor:
    """A float64 tensor of a tensor or an array."""
    return torch.as_tensor(np.asarray(values)) if not isinstance(values, Tensor) else values.detach().double()


def check_close(what: str, found: Any, wanted: Any, tolerance: float, unit: float | None = None) -> None:
    """|found - wanted| <= tolerance * unit everywhere; unit is the largest |wanted| where it is not given. NaN fails."""
    found, wanted = wide(found), wide(wanted)
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    size = float(wanted.abs().max()) if unit is None else unit
    worst = float((found - wanted).abs().max())
    assert worst <= tolerance * size, f"{what}: off by {worst / size:.3g} of {size:.3g}, {tolerance:g} allowed"
