"""Code that asks for the class of a value, or whether an argument was given, is traced as it runs, or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite.api.passage import Passage, passage, why_apart
from normrewrite.passes.folding import fold
from normrewrite.sites import graph

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class _Block(nn.Module):
    """ask: of its input, or of what was computed of it; where that is so, a ReLU stands between layer and norm."""

    def __init__(self, ask: Callable[[Any], bool] = bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.ask = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), ask
        self.norm.running_mean = torch.randn(8)
        self.norm.running_var = torch.rand(8) + 0.5
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y.relu() if self.ask(y) else y)  # type: ignore[no-any-return]


ASKS: dict[str, Callable[[Any], bool]] = {
    "tensor": lambda y: isinstance(y, Tensor),
    "is_tensor": torch.is_tensor,
    "no list": lambda y: not isinstance(y, list | tuple),
    "class": lambda y: y.__class__ is Tensor,
    "shape": lambda y: isinstance(y.shape, tuple) and isinstance(y.size(), torch.Size),
    "size": lambda y: isinstance(y.shape[0], int) and isinstance(y.size(1) // 2, int),
    "ratio": lambda y: isinstance(y.size(1) / 2, float) and isinstance(y.shape[1:], tuple),
    "no size": lambda y: not isinstance(y.shape[0], Tensor) and isinstance(y / 2, Tensor),
    "dtype": lambda y: isinstance(y.dtype, torch.dtype) and isinstance(y.device, torch.device),
    "parts": lambda y: isinstance(y.chunk(2), tuple) and isinstance(y.chunk(2)[0], Tensor),
    "no parameter": lambda y: not isinstance(y, nn.Parameter),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
@pytest.mark.parametrize("to", ["none", "wn", "bwn"])
def test_classes_are_told_as_they_are(ask: Callable[[Any], bool], to: str) -> None:
    model = _Block(ask)
    assert ask(X) or ask is ASKS["is_tensor"]
    traced = graph.trace(model)
    torch.testing.assert_close(traced(X), model(X))
    torch.testing.assert_close(nr.convert(model, to)(X), model(X), **CLOSE)  # type: ignore[arg-type]


def test_a_parameter_is_one() -> None:
    class Asks(_Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y.relu() if isinstance(self.conv.weight, nn.Parameter) else y)  # type: ignore[no-any-return]

    model = Asks()
    torch.testing.assert_close(nr.convert(model, "none")(X), model(X), **CLOSE)  # type: ignore[arg-type]


def test_functional_norms_are_lifted_as_they_run() -> None:
    class Functional(_Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = x.relu() if isinstance(x, Tensor) else x
            return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=self.training)

    model = Functional()
    torch.testing.assert_close(nr.convert(model, "l1")(X), model(X), **CLOSE)  # type: ignore[arg-type]


# --- arguments that need not be given ------------------------------------------------------------------------------------


class _Without(_Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.norm(y.relu() if mask is None else y)  # type: ignore[no-any-return]


class _With(_Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.norm(y if mask is None else y.relu())  # type: ignore[no-any-return]


class _ByName(_Block):
    def forward(self, x: Tensor, **options: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y.relu() if options.get("mask") is None else y)  # type: ignore[no-any-return]


class _Behind(_Block):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y.relu() if mask is None else y


class _Loss(_Block):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x)).mean((2, 3))
        return y if labels is None else (F.cross_entropy(y, labels), y)


OPTIONAL = [_Without, _With, _ByName, _Behind, _Loss]


@pytest.mark.parametrize("model", [kind() for kind in OPTIONAL], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("to", ["none", "wn", "bwn"])
@pytest.mark.parametrize("inputs", [None, (X,)], ids=["", "inputs"])
def test_a_twin_takes_what_the_original_takes(model: nn.Module, to: str, inputs: tuple[Tensor] | None) -> None:
    twin = nr.convert(model, to, example_inputs=inputs)
    torch.testing.assert_close(twin(X), model(X), **CLOSE)  # type: ignore[arg-type]
    given = {"labels": torch.arange(4)} if isinstance(model, _Loss) else {"mask": X}
    torch.testing.assert_close(twin(X, **given), model(X, **given), **CLOSE)  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", [None, (X,)], ids=["", "inputs"])
def test_what_all_ways_have_in_common_is_folded(inputs: tuple[Tensor] | None) -> None:
    for kind, folds in {_Behind: True, _Loss: True, _Without: False, _With: False}.items():
        assert ("folded into conv" in str(nr.plan(kind(), "none", example_inputs=inputs))) == folds
    assert nr.advise(_Loss(), X).sites[0].folds_into == "conv"


def test_weights_are_scale_invariant_where_they_are_whatever_is_given() -> None:
    for kind, names in {_Loss: ["conv.weight"], _Behind: ["conv.weight"], _With: []}.items():
        found = nr.scale_invariant(kind().requires_grad_(True))
        assert [weight.name for weight in found.weights] == names and not found.untraceable


def test_a_trace_that_would_fix_an_argument_is_refused_by_its_name() -> None:
    class Several(_With):
        def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
            return super().forward(x * scale, mask)

    with pytest.raises(graph.Untraceable, match="optional arguments mask, which"):
        graph.trace(Several())
    assert len(graph.traces(Several())) > 1
    assert len(graph.traces(_Block(lambda y: True))) == 1


def test_a_trace_for_what_is_given_takes_no_more() -> None:
    model = _With()
    folded, outcome, _ = fold(model, (X,))
    assert outcome.into_neighbour == ["norm"]
    torch.testing.assert_close(folded(X), model(X), **CLOSE)  # type: ignore[arg-type]
    with pytest.raises(nr.NormRewriteError, match="argument mask: the network was traced with None"):
        folded(X, X)
    torch.testing.assert_close(fold(model)[0](X, X), model(X, X), **CLOSE)  # type: ignore[arg-type]
    torch.testing.assert_close(fold(model, (X, X))[0](X, X), model(X, X), **CLOSE)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [_Without, _ByName, _Loss])
def test_networks_of_optional_arguments_are_exported(kind: type[_Block], tmp_path: Path) -> None:
    model = kind()
    nr.export(model, X, tmp_path / "m.onnx")
    assert nr.verify(model, tmp_path / "m.onnx", X).ok


# --- where a trace is deceived all the same ------------------------------------------------------------------------------


class _Deceiver(_Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y if isinstance(x, torch.fx.Proxy) else y.relu())  # type: ignore[no-any-return]


def test_export_compares_before_it_writes(tmp_path: Path) -> None:
    with pytest.raises(nr.NormRewriteError, match="folded, _Deceiver computes another function") as error:
        nr.export(_Deceiver(), X, tmp_path / "m.onnx")
    assert error.value.exit_code == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["none", "wn"])
def test_convert_compares_the_whole_network_on_inputs(to: str) -> None:
    model = _Deceiver()
    for convert in (nr.convert, nr.convert_):
        with pytest.raises(nr.NormRewriteError, match="the twin computes another function") as error:
            convert(model, to, example_inputs=(X,))
        assert error.value.exit_code == 1
    assert type(model.norm) is nn.BatchNorm2d


def test_a_norm_that_is_passed_by_is_told() -> None:
    model = _Block(lambda y: True)
    model.norm = nn.BatchNorm2d(8, eps=0.0).eval()  # without statistics of its own, nothing at all
    past = nn.Sequential(model.conv, nn.ReLU())
    before, after = passage(model, ["norm"], [X]), passage(past, ["norm"], [X])
    assert "calls no norm at norm" in str(why_apart(before, after, 1e-4)) and not after.called
    assert why_apart(after, before, 1e-4) is None and why_apart(before, before, 0.0) is None
    louder = Passage(before.called, {name: 1.01 * value for name, value in before.outputs.items()})
    assert "output differs by 1.0e-02" in str(why_apart(before, louder, 1e-4))
    assert "instead of (4, 8, 6, 6)" in str(why_apart(before, passage(model, ["norm"], [X[:2]]), 1e-4))


def test_the_models_own_bf16_asks_for_its_opset(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(X.shape[1], 8, 3).bfloat16(), nn.BatchNorm2d(8)
    ).eval()  # all in bf16 would become fp32
    with pytest.raises(nr.NormRewriteError, match=r"opset 22. Ask for that. The Sequential is in bf16"):
        nr.export(model, X.bfloat16(), tmp_path / "m.onnx")
    nr.export(model, X.bfloat16(), tmp_path / "m.onnx", opset=22)
