"""Empty batches, in training too: as torch's own norms take them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.nn.mean_only import MeanOnlyBatchNorm

OURS: dict[str, Callable[[float | None], Any]] = {
    **{
        metric: lambda momentum, metric=metric: nr.nn.BatchNorm2d(4, metric=metric, momentum=momentum)
        for metric in ("l1", "l2", "linf", "topk:10", "range")
    },
    "renorm": lambda momentum: nr.nn.BatchRenorm(4, momentum=momentum),
    "mean only": lambda momentum: MeanOnlyBatchNorm(4, momentum),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
@pytest.mark.parametrize("which", OURS)
def test_nothing_is_measured(which: str, shape: tuple[int, ...], momentum: float | None, dtype: torch.dtype) -> None:
    norm, torchs = OURS[which](momentum).to(dtype), nn.BatchNorm2d(4, momentum=momentum).to(dtype)
    before = {name: value.clone() for name, value in norm.named_buffers() if name != "num_batches_tracked"}
    for module in (norm, torchs):
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        y = module(x)
        assert y.shape == x.shape and y.dtype == dtype
        y.sum().backward()
        assert x.grad is not None and all(not p.grad.any() for p in module.parameters())
    assert all(torch.equal(dict(norm.named_buffers())[name], value) for name, value in before.items())
    assert norm.num_batches_tracked == torchs.num_batches_tracked == 1
    assert norm.eval()(torch.zeros(shape, dtype=dtype)).shape == shape


@pytest.mark.parametrize("which", OURS)
def test_one_value_a_channel_is_still_refused(which: str) -> None:
    with pytest.raises(nr.NormRewriteError, match="more than one value a channel"):
        OURS[which](0.1)(torch.zeros(1, 4, 1, 1))


def test_with_relu_and_a_residual() -> None:
    norm, empty = nr.nn.BatchNorm2d(4), torch.zeros(0, 4, 2, 2)
    assert nr.nn.norm_relu(norm, empty, empty).shape == empty.shape
