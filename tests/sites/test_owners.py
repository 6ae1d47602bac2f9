"""Norms whose owners use them in other ways than to call them: refused by name, in every target."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.nn.intrinsic import ConvBn2d
from torch.ao.nn.intrinsic import qat as intrinsic
from torch.ao.quantization import get_default_qat_qconfig

import normrewrite as nr
from normrewrite.sites import find
from normrewrite.sites.owners import why_owned
from tests.sites.test_kinds import NormAct, Splits


@pytest.mark.parametrize("to", ["l1", "none", "wn", "bwn", "group", "frozen"])
def test_a_layer_in_quantised_training_keeps_its_norm(to: str) -> None:
    qconfig: Any = get_default_qat_qconfig("x86")
    model = nn.Sequential(intrinsic.ConvBn2d(3, 8, 3, qconfig=qconfig), nn.ReLU()).eval()
    with pytest.raises(nr.NormRewriteError, match=r"0.bn: is a part of ConvBn2d, whose forward reads its tensors"):
        nr.convert(model, to)


def test_a_fused_pair_before_that_is_a_plain_sequence() -> None:
    model = nn.Sequential(ConvBn2d(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).eval()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(nr.convert(model)(x), model(x))


def test_norms_within_a_norm_stay_with_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Splits(8), NormAct(8), nn.BatchNorm2d(8))
    refused = {site.name for site in find(model) if why_owned(site)}
    assert refused == {"1.aux.0"}
    twin = nr.convert(model)
    assert type(twin[1]) is Splits and type(twin[1].aux[0]) is nn.BatchNorm2d and type(twin[3]) is nr.nn.BatchNorm2d
