"""Tiles of few sizes: they cover every tensor once, and norms so cut are the reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normrewrite.backends import torch_sample
from normrewrite.backends.call import Call
from normrewrite.backends.triton import geometry, launch
from normrewrite.backends.triton.fixed import Fixed, fitting, using
from normrewrite.backends.triton.geometry import Tuning
from normrewrite.norms import metric
from tests.backends.triton.test_geometry import PROPERTY

FIXED = Fixed()


@PROPERTY
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 4), st.integers(2, 9000)),
    last=st.booleans(),
    k=st.sampled_from([0, 1, 2, 16, 17, 128]),
    repeat=st.sampled_from([None, 4]),
)
def test_parts_cover_lanes_once(shape: tuple[int, int, int, int], last: bool, k: int, repeat: int | None) -> None:
    x = torch.empty(shape, device="meta")
    seen = geometry.of_samples(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if last else x)
    pieces = FIXED.cut(seen, 4, repeat, k)
    assert pieces.part * pieces.parts >= seen.length > pieces.part * (pieces.parts - 1)
    assert pieces.blocks * pieces.lanes >= seen.lanes and seen.width % pieces.vector == 0
    assert (pieces.lanes if seen.columns else pieces.steps) in (*FIXED.sides, *FIXED.runs, *FIXED.searched_parts)
    if k:
        assert pieces.part * FIXED.searched(k) <= FIXED.candidates and FIXED.searched(k) >= k


def test_there_are_few_kinds_of_tiles() -> None:
    shapes = [(2, groups, 1, length) for groups in (2, 31) for length in range(2, 600)]
    cuts = [FIXED.cut(geometry.of_samples(torch.empty(shape, device="meta")), 2) for shape in shapes]
    assert len({(pieces.lanes, pieces.steps, pieces.vector) for pieces in cuts}) == 6
    assert fitting((8, 32), 9) == 32 and fitting((8, 32), 99) == 32


@pytest.mark.parametrize("shape", [(2, 2, 3, 49), (1, 3, 1, 5000), (3, 1, 300, 1)], ids=str)
@pytest.mark.parametrize("spec", ["l1", "l2", "topk:3"])
def test_norms_are_those_of_torch(spec: str, shape: tuple[int, ...]) -> None:
    """Alone and by other tiles, which `using` brings back."""
    x, weight = torch.randn(shape, dtype=torch.float64).float() + 3, torch.rand(shape[1:3]) + 0.5
    told = metric(spec), "exact", 1e-5
    with using(FIXED):
        found = launch.forward(x, None, weight, None, *told, sample=True)[0]
    assert type(launch.TUNING) is Tuning
    wanted = torch_sample.forward(Call(x.double(), *told, sample=True), weight.double(), None)[0]
    assert (found - wanted).abs().max() <= 5e-6 * max(1.0, wanted.abs().max().item())
    assert not math.isclose((1.01 * found - wanted).abs().max().item(), 0, abs_tol=5e-6)  # it can fail
