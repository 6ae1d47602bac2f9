"""Mean-only batch norm: train and eval, running mean, casts, tracing, export; the tails beside it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from normrewrite import sites
from normrewrite.backends.measuring import per_channel
from normrewrite.errors import NormRewriteError
from normrewrite.nn import BatchNorm, ChannelAffine, MeanOnlyBatchNorm, StandIn
from normrewrite.nn.origin import Origin
from tests.backends.tolerances import TOLERANCES, check_close

SHAPES = [(5, 3), (4, 3, 7), (2, 3, 4, 5), (2, 3, 2, 3, 4)]
FP32 = TOLERANCES[torch.float32]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def trained(momentum: float | None = 0.1, dtype: torch.dtype | None = None) -> MeanOnlyBatchNorm:
    norm = MeanOnlyBatchNorm(3, momentum, dtype=dtype)
    values = {"bias": [0.5, 0.0, -1.0], "running_mean": [0.1, -0.7, 3.3], "num_batches_tracked": 5}
    norm.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    return norm


def expected(norm: MeanOnlyBatchNorm, x: Tensor) -> Tensor:
    x = x.double()
    mean = x.mean([0, *range(2, x.dim())]) if norm.training else norm.running_mean.double()
    return x - per_channel(mean, x.dim()) + per_channel(norm.bias.detach().double(), x.dim())


@every_shape
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_value(shape: tuple[int, ...], training: bool, dtype: torch.dtype) -> None:
    norm, x = trained(dtype=dtype).train(training), (3 * torch.randn(shape) + 30).to(dtype)
    before = copy.deepcopy(norm)
    wanted, y = expected(norm, x), norm(x)
    assert y.dtype == dtype
    # x is near 30, so a rounding of the mean counts by that.
    check_close("y", y, wanted, TOLERANCES[dtype].y, unit=30.0)
    with pytest.raises(AssertionError, match="y: off by"):
        check_close("y", norm(x).double() * 1.01 + 0.3, wanted, TOLERANCES[dtype].y, unit=30.0)
    assert training or torch.equal(norm.running_mean, before.running_mean)


@every_shape
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients(shape: tuple[int, ...], training: bool) -> None:
    norm = trained(dtype=torch.float64).train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, bias: Tensor) -> Any:
        return torch.func.functional_call(copy.deepcopy(norm), {"bias": bias}, x)

    assert torch.autograd.gradcheck(run, (x, norm.bias))


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_the_running_mean_is_torchs(momentum: float | None) -> None:
    ours, theirs = MeanOnlyBatchNorm(3, momentum), nn.BatchNorm1d(3, momentum=momentum)
    for step in range(4):
        x = torch.randn(5, 3, 7) * step + step
        ours(x), theirs(x)
        check_close("running_mean", ours.running_mean, theirs.running_mean, FP32.statistics, unit=3.0)
        assert ours.num_batches_tracked == theirs.num_batches_tracked


@pytest.mark.parametrize("momentum", [0.1, None])
def test_nan_does_not_poison_the_running_mean(momentum: float | None) -> None:
    norm = trained(momentum)
    norm(torch.full((4, 3), float("nan")))
    assert torch.equal(norm.running_mean, trained().running_mean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_stays_wide(dtype: torch.dtype) -> None:
    norm = trained().to(dtype)
    assert (norm.bias.dtype, norm.running_mean.dtype) == (dtype, torch.float32)
    assert torch.equal(norm.running_mean, trained().running_mean)
    assert trained().double().running_mean.dtype == torch.float64


def test_large_sums_in_fp16_stay_finite() -> None:
    y = trained().half()(torch.full((64, 3, 32, 32), 3e4, dtype=torch.float16))
    assert torch.isfinite(y).all()


def test_layout_is_kept() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert trained()(x).is_contiguous(memory_format=torch.channels_last)


def test_errors_say_where() -> None:
    norm = trained()
    norm.site = "layer1.bn1"
    with pytest.raises(NormRewriteError, match=r"layer1\.bn1 expects \(N, 3, \*\), got shape \(2, 4\)"):
        norm(torch.randn(2, 4))
    with pytest.raises(NormRewriteError, match=r"layer1\.bn1 needs more than one value a channel when training"):
        norm(torch.randn(1, 3))
    assert norm.eval()(torch.randn(1, 3)).shape == (1, 3)


def test_reset() -> None:
    norm = trained()
    norm.reset_parameters()
    fresh = MeanOnlyBatchNorm(3).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in norm.state_dict().items())


def test_repr() -> None:
    assert repr(trained()) == "MeanOnlyBatchNorm(3, momentum=0.1)"


def test_it_is_no_batch_norm_site() -> None:
    assert not sites.find(nn.Sequential(trained(), StandIn(None, {})))


MODULES = {
    "mean only": trained,
    "affine": lambda: ChannelAffine(torch.tensor([2.0, -0.5, 0.0]), torch.tensor([1.0, 0.25, -3.0])),
    "batch norm": lambda: BatchNorm(3),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_node_and_its_tail(kind: str, training: bool) -> None:
    """The children named in `tail` are applied behind, in order; traced it is one node whose mode is not baked in."""
    module: Any = MODULES[kind]()
    bare, x = copy.deepcopy(module).train(training), torch.randn(4, 3, 5)
    module.add_module("act", nn.LeakyReLU(0.5))
    module.add_module("square", nn.ReLU())
    module.tail = ("act", "square")
    model = nn.Sequential(module).train(not training)
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0"]
    wanted = bare(x).clamp_min(0)
    assert torch.equal(copy.deepcopy(model).train(training)(x), wanted)
    assert torch.equal(traced.train(training)(x), wanted)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_and_exported(training: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 3, 5)
    model = nn.Sequential(StandIn(None, {}), trained(None), MODULES["affine"]()).train(training)
    wanted = copy.deepcopy(model)(x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(program.module()(x), wanted)


@pytest.mark.parametrize("kind", ["mean only", "affine"])
def test_the_origin_travels(kind: str) -> None:
    norm = nn.BatchNorm1d(3)
    modules: list[Any] = [MODULES[kind](), MODULES[kind]()]
    for module, var in zip(modules, (torch.rand(3), torch.rand(3)), strict=True):
        module.origin = Origin(norm, {"running_var": (var, var)})
    first, second = modules
    second.load_state_dict(copy.deepcopy(first).state_dict(), strict=True)
    assert torch.equal(second.origin.running_var, first.origin.running_var)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_that_are_switched_off_stay(momentum: float | None) -> None:
    norm, x = trained(momentum), torch.randn(4, 3, 7)
    before = copy.deepcopy(norm)
    norm.track_running_stats = False
    y = norm(x)
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before.buffers(), strict=True))
    assert torch.equal(y, before(x)) and not torch.equal(norm.running_mean, before.running_mean)
    assert torch.equal(norm.eval()(x), trained(momentum).eval()(x))
