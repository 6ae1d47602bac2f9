"""Index arithmetic beyond 2**31 elements: the last programs alone, over memory that is reserved and hardly touched."""

from collections.abc import Iterator

import pytest
import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.errors import InterpreterError

from normrewrite.backends.triton import launch
from normrewrite.backends.triton.ahead import Launch, recorded
from normrewrite.norms import metric

SHAPES = {"channels_last": (2**20 + 64, 2048), "contiguous": (2**12 + 3, 8, 2**16)}  # (rows, C); (N, C, length)


@pytest.fixture(scope="module", params=SHAPES)
def far(request: pytest.FixtureRequest) -> Iterator[Tensor]:
    """4 GiB and more of fp16, of which the operating system has given no page yet."""
    yield torch.empty(SHAPES[request.param], dtype=torch.float16)


def last(recorded_launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the last program of a launch."""
    builder, first = triton_interpreter.interpreter_builder, recorded_launch.programs - 1
    with monkeypatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (x + first, y, z)))
        launch.run(recorded_launch.kernel, 1, recorded_launch.warps, recorded_launch.arguments)


def tail(x: Tensor, told: Launch) -> Tensor:
    """(lanes, steps): the corner of x that the last program of a launch reads."""
    arguments = told.arguments
    lane, step = arguments["LANES"], arguments["STEPS"] * arguments["iterations"]
    matrix = x.T if arguments["COLUMNS"] else x.view(-1, x.shape[-1])
    lanes = matrix.shape[0] - (matrix.shape[0] - 1) // lane * lane
    steps = matrix.shape[1] - (matrix.shape[1] - 1) // step * step
    return matrix[-lanes:, -steps:]


def test_statistics_and_output_of_the_last_elements(far: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert far.numel() > 2**31
    with recorded() as launches:
        y, *_ = launch.forward(far, None, None, None, metric("linf"), "exact", 1e-5)
    moments, _, apply = launches
    corner = tail(far, moments)
    corner.copy_(torch.randn(corner.shape, generator=torch.Generator().manual_seed(0)))
    last(moments, monkeypatch)
    mean, high, low = (plane[-1, -len(corner) :] for plane in moments.arguments["partial_ptr"])
    torch.testing.assert_close(mean, corner.float().mean(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(high, corner.float().amax(1)) and torch.equal(low, corner.float().amin(1))
    apply.arguments["mean_ptr"].fill_(0.5)
    apply.arguments["scale_ptr"].fill_(2.0)
    last(apply, monkeypatch)
    torch.testing.assert_close(tail(y, apply), (tail(far, apply) - 0.5) / 2)


def test_gradient_of_the_last_elements(far: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums, bits, dx, and one element that a sparse family corrects."""
    channels = far.shape[1]
    g, x = torch.empty_like(far), far
    mean, spread = torch.zeros(channels), torch.ones(channels)
    lane_length = far.numel() // channels
    indices = torch.full((channels, 1), lane_length - 1)
    with recorded() as launches:
        kept = (mean, spread, indices, torch.ones(channels, 1), None)
        dx, *_ = launch.backward(g, x, None, None, *kept, metric("linf"), "exact", 0.0, relu=True)
    collect, _, gradient, correct = launches
    corner, upstream = tail(x, collect), tail(g, collect)
    for seed, values in enumerate((corner, upstream)):
        values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))
    last(collect, monkeypatch)
    masked = torch.where(corner > 0, upstream, 0).float()
    sums = collect.arguments["partial_ptr"][:2, -1, -len(corner) :]
    torch.testing.assert_close(sums[0], masked.sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sums[1], (masked * corner).sum(1), rtol=1e-4, atol=1e-3)
    gradient.arguments["terms_ptr"].copy_(torch.tensor([2.0, 0.25, 1.0, torch.inf])[:, None].expand(-1, channels))
    last(gradient, monkeypatch)
    wanted = torch.where(tail(x, gradient) > 0, tail(g, gradient).float(), 0) / 2 - 0.25
    torch.testing.assert_close(tail(dx, gradient).float(), wanted, rtol=1e-3, atol=1e-3)
    last(correct, monkeypatch)
    torch.testing.assert_close(tail(dx, gradient)[-1, -1].float(), wanted[-1, -1] - 1.0, rtol=1e-3, atol=1e-3)


@triton.jit  # type: ignore[untyped-decorator]
def _product(y_ptr, by):  # type: ignore[no-untyped-def]
    tl.store(y_ptr + tl.arange(0, 2), (2**16 - 1 + tl.arange(0, 2)) * by)


def test_what_32_bits_do_not_hold_is_an_error() -> None:
    y = torch.zeros(2, dtype=torch.int64)
    launch.run(_product, 1, 1, {"y_ptr": y, "by": 2**15 - 1})
    assert y.tolist() == [(2**16 - 1) * (2**15 - 1), 2**16 * (2**15 - 1)]
    with pytest.raises(InterpreterError, match="int32 overflows"):
        launch.run(_product, 1, 1, {"y_ptr": y, "by": 2**15})
