"""torch.compile without a graph break, torch.export with a dynamic batch; both compute what eager does."""

import copy

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.norms import METRICS

SPECS = [*(str(row) for row in METRICS.values()), "topk:10%"]
OF_FAMILIES = ("l1", "linf", "topk:10%", "range")
SAME = {"rtol": 1e-4, "atol": 1e-4}  # fp32; the compiled graph may add in another order


def _model(metric: str) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nr.nn.BatchNorm2d(8, metric=metric, momentum=None), nn.ReLU())


def _step(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


# Open sizes are the harder case; a k in percent is another number where they are fixed. A family is one function.
@pytest.mark.parametrize(("metric", "dynamic"), [*((spec, True) for spec in OF_FAMILIES), ("topk:10%", False)])
def test_compiled_training_and_eval(metric: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    model = _model(metric)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (4, 6, 9) if dynamic else (4,):
        x = torch.randn(count, 3, 8, 8)
        for got, expected in zip(_step(compiled, x), _step(eager, x), strict=True):
            torch.testing.assert_close(got, expected, **SAME)
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, **SAME)
    torch.testing.assert_close(compiled.eval()(x), eager.eval()(x), **SAME)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("metric", SPECS)
def test_exported_with_a_dynamic_batch(metric: str, training: bool) -> None:
    model = _model(metric).train(training)
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model, (torch.randn(4, 3, 8, 8),), dynamic_shapes=shapes)
    x = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(program.module()(x), copy.deepcopy(model)(x), **SAME)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["l1", "topk:10"])
def test_compiled_to_code(metric: str) -> None:
    """The same through inductor, which writes and compiles C++."""
    torch._dynamo.reset()
    model = _model(metric)
    eager, x = copy.deepcopy(model), torch.randn(4, 3, 8, 8)
    for got, expected in zip(_step(torch.compile(model, fullgraph=True), x), _step(eager, x), strict=True):
        torch.testing.assert_close(got, expected, **SAME)
