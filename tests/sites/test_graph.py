"""Tracing: names that torch.fx would write into its source as code are refused before."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite.passes.lift_functional import lifted
from normrewrite.sites import graph

NAME = 'c", __import__("ran_from_a_name")) #'


@pytest.fixture(autouse=True)
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], bool]]:
    """Whether the code in NAME was run."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "ran_from_a_name.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield lambda: "ran_from_a_name" in sys.modules
    sys.modules.pop("ran_from_a_name", None)


def network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict([("conv", nn.Conv2d(3, 4, 3)), ("norm", nn.BatchNorm2d(4)), ("act", nn.ReLU())])
    ).eval()


def named(model: nn.Sequential) -> nn.Sequential:
    model._modules[NAME] = nn.ReLU()
    return model


class Functional(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.register_module("act", nn.ReLU())
        self._modules[name] = nn.ReLU()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._modules[self.name](F.batch_norm(x, self.mean, self.var, training=self.training))


Ran = Callable[[], bool]


def test_torch_would_run_it(ran: Ran) -> None:
    """What is guarded against: torch.fx alone makes code of the name."""
    with suppress(Exception):  # whatever the code leaves behind
        torch.fx.symbolic_trace(named(network()))(torch.randn(1, 3, 5, 5))
    assert ran()


def test_nothing_is_traced(ran: Ran) -> None:
    model = named(network())
    for trace in (graph.trace, graph.symbolic_trace):
        with pytest.raises(graph.Untraceable, match="could be read as code"):
            trace(model)
    assert not ran()


@pytest.mark.parametrize("to", ["l1", "bwn", "none", "group"])
def test_conversion_goes_on_without_a_trace(to: str, ran: Ran) -> None:
    model = named(network())
    twin = nr.convert(model, to=to)
    x = torch.randn(2, 3, 5, 5)
    if to != "group":
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
    assert not ran()


def test_functional_norms_are_not_lifted(ran: Ran) -> None:
    assert "could be read as code" in str(lifted(Functional(NAME).eval()))
    assert isinstance(lifted(Functional("last").eval()), nn.Module) and not ran()


def test_nothing_is_exported(tmp_path: Path, ran: Ran) -> None:
    with pytest.raises(nr.NormRewriteError, match="could be read as code"):
        nr.export(named(network()), torch.randn(1, 3, 5, 5), tmp_path / "m.onnx")
    assert not ran() and not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("table", ["_parameters", "_buffers", "__dict__"])
def test_names_of_tensors_count(table: str) -> None:
    model = network()
    getattr(model.conv, table)["a\n"] = torch.ones(1)
    with pytest.raises(graph.Untraceable, match="could be read as code"):
        graph.trace(model)


def test_a_trace_is_looked_at_too() -> None:
    traced = graph.trace(network())
    assert graph.trace(traced) is traced
    traced._modules["a'"] = nn.ReLU()
    with pytest.raises(graph.Untraceable):
        graph.trace(traced)
