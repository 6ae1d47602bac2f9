"""How tensors are cut: every element of every group once, whatever the shape, layout and tuning."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normrewrite.backends.triton import geometry
from normrewrite.backends.triton.geometry import Geometry, Tuning, power_of_two
from normrewrite.norms import metric
from tests.backends.triton.conftest import SMALL

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True, database=None)
sizes = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 6), st.integers(1, 9))


def places(x: Tensor, sample: bool) -> list[list[int]]:
    """Where the elements of each group stand in memory, in its order, as the kernels compute it."""
    shape = geometry.of(x, sample)
    found = []
    for group in range(shape.groups):
        elements = []
        for j, step in itertools.product(range(shape.members), range(shape.length)):
            lane = group * shape.lane_of_group + j * shape.lane_of_member
            if shape.columns:
                row = lane // shape.channels * shape.length + step
                elements.append(row * shape.channels + lane % shape.channels)
            else:
                elements.append(lane * shape.length + step)
        found.append(elements)
    return found


@PROPERTY
@given(shape=sizes, last=st.booleans())
def test_groups_of_a_batch_are_channels(shape: tuple[int, int, int, int], last: bool) -> None:
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    x = x.to(memory_format=torch.channels_last) if last else x
    memory = torch.as_strided(x, (x.numel(),), (1,))
    wanted = x.transpose(0, 1).flatten(1)
    assert torch.equal(memory[torch.tensor(places(x, False))], wanted)


@PROPERTY
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(2, 9)), last=st.booleans())
def test_groups_of_a_sample_are_its_groups(shape: tuple[int, int, int, int], last: bool) -> None:
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    if last:
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    memory = torch.as_strided(x, (x.numel(),), (1,))
    assert torch.equal(memory[torch.tensor(places(x, True))], x.flatten(2).flatten(0, 1))


@PROPERTY
@given(shape=sizes, last=st.booleans(), k=st.integers(0, 16), repeat=st.sampled_from([None, 1, 4]), small=st.booleans())
def test_parts_cover_lanes_once(
    shape: tuple[int, int, int, int], last: bool, k: int, repeat: int | None, small: bool
) -> None:
    x = torch.empty(shape).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    tuning, seen = SMALL if small else Tuning(), geometry.of_batch(x)
    pieces = tuning.cut(seen, 4, repeat, k)
    assert power_of_two(pieces.lanes) == pieces.lanes and power_of_two(pieces.steps) == pieces.steps
    assert pieces.part * pieces.parts >= seen.length > pieces.part * (pieces.parts - 1)
    assert pieces.blocks * pieces.lanes >= seen.lanes and seen.width % pieces.vector == 0
    if k:
        assert power_of_two(pieces.part) == pieces.part
        assert pieces.part * power_of_two(k) <= max(tuning.candidates, 8 * power_of_two(k))


def test_large_tensors_make_few_programs_and_full_tiles() -> None:
    x = torch.empty(256, 256, 56, 56, device="meta").to(memory_format=torch.channels_last)
    pieces = Tuning().cut(geometry.of_batch(x), 2)
    assert (pieces.lanes * pieces.steps, pieces.vector, pieces.warps) == (2048, 8, 8)
    assert 1024 <= pieces.programs <= 2048


@pytest.mark.parametrize(
    ("strides", "same"), [((63, 1, 21, 3), True), ((63, 21, 7, 1), True), ((126, 42, 14, 2), False)], ids=str
)
def test_only_other_layouts_are_copied(strides: tuple[int, ...], same: bool) -> None:
    x = torch.empty_strided((2, 3, 3, 7), strides)
    assert (geometry.laid_out(x, False) is x) == same


def test_bits_of_each_row_begin_a_byte() -> None:
    assert Geometry(8, 30, 4, False, False, 2, 1, 4).bits == (8, 4)
    assert Geometry(12, 30, 12, True, False, 1, 1, 1).bits == (30, 2)


def test_what_is_not_served() -> None:
    assert geometry.why_not((4, 1, 8192, 1), metric("l1"), True) is None
    assert "rows of up to 8192 elements, got 8193" in str(geometry.why_not((4, 1, 8193, 1), metric("l1"), True))
    assert "rows of up to 4096 elements, got 4097" in str(geometry.why_not((4, 1, 4097, 1), metric("range"), True))
    assert geometry.why_not((4, 2, 8193, 2), metric("topk:500"), True) is None  # parts, not rows in registers
