"""`norm_relu` is relu(norm(x) + residual), whatever norm it gets."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite.nn.batch import FrozenBatchNorm
from tests.conftest import randomise

NORMS = {
    "batch": lambda: nr.nn.BatchNorm2d(8, metric="l1"),
    "cumulative": lambda: nr.nn.BatchNorm2d(8, metric="topk:3", momentum=None),
    "untracked": lambda: nr.nn.BatchNorm2d(8, metric="linf", track_running_stats=False),
    "frozen": lambda: nr.convert(randomise(nn.BatchNorm2d(8)), "frozen"),
    "renorm": lambda: nr.nn.BatchRenorm(8),
    "group": lambda: nr.nn.GroupNorm(2, 8, metric="range"),
    "instance": lambda: nr.nn.InstanceNorm2d(8, affine=True, metric="l1"),
    "layer": lambda: nr.nn.LayerNorm((8, 5, 5), metric="l1"),
    "torch": lambda: randomise(nn.BatchNorm2d(8)),
    "hooked": lambda: _hooked(nr.nn.BatchNorm2d(8, metric="l1")),
}


def _hooked(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, args, output: output + 1)
    return norm


def _step(norm: nn.Module, fused: bool, x: Tensor, residual: Tensor | None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    if fused:
        y = nr.nn.norm_relu(norm, x, residual)
    else:
        y = norm(x) if residual is None else norm(x) + residual
        y = F.relu(y)
    y.square().sum().backward()
    assert x.grad is not None
    return [y, x.grad, *(p.grad for p in norm.parameters() if p.grad is not None), *norm.buffers()]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("added", [False, True], ids=["relu", "add+relu"])
def test_the_same_as_apart(name: str, training: bool, added: bool) -> None:
    norm = NORMS[name]().train(training)
    other, x = copy.deepcopy(norm), torch.randn(4, 8, 5, 5)
    residual = torch.randn(x.shape) if added else None
    found, wanted = _step(norm, True, x, residual), _step(other, False, x, residual)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_residual_that_broadcasts() -> None:
    norm, x, residual = nr.nn.BatchNorm2d(8), torch.randn(4, 8, 5, 5), torch.randn(4, 8, 1, 1)
    assert torch.equal(nr.nn.norm_relu(norm, x, residual), F.relu(norm(x) + residual))


def test_one_call_in_a_trace() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nr.nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return nr.nn.norm_relu(self.norm, x, x)

    block, x = Block().eval(), torch.randn(4, 8, 5, 5)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(program.module()(x[:3]), block(x[:3]))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_frozen_norms_stay_frozen(training: bool) -> None:
    norm = NORMS["frozen"]().train(training)
    assert isinstance(norm, FrozenBatchNorm)
    x = torch.randn(4, 8, 5, 5)
    assert torch.equal(nr.nn.norm_relu(norm, x[:1]), nr.nn.norm_relu(norm, x)[:1])
