"""The float64 reference: by hand on tiny groups, and against torch's batch norm where that is the same function."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from normrewrite.backends.reference import batch_norm, spread
from normrewrite.norms import METRICS, metric
from tests.backends.tolerances import check_close

# Sums of a few terms, each rounded at 1.1e-16; the comparison with torch adds hundreds.
BY_HAND = 1e-15
AGAINST_TORCH = 1e-13

# Two channels of four values: (1, 2, 3, 6) with mean 3 and d = (-2, -1, 0, 3); its mirror image, ten times as far out.
X = np.array([[1.0, -10.0], [2.0, -20.0], [3.0, -30.0], [6.0, -60.0]])
D = np.array([[-2.0, -1.0, 0.0, 3.0], [20.0, 10.0, 0.0, -30.0]])
SPREADS = {"l2": math.sqrt(14 / 4), "l1": 1.5, "linf": 3, "topk:2": 2.5, "topk:3": 2, "topk:50%": 2.5, "range": 5}


@pytest.mark.parametrize(("spec", "wanted"), SPREADS.items())
def test_spread_by_hand(spec: str, wanted: float) -> None:
    check_close("S", spread(D, metric(spec)), np.array([wanted, 10 * wanted]), BY_HAND)


@pytest.mark.parametrize("spec", SPREADS)
@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_batch_norm_by_hand(spec: str, eps: float) -> None:
    weight, bias = np.array([2.0, -1.0]), np.array([0.5, 7.0])
    y, mean, measured = batch_norm(X, metric(spec), weight, bias, eps)
    c = metric(spec).gain(4)
    check_close("mean", mean, np.array([3.0, -30.0]), BY_HAND)
    check_close("C * S", measured, c * SPREADS[spec] * np.array([1.0, 10.0]), BY_HAND)
    first = 2.0 * D[0] / (c * SPREADS[spec] + eps) + 0.5
    second = -1.0 * D[1] / (c * SPREADS[spec] * 10 + eps) + 7.0
    check_close("y", y, np.stack([first, second], 1), BY_HAND)


def test_gains_by_hand() -> None:
    """l1 at n = 4 is 1 / (sqrt(2/pi) * sqrt(3/4)); the paper's range at n = 4 is 1 / sqrt(2 ln 4)."""
    exact = batch_norm(X, metric("l1"))[2]
    paper = batch_norm(X, metric("range"), gain="paper")[2]
    check_close("l1", exact, np.array([1.5, 15.0]) * math.sqrt(math.pi / 2 * 4 / 3), BY_HAND)
    check_close("range", paper, np.array([5.0, 50.0]) / math.sqrt(2 * math.log(4)), BY_HAND)


@pytest.mark.parametrize("shape", [(7, 3), (5, 3, 11), (2, 3, 4, 5), (2, 3, 2, 3, 4)], ids=str)
def test_l2_is_torchs_batch_norm(shape: tuple[int, ...]) -> None:
    """Both with an eps too small to matter: torch adds it to the variance, the reference to the scale."""
    x = torch.randn(shape, dtype=torch.float64).exp()
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    wanted = F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-30)
    y, mean, measured = batch_norm(x.numpy(), METRICS["l2"], weight.numpy(), bias.numpy(), eps=1e-30)
    rows = x.transpose(0, 1).flatten(1)
    check_close("y", y, wanted, AGAINST_TORCH)
    check_close("mean", mean, rows.mean(1), AGAINST_TORCH)
    check_close("C * S", measured, rows.std(1, correction=0), AGAINST_TORCH)
    with pytest.raises(AssertionError, match="y: off by"):
        check_close("y", y * 1.01, wanted, AGAINST_TORCH)


@pytest.mark.parametrize("spec", SPREADS)
def test_half_precision_input_is_read_as_it_is(spec: str) -> None:
    x = np.random.default_rng(0).laplace(size=(16, 3, 5)).astype(np.float16)
    found, wanted = batch_norm(x, metric(spec)), batch_norm(x.astype(np.float64), metric(spec))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == np.float64
        assert np.array_equal(a, b)
