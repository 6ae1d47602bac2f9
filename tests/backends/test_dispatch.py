"""Who computes a norm: the table, and the switch between torch's operators and the kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor

import normrewrite as nr
from normrewrite.backends import dispatch, torch_batch
from normrewrite.backends.accumulate import Accumulator
from normrewrite.backends.call import Call
from normrewrite.backends.dispatch import VARIABLE, asked, chosen, kernels, whole
from normrewrite.backends.triton import serving
from normrewrite.errors import NormRewriteError
from normrewrite.norms import Metric

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

X = torch.randn(4, 3)


def by(**more: object) -> str:
    return chosen(Call(X, "l1", **more)).name  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    serving._why_not_here.cache_clear()


def test_a_cpu_is_torchs_unless_the_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert by() == "torch"
    with kernels("triton"):
        assert by() == "triton"
        serving._why_not_here.cache_clear()
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(
            NormRewriteError, match="NORMREWRITE_KERNELS=triton: the kernels are for CUDA, got a tensor on cpu"
        ):
            by()
    serving._why_not_here.cache_clear()


def test_the_environment_is_read_at_every_call_and_a_block_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for choice, served in (("triton", True), ("torch", False), ("auto", False), ("triton", True)):
        monkeypatch.setenv(VARIABLE, choice)
        assert (by() == "triton") == served
    with kernels("torch"):
        assert by() == "torch"
        with kernels("triton"):
            assert by() == "triton"
        assert by() == "torch"
    assert by() == "triton"


def test_a_wrong_word_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(
            NormRewriteError, match=r"kernels\(\): unknown 'tritn'\. .*'triton'.* Known: auto, torch, triton, compiled"
        ),
        kernels("tritn"),
    ):
        pass
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(NormRewriteError, match="NORMREWRITE_KERNELS: unknown 'cuda'"):
        by()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with kernels("triton"), pytest.raises(NormRewriteError, match=r"pip install normrewrite\[triton\]"):
        by()
    serving._why_not_here.cache_clear()


def test_a_row_that_kernels_do_not_know() -> None:
    cubic = Metric("l3", "mean", "", "", exact=lambda n, k: 1.0, paper=lambda n, k: 1.0, power=3)
    assert serving.why_not(Call(X, cubic)) == "the kernels know powers 1 and 2, l3 has 3"
    assert serving.why_not(Call(X, "l1")) is None


def test_the_first_that_serves_computes() -> None:
    """What is differentiable whole comes before the operators, half arithmetic before ranks, and those before torch.func."""
    x = torch.randn(2, 3, 1, 4)
    assert whole(Call(x, "l1")) is None
    for fields, name in (
        ({"transformed": True}, "plain"),
        ({"group": object(), "transformed": True}, "ranks"),
        ({"group": object(), "accumulator": Accumulator()}, "half"),
    ):
        backend = whole(Call(x, "l1", **fields))  # type: ignore[arg-type]
        assert backend is not None and backend.name == name
        assert whole(Call(x, "l1", relu=True, **fields)) is None  # type: ignore[arg-type]
    with kernels("compiled"):
        assert [by(), by(sample=True), chosen(Call(X, "linf")).name] == ["compiled", "torch", "torch"]
    with nr.half_arithmetic("half:2"):
        assert asked(X.half(), "l1", "exact", 1e-5).accumulator == Accumulator(2)
        assert asked(X, "l1", "exact", 1e-5).accumulator is None


def test_a_new_one_is_a_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is chosen by its name, serves what it says, forward and backward, behind the same operators and modules."""
    calls: list[str] = []

    def seen(name: str) -> Any:
        function = getattr(torch_batch, name)
        return lambda *args: calls.append(name) or function(*args)

    def why_not(call: Call) -> str | None:
        return torch_batch.why_not(call) or (None if call.x.dtype is torch.float64 else "fp64 alone")

    mine = dispatch.Halves("mine", why_not, seen("forward"), seen("backward"), unasked=lambda call: False, strict=True)
    monkeypatch.setattr(dispatch, "HALVES", (mine, *dispatch.HALVES))
    monkeypatch.setattr(dispatch, "CHOICES", (*dispatch.CHOICES, "mine"))
    norm, x = nr.nn.BatchNorm1d(3), torch.randn(4, 3, 5, dtype=torch.float64)

    def step(x: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.sin().sum().backward()
        assert leaf.grad is not None
        return [y.detach(), leaf.grad]

    wanted = step(x)
    assert calls == []
    with kernels("mine"):
        assert all(map(torch.equal, step(x), wanted)) and calls == ["forward", "backward"]
        with pytest.raises(NormRewriteError, match=r"NORMREWRITE_KERNELS=mine: fp64 alone\. Choose auto"):
            norm(x.float())
