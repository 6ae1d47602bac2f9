"""Faults that a second reading found, one test each."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite import sites
from normrewrite.data import Batch, Data
from normrewrite.passes import FoldAffine, SwapMetric
from normrewrite.passes.folding import fold
from normrewrite.passes.reversion import reverted
from tests.conftest import randomise
from tests.passes.test_lift_functional import Block
from tests.sites.test_kinds import NormAct

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_trained_then_calibrated_reverts_to_the_nearest_and_says_so(small: Callable[[], nn.Module]) -> None:
    twin = nr.convert(small()).train()
    for _ in range(10):
        twin(5 * torch.randn(8, 3, 4, 4))
    twin, _ = nr.calibrate(twin.eval(), torch.randn(16, 3, 4, 4))
    x = torch.randn(4, 3, 4, 4)
    expected = twin(x)
    back, names, trained = reverted(copy.deepcopy(twin))
    torch.testing.assert_close(back(x), expected, rtol=1e-4, atol=1e-4)
    assert names == trained == ["1", "4"]


def test_calibration_leaves_tied_weights_alone() -> None:
    model = randomise(nn.Sequential(nn.BatchNorm1d(8), nn.Tanh(), nn.BatchNorm1d(8), nn.BatchNorm1d(8))).eval()
    model[2].weight = model[0].weight
    twin, calibration = nr.calibrate(nr.convert(model), torch.randn(64, 8) ** 3)
    x = torch.randn(5, 8)
    torch.testing.assert_close(twin(x), model(x), **CLOSE)
    assert [bool(site.note) for site in calibration.sites] == [True, True, False]


class _ReadsANorm(nn.Module):
    """Calls a norm, and F.batch_norm on the same norm's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = randomise(nn.BatchNorm2d(3))
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.bn(x))
        return F.batch_norm(y, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias, self.training)


def test_planning_touches_nothing() -> None:
    model = nn.Sequential(_ReadsANorm()).train()
    model[0].inner.eval()
    before = copy.deepcopy(model.state_dict())
    str(nr.plan(model))
    assert list(model.state_dict()) == list(before) and not model[0].inner.training and model[0].training
    x = torch.randn(4, 3, 5, 5)
    twin = nr.convert(model)
    assert not twin.get_submodule("0.inner.0").training
    torch.testing.assert_close(twin.eval()(x), model.eval()(x), **CLOSE)
    assert list(model.state_dict()) == list(before)


class _NormTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), randomise(NormAct(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.norm(self.a(x))))


class _ReadsAWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(4, 4, 1), randomise(nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.norm(self.a(x)), self.a.weight)


@pytest.mark.parametrize("make", [_NormTwice, _ReadsAWeight])
def test_folding_keeps_what_others_need(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), torch.randn(2, 4, 5, 5)
    for network in (model, nr.convert(model)):
        torch.testing.assert_close(fold(network)[0](x), model(x), **CLOSE)


class _Private(nn.BatchNorm2d):
    def __init__(self, width: int, noise: float = 0.0) -> None:
        super().__init__(width)
        self._noise = noise

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * (1 + self._noise) if self.training else y


def test_private_attributes_count_and_come_back() -> None:
    model = randomise(nn.Sequential(_Private(4), _Private(4, 1.0))).eval()
    plan = nr.plan(model)
    assert [choice.rewrite is not None for choice in plan.choices] == [True, False]
    back = nr.revert(plan.apply()[0])
    assert back[0]._noise == 0.0 and torch.equal(back(torch.ones(1, 4, 2, 2)), model(torch.ones(1, 4, 2, 2)))  # type: ignore[index]


def test_a_call_that_always_measures_is_not_lifted_from_a_graph() -> None:
    class Always(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var, training=True, momentum=0.0)

    model, x = Always().eval(), 3 + torch.randn(4, 3, 5, 5)
    for rewrite in (SwapMetric("l1"), FoldAffine()):
        torch.testing.assert_close(rewrite(torch.fx.symbolic_trace(model)).graph_module(x), model(x), **CLOSE)


def test_modules_that_a_trace_takes_whole_are_copied_before_their_norms_change() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer.norm1 = randomise(nn.BatchNorm1d(5)).eval()  # type: ignore[assignment]
    model = nn.Sequential(layer)
    traced = SwapMetric("l1")(torch.fx.symbolic_trace(model)).graph_module
    assert type(layer.norm1) is nn.BatchNorm1d and type(traced.get_submodule("0.norm1")) is nr.nn.BatchNorm1d


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_an_affine_without_parameters_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.ReLU(), randomise(nn.BatchNorm2d(4, affine=False)), nn.ReLU()).to(dtype).eval()
    x = torch.randn(3, 4, 5, 5).to(dtype)
    y = fold(model)[0](x)
    assert y.dtype is dtype
    tolerance = 1e-12 if dtype is torch.float64 else 5e-3
    torch.testing.assert_close(y, model(x), rtol=tolerance, atol=tolerance)


class _Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = F.batch_norm(x, self.mean, self.var, training=self.training)
        return y if skip is None else y + skip


def test_optional_arguments_are_not_baked_in() -> None:
    model = nn.Sequential(_Optional(), nn.BatchNorm2d(3)).eval()
    plan = nr.plan(model)
    assert "optional arguments skip" in str(plan) and len(plan.rewritten) == 1
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(plan.apply()[0](x), model(x), **CLOSE)


def test_what_is_excluded_is_not_traced_either() -> None:
    model = nn.Sequential(Block(3), randomise(nn.BatchNorm2d(3))).eval()
    twin = nr.convert(model, exclude="0.*")
    assert type(twin[0]) is Block  # type: ignore[index]


def test_nothing_compared_is_no_agreement() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> object:
            return object()

    with pytest.raises(nr.NormRewriteError, match="no tensor"):
        nr.verify(Opaque(), Opaque(), torch.randn(2, 3))


def test_opsets_that_the_exporter_does_not_give_are_refused(small: Callable[[], nn.Module], tmp_path: Path) -> None:
    for opset in (-3, 7, 99):
        with pytest.raises(nr.NormRewriteError, match=f"--opset {opset}"):
            nr.export(small(), torch.randn(2, 3, 4, 4), tmp_path / "model.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_batch_norm_cannot_compute_in_is_refused() -> None:
    norm = nn.BatchNorm2d(4)
    norm.weight.data = norm.weight.data.to(torch.float8_e4m3fn)
    assert "float8" in str(nr.plan(nn.Sequential(norm)))
    mixed = nn.BatchNorm2d(4)
    mixed.running_mean = mixed.running_mean.bfloat16()  # type: ignore[union-attr]
    assert "bfloat16 and float32" in str(nr.plan(nn.Sequential(mixed)))


def test_what_an_origin_keeps_is_no_norm_of_the_model() -> None:
    """It holds the tensors of one, running statistics too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), randomise(nn.BatchNorm2d(4))).eval()
    for to in ("bwn", "layer", "frozen"):
        twin = nr.convert(model, to)
        assert [site.name for site in sites.find(twin)] == (["1"] if to == "frozen" else [])


class _TwoInputs(nn.Module):
    """A linear layer with a norm to itself on the first argument, and another width on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), randomise(nn.BatchNorm1d(6)), nn.Linear(3, 6)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.norm(self.first(a)) + self.second(b)  # type: ignore[no-any-return]


def test_inputs_by_name_may_come_in_any_order() -> None:
    model = _TwoInputs().eval()
    batch = Batch({"b": torch.randn(5, 3), "a": torch.randn(5, 4)})
    assert [tuple(value.shape) for value in batch.positional(["a", "b"])] == [(5, 4), (5, 3)]
    twin = nr.convert(model, "wn", example_inputs=batch.positional(["a", "b"]))
    assert isinstance(twin.norm, nr.nn.StandIn)  # the rank of its layer's output is known
    torch.testing.assert_close(twin(**batch.inputs), model(**batch.inputs))
    assert nr.advise(model, Data(batch)).sites[0].folds_into == "first"


@pytest.mark.parametrize("to", ["l1", "renorm", "frozen", "layer", "none", "bwn", "wn"])
def test_networks_without_values_are_converted_or_refused(to: str) -> None:
    """On the meta device a network is planned before it is filled."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    try:
        twin = nr.convert(model, to)
    except nr.NormRewriteError as error:
        assert "meta" in str(error)
    else:
        assert all(tensor.is_meta for tensor in twin.parameters())
