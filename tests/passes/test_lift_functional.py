"""LiftFunctional: calls of F.batch_norm become modules, and convert finds them."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite import sites
from normrewrite.passes import FoldAffine, LiftFunctional, SwapMetric
from tests.conftest import TARGETS, randomise
from tests.sites.test_kinds import NormAct


class Block(nn.Module):
    """A convolution and a norm that is only a function call, as in hand-written networks."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.gamma, self.beta = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.rand(width))
        self.register_buffer("mean", torch.rand(width))
        self.register_buffer("var", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), self.mean, self.var, self.gamma, self.beta, self.training, 0.2, 1e-3)
        return F.relu(y)


class Plain(nn.Module):
    """No call of F.batch_norm, but an attribute of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = randomise(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(x) if x.sum() > 0 else x


class Dropping(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x) + F.batch_norm(x, None, None, training=True).mean(), 0.5, self.training)


class Always(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gamma, self.beta, True, 0.2, 1e-3)


def _net() -> nn.Module:
    return nn.Sequential(Plain(), Block(), nn.Conv2d(6, 4, 1), randomise(nn.BatchNorm2d(4))).eval()


@pytest.mark.parametrize("to", TARGETS)
def test_convert_finds_them_and_keeps_the_rest(to: str) -> None:
    model, x = _net(), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(model)
    plan = nr.plan(model, to)
    assert plan.lifts == ["1"] and [choice.site.name for choice in plan.rewritten] == [
        "0.batch_norm",
        "3",
        "1.batch_norm",
    ]
    twin, report = plan.apply()
    assert len(report.rewritten) == 3 and report.ok and type(model[1]) is Block and type(twin[0]) is Plain  # type: ignore[index]
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in model.state_dict().items())
    assert "gamma" not in str(twin.state_dict().keys()) and len(list(twin.parameters())) == len(
        list(model.parameters())
    )
    twin.train()(x)
    assert not torch.equal(twin[1].batch_norm.running_mean, model[1].mean)  # type: ignore[index]
    torch.testing.assert_close(nr.revert(nr.convert(model, to))(x), model(x), rtol=0, atol=0)


def test_as_the_root_in_place_and_through_a_file(tmp_path: Path) -> None:
    model, x = Block().eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    twin = nr.convert_(model, "l1")
    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)
    nr.save(twin, tmp_path / "twin.pt")
    torch.testing.assert_close(
        nr.load(tmp_path / "twin.pt", arch=lambda: Block().eval())(x), expected, rtol=1e-5, atol=1e-5
    )


def test_where_a_tracer_enters_a_leaf_class() -> None:
    """torch.fx steps into norm classes outside torch.nn and finds their F.batch_norm."""
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), randomise(NormAct(6))).eval(), torch.randn(2, 3, 8, 8)
    traced = torch.fx.symbolic_trace(model)
    assert LiftFunctional()(copy.deepcopy(traced)).modified
    result = SwapMetric("l1")(traced)
    assert result.modified and [site.kind for site in sites.find(result.graph_module)] == ["BatchNorm"]
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "reason"),
    [(Dropping(), "training flag"), (Always(), "training=True whatever")],
    ids=["dropout", "always"],
)
def test_refused_by_name(block: nn.Module, reason: str) -> None:
    plan = nr.plan(nn.Sequential(block, nn.BatchNorm2d(6)), "l1")
    assert reason in str(plan) and len(plan.rewritten) == 1


def test_tracing_leaves_counters_and_flags_alone() -> None:
    model = nn.Sequential(randomise(NormAct(6)), Block(6)).train()
    model[1].eval()
    nr.plan(model, "l1")
    assert model[0].num_batches_tracked == 0 and model[0].training and not model[1].training


class WithUnused(Block):
    """A norm that forward never reaches, in a module that will be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.BatchNorm2d(6)


def test_a_norm_that_the_trace_does_not_reach_is_left_and_the_original_untouched() -> None:
    model = WithUnused().eval()
    twin, report = nr.plan(model, "l1").apply()
    assert [site.label for site in report.rewritten] == ["batch_norm"] and "does not use it" in str(report)
    assert type(model.unused) is nn.BatchNorm2d and not hasattr(twin, "unused")


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
        torch.testing.assert_close(
            rewrite(torch.fx.symbolic_trace(model)).graph_module(x), model(x), rtol=1e-5, atol=1e-5
        )
