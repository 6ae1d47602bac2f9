"""From a network's graph to the operator with ReLU: the pass, the modules' choice, and what compilers and exporters see."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normrewrite as nr
from normrewrite.backends.dispatch import kernels
from normrewrite.nn import norm_relu
from normrewrite.passes import FuseActivation
from tests.conftest import randomise

pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]
NORMS = {"batch": lambda: nn.BatchNorm2d(4), "group": lambda: nn.GroupNorm(2, 4)}
every_norm = pytest.mark.parametrize(("scope", "spec"), [("batch", "l1"), ("batch", "topk:3"), ("group", "l1")])


class Block(nn.Module):
    def __init__(self, scope: str) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), NORMS[scope]()
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), NORMS[scope]()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + x)


class Seen(TorchDispatchMode):
    """How often one operator is called."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += op is self.op
        return op(*args, **(kwargs or {}))


def networks(scope: str, spec: str) -> tuple[nn.Module, nn.Module]:
    """A network and its fused form, with the same numbers."""
    torch.manual_seed(0)
    apart = nr.convert(randomise(Block(scope)), to=spec, scope=scope).train()
    return apart, FuseActivation()(fx.symbolic_trace(copy.deepcopy(apart))).graph_module


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@every_norm
def test_training(scope: str, spec: str) -> None:
    apart, fused = networks(scope, spec)
    x = torch.randn(2, 4, 5, 3)
    wanted = step(apart, x)
    with kernels("triton"), Seen(torch.ops.normrewrite.norm_relu.default) as seen:
        found = step(fused, x)
    assert seen.calls == 2
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert found[0].allclose(step(fused, x)[0], atol=1e-5)  # by torch


@every_norm
def test_training_under_autocast_and_compiled(scope: str, spec: str) -> None:
    apart, fused = networks(scope, spec)
    x = torch.randn(2, 4, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = step(apart, x)
        with kernels("triton"), Seen(torch.ops.normrewrite.norm_relu.default) as seen:
            found = step(fused, x)
    assert seen.calls >= 1  # the second norm's residual is fp32
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1 * float(b.detach().abs().max()))
    with kernels("triton"):
        found = step(torch.compile(fused, fullgraph=True, backend="aot_eager"), x)
    for a, b in zip(found, step(apart, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_norm
@torch.no_grad()
def test_eval_also_compiled_and_exported(scope: str, spec: str) -> None:
    apart, fused = (model.eval() for model in networks(scope, spec))
    x = torch.randn(2, 4, 5, 3)
    with kernels("triton"):
        forms = (
            fused,
            torch.compile(fused, fullgraph=True, backend="aot_eager"),
            torch.export.export(fused, (x,)).module(),
        )
        found = [form(x) for form in forms]
    for y in found:
        torch.testing.assert_close(y, apart(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("scope", ["batch", "group"])
def test_a_wider_residual_widens_the_sum(scope: str, training: bool) -> None:
    norm = nr.nn.BatchNorm2d(4) if scope == "batch" else nr.nn.GroupNorm(2, 4)
    x, residual = torch.randn(2, 4, 5, 3).half(), torch.randn(2, 4, 5, 3)
    norm.train(training)
    wanted = torch.relu(copy.deepcopy(norm)(x) + residual)
    with kernels("triton"), torch.no_grad():
        found = norm_relu(norm, x, residual)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
