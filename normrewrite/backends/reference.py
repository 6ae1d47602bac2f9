"""Float64 numpy: the plainest form of each family, sorted and summed. Slow, and the oracle of every other backend.

>>> y, mean, spread = batch_norm(x, metric("l1"))          # x: (N, C, *)
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from normrewrite.norms import Gain, Metric

Array = npt.NDArray[Any]


def spread(d: Array, row: Metric) -> Array:
    """S(d) of deviations d: (groups, n) -> (groups,), float64."""
    ordered = np.sort(np.abs(d), axis=1)
    measured: Array
    if row.family == "mean":
        measured = (ordered**row.power).mean(1) ** (1 / row.power)
    elif row.family == "top":
        measured = ordered[:, d.shape[1] - row.k(d.shape[1]) :].mean(1)
    else:
        measured = np.ptp(d, axis=1)
    return measured


def batch_norm(
    x: Array,
    row: Metric,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    gain: Gain = "exact",
) -> tuple[Array, Array, Array]:
    """y = weight * (x - mean) / (C * S + eps) + bias over (N, *) of x: (N, C, *). Returns y, mean (C,), C * S (C,)."""
    wide = np.asarray(x, dtype=np.float64)
    lines = np.moveaxis(wide, 1, 0).reshape(wide.shape[1], -1)
    mean = lines.mean(1)
    measured = row.gain(lines.shape[1], gain) * spread(lines - mean[:, None], row)
    shape = (1, -1) + (1,) * (wide.ndim - 2)
    y = (wide - mean.reshape(shape)) / (measured + eps).reshape(shape)
    y = y * (1.0 if weight is None else np.asarray(weight, np.float64).reshape(shape))
    return y + (0.0 if bias is None else np.asarray(bias, np.float64).reshape(shape)), mean, measured


def row_norm(
    x: Array,
    row: Metric,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    gain: Gain = "exact",
    centred: bool = True,
) -> tuple[Array, Array, Array]:
    """The same over (K, S) of x: (B, G, K, S), with weight and bias (G, K); mean and C * S are (B, G).

    Not centred, the mean is 0 and the deviations are x itself.
    """
    wide = np.asarray(x, dtype=np.float64)
    lines = wide.reshape(wide.shape[0] * wide.shape[1], -1)
    mean = lines.mean(1) if centred else np.zeros(len(lines))
    measured = row.gain(lines.shape[1], gain) * spread(lines - mean[:, None], row)
    y = ((lines - mean[:, None]) / (measured + eps)[:, None]).reshape(wide.shape)
    y = y * (1.0 if weight is None else np.asarray(weight, np.float64)[None, :, :, None])
    y = y + (0.0 if bias is None else np.asarray(bias, np.float64)[None, :, :, None])
    return y, mean.reshape(wide.shape[:2]), measured.reshape(wide.shape[:2])
