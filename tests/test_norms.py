"""The table of norms: gains against quadrature of the textbook integrals and Monte Carlo; spellings and their errors."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, special, stats

from normrewrite.errors import NormRewriteError
from normrewrite.norms import METRICS, Metric, metric, spellings

# Simpson over these nodes is good to 1e-8: an order statistic's tail falls within 1/sqrt(n) >= 1e-3, four nodes wide.
T = np.linspace(0.0, 12.0, 48_001)
QUADRATURE = 1e-6
SIZES = (2, 3, 4, 7, 16, 49, 100, 256, 1023, 10_000, 123_457, 1_000_000)

# Every property is checked on the same examples each run.
PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)


def check_gain(found: float, expected_spread: float, rel: float) -> None:
    """found * expected_spread = 1: the gain undoes what S reads on unit Gaussians."""
    assert abs(found * expected_spread - 1) <= rel, f"gain {found}, but S reads {expected_spread}"


def area(tail: NDArray[np.float64]) -> float:
    """E[X] of X >= 0 as the integral of P(X > t)."""
    return float(integrate.simpson(tail, x=T))


def linf_reads(n: int) -> float:
    return area(1 - special.erf(T / math.sqrt(2)) ** n)


def topk_reads(n: int, k: int) -> float:
    """(1/k) * sum over j <= k of E[j-th largest |z|]; the j-th exceeds t where at least j of n do, a binomial count."""
    p = special.erfc(T / math.sqrt(2))
    if k <= 16:
        return area(np.sum([stats.binom.sf(j - 1, n, p) for j in range(1, k + 1)], axis=0)) / k
    # The same sum is E[min(count, k)], in closed form where k is too large to sum over.
    return area(n * p * stats.binom.cdf(k - 2, n - 1, p) + k * stats.binom.sf(k - 1, n, p)) / k


def range_reads(n: int) -> float:
    """2 * E[max of n normals], from both halves of the line; the sample's mean cancels."""
    return 2 * (area(1 - special.ndtr(T) ** n) - area(special.ndtr(-T) ** n))


def l1_reads(n: int) -> float:
    """E|z|, of deviations whose own mean takes 1/n of their variance."""
    return area(special.erfc(T / math.sqrt(2))) * math.sqrt(1 - 1 / n)


def counts(n: int) -> list[int]:
    return sorted({k for k in (1, 2, 3, 10, 16, 17, n // 100, n // 2, n - 1) if 1 <= k < n})


@pytest.mark.parametrize("n", SIZES)
def test_gains_match_quadrature(n: int) -> None:
    check_gain(METRICS["l2"].gain(n), 1.0, rel=0)
    check_gain(METRICS["l1"].gain(n), l1_reads(n), rel=QUADRATURE)
    check_gain(METRICS["linf"].gain(n), linf_reads(n), rel=QUADRATURE)
    check_gain(METRICS["range"].gain(n), range_reads(n), rel=QUADRATURE)


@pytest.mark.parametrize("n", SIZES)
def test_topk_gains_match_quadrature(n: int) -> None:
    for k in counts(n):
        check_gain(metric(f"topk:{k}").gain(n), topk_reads(n, k), rel=QUADRATURE)


@pytest.mark.parametrize(
    ("spec", "n", "reads"),
    [
        ("l1", 100, l1_reads(100)),
        ("linf", 100, linf_reads(100)),
        ("range", 100, range_reads(100)),
        ("topk:3", 100, topk_reads(100, 3)),
        ("topk:50%", 1000, topk_reads(1000, 500)),
    ],
)
@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_one_percent_off_is_caught(spec: str, n: int, reads: float, factor: float) -> None:
    with pytest.raises(AssertionError, match="gain"):
        check_gain(metric(spec).gain(n) * factor, reads, rel=QUADRATURE)


def test_closed_forms_of_small_samples() -> None:
    """max(|a|, |b|) = (|a+b| + |a-b|)/2, and the range of two or three normals: by hand, so the oracle is checked too."""
    root_pi = math.sqrt(math.pi)
    for reads, found in ((linf_reads, "linf"), (range_reads, "range")):
        check_gain(1 / reads(2), 2 / root_pi, rel=QUADRATURE)
        check_gain(METRICS[found].gain(2), 2 / root_pi, rel=1e-9)
    check_gain(METRICS["range"].gain(3), 3 / root_pi, rel=1e-9)
    check_gain(METRICS["l1"].gain(2), 1 / root_pi, rel=1e-14)  # |a - b|/2


def monte_carlo(row: Metric, n: int, trials: int, own_mean: bool) -> tuple[float, float]:
    """Mean of C * S over unit Gaussian samples, and its standard error."""
    z = np.random.default_rng(n).standard_normal((trials, n))
    d = z - z.mean(1, keepdims=True) if own_mean else z
    if row.family == "span":
        read = d.max(1) - d.min(1)
    elif row.family == "top":
        read = -np.partition(-np.abs(d), row.k(n) - 1, axis=1)[:, : row.k(n)].mean(1)
    else:
        read = np.abs(d).mean(1)
    scaled = row.gain(n) * np.abs(read)
    return float(scaled.mean()), float(scaled.std() / math.sqrt(trials))


@pytest.mark.parametrize("n", [8, 64, 1000])
@pytest.mark.parametrize(
    ("spec", "own_mean"), [("linf", False), ("topk:3", False), ("topk:20%", False), ("l1", True), ("range", True)]
)
def test_scale_reads_one_on_gaussians(spec: str, own_mean: bool, n: int) -> None:
    mean, error = monte_carlo(metric(spec), n, trials=20_000 if n < 1000 else 4000, own_mean=own_mean)
    assert abs(mean - 1) <= 4 * error
    assert error < 0.003  # else four standard errors would hide anything


@pytest.mark.parametrize("n", [2, 64, 256, 100_000])
def test_paper_constants(n: int) -> None:
    one_sided = 0.5 * (1 + (math.pi * math.log(4)) ** 0.5) / (2 * math.log(n)) ** 0.5
    assert METRICS["linf"].gain(n, "paper") == pytest.approx(one_sided, rel=1e-12)
    assert METRICS["range"].gain(n, "paper") == pytest.approx((2 * math.log(n)) ** -0.5, rel=1e-12)
    assert METRICS["l1"].gain(n, "paper") == pytest.approx(1.2533141373155001, rel=1e-12)
    assert METRICS["l2"].gain(n, "paper") == 1.0
    if n >= 10:
        assert METRICS["topk"].gain(n, "paper") == METRICS["linf"].gain(n, "paper")


def test_the_papers_constants_to_six_digits() -> None:
    """Worked out by hand at n = 256: sqrt(2 ln 256) = 3.330219, 0.5 * (1 + sqrt(pi ln 4)) = 1.543450."""
    assert METRICS["linf"].gain(256, "paper") == pytest.approx(0.463468, rel=2e-6)
    assert METRICS["range"].gain(256, "paper") == pytest.approx(0.300281, rel=2e-6)


def test_a_gain_that_does_not_exist_is_refused() -> None:
    """`Exact` would otherwise be read as `paper`, and be 40 % off."""
    with pytest.raises(NormRewriteError, match="gain"):
        METRICS["linf"].gain(100, "Exact")  # type: ignore[arg-type]


@PROPERTY
@given(n=st.integers(2, 1_000_000))
def test_topk_joins_linf_to_l1(n: int) -> None:
    assert metric("topk:1").gain(n) == METRICS["linf"].gain(n)
    assert metric(f"topk:{n}").gain(n) == METRICS["l1"].gain(n)
    assert metric("topk:100%").gain(n) == METRICS["l1"].gain(n)


@PROPERTY
@given(n=st.integers(2, 500_000), k=st.integers(1, 500_000), step=st.integers(1, 10_000))
def test_gains_are_monotonic(n: int, k: int, step: int) -> None:
    """More samples reach farther out, so S grows and C falls; a larger k reaches less far out, so C rises."""
    k = min(k, n)
    for row in (METRICS["l1"], METRICS["linf"], METRICS["range"], metric(f"topk:{k}")):
        assert row.gain(n + step) < row.gain(n)
    assert metric(f"topk:{k}").gain(n + step) < metric(f"topk:{k + 1}").gain(n + step)
    # E max |z| lies between E max z and the range, E max z - E min z = 2 E max z; at n = 2 it is the range.
    both_sides, one_side = METRICS["linf"].gain(n), METRICS["range"].gain(n)
    assert one_side * (1 - 1e-9) <= both_sides < 2 * one_side


# --- spellings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "count", "percent", "text"),
    [
        ("l2", "l2", None, None, "l2"),
        ("l1", "l1", None, None, "l1"),
        ("linf", "linf", 1, None, "linf"),
        ("range", "range", None, None, "range"),
        ("topk", "topk", 10, None, "topk:10"),
        ("topk:10", "topk", 10, None, "topk:10"),
        ("topk:5", "topk", 5, None, "topk:5"),
        ("topk:1%", "topk", None, 1.0, "topk:1%"),
        ("topk:0.5%", "topk", None, 0.5, "topk:0.5%"),
        ("topk:100%", "topk", None, 100.0, "topk:100%"),
        (" TopK:5 ", "topk", 5, None, "topk:5"),
        ("LINF", "linf", 1, None, "linf"),
    ],
)
def test_spellings(spec: str, name: str, count: int | None, percent: float | None, text: str) -> None:
    row = metric(spec)
    assert (row.name, row.count, row.percent) == (name, count, percent)
    assert str(row) == text
    assert metric(str(row)) == row


@PROPERTY
@given(argument=st.integers(1, 10**9) | st.floats(1e-6, 100).map(lambda percent: f"{percent!r}%"))
def test_round_trip(argument: int | str) -> None:
    """Modules and files keep the text: a percentage must come back to the bit, or k changes with it."""
    row = metric(f"topk:{argument}")
    assert metric(str(row)) == row


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("l9", ["unknown metric 'l9'", "Did you mean 'l"]),
        ("lnf", ["unknown metric 'lnf'", "Did you mean 'linf'?"]),
        ("tpok:3", ["unknown metric 'tpok:3'", "Did you mean 'topk'?", *spellings()]),
        ("ranges", ["Did you mean 'range'?"]),
        ("", ["unknown metric ''", *spellings()]),
        ("topk:0", ["'0' is no count", "topk:10", "topk:1%"]),
        ("topk:-3", ["'-3' is no count"]),
        ("topk:x", ["'x' is no count"]),
        ("topk:", ["'' is no count"]),
        ("topk:2.5", ["'2.5' is no count"]),
        ("topk:-5%", ["'-5%' is no count", "up to 100"]),
        ("topk:0%", ["'0%' is no count"]),
        ("topk:101%", ["'101%' is no count", "up to 100"]),
        ("topk:nan%", ["'nan%' is no count"]),
        ("l1:3", ["l1 takes no argument", "Write 'l1'"]),
        ("linf:2", ["linf takes no argument"]),
    ],
)
def test_bad_spellings_say_what_to_write(spec: str, parts: list[str]) -> None:
    with pytest.raises(NormRewriteError) as caught:
        metric(spec)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("spec", "n", "k"),
    [
        ("l1", 50, 50),
        ("l2", 50, 50),
        ("range", 50, 50),
        ("linf", 50, 1),
        ("topk:3", 50, 3),
        ("topk:50", 50, 50),
        ("topk:1%", 50, 1),  # never none
        ("topk:1%", 149, 1),
        ("topk:1%", 151, 2),
        ("topk:20%", 7, 1),
        ("topk:20%", 8, 2),
        ("topk:100%", 7, 7),
        ("topk:99.9%", 7, 7),
    ],
)
def test_how_many_are_read(spec: str, n: int, k: int) -> None:
    assert metric(spec).k(n) == k


def test_too_few_elements() -> None:
    with pytest.raises(NormRewriteError, match=r"topk:10 needs at least 10 elements .* got 8\..*topk:1%"):
        METRICS["topk"].gain(8)
    for row in METRICS.values():
        with pytest.raises(NormRewriteError, match=f"{row} needs at least 2 elements .* got 1"):
            row.gain(1)
