"""The functions of `import normrewrite as nr`, given what Python programs have at hand, right and wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import normrewrite as nr
from tests.conftest import randomise


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    ).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("to", ["l1", "none"])
def test_a_graph_is_a_model_too(net: nn.Module, x: Tensor, to: str) -> None:
    exported: Any = torch.export.export(net, (x,)).module()
    for graph in (fx.symbolic_trace(net), exported):
        if graph is exported:  # whose forward is generated; batch norm is no module in it
            with pytest.raises(nr.NormRewriteError, match=r"nothing to rewrite|none of"):
                nr.convert(graph, to)
        else:
            assert nr.verify(net, nr.convert(graph, to), x).ok


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_to_compare_is_no_agreement(net: nn.Module, x: Tensor, bad: float) -> None:
    other = nr.convert(net)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not nr.verify(net, other, x).ok
    with pytest.raises(nr.NormRewriteError, match="8 of 8 inputs hold NaN or infinity"):
        nr.verify(net, other, torch.full_like(x, bad))
    with torch.no_grad():
        net[4].bias.fill_(float("nan"))  # type: ignore[index, union-attr]
    with pytest.raises(nr.NormRewriteError, match="NaN or infinity alone"):
        nr.verify(net, net, x)


def test_a_training_that_never_stepped_fails(net: nn.Module) -> None:
    with pytest.raises(nr.NormRewriteError, match="all 2 steps were skipped") as caught:
        nr.finetune(nr.convert(net), torch.full((128, 3, 8, 8), 1e30), epochs=1)
    assert caught.value.exit_code == 1


def test_batches_without_labels(net: nn.Module, x: Tensor) -> None:
    """A loader over a TensorDataset of one tensor gives lists of one."""
    twin = nr.convert(net)
    _, found = nr.calibrate(twin, DataLoader(TensorDataset(x), batch_size=4), batch_size=4)
    assert found.inputs == nr.calibrate(twin, x, batch_size=4)[1].inputs == 8


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net, x: nr.verify(net, net, x.numpy()), "inputs is a ndarray"),
        (lambda net, x: nr.verify(net, net, "images.npz"), "inputs is a str"),
        (lambda net, x: nr.verify(net, net, []), "held no batch"),
        (lambda net, x: nr.convert(net.state_dict()), "is a OrderedDict; needed is a torch.nn.Module"),
        (lambda net, x: nr.convert(None), "is a NoneType"),
        (lambda net, x: nr.convert(torch.jit.trace(net, x)), "is a TopLevelTracedModule"),
        (lambda net, x: nr.convert(net, to=None), "the target is a NoneType"),
        (lambda net, x: nr.convert(net, rules="1=linf"), "write a mapping"),
        (lambda net, x: nr.export(net, (1, 3, 8, 8), "net.onnx"), "example_inputs: needed are"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's
def test_wrong_arguments_are_told_in_words(net: nn.Module, x: Tensor, call: Any, words: str) -> None:
    with pytest.raises(nr.NormRewriteError, match=words):
        call(net, x)


def test_nothing_is_said_of_differences_that_were_not_measured(net: nn.Module) -> None:
    report = nr.plan(net, "group:4").apply()[1]
    assert "eval difference 0" not in str(report) and "1 can't be exact" in str(report)
    assert "largest eval difference" in str(nr.plan(net, "l1").apply()[1])
