"""What a comparison is: every kind of output against hand-made numbers, and limits that unrelated networks don't pass."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import normrewrite as nr
from normrewrite.diagnostics.comparison import OutputDifference
from normrewrite.diagnostics.outputs import comparable, matched
from normrewrite.diagnostics.sums import masked
from normrewrite.tolerances import LIMITS


def of(a: Tensor, b: Tensor, parts: int = 1) -> OutputDifference:
    found = OutputDifference("y")
    for one, other in zip(a.chunk(parts), b.chunk(parts), strict=True):
        found.add(one, other)
    return found


@pytest.mark.parametrize("parts", [1, 3, 12])  # batches of any size, of one too
def test_variation_is_numpys(parts: int) -> None:
    a, b = (1000 + torch.randn(12, 5, dtype=torch.float64) for _ in range(2))
    found, noise = of(a, b, parts), float(((a - b) ** 2).sum())
    by_row = float(((b - b.mean(0)) ** 2).sum())
    assert found.variation_db(LIMITS["fp64"]) == pytest.approx(10 * math.log10(by_row / noise), abs=1e-4)
    assert found.snr_db == pytest.approx(10 * math.log10(float((b**2).sum()) / noise))


def test_rows_of_several_lengths_vary_too() -> None:
    found = OutputDifference("y")
    for length in (3, 5, 3):
        b = torch.randn(2, length) + 7
        found.add(b + 0.01 * torch.randn_like(b), b)
    assert 20 < found.variation_db(LIMITS["fp16"]) < found.snr_db


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_a_constant_has_to_agree_in_size(precision: str) -> None:
    limit, b = LIMITS[precision], torch.full((4, 3), 0.5)
    for off, enough in ((0.5, True), (2, False)):
        assert (of(b * (1 + off * limit.constant), b).variation_db(limit) >= limit.min_snr) == enough
    assert of(b, b).variation_db(limit) == math.inf


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0])
def test_what_has_nothing_in_common_never_passes(precision: str, spread: float) -> None:
    """Whatever size the outputs share: a constant, or one number a class."""
    limit = LIMITS[precision]
    for size in (torch.ones(1), 1 + torch.rand(7)):
        a, b = (size + spread * torch.randn(64, 7) for _ in range(2))
        if spread < limit.least / 10:
            continue  # no precision can show it; the size is compared
        if float(b.std(0).mean() / b.square().mean().sqrt()) > limit.least or size.numel() == 1:
            assert of(a, b).variation_db(limit) < limit.min_snr


def leaf(value: object) -> Tensor:
    found = comparable(value)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.eye(3), 0.5, 0, torch.qint8),
        lambda: torch.eye(3, requires_grad=True),
        lambda: np.eye(3),
        lambda: np.float32(2),
        *(lambda value=value: value for value in (2, True, 2.5, 1j)),  # type: ignore[misc]
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quant", "ignore::DeprecationWarning")
def test_every_kind_is_compared(make: Any) -> None:
    found = leaf(make())
    assert of(found[None], found[None]).max_abs == 0 and found.layout is torch.strided
    assert of(found[None] + 1, found[None]).max_abs == 1
    assert all(comparable(other) is None for other in ("text", None, object(), torch.empty(2, device="meta")))


def test_parts_of_complex_numbers() -> None:
    x = torch.complex(torch.randn(4, 2), torch.randn(4, 2))
    assert of(x, x).max_abs == 0 and of(x, x.conj()).max_abs == pytest.approx(2 * float(x.imag.abs().max()))
    assert of(x.real, torch.complex(x.real, torch.zeros(4, 2))).max_abs == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_are_exact(dtype: torch.dtype) -> None:
    a = torch.ones(8, 3).to(dtype)
    b = a.clone()
    b[2, 1] = 0
    found = of(a, b)
    assert (found.whole, found.differing, found.numbers, found.rows) == (True, 1, 24, 0)
    large = torch.full((2,), 2**62)
    assert of(large, large + 1).differing == 2  # float64 would not see it


def test_infinity_and_nan() -> None:
    b = torch.tensor([1.0, math.inf, math.nan, 2.0])
    assert of(b, b).max_abs == 0 and of(b, b).nan == 1
    for other in (torch.tensor([1.0, math.inf, 0.0, 2.0]), torch.tensor([1.0, -math.inf, math.nan, 2.0])):
        assert of(other, b).max_abs == math.inf and of(other, b).variation_db(LIMITS["int8"]) == -math.inf


def names(a: dict[str, object], b: dict[str, object], files: bool = False) -> list[tuple[float, float]]:
    return [(float(one), float(other)) for _, one, other in matched(a, b, files)[0]]


def test_outputs_go_by_name_where_both_have_names() -> None:
    assert names({"a": 1, "b": 2}, {"b": 2, "a": 1}) == [(1, 1), (2, 2)]
    assert names({"a": 1, "b": 2}, {"b": 2, "a": 1}, True) == [(1, 1), (2, 2)]
    assert names({"a": 1, "b": 2}, {"add": 1, "mul": 2}, True) == [(1, 1), (2, 2)]  # a file has its own
    assert names({"logits": 1}, {"output": 1}) == [(1, 1)]
    assert matched({"a": 1, "c": None}, {"a": 1, "c": "x"}, False)[1] == {"c": "str"}


@pytest.mark.parametrize(
    ("a", "b", "files"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ({"a": 1, "b": 2}, {"a": 1}, True),
        ({"a": 1}, {"b": 1}, False),
        ({"a": 1, "b": 2}, {"c": 1, "a": 2}, True),
        ({"output_0": 1, "output_1": None, "output_2": 3}, {"output_0": 1, "output_1": 2, "output_2": None}, False),
        ({"a": 1}, {"a": None}, False),
    ],
)
def test_an_output_that_one_has_not_is_told(a: dict[str, object], b: dict[str, object], files: bool) -> None:
    with pytest.raises(nr.NormRewriteError, match=r"can't be compared: A gives .*; B gives"):
        matched(a, b, files)


def test_one_number_of_one_input() -> None:
    """It varies by nothing, and is right where it is within the tolerance."""
    limit, b = LIMITS["fp32"], torch.tensor([[3.0]])
    assert of(b * (1 + 5e-5), b).variation_db(limit) > limit.min_snr > of(b * (1 + 5e-4), b).variation_db(limit)


def test_constants_that_stand_for_masked_numbers() -> None:
    numbers = torch.tensor([[1.0, -1e9, torch.finfo().min], [-1e9, 2.0, torch.finfo().min]])
    assert masked(numbers, numbers).tolist() == [[False, True, True], [True, False, True]]
    assert not masked(numbers + torch.tensor([0.0, 1e6, -1e35]), numbers).any()  # they differ
    assert not masked(numbers[:1, :2], numbers[:1, :2]).any()  # one large number is a number
    assert not masked(torch.zeros(2, 2), torch.zeros(2, 2)).any() and not masked(torch.zeros(0), torch.zeros(0)).any()


@pytest.mark.parametrize("part", [(0, slice(None)), (slice(None), 0), (slice(None), slice(None), 0)])
def test_a_part_of_another_size_has_to_agree(part: tuple[object, ...]) -> None:
    """One row, one column along either axis, each a hundredth of the rest."""
    b = torch.randn(32, 6, 4, dtype=torch.float64)
    b[part] *= 1e-2
    a = b.clone()
    a[part] = a[part].flip(-1)
    limit = LIMITS["fp32"]
    assert of(a, b).part_faults(limit) and not of(b * (1 + 1e-6), b).part_faults(limit)
    assert of(a, b).part_faults(LIMITS["fp16"]) or part[0] == 0  # one row of many is not told in a half
