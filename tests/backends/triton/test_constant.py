"""Constant groups through the kernels: a rounding of their mean would be divided by eps alone."""

from collections.abc import Iterator

import pytest
import torch

from normrewrite.backends.dispatch import kernels
from tests.backends.test_rounding import SCOPES, affine, by_batch, by_sample, off

pytestmark = [
    pytest.mark.usefixtures("small_tiles", "by_kernels"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]


@pytest.fixture
def by_kernels() -> Iterator[None]:
    with kernels("triton"):
        yield


@pytest.mark.parametrize("scope", ["batch", "batch, channels last", "group"])
@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "topk:3", "topk:20", "range"])
def test_constant_groups_give_the_bias(spec: str, scope: str) -> None:
    weight, bias = affine(torch.float32)
    for value in (10.3, 1000.1):
        x = torch.full((3, 6, 5, 7), value)
        y = SCOPES[scope][0](spec)(x, weight, bias)
        assert off(y, bias[:, None, None].expand(x.shape)) <= 1e-6, value


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "range"])
def test_constant_rows_in_registers_give_the_bias(spec: str) -> None:
    x, bias = torch.full((3, 61, 1, 1), 50.7), torch.linspace(-1, 1, 61)
    assert off(by_sample(spec, 1)(x, torch.ones(61), bias), bias[:, None, None].expand(x.shape)) <= 1e-6


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "range"])
def test_a_mean_far_from_zero(spec: str) -> None:
    """Means of parts and of groups are rounded once each: what is left is what fp32 leaves of the mean itself."""
    x = 1e5 + torch.randn(8, 3, 9, 7, generator=torch.Generator().manual_seed(1))
    y = by_batch(spec)(x, torch.ones(3), torch.zeros(3))
    with kernels("torch"):
        wanted = by_batch(spec)(x.double(), torch.ones(3).double(), torch.zeros(3).double())
    assert off(y, wanted) <= 1.5e-2  # 1e5 is followed by 1e5 + 0.0078
