"""Batch norms by torch's compiler, through the same checks as torch's own operators."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import normrewrite as nr
from normrewrite.backends import compiled
from normrewrite.backends.call import Call
from normrewrite.backends.dispatch import kernels
from normrewrite.norms import metric
from tests.backends.test_torch_batch import (
    EPS,
    affine_of,
    backward_case,
    check_backward,
    check_forward,
    gradients,
    normalise,
    ours,
    samples,
)

SHAPES = [(5, 3, 7), (2, 4, 16, 12), (33, 2)]


def innermost(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiler's own reading of the functions, run by torch's operators: its code takes seconds a kind."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled._halves.cache_clear()
    yield
    compiled._halves.cache_clear()


def check(spec: str, dtype: torch.dtype, shape: tuple[int, ...], laid_out: Callable[[Tensor], Tensor]) -> None:
    row = metric(spec)
    with kernels("compiled"):
        weight, bias = affine_of(shape[1], dtype)
        x = laid_out(samples("laplace", shape, dtype))
        y = normalise(x, weight, bias, row, "exact", EPS)
        check_forward(y, x, weight, bias, row)
        assert y[0].stride() == x.stride()
        x, weight, bias, g = backward_case(shape, dtype)
        found = gradients(ours(row), g, laid_out(x), weight, bias)
        check_backward(found, x, weight, bias, g, row)
        with pytest.raises(AssertionError, match="off by"):
            check_backward((1.01 * found[0].double(), *found[1:]), x, weight, bias, g, row)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a call of a compiled function."""
    called, calls = compiled._called, list[int]()
    monkeypatch.setattr(compiled, "_called", lambda *args: calls.append(1) or called(*args))
    return calls


@pytest.mark.parametrize(("spec", "dtype"), [("l2", torch.float32), ("l1", torch.float16)], ids=str)
def test_forward_and_backward_are_right(spec: str, dtype: torch.dtype, calls: list[int], traced: None) -> None:
    for shape, laid_out in itertools.product(SHAPES, (torch.clone, innermost)):
        check(spec, dtype, shape, laid_out)
    assert len(calls) == 2 * 3 * len(SHAPES)


@pytest.mark.slow  # a kind takes a compiler ten seconds
@pytest.mark.parametrize(
    ("spec", "dtype", "shapes", "laid_out"),
    [
        ("l1", torch.float32, SHAPES[:2], torch.clone),
        ("l1", torch.bfloat16, SHAPES[:2], innermost),
        ("l2", torch.float64, SHAPES[2:], torch.clone),
    ],
    ids=["planes", "channels last", "one place"],
)
def test_its_code_is_right(
    spec: str, dtype: torch.dtype, shapes: Any, laid_out: Callable[[Tensor], Tensor], calls: list[int]
) -> None:
    """Each power, width, layout, and channels of one place, in C++."""
    for shape in shapes:
        check(spec, dtype, shape, laid_out)
    assert len(calls) == 3 * len(shapes)


def test_second_derivatives_are_torchs(traced: None) -> None:
    x, g = samples("laplace", (5, 3, 7), torch.float32).requires_grad_(), torch.randn(5, 3, 7)

    def second() -> Tensor:
        y = normalise(x.sin(), None, None, "l1", "exact", EPS)[0]
        (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    with kernels("compiled"):
        found = second()
    torch.testing.assert_close(found, second(), rtol=1e-3, atol=1e-3)


def test_a_dead_channel_stays_finite_in_half_and_nothing_else_is_needed(traced: None) -> None:
    x = torch.ones(4, 2, 8, dtype=torch.float16, requires_grad=True)
    with kernels("compiled"):
        y, _, _ = normalise(x, None, None, "l1", "exact", 1e-7)
        (dx,) = torch.autograd.grad(y, x, torch.randn(4, 2, 8).half())
    assert (y == 0).all() and dx.isfinite().all()


def test_what_it_does_not_serve_is_torchs() -> None:
    def x(*shape: int) -> Tensor:
        return torch.randn(*shape)

    def why_not(x: Tensor, metric: str = "l1", sample: bool = False) -> str:
        return compiled.why_not(Call(x, metric, sample=sample)) or ""

    assert not why_not(x(4, 3, 8)) and not why_not(x(4, 3, 8, 8).contiguous(memory_format=torch.channels_last))
    assert "dense metrics" in why_not(x(4, 3, 8), "linf") and "by channel" in why_not(x(4, 3, 1, 8), sample=True)
    assert "without gaps" in why_not(x(4, 3, 8)[:, :, ::2])
    assert "for a CPU" in why_not(x(4, 3).to("meta")) and "not empty" in why_not(x(0, 3, 8))
    inputs = x(4, 3, 8)
    with kernels("compiled"):
        found = normalise(inputs, None, None, "topk:4", "exact", EPS)
    torch.testing.assert_close(found, normalise(inputs, None, None, "topk:4", "exact", EPS), rtol=0, atol=0)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: object) -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(none, RuntimeError("no g++"), None)

    monkeypatch.setattr(compiled, "_halves", lambda *kind: (none, none))
    with (
        kernels("compiled"),
        pytest.raises(nr.NormRewriteError, match=r"torch.compile fails: .*needs a C\+\+ compiler"),
    ):
        normalise(torch.randn(4, 3), None, None, "l1", "exact", EPS)


@pytest.mark.slow
def test_a_constant_channel_gives_the_bias() -> None:
    x, bias = torch.randn(4, 3, 8, 7), torch.tensor([-1.0, 0.5, 2.0])
    x[:, 0], x[:, 2] = 10.3, 1000.1
    with kernels("compiled"):
        y, mean, spread = normalise(x, torch.ones(3), bias, "l1", "exact", EPS)
    assert float((y[:, [0, 2]] - bias[[0, 2], None, None]).abs().max()) <= 1e-6
    assert torch.equal(mean[[0, 2]], x[0, [0, 2], 0, 0]) and not spread[[0, 2]].any()
