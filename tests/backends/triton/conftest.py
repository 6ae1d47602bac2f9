"""Kernels are proved through Triton's interpreter, in small tiles, so that small tensors have several parts."""

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

from normrewrite.backends.triton import launch
from normrewrite.backends.triton.geometry import Tuning
from tests.backends.triton import interpreter

# Of (2, 5, 3, 7): two parts of two tiles and of one, a block of lanes that is not full, two searches for extremes.
SMALL = Tuning(
    tile=128, across=8, along=8, programs=2, repeat=2, members=2, peaks=4, row_programs=2, largest_k=16, candidates=128
)

interpreter.mend()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNING", SMALL)
