"""The modules: train and eval, running statistics, casts, files, tracing, and a short training with every metric."""

import copy
import io
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from normrewrite.backends import reference
from normrewrite.backends.measuring import per_channel
from normrewrite.errors import NormRewriteError
from normrewrite.nn import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from normrewrite.nn.functional import batch_norm
from normrewrite.norms import metric
from tests.backends.tolerances import TOLERANCES, check_close

SPECS = ("l2", "l1", "linf", "topk:3", "topk:20%", "range")
SHAPES = ((9, 3), (5, 3, 7), (4, 3, 3, 7), (2, 3, 2, 3, 7), (2, 3, 2, 1, 3, 2))
CLASSES = ((BatchNorm1d, (9, 3)), (BatchNorm1d, (5, 3, 7)), (BatchNorm2d, (4, 3, 3, 7)), (BatchNorm3d, (2, 3, 2, 3, 7)))
FP32 = TOLERANCES[torch.float32]

every_spec = pytest.mark.parametrize("spec", SPECS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def lognormal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).exp()


def trained(spec: str, cls: type[BatchNorm] = BatchNorm, dtype: torch.dtype | None = None) -> BatchNorm:
    """Three channels, all tensors set to what no initialiser would give."""
    values = {
        "weight": [2.0, -0.5, 1.25],
        "bias": [0.5, 0.0, -1.0],
        "running_mean": [0.1, -0.7, 3.3],
        "running_scale": [0.3, 1.7, 2.9],
        "num_batches_tracked": 5,
    }
    norm = cls(3, metric=spec, dtype=dtype)
    norm.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    return norm


def expected(norm: BatchNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and C * S of the float64 reference, with the module's own weight and bias."""
    weight, bias = (None if value is None else value.detach().double().numpy() for value in (norm.weight, norm.bias))
    found = reference.batch_norm(x.double().numpy(), metric(norm.metric), weight, bias, norm.eps, norm.gain)
    y, mean, spread = (torch.from_numpy(value) for value in found)
    return y, mean, spread


def expected_in_eval(norm: BatchNorm, x: Tensor) -> Tensor:
    """weight * (x - running_mean) / (running_scale + eps) + bias, in float64."""
    assert norm.running_mean is not None and norm.running_scale is not None
    mean, scale = (per_channel(value.double(), x.dim()) for value in (norm.running_mean, norm.running_scale))
    y = (x.double() - mean) / (scale + norm.eps)
    if norm.weight is None or norm.bias is None:
        return y
    weight, bias = (per_channel(value.detach().double(), x.dim()) for value in (norm.weight, norm.bias))
    return weight * y + bias


def buffers(norm: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in norm.named_buffers()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """To the bit, and in dtype."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


# --- values ----------------------------------------------------------------------------------------------------------


@every_spec
@every_shape
@pytest.mark.parametrize("tracking", [True, False], ids=["tracking", "live"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_train_and_eval(spec: str, shape: tuple[int, ...], tracking: bool, affine: bool) -> None:
    """Training reads the batch; eval the running statistics, or the batch again where there are none."""
    norm = BatchNorm(3, affine=affine, track_running_stats=tracking, metric=spec)
    if affine:
        norm.load_state_dict(trained(spec).state_dict(), strict=tracking)
    assert (norm.weight is None, norm.bias is None) == (not affine, not affine)
    x = lognormal(shape)
    check_close("train", norm(x), expected(norm, x)[0], FP32.y)
    x, before = lognormal(shape, seed=1), buffers(norm.eval())
    check_close("eval", norm(x), expected_in_eval(norm, x) if tracking else expected(norm, x)[0], FP32.y)
    assert_same(buffers(norm), before)
    assert list(before) == (["running_mean", "running_scale", "num_batches_tracked"] if tracking else [])


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_an_eval_one_percent_off_is_caught(factor: float) -> None:
    norm, x = trained("l1").eval(), lognormal((5, 3, 7))
    wanted = expected_in_eval(norm, x)
    norm.get_buffer("running_scale").mul_(factor)
    with pytest.raises(AssertionError, match="eval: off by"):
        check_close("eval", norm(x), wanted, FP32.y)


@every_spec
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics(spec: str, momentum: float | None) -> None:
    """(1 - momentum) * running + momentum * batch, or the mean over all batches so far where momentum is None."""
    norm = BatchNorm(3, momentum=momentum, metric=spec)
    mean, scale = torch.zeros(3).double(), torch.ones(3).double()
    for step in range(1, 5):
        x = lognormal((5, 3, 7), seed=step) * step
        norm(x)
        _, batch_mean, batch_scale = expected(norm, x)
        factor = 1 / step if momentum is None else momentum
        mean, scale = (1 - factor) * mean + factor * batch_mean, (1 - factor) * scale + factor * batch_scale
        check_close("running_mean", norm.running_mean, mean, FP32.statistics, unit=3.0)
        check_close("running_scale", norm.running_scale, scale, FP32.statistics, unit=3.0)
        assert norm.num_batches_tracked == step


def test_l2_tracks_what_torch_tracks() -> None:
    """Mean for mean; torch's running_var is of the unbiased variance, so it is compared after one whole batch."""
    ours, theirs = BatchNorm2d(3, metric="l2", momentum=1.0), nn.BatchNorm2d(3, momentum=1.0)
    x = lognormal((4, 3, 3, 7))
    ours(x), theirs(x)
    n = x.numel() // 3
    check_close("mean", ours.running_mean, theirs.running_mean, FP32.statistics)
    check_close(
        "scale", ours.running_scale, (theirs.get_buffer("running_var").double() * (n - 1) / n).sqrt(), FP32.statistics
    )


@every_spec
@both_modes
def test_gradients_reach_input_and_parameters(spec: str, training: bool) -> None:
    norm = trained(spec, dtype=torch.float64).train(training)
    inputs = [lognormal((3, 3, 5)).double().requires_grad_(), *norm.parameters()]

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, x)
        return result

    assert torch.autograd.gradcheck(forward, inputs)


@both_modes
def test_statistics_need_no_gradient(training: bool) -> None:
    norm = trained("linf").train(training)
    norm(lognormal((5, 3, 7))).sum().backward()
    assert not any(buffer.requires_grad for buffer in norm.buffers())


@every_spec
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_leaves_its_channel_untouched(spec: str, bad: float) -> None:
    norm, x = trained(spec), lognormal((5, 3, 7))
    before = buffers(norm)
    x[2, 1, 3] = bad
    norm(x)
    for name in ("running_mean", "running_scale"):
        kept = torch.tensor([False, True, False])
        assert torch.equal(buffers(norm)[name] == before[name], kept)
        assert bool(buffers(norm)[name].isfinite().all())
    norm(torch.full_like(x, bad))
    assert bool(norm.get_buffer("running_scale").isfinite().all())


@pytest.mark.parametrize("channels", [slice(None), slice(1)], ids=["all", "one"])
def test_a_batch_that_is_not_finite_does_not_enter_a_cumulative_average(channels: slice) -> None:
    """Counted but left out, it would give the initial 0 and 1 its place in the average for good."""
    norm, x = BatchNorm(3, momentum=None), lognormal((5, 3, 7))
    bad = x.clone()
    bad[:, channels] = math.nan
    norm(bad)
    norm(x)
    norm(bad)
    check_close("running_mean", norm.running_mean, expected(norm, x)[1], FP32.statistics)
    check_close("running_scale", norm.running_scale, expected(norm, x)[2], FP32.statistics)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "ranks"), [(BatchNorm1d, (2, 3)), (BatchNorm2d, (4,)), (BatchNorm3d, (5,)), (BatchNorm, (2, 3, 4, 5, 6))]
)
def test_ranks(cls: type[BatchNorm], ranks: tuple[int, ...]) -> None:
    for training, rank in itertools.product((True, False), range(1, 7)):
        norm, shape = cls(3).train(training), (2, 3, 2, 2, 2, 2)[:rank]
        if rank in ranks:
            assert norm(torch.randn(shape)).shape == shape
            continue
        with pytest.raises(ValueError, match=rf"{cls.__name__} expects .*got shape \({', '.join(map(str, shape))}"):
            norm(torch.randn(shape))


@both_modes
def test_wrong_channel_count(training: bool) -> None:
    norm = BatchNorm2d(3).train(training)
    with pytest.raises(NormRewriteError, match=r"BatchNorm2d expects \(N, 3, \*\), got shape \(2, 4, 5, 5\)"):
        norm(torch.randn(2, 4, 5, 5))
    norm.site = "layer1.bn2"
    with pytest.raises(NormRewriteError, match=r"layer1\.bn2 expects \(N, 3, \*\)"):
        norm(torch.randn(2, 4, 5, 5))
    with pytest.raises(NormRewriteError, match=r"layer1\.bn2 expects 4D input, got shape \(2, 3\)"):
        norm(torch.randn(2, 3))


def test_one_value_a_channel() -> None:
    norm = BatchNorm(3, metric="l1")
    before = buffers(norm)
    for shape in ((1, 3), (1, 3, 1, 1)):
        with pytest.raises(
            NormRewriteError, match=r"more than one value a channel .*Raise the batch size or call .eval"
        ):
            norm(torch.randn(shape))
        assert norm.eval()(torch.randn(shape)).shape == shape
        norm.train()
    assert torch.equal(buffers(norm)["running_scale"], before["running_scale"])


def test_too_few_values_for_the_metric() -> None:
    norm = BatchNorm(3, metric="topk:10")
    norm.site = "head.norm"
    with pytest.raises(NormRewriteError, match=r"head\.norm: topk:10 needs at least 10 .* got 8.*\(input \(8, 3\)\)"):
        norm(torch.randn(8, 3))


def test_unknown_arguments() -> None:
    with pytest.raises(NormRewriteError, match=r"unknown gain 'Exact'\. Known: exact, paper"):
        BatchNorm(3, gain="Exact")  # type: ignore[arg-type]
    with pytest.raises(NormRewriteError, match="Did you mean 'linf'"):
        BatchNorm(3, metric="lnf")
    with pytest.raises(NormRewriteError, match="needs running_mean and running_scale"):
        batch_norm(torch.randn(4, 3), None, None)
    with pytest.raises(NormRewriteError, match=r"needs \(N, C, \*\)"):
        batch_norm(torch.randn(4), None, None, training=True)


# --- dtypes and layouts ----------------------------------------------------------------------------------------------

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.float16),
    "to device": lambda module: module.to("cpu", torch.bfloat16),
    "inside": lambda module: nn.Sequential(nn.Identity(), module).half()[1],
    "twice": lambda module: module.half().bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cast_keeps_the_statistics_to_the_bit(cast: str, dtype: torch.dtype) -> None:
    norm = trained("l1", dtype=dtype)
    before = buffers(norm)
    assert before["running_scale"].dtype == dtype
    parameters = {parameter.dtype for parameter in CASTS[cast](norm).parameters()}
    assert parameters <= {torch.float16, torch.bfloat16}
    assert_same(buffers(norm), before)


def test_wider_casts_are_exact() -> None:
    norm = trained("l1")
    before = buffers(norm)
    assert {value.dtype for value in norm.double().state_dict().values()} == {torch.float64, torch.long}
    assert torch.equal(buffers(norm)["running_scale"], before["running_scale"].double())
    assert_same(buffers(norm.float()), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_made_in_half_precision_the_statistics_are_fp32(dtype: torch.dtype) -> None:
    norm = BatchNorm(3, dtype=dtype)
    assert [value.dtype for value in norm.state_dict().values()] == [
        dtype,
        dtype,
        torch.float32,
        torch.float32,
        torch.long,
    ]


@every_spec
@both_modes
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["fp32 parameters", "own parameters"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(spec: str, training: bool, dtype: torch.dtype, parameters: torch.dtype | None) -> None:
    if dtype is torch.float64:
        parameters = None  # torch's kernels, too, take no fp32 parameters beside a float64 input
    norm = trained(spec).to(parameters or dtype).train(training)
    x = lognormal((4, 3, 3, 7)).to(dtype)
    y = norm(x)
    assert y.dtype == dtype
    check_close("y", y, expected(norm, x)[0] if training else expected_in_eval(norm, x), TOLERANCES[dtype].y)
    assert torch.finfo(norm.get_buffer("running_scale").dtype).bits >= 32


@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(training: bool, dtype: torch.dtype) -> None:
    """The dtype of torch's own norm under the same autocast, alone and behind a convolution; statistics stay fp32."""
    x = lognormal((4, 3, 5, 7)).to(dtype)
    conv = nn.Conv2d(3, 3, 3)
    ours, theirs = trained("l1", BatchNorm2d).train(training), nn.BatchNorm2d(3).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone, behind = ours(x), ours(conv(x))
        assert alone.dtype == theirs(x).dtype == dtype
        assert behind.dtype == theirs(conv(x)).dtype == torch.bfloat16
    behind.float().sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.dtype == torch.float32
    assert norm_dtypes(ours) == {torch.float32, torch.long}


def norm_dtypes(norm: nn.Module) -> set[torch.dtype]:
    return {value.dtype for value in norm.state_dict().values()}


@both_modes
@pytest.mark.parametrize("spec", ["l1", "topk:3", "range"])
def test_channels_last_is_kept(spec: str, training: bool) -> None:
    norm, x = trained(spec, BatchNorm2d).train(training), lognormal((4, 3, 5, 7))
    y = copy.deepcopy(norm)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    check_close("y", y, norm(x), FP32.y)


# --- copies and files ------------------------------------------------------------------------------------------------


def by_deepcopy(norm: BatchNorm) -> BatchNorm:
    return copy.deepcopy(norm)


def by_state_dict(norm: BatchNorm) -> BatchNorm:
    new = type(norm)(norm.num_features, norm.eps, metric=norm.metric, gain=norm.gain)
    new.load_state_dict(norm.state_dict(), strict=True)
    return new


def by_file(norm: BatchNorm) -> BatchNorm:
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    loaded: BatchNorm = torch.load(file, weights_only=False)
    return loaded


@every_spec
@pytest.mark.parametrize("way", [by_deepcopy, by_state_dict, by_file])
def test_copies_are_whole_and_independent(spec: str, way: Callable[[BatchNorm], BatchNorm]) -> None:
    norm = trained(spec, BatchNorm2d)
    new = way(norm)
    assert type(new) is BatchNorm2d
    assert repr(new) == repr(norm)
    assert_same(new.state_dict(), norm.state_dict())
    x, before = lognormal((4, 3, 3, 7)), buffers(norm)
    y = new(x)
    assert_same(buffers(norm), before)
    assert torch.equal(y, norm(x))
    assert_same(new.state_dict(), norm.state_dict())
    assert torch.equal(new.eval()(x), norm.eval()(x))


def test_a_state_dict_holds_five_plain_tensors() -> None:
    names = ["weight", "bias", "running_mean", "running_scale", "num_batches_tracked"]
    assert list(BatchNorm(3).state_dict()) == names
    file = io.BytesIO()
    torch.save(trained("l1").state_dict(), file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), trained("l1").state_dict())


@pytest.mark.parametrize(
    ("norm", "text"),
    [
        (
            lambda: BatchNorm2d(64),
            "BatchNorm2d(64, metric='l1', eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)",
        ),
        (
            lambda: BatchNorm(8, 1e-3, None, False, False, metric="TOPK", gain="paper"),
            "BatchNorm(8, metric='topk:10', gain='paper', eps=0.001, momentum=None, affine=False, track_running_stats=False)",
        ),
    ],
)
def test_repr(norm: Callable[[], BatchNorm], text: str) -> None:
    assert repr(norm()) == text


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracking", [True, False])
def test_reset_parameters(affine: bool, tracking: bool) -> None:
    """Everything as new; so may a module made on the meta device be filled."""
    fresh = BatchNorm(3, affine=affine, track_running_stats=tracking)
    norm = copy.deepcopy(fresh)
    norm.load_state_dict(trained("l1").state_dict(), strict=False)
    norm.reset_parameters()
    assert_same(norm.state_dict(), fresh.state_dict())
    empty = BatchNorm(3, affine=affine, track_running_stats=tracking, device="meta")
    assert {value.device.type for value in empty.state_dict().values()} <= {"meta"}
    empty.to_empty(device="cpu").reset_parameters()
    assert_same(empty.state_dict(), fresh.state_dict())


def test_reset_running_stats_leaves_the_parameters() -> None:
    norm = trained("l1")
    norm.reset_running_stats()
    assert_same(buffers(norm), buffers(BatchNorm(3)))
    assert torch.equal(norm.get_parameter("weight"), trained("l1").get_parameter("weight"))


@every_spec
def test_random_numbers_are_left_alone(spec: str) -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    norm = BatchNorm2d(3, metric=spec)
    norm(lognormal((4, 3, 3, 7)))
    norm.reset_parameters()
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy_state)


# --- torch.fx --------------------------------------------------------------------------------------------------------


class _Twice(nn.Module):
    """One norm that is called twice, and one called by keyword."""

    def __init__(self, spec: str, cls: type[BatchNorm]) -> None:
        super().__init__()
        self.shared = trained(spec, cls)
        self.other = trained(spec, cls)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(input=self.shared(self.shared(x)).relu())
        return y


@every_spec
@pytest.mark.parametrize(("cls", "shape"), CLASSES, ids=str)
def test_one_node_a_call_when_traced(spec: str, cls: type[BatchNorm], shape: tuple[int, ...]) -> None:
    model = _Twice(spec, cls)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    called = [node.target for node in traced.graph.nodes if node.op.startswith("call")]
    assert called == ["shared", "shared", "relu", "other"]
    assert type(traced.get_submodule("shared")) is cls
    # The mode is not baked in: both ways and back, the trace does what the model does.
    for step, training in enumerate((True, False, True, False)):
        x = lognormal(shape, seed=step)
        assert torch.equal(traced.train(training)(x), model.train(training)(x))
        assert_same(traced.state_dict(), model.state_dict())


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = trained("l1")

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return batch_norm(
            x, norm.running_mean, norm.running_scale, norm.weight, norm.bias, True, 0.5, 1e-3, "linf", "paper"
        )


def test_the_function_is_one_node_when_traced() -> None:
    model = _Functional()
    traced = fx.symbolic_trace(copy.deepcopy(model))
    calls = [node for node in traced.graph.nodes if node.op.startswith("call")]
    assert [(node.op, node.target) for node in calls] == [("call_function", batch_norm)]
    x = lognormal((5, 3, 7))
    assert torch.equal(traced(x), model(x))
    for name in ("norm.running_mean", "norm.running_scale"):
        assert torch.equal(traced.get_buffer(name), model.get_buffer(name))
        assert not torch.equal(traced.get_buffer(name), _Functional().get_buffer(name))


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)


def small_network(spec: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        BatchNorm2d(8, metric=spec),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False),
        BatchNorm2d(16, metric=spec),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@every_spec
def test_training_on_digits(spec: str, digits: tuple[Tensor, Tensor]) -> None:
    """Two epochs of plain SGD; accuracy in eval, so that the running statistics have to be right as well."""
    images, labels = digits
    model = small_network(spec)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in itertools.chain(*(torch.randperm(len(labels)).split(64) for _ in range(2))):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
    with torch.no_grad():
        accuracy = float((model.eval()(images).argmax(1) == labels).float().mean())
    assert accuracy >= 0.9


def test_tools_that_fold_batch_norms_find_what_they_need() -> None:
    conv = nn.Conv2d(3, 5, 3).double().eval()
    norm = BatchNorm(5).double().eval()
    norm.running_mean, norm.running_scale = torch.randn(5).double(), 0.5 + torch.rand(5).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    fused = nn.utils.fuse_conv_bn_eval(conv, norm)  # type: ignore[type-var]
    torch.testing.assert_close(fused(x), norm(conv(x)))
