"""The switch between torch's operators and the kernels."""

import pytest
import torch
from normrewrite.backends.kernels import VARIABLE, kernels, serving

from normrewrite.backends import kernels as switch
from normrewrite.errors import NormRewriteError
from normrewrite.norms import Metric, metric

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

X = torch.randn(4, 3)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    switch._why_not_here.cache_clear()


def test_a_cpu_is_torchs_unless_the_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert serving(X, metric("l1")) is None
    with kernels("triton"):
        assert serving(X, metric("l1")) is not None
        switch._why_not_here.cache_clear()
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(
            NormRewriteError, match="NORMREWRITE_KERNELS=triton: the kernels are for CUDA, got a tensor on cpu"
        ):
            serving(X, metric("l1"))
    switch._why_not_here.cache_clear()


def test_the_environment_is_read_at_every_call_and_a_block_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for choice, served in (("triton", True), ("torch", False), ("auto", False), ("triton", True)):
        monkeypatch.setenv(VARIABLE, choice)
        assert (serving(X, metric("l1")) is not None) == served
    with kernels("torch"):
        assert serving(X, metric("l1")) is None
        with kernels("triton"):
            assert serving(X, metric("l1")) is not None
        assert serving(X, metric("l1")) is None
    assert serving(X, metric("l1")) is not None


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
        serving(X, metric("l1"))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch.importlib.util, "find_spec", lambda name: None)
    with kernels("triton"), pytest.raises(NormRewriteError, match=r"pip install normrewrite\[triton\]"):
        serving(X, metric("l1"))
    switch._why_not_here.cache_clear()


def test_a_row_that_kernels_do_not_know() -> None:
    cubic = Metric("l3", "mean", "", "", exact=lambda n, k: 1.0, paper=lambda n, k: 1.0, power=3)
    assert switch.why_not(X, cubic) == "the kernels know powers 1 and 2, l3 has 3"
    assert switch.why_not(X, metric("l1")) is None
