"""Two forms of a network against the clock."""

import torch
from torch import nn

from normrewrite.api.bench import bench
from tests.conftest import randomise


def test_bench_sees_a_slower_form() -> None:
    small, large = (
        randomise(nn.Sequential(nn.Conv2d(3, 8, 3), *(nn.Conv2d(8, 8, 3, padding=1),) * n)) for n in (1, 30)
    )
    assert bench(small, large, torch.randn(8, 3, 32, 32), rounds=7).ratio > 2


def test_the_ratio_is_of_rounds() -> None:
    timed = bench(nn.Identity(), nn.Identity(), torch.randn(2, 3), rounds=3)
    timed.seconds[0][:], timed.seconds[1][:] = [1.0, 1.0, 9.0], [2.0, 2.0, 18.0]
    assert timed.ratio == 2 and timed.as_dict()["seconds"] == {"a": 1.0, "b": 2.0} and "2.000 times" in str(timed)
