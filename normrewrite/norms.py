"""The table of norms: one row a metric. Nothing else in the project knows a metric's name.

>>> metric("topk:1%").gain(n=10_000)      # C(n): E[C * S] = 1 on unit Gaussians
0.3459...
>>> [str(row) for row in METRICS.values()]
['l2', 'l1', 'linf', 'topk:10', 'range']

A metric measures the spread S of the deviations d = x - mean of the n elements that share statistics;
a norm divides by scale = C(n) * S(d) + eps. Every backend (float64 reference, torch, ONNX, kernels) is a function of
a row's `family` and its numbers, never of its name:

    family   S(d)                                 w = dS/dd
    mean     (mean |d|^power)^(1/power)           dense
    top      mean of the k largest |d|            on k elements
    span     max d - min d                        on two elements
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from normrewrite.errors import NormRewriteError, nearest
from normrewrite.outside import count

Family = Literal["mean", "top", "span"]
Gain = Literal["exact", "paper"]
Array = npt.NDArray[np.float64]
GAINS: tuple[Gain, ...] = ("exact", "paper")
_HALF_NORMAL_MEAN = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class Metric:
    """One row: how spread is measured, what it reads on Gaussians, and where that comes from.

    `exact` and `paper` give C(n, k). `exact` makes E[C * S] = 1 on n unit Gaussians of known mean, times the finite-n
    factor of the sample's own mean where that is exact; `paper` is the constant of the publication named in `source`.
    """

    name: str
    family: Family
    summary: str
    source: str
    exact: Callable[[int, int], float]
    paper: Callable[[int, int], float]
    power: int = 1
    count: int | None = None
    percent: float | None = None
    countable: bool = False
    native: bool = False  # torch's own batch norm measures so

    def __str__(self) -> str:
        if not self.countable:
            return self.name
        return f"{self.name}:{_short(self.percent)}%" if self.percent is not None else f"{self.name}:{self.count}"

    @property
    def spelling(self) -> str:
        """How it may be written, for help texts: `l1`, `topk:K`."""
        return f"{self.name}:K" if self.countable else self.name

    def k(self, n: int) -> int:
        """How many of n elements the statistic reads; raises where n has fewer than the metric asks for."""
        if self.percent is not None:
            return max(1, round(self.percent * n / 100))
        k = self.count if self.count is not None else n
        if k > n:
            raise NormRewriteError(
                f"{self} needs at least {k} elements that share statistics, got {n}. Raise the batch size, "
                f"or use a percentage ({self.name}:1%) or another metric."
            )
        return k

    def gain(self, n: int, which: Gain = "exact") -> float:
        """C(n), so that C * S estimates the standard deviation of Gaussian data."""
        require_gain(which)
        if n < 2:
            raise NormRewriteError(f"{self} needs at least 2 elements that share statistics, got {n}.")
        return _cached_gain(self, n, self.k(n), which)


def require_gain(which: str) -> None:
    """Raises for what is no `exact` or `paper`."""
    if which not in GAINS:
        raise NormRewriteError(f"unknown gain {which!r}. Known: {', '.join(GAINS)}.")


def _short(percent: float) -> str:
    """As few digits as bring the number back."""
    return f"{percent:g}" if float(f"{percent:g}") == percent else repr(percent)


@lru_cache(maxsize=4096)
def _cached_gain(row: Metric, n: int, k: int, which: Gain) -> float:
    return row.exact(n, k) if which == "exact" else row.paper(n, k)


# --- gains -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _legendre() -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights on (0, 1); 256 resolve every integrand below to 1e-9 for n up to 1e9."""
    nodes, weights = np.polynomial.legendre.leggauss(256)
    return (nodes + 1) / 2, weights / 2


def _integral(integrand: Callable[[Array], Array], low: float, high: float) -> float:
    nodes, weights = _legendre()
    return float((high - low) * (weights * integrand(low + (high - low) * nodes)).sum())


def _tail(t: Array) -> Array:
    """P(|z| > t) of a unit Gaussian."""
    tail: Array = np.vectorize(math.erfc, otypes=[float])(t / math.sqrt(2))
    return tail


def _tail_inverse(probability: float) -> float:
    """t with P(|z| > t) = probability, by bisection: it only places an integration window."""
    low, high = 0.0, 39.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / math.sqrt(2)) > probability else (low, middle)
    return low


def _own_mean(n: int) -> float:
    """Deviations from the sample's own mean are Gaussian with variance 1 - 1/n, exactly."""
    return math.sqrt(1 - 1 / n)


def _exact_l1(n: int, k: int) -> float:
    """1 / (sqrt(2/pi) * sqrt(1 - 1/n)). Hoffer et al. 2018, arXiv:1803.01814, eq. 5, with the finite-n factor."""
    return 1 / (_HALF_NORMAL_MEAN * _own_mean(n))


def _exact_top(n: int, k: int) -> float:
    """1 / E[mean of the k largest of n half-normals], by one integral.

    Given that the (k+1)-th largest exceeds with tail probability u, the k above it are independent and their mean is
    2*phi(t)/u with u = P(|z| > t); u is Beta(k+1, n-k) distributed. With k = n this is l1.
    """
    if k == n:
        return _exact_l1(n, k)
    log_norm = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k)

    def integrand(t: Array) -> Array:
        u = np.maximum(_tail(t), 1e-300)
        density = 2 * np.exp(-t * t / 2) / math.sqrt(2 * math.pi)  # of |z| at t, = -du/dt
        inside = np.vectorize(math.erf, otypes=[float])(t / math.sqrt(2))  # 1 - u, without cancellation
        log_beta = log_norm + k * np.log(u) + (n - k - 1) * np.log(np.maximum(inside, 1e-300))
        value: Array = np.exp(log_beta) * density * density / u
        return value

    centre, spread = (k + 1) / (n + 1), math.sqrt((k + 1) * (n - k) / (n + 2)) / (n + 1)
    low = _tail_inverse(min(1.0, centre + 14 * spread))
    high = _tail_inverse(max(centre - 14 * spread, 1e-18 / n))
    return 1 / _integral(integrand, low, high)


def _exact_range(n: int, k: int) -> float:
    """1 / E[max - min of n normals] = 1 / (2 * integral over t > 0 of 1 - P(z < t)^n - P(z > t)^n); the mean cancels."""

    def integrand(t: Array) -> Array:
        above = _tail(t) / 2
        value: Array = -np.expm1(n * np.log1p(-above)) - above**n
        return value

    return 1 / (2 * _integral(integrand, 0.0, _tail_inverse(1e-18 / n)))


def _paper_one_sided(n: int, k: int) -> float:
    """0.5 * (1 + sqrt(pi ln 4)) / sqrt(2 ln n). Hoffer et al. 2018, eq. 6: the published constant of L-infinity and
    Top(k). It averages bounds on the one-sided maximum and ignores k, and so reads 36 to 47 % too large."""
    return 0.5 * (1 + math.sqrt(math.pi * math.log(4))) / math.sqrt(2 * math.log(n))


# --- the table -------------------------------------------------------------------------------------------------------

METRICS: dict[str, Metric] = {
    row.name: row
    for row in (
        Metric(
            "l2",
            "mean",
            "root mean square, as ordinary batch norm",
            "Ioffe & Szegedy 2015, arXiv:1502.03167",
            exact=lambda n, k: 1.0,
            paper=lambda n, k: 1.0,
            power=2,
            native=True,
        ),
        Metric(
            "l1",
            "mean",
            "mean absolute deviation",
            "Hoffer et al. 2018, arXiv:1803.01814, eq. 5",
            exact=_exact_l1,
            paper=lambda n, k: 1 / _HALF_NORMAL_MEAN,
        ),
        Metric(
            "linf",
            "top",
            "largest absolute deviation",
            "Hoffer et al. 2018, arXiv:1803.01814, eq. 6",
            exact=_exact_top,
            paper=_paper_one_sided,
            count=1,
        ),
        Metric(
            "topk",
            "top",
            "mean of the k largest absolute deviations",
            "Hoffer et al. 2018, arXiv:1803.01814, Top(k); k = 10 there",
            exact=_exact_top,
            paper=_paper_one_sided,
            count=10,
            countable=True,
        ),
        Metric(
            "range",
            "span",
            "largest minus smallest",
            "Banner et al. 2018, arXiv:1805.11046 (Range BN); paper gain 1/sqrt(2 ln n)",
            exact=_exact_range,
            paper=lambda n, k: 1 / math.sqrt(2 * math.log(n)),
        ),
    )
}


def spellings() -> list[str]:
    """How targets may be written, for help texts: `l2`, `l1`, `linf`, `topk:K`, `range`."""
    return [row.spelling for row in METRICS.values()]


@lru_cache(maxsize=256)
def metric(spec: str) -> Metric:
    """The row that `spec` names: `l1`, `linf`, `topk` (k = 10), `topk:5`, `topk:1%`, `range`, `l2`.

    >>> metric("topk:1%").k(1000)
    10

    Raises NormRewriteError with the nearest name where there is no such row, and for a count below one.
    """
    if not isinstance(spec, str):
        raise NormRewriteError(
            f"the metric is a {type(spec).__name__}; needed is a text. Known: {', '.join(spellings())}."
        )
    name, colon, argument = spec.strip().lower().partition(":")
    if name not in METRICS:
        raise NormRewriteError(
            f"unknown metric {spec!r}.{nearest(name, METRICS)} Known: {', '.join(spellings())} (K a count or a percentage)."
        )
    row = METRICS[name]
    if not colon:
        return row
    if not row.countable:
        raise NormRewriteError(f"{spec!r}: {name} takes no argument. Write {name!r}.")
    return _counted(row, argument, spec)


def _counted(row: Metric, argument: str, spec: str) -> Metric:
    try:
        if argument.endswith("%"):
            percent = float(argument[:-1])
            if 0 < percent <= 100:
                return replace(row, count=None, percent=percent)
        elif (number := count(argument)) is not None:
            return replace(row, count=number)
    except ValueError:
        pass
    raise NormRewriteError(
        f"{spec!r}: {argument!r} is no count. Give a whole number from 1 ({row.name}:10) "
        f"or a percentage above 0 up to 100 ({row.name}:1%)."
    )
