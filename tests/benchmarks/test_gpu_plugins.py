"""What of the plugins' benchmark needs no GPU: correctness by the interpreter, shares, and the word on RTX's runtime."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

from benchmarks import gpu_plugins
from normrewrite.backends.triton import launch
from normrewrite.plugins import compute as memory
from tests.backends.triton import interpreter
from tests.plugins.rtx import needs_rtx

interpreter.mend()
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
GROUP = {"group": gpu_plugins.SMALL["group"]}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plugins, "DEVICE", "cpu")
    monkeypatch.setattr(memory, "tensor_at", gpu_plugins._on_cpu)
    monkeypatch.setattr(memory, "on_stream", lambda _: nullcontext())


def test_what_is_run_first_on_a_gpu_is_right_here() -> None:
    found = gpu_plugins.correctness(GROUP)
    assert found["cases"] == {"enqueue": 15, "ahead of time": 15}
    assert set(found["largest difference"]["enqueue"]) == {"float32", "float16", "int8"}


@pytest.mark.parametrize("kernel", ["apply", "row_once"])
def test_it_can_fail(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = launch.run

    def spoilt(each: Any, programs: int, warps: int, told: dict[str, Any], *more: Any) -> None:
        if each.fn.__name__ == kernel:
            told = told | {"weight_ptr": 1.01 * told["weight_ptr"]}
        run(each, programs, warps, told, *more)

    monkeypatch.setattr(launch, "run", spoilt)
    way = "enqueue" if kernel == "apply" else "ahead of time"
    with pytest.raises(AssertionError, match=rf"{way}, .* float32: off by .*, 1e-05 allowed"):
        gpu_plugins.correctness(GROUP)


def test_shares_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer norm reads x and writes y once, but for its parameters."""
    monkeypatch.setattr(gpu_plugins, "milliseconds", lambda steps: {"plugin": 2.0})
    monkeypatch.setattr(gpu_plugins, "graphed", lambda step: step)
    found = gpu_plugins.timed("l1", (64, 1, 1024, 1), 1e9)
    size = 2 * 64 * 1024
    assert found["share of copy"] == found["floor ms"] / 2.0 and 2 <= found["floor ms"] * 1e6 / size < 2.1
    assert "| l1 | 64×1×1024×1 | 2.000 |" in gpu_plugins.table([found])


@needs_rtx
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_becomes_of_an_engine_is_written_down() -> None:
    """Built, and then: no GPU."""
    assert "an engine runs only on the GPU it was built for" in gpu_plugins._engine("sm89", "auto")
