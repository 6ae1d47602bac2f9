"""SwapMetric: eval exact, whatever the norm; refused by name where it can't be."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.infra.pass_manager import PassManager

import normrewrite as nr
from normrewrite import sites
from normrewrite.passes import FoldAffine, SwapMetric
from normrewrite.tolerances import SAME_FUNCTION, worst
from tests.conftest import TARGETS, randomise


def cases() -> list[tuple[nn.Module, tuple[int, ...]]]:
    return [
        (nn.BatchNorm1d(5), (4, 5)),
        (nn.BatchNorm1d(5, eps=0.3), (4, 5, 7)),
        (nn.BatchNorm2d(6, affine=False), (3, 6, 4, 4)),
        (nn.BatchNorm2d(6, momentum=None), (3, 6, 4, 4)),
        (nn.BatchNorm3d(4, eps=1e-3, momentum=0.0), (2, 4, 3, 3, 3)),
    ]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("norm", "shape"), cases(), ids=lambda value: str(value)[:24])
def test_eval_is_the_same_function(norm: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, to: str) -> None:
    norm = randomise(norm).to(dtype).eval()
    x = (2 * torch.randn(shape, dtype=torch.float64) + 1).to(dtype)
    twin = nr.convert(norm, to)
    assert worst(twin(x), norm(x)) <= SAME_FUNCTION[dtype]
    assert twin(x).dtype == norm(x).dtype


def test_a_wrong_scale_is_caught() -> None:
    norm = randomise(nn.BatchNorm2d(4)).eval()
    twin = nr.convert(norm, "l1")
    twin.running_scale *= 1.01
    x = torch.randn(2, 4, 3, 3)
    assert worst(twin(x), norm(x)) > SAME_FUNCTION[torch.float32]


class _Renamed(nn.BatchNorm2d):
    """Adds nothing but an attribute."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.note = "mine"


class _WithActivation(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class _AnyRank(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


def test_subclasses() -> None:
    plain, any_rank = randomise(_Renamed(3)).eval(), randomise(_AnyRank(3)).eval()
    assert type(nr.convert(plain)) is nr.nn.BatchNorm2d
    back = nr.revert(nr.convert(plain))
    assert type(back) is _Renamed and back.note == "mine"
    x = torch.randn(2, 3, 2, 2, 2, 2)
    torch.testing.assert_close(nr.convert(any_rank)(x), any_rank(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(nr.NormRewriteError, match="_WithActivation overrides forward"):
        nr.convert(nn.Sequential(_WithActivation(3)))


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.LazyBatchNorm2d(), "lazy"),
        (nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(3), "weight", nn.Identity()), "parametrised"),
        (nr.nn.BatchNorm2d(3, metric="l1"), "l1 already"),
    ],
    ids=["lazy", "parametrised", "already"],
)
def test_refusals(norm: nn.Module, reason: str) -> None:
    plan = nr.plan(nn.Sequential(norm), "l1")
    assert reason in str(plan)
    with pytest.raises(nr.NormRewriteError, match=reason):
        plan.apply()


def test_between_our_own_metrics_the_way_back_stays_exact() -> None:
    norm = randomise(nn.BatchNorm2d(4)).eval()
    twin = nr.convert(nr.convert(norm, "l1"), "topk:3")
    assert twin.metric == "topk:3"
    for name, value in nr.revert(twin).state_dict().items():
        assert torch.equal(value, norm.state_dict()[name]), name


def test_ours_from_the_start_reverts_to_its_own_metric() -> None:
    norm = nr.nn.BatchNorm2d(4, metric="l1")
    back = nr.revert(nr.convert(norm, "range"))
    assert isinstance(back, nr.nn.BatchNorm2d) and back.metric == "l1"
    assert isinstance(nr.convert(norm, "l2"), nn.BatchNorm2d)


def test_as_a_torch_fx_pass(small: Callable[[], nn.Module]) -> None:
    model = small()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 4, 4)
    traced = torch.fx.symbolic_trace(model)
    result = SwapMetric(to="l1")(traced)
    assert result.modified and result.graph_module is traced
    assert not SwapMetric(to="l1")(traced).modified
    torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)
    assert [type(site.module) for site in sites.find(model)] == [nn.BatchNorm2d, nn.BatchNorm2d]
    both = PassManager([SwapMetric(to="linf"), FoldAffine()])(torch.fx.symbolic_trace(model)).graph_module
    assert not sites.find(both)
    torch.testing.assert_close(both(x), model(x), rtol=1e-5, atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_twins_trace_with_one_node_a_norm_and_a_live_training_flag(small: Callable[[], nn.Module]) -> None:
    traced = torch.fx.symbolic_trace(nr.convert(small(), "l1"))
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    norms = [node for node in calls if isinstance(traced.get_submodule(str(node.target)), nr.nn.BatchNorm2d)]
    assert len(norms) == 2 and not [node for node in traced.graph.nodes if node.op == "call_function"]
    x = 3 + torch.randn(2, 3, 4, 4)
    assert not torch.equal(traced.train()(x), traced.eval()(x))


def test_an_unknown_gain_is_told_before_training_meets_it() -> None:
    with pytest.raises(nr.NormRewriteError, match=r"unknown gain 'Exact'\. Known: exact, paper"):
        SwapMetric("l1", "Exact")  # type: ignore[arg-type]


def test_modules_that_a_trace_takes_whole_are_copied_before_their_norms_change() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    layer.norm1 = randomise(nn.BatchNorm1d(5)).eval()  # type: ignore[assignment]
    model = nn.Sequential(layer)
    traced = SwapMetric("l1")(torch.fx.symbolic_trace(model)).graph_module
    assert type(layer.norm1) is nn.BatchNorm1d and type(traced.get_submodule("0.norm1")) is nr.nn.BatchNorm1d
