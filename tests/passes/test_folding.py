"""folding: what others need of a layer or a norm is kept."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite.passes.folding import fold
from tests.conftest import randomise
from tests.sites.test_kinds import NormAct

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class _NormTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), randomise(NormAct(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.norm(self.a(x))))


class _ReadsAWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(4, 4, 1), randomise(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.norm(self.a(x)), self.a.weight)


@pytest.mark.parametrize("make", [_NormTwice, _ReadsAWeight])
def test_folding_keeps_what_others_need(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), torch.randn(2, 4, 5, 5)
    for network in (model, nr.convert(model)):
        torch.testing.assert_close(fold(network)[0](x), model(x), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_an_affine_without_parameters_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.ReLU(), randomise(nn.BatchNorm2d(4, affine=False)), nn.ReLU()).to(dtype).eval()
    x = torch.randn(3, 4, 5, 5).to(dtype)
    y = fold(model)[0](x)
    assert y.dtype is dtype
    tolerance = 1e-12 if dtype is torch.float64 else 5e-3
    torch.testing.assert_close(y, model(x), rtol=tolerance, atol=tolerance)
