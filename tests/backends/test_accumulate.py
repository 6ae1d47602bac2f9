"""Sums of half numbers, bit for bit against a scalar emulation in numpy's float16."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from normrewrite import NormRewriteError
from normrewrite.backends.accumulate import Accumulator, accumulator
from tests.diagnostics.test_moments import in_a_tree, running

Half = npt.NDArray[np.float16]
SPECS = ("fp32", "half:1", "half:3", "half:64")
SIZES = (1, 2, 3, 63, 64, 65, 130, 1000, 4099)


def added_up(values: Half, spec: str) -> np.float16:
    """One sum, number by number, as the docstring of normrewrite.backends.accumulate says it."""
    name, _, chunk = spec.partition(":")
    size = len(values) if name == "fp32" else int(chunk)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = [_in_fp32(values[start : start + size]) for start in range(0, len(values), size)]
        while len(sums) > 1:
            pairs = [sums[i] + sums[i + 1] for i in range(0, len(sums) - 1, 2)]
            sums = pairs + sums[2 * len(pairs) :]
    assert isinstance(sums[0], np.float16)
    return sums[0]


def _in_fp32(values: Half) -> np.float16:
    total = np.float32(0)
    for value in values:
        total = total + np.float32(value)
    return np.float16(total)


def on_a_grid(n: int, rows: int = 3) -> Half:
    """Half numbers whose sums fp32 holds exactly, in whatever order they are taken: multiples of 1/64 up to 16."""
    return (np.random.default_rng(n).integers(-1024, 1024, (rows, n)) / 64).astype(np.float16)


def same_bits(found: Tensor, wanted: list[np.float16]) -> bool:
    return found.dtype is torch.float16 and np.array_equal(found.numpy(), np.array(wanted), equal_nan=True)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", SIZES)
def test_sums_and_means_are_the_emulations(spec: str, n: int) -> None:
    for values in (on_a_grid(n), abs(on_a_grid(n)), 60 * abs(on_a_grid(n))):
        wanted = [added_up(row, spec) for row in values]
        found = accumulator(spec)
        assert same_bits(found.sum(torch.from_numpy(values)), wanted)
        if spec != "fp32":
            means = [np.float16(np.float32(total) / np.float32(n)) for total in wanted]
            assert same_bits(found.mean(torch.from_numpy(values)), means)
        else:
            means = [np.float16(row.astype(np.float64).mean()) for row in values]
            np.testing.assert_array_max_ulp(found.mean(torch.from_numpy(values)).numpy(), np.array(means), 1)


def test_the_comparison_tells_accumulators_apart() -> None:
    values = torch.from_numpy(abs(on_a_grid(4099, rows=20)))
    sums = [accumulator(spec).sum(values).tolist() for spec in ("fp32", "half:1", "half:64")]
    assert sums[0] != sums[1] != sums[2] != sums[0]
    assert not same_bits(1.01 * accumulator("half:1").sum(values), [added_up(row, "half:1") for row in values.numpy()])


def test_one_number_to_a_chunk_is_the_tree_of_the_forecast() -> None:
    values = torch.randn(4, 1234).half()
    np.testing.assert_array_equal(Accumulator(1).sum(values).double().numpy(), in_a_tree(values.numpy()))
    ones = torch.ones(1, 5000).half()
    assert Accumulator(1).sum(ones) == 5000 != running(ones.numpy())[0]


def test_what_is_beyond_half_is_infinite() -> None:
    many = torch.full((1, 5000), 16.0).half()  # 80,000
    assert accumulator("half").sum(many).isinf() and accumulator("fp32").sum(many).isinf()
    assert accumulator("half").mean(many).isinf() and accumulator("fp32").mean(many) == 16
    assert accumulator("half:64").sum(torch.full((1, 64), 1200.0).half()).isinf()
    alternating = torch.tensor([40_000.0, 40_000.0, -40_000.0, -40_000.0]).half()
    assert accumulator("half:4").sum(alternating) == 0 and accumulator("half:2").sum(alternating).isnan()


def test_more_elements_than_half_can_count() -> None:
    assert accumulator("half:64").mean(torch.full((1, 2**17), 0.25).half()) == 0.25


def test_any_leading_dimensions_and_none_at_all() -> None:
    values = torch.randn(2, 3, 200).half()
    found = Accumulator(16).sum(values)
    assert found.shape == (2, 3) and torch.equal(found[1], Accumulator(16).sum(values[1]))
    assert Accumulator(16).sum(values[:0]).shape == (0, 3) and Accumulator(16).sum(values[..., :0]).eq(0).all()


def test_spellings() -> None:
    assert [str(accumulator(spec)) for spec in ("fp32", "half", " HALF:7 ")] == ["fp32", "half:64", "half:7"]
    for wrong in ("", "fp16", "fp32:64", "half:", "half:0", "half:-1", "half:1.5", "half:²"):
        with pytest.raises(NormRewriteError, match="write fp32, half"):
            accumulator(wrong)
