"""FoldAffine: norms vanish into their neighbours, and the function stays."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite import sites
from normrewrite.passes import FoldAffine
from normrewrite.passes.fold_affine import into_next, into_previous
from normrewrite.passes.folding import fold
from tests.conftest import randomise

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64: folding is a reordering of products
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _fold(model: nn.Module, *inputs: Tensor) -> tuple[nn.Module, FoldAffine]:
    rewrite = FoldAffine(inputs or None)
    return rewrite(torch.fx.symbolic_trace(model)).graph_module, rewrite


def _norm(rank: int, width: int, ours: bool) -> nn.Module:
    norm = randomise(_NORMS[rank](width)).double().eval()
    return nr.convert(norm, "l1") if ours else norm


@pytest.mark.parametrize("ours", [True, False], ids=["l1", "native"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("layers", [_CONVS, _TRANSPOSED], ids=["conv", "transposed"])
def test_into_the_layer_before(
    layers: dict[int, Callable[..., nn.Module]], rank: int, groups: int, bias: bool, ours: bool
) -> None:
    conv = layers[rank](4, 8, 3, stride=2, padding=1, groups=groups, bias=bias)
    model = nn.Sequential(conv, _norm(rank, 8, ours), nn.ReLU()).double().eval()
    x = torch.randn(2, 4, *(5,) * rank, dtype=torch.float64)
    folded, rewrite = _fold(model)
    torch.testing.assert_close(folded(x), model(x), **EXACT)
    assert rewrite.outcome.into_neighbour == ["1"] and not sites.find(folded)
    assert model[0].bias is None or not bias or not torch.equal(model[0].bias, folded.get_submodule("0").bias)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("padding", "mode", "folds"),
    [(0, "zeros", True), (1, "zeros", False), ("same", "zeros", False), ("valid", "zeros", True), (1, "reflect", True)],
)
def test_into_the_layer_behind(groups: int, padding: int | str, mode: str, folds: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode, groups=groups)
    model = nn.Sequential(nn.ReLU(), _norm(2, 4, True), conv).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    folded, rewrite = _fold(model)
    torch.testing.assert_close(folded(x), model(x), **EXACT)
    assert rewrite.outcome.into_neighbour == (["1"] if folds else [])
    assert rewrite.outcome.to_affine == ([] if folds else ["1"])


@pytest.mark.parametrize("shape", [(5, 6), (5, 8, 6)], ids=["rank2", "rank3"])
def test_a_linear_layer_folds_only_where_its_rank_is_known_to_be_two(shape: tuple[int, ...]) -> None:
    """With three dimensions torch's BatchNorm1d normalises the second axis, and the linear layer works on the last."""
    model = nn.Sequential(nn.Linear(6, 8), _norm(1, 8, True), nn.Linear(8, 3)).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    for inputs in ((), (x,)):
        folded, rewrite = _fold(model, *inputs)
        torch.testing.assert_close(folded(x), model(x), **EXACT)
        assert bool(rewrite.outcome.into_neighbour) == (len(inputs) == 1 and len(shape) == 2)


class _SharedConv(nn.Module):
    """The same convolution in front of two norms, and the same norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.first, self.second = randomise(nn.BatchNorm2d(3), 1), randomise(nn.BatchNorm2d(3), 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.conv(x)) + self.second(self.conv(x))
        return F.relu(self.first(self.other(y)))


class _UsedTwice(nn.Module):
    """What the convolution gives is needed beside the norm too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), randomise(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


@pytest.mark.parametrize("make", [_SharedConv, _UsedTwice])
@pytest.mark.parametrize("to", ["l1", None])
def test_shared_layers_are_never_changed_for_one_caller(make: Callable[[], nn.Module], to: str | None) -> None:
    model = make().double().eval()
    model = nr.convert(model, to) if to else model
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    folded, _ = _fold(model)
    torch.testing.assert_close(folded(x), model(x), **EXACT)
    assert not sites.find(folded)


def test_hooks_and_parametrisations_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), randomise(nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 1), randomise(nn.BatchNorm2d(3))
    )
    model = model.double().eval()
    nn.utils.parametrizations.weight_norm(model[0])
    model[3].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    expected = model(x)
    folded, rewrite = _fold(model)
    torch.testing.assert_close(folded(x), expected, **EXACT)
    assert rewrite.outcome.to_affine == ["3"]
    assert rewrite.outcome.into_neighbour == ["1"]  # into the convolution behind


def test_live_statistics_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    result = FoldAffine()(torch.fx.symbolic_trace(model))
    assert not result.modified and len(sites.find(result.graph_module)) == 1


def test_what_torch_fx_cannot_trace_keeps_an_affine() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), randomise(nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) if x.sum() > 0 else self.norm(x)

    model = Branching().eval()
    folded, outcome, notes = fold(model)
    assert outcome.to_affine == ["norm"] and "control flow" in notes[0]
    for x in (torch.ones(1, 3, 2, 2), -torch.ones(1, 3, 2, 2)):
        torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("into", [into_previous, into_next])
def test_a_wrong_factor_is_caught(into: Callable[..., nn.Module]) -> None:
    conv = nn.Conv2d(4, 4, 1).double()
    a, b = torch.rand(2, 4, dtype=torch.float64) + 0.5
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)

    def affine(y: Tensor) -> Tensor:
        return a.view(1, -1, 1, 1) * y + b.view(1, -1, 1, 1)

    expected = affine(conv(x)) if into is into_previous else conv(affine(x))
    torch.testing.assert_close(into(conv, (a, b))(x), expected, **EXACT)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(into(conv, (1.01 * a, b))(x), expected, **EXACT)


class _Live(nn.Module):
    """A norm of each batch, without statistics that could be folded."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=self.training)


def test_a_graph_whose_calls_were_only_lifted_says_that_it_changed() -> None:
    graph_module = torch.fx.symbolic_trace(_Live().train())
    result = FoldAffine()(graph_module)
    assert result.modified and [node.op for node in graph_module.graph.nodes][1] == "call_module"
    assert not FoldAffine()(graph_module).modified


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.SyncBatchNorm(5)], ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("to", ["none", "wn", "bwn", "wn:mean-bn", "l1", "frozen"])
def test_one_sample_whose_length_is_its_width_is_exact_or_refused(to: str, norm: nn.Module) -> None:
    """A convolution takes (C, L), and a batch norm takes that for N samples of L channels: a fold would scale the others."""
    model = randomise(nn.Sequential(nn.Conv1d(3, 5, 3), copy.deepcopy(norm))).eval()
    batch, alone = torch.randn(2, 3, 7), torch.randn(3, 7)
    twin = nr.convert(model, to)
    for form in (twin, torch.fx.symbolic_trace(twin), FoldAffine()(torch.fx.symbolic_trace(twin)).graph_module):
        torch.testing.assert_close(form(batch), model(batch), rtol=1e-4, atol=1e-4)
        try:
            torch.testing.assert_close(form(alone), model(alone), rtol=1e-4, atol=1e-4)
        except nr.NormRewriteError as error:
            assert "Give a batch" in str(error)


def test_an_example_without_a_batch_is_not_folded() -> None:
    model = randomise(nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5))).eval()
    alone = torch.randn(3, 7)
    rewrite = FoldAffine((alone,))
    torch.testing.assert_close(
        rewrite(torch.fx.symbolic_trace(model)).graph_module(alone), model(alone), rtol=1e-4, atol=1e-4
    )
    assert rewrite.outcome.to_affine == ["1"]
