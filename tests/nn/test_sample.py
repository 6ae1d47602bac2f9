"""The modules: what they view, values against float64 and torch, casts, files, compilers, tracing, training."""

import copy
import io
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from normrewrite.backends import reference
from normrewrite.errors import NormRewriteError
from normrewrite.nn import GroupNorm, InstanceNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d, LayerNorm, RMSNorm
from normrewrite.nn.sample import RowNorm
from normrewrite.norms import metric
from tests.backends.tolerances import TOLERANCES, check_close

SPECS = ("l2", "l1", "linf", "topk:3", "topk:20%", "range")

Make = Callable[..., RowNorm]

# name: how to make it (with any keyword arguments), torch's own, an input, and its view.
MODULES: dict[str, tuple[Make, Make, tuple[int, ...], tuple[int, ...]]] = {
    "layer": (lambda **k: LayerNorm(12, **k), lambda **k: nn.LayerNorm(12, **k), (4, 5, 12), (20, 1, 12, 1)),
    "layer of two dimensions": (
        lambda **k: LayerNorm((3, 4), **k),
        lambda **k: nn.LayerNorm((3, 4), **k),
        (5, 2, 3, 4),
        (10, 1, 12, 1),
    ),
    "rms": (lambda **k: RMSNorm(12, **k), lambda **k: nn.RMSNorm(12, **k), (4, 5, 12), (20, 1, 12, 1)),
    "group": (
        lambda **k: GroupNorm(3, 12, **k),
        lambda **k: nn.GroupNorm(3, 12, **k),
        (4, 12, 3, 5),
        (4, 3, 4, 15),
    ),
    "group of rank 2": (lambda **k: GroupNorm(3, 12, **k), lambda **k: nn.GroupNorm(3, 12, **k), (4, 12), (4, 3, 4, 1)),
    "instance": (
        lambda **k: InstanceNorm2d(12, affine=True, **k),
        lambda **k: nn.InstanceNorm2d(12, affine=True, **k),
        (4, 12, 3, 5),
        (4, 12, 1, 15),
    ),
}
LAYOUTS = MODULES | {
    "channels first": (
        lambda **k: LayerNorm(12, channels_first=True, **k),
        lambda **k: _ChannelsFirst(12, **k),
        (4, 12, 3, 5),
        (60, 1, 12, 1),
    ),
}

every_spec = pytest.mark.parametrize("spec", SPECS)
every_module = pytest.mark.parametrize("name", LAYOUTS)


class _ChannelsFirst(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def trained(norm: nn.Module) -> nn.Module:
    """Parameters that no initialiser would give."""
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.data = (torch.rand(parameter.shape, generator=generator) - 0.3).to(parameter.dtype)
    return norm


def lognormal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).exp()


def made(name: str, spec: str) -> tuple[RowNorm, Tensor]:
    make, _, shape, _ = LAYOUTS[name]
    return trained(make(metric=spec)), lognormal(shape)  # type: ignore[return-value]


def expected(norm: RowNorm, x: Tensor) -> Tensor:
    viewed = norm.view(x.double())
    affine = [
        None if value is None else value.detach().double().view(viewed.shape[1:3]).numpy()
        for value in (norm.weight, norm.bias)
    ]
    eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    y = reference.row_norm(viewed.numpy(), metric(norm.metric), *affine, eps, norm.gain, norm.centred)[0]
    return norm.from_view(torch.from_numpy(y), x)


# --- values ----------------------------------------------------------------------------------------------------------


@every_spec
@every_module
@pytest.mark.parametrize("gain", ["exact", "paper"])
def test_values(spec: str, name: str, gain: str) -> None:
    make, _, shape, viewed = LAYOUTS[name]
    norm, x = trained(make(metric=spec, gain=gain)), lognormal(shape)
    assert isinstance(norm, RowNorm) and norm.view(x).shape == viewed
    assert torch.equal(norm.from_view(norm.view(x), x), x)
    for training in (True, False):
        check_close("y", norm.train(training)(x), expected(norm, x), TOLERANCES[torch.float32].y)


@every_module
def test_l2_is_torchs_own(name: str) -> None:
    """In values, parameters and state_dict; with an eps too small to matter."""
    make, native, shape, _ = LAYOUTS[name]
    ours, theirs = make(metric="l2", eps=1e-30).double(), trained(native(eps=1e-30).double())
    ours.load_state_dict(theirs.state_dict())
    x = lognormal(shape).double()
    check_close("y", ours(x), theirs(x), 1e-13)
    if name != "channels first":  # a class of this file's own
        for attribute in ("normalized_shape", "num_groups", "num_channels", "num_features", "elementwise_affine"):
            assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_without_an_eps_it_is_torchs(dtype: torch.dtype) -> None:
    """Torch's RMSNorm, too, takes the machine epsilon of the statistics; small enough not to show at x of order one."""
    x = lognormal((4, 12)).to(dtype)
    y = RMSNorm(12, metric="l2", dtype=dtype)(x)
    check_close("y", y, nn.RMSNorm(12, dtype=dtype)(x), 2 * TOLERANCES[dtype].y)


def test_without_affine() -> None:
    for norm, shape in (
        (LayerNorm(12, elementwise_affine=False), (4, 12)),
        (RMSNorm(12, elementwise_affine=False), (4, 12)),
        (GroupNorm(3, 12, affine=False), (4, 12)),
        (InstanceNorm2d(7), (4, 12, 3, 5)),  # torch's takes any width, too, without tensors of one
    ):
        x = lognormal(shape)
        assert norm.weight is None and norm.bias is None and not norm.state_dict()
        check_close("y", norm(x), expected(norm, x), TOLERANCES[torch.float32].y)
    assert LayerNorm(12, bias=False).bias is None and RMSNorm(12).bias is None


@every_spec
def test_rms_over_a_group(spec: str) -> None:
    norm, x = trained(GroupNorm(3, 12, metric=spec, centred=False)), lognormal((4, 12, 3, 5))
    assert isinstance(norm, GroupNorm)
    check_close("y", norm(x), expected(norm, x), TOLERANCES[torch.float32].y)
    assert not torch.allclose(norm(x), norm(x + 1))


@pytest.mark.parametrize(
    ("cls", "native", "shape"),
    [
        (InstanceNorm1d, nn.InstanceNorm1d, (4, 3, 7)),
        (InstanceNorm2d, nn.InstanceNorm2d, (4, 3, 5, 7)),
        (InstanceNorm3d, nn.InstanceNorm3d, (4, 3, 2, 5, 7)),
    ],
)
def test_instance_ranks(cls: type[InstanceNorm], native: type[nn.Module], shape: tuple[int, ...]) -> None:
    """A batch, and one sample alone; other ranks are refused."""
    ours, theirs = cls(3, eps=1e-30, metric="l2"), native(3, eps=1e-30)
    for x in (lognormal(shape), lognormal(shape)[0]):
        check_close("y", ours(x), theirs(x), 1e-5)
    for wrong in (shape[2:], (*shape, 2)):
        with pytest.raises(NormRewriteError, match=rf"{cls.__name__} expects .*D input, got shape"):
            ours(torch.randn(wrong))


@every_spec
@pytest.mark.parametrize("momentum", [0.3, None])
def test_instance_statistics(spec: str, momentum: float | None) -> None:
    """Means over the samples of a batch; eval uses them. Torch's, too, keeps its initial ones without a momentum."""
    norm, x = InstanceNorm2d(3, momentum=momentum, track_running_stats=True, metric=spec), lognormal((4, 3, 5, 7))
    norm(x)
    _, mean, spread = reference.row_norm(norm.view(x).double().numpy(), metric(spec))
    factor = momentum or 0.0
    wanted_mean, wanted_scale = factor * mean.mean(0), (1 - factor) + factor * spread.mean(0)
    check_close("running_mean", norm.running_mean, wanted_mean, 1e-6, unit=1.0)
    check_close("running_scale", norm.running_scale, wanted_scale, 1e-6)
    wanted = (x.double() - torch.from_numpy(wanted_mean).view(3, 1, 1)) / torch.from_numpy(wanted_scale + 1e-5).view(
        3, 1, 1
    )
    check_close("eval", norm.eval()(x), wanted, 1e-6)
    check_close("alone", norm(x[0]), wanted[0], 1e-6)
    assert norm.half().get_buffer("running_scale").dtype is torch.float32


# --- what is refused -------------------------------------------------------------------------------------------------


def test_wrong_shapes_name_the_site() -> None:
    cases: list[tuple[RowNorm, tuple[int, ...], str]] = [
        (LayerNorm((3, 4)), (2, 4, 3), r"\(\*, 3, 4\)"),
        (LayerNorm(4, channels_first=True), (2, 5, 4), r"\(N, 4, \*\)"),
        (RMSNorm(4), (), r"\(\*, 4\)"),
        (GroupNorm(2, 4), (2, 6, 3), r"\(N, 4, \*\)"),
        (GroupNorm(2, 4), (4,), r"\(N, 4, \*\)"),
        (InstanceNorm(4, affine=True), (2, 6, 3), r"\(N, 4, \*\)"),
        (InstanceNorm2d(4), (2, 4), "3D or 4D input"),
    ]
    for norm, shape, wanted in cases:
        with pytest.raises(NormRewriteError, match=rf"{type(norm).__name__} expects {wanted}, got shape"):
            norm(torch.randn(shape))
        norm.site = "head.norm"
        with pytest.raises(NormRewriteError, match=rf"^head\.norm expects {wanted}"):
            norm(torch.randn(shape))


def test_too_few_elements() -> None:
    norm = GroupNorm(4, 8, metric="topk:10")
    with pytest.raises(NormRewriteError, match=r"^topk:10 needs at least 10 elements that share statistics, got 8"):
        norm(torch.randn(2, 8, 4))
    norm.site = "stem.norm"
    with pytest.raises(NormRewriteError, match=r"^stem\.norm: topk:10 needs .*\(rows of 2 channels × 4 positions\)"):
        norm(torch.randn(2, 8, 4))
    with pytest.raises(NormRewriteError, match="at least 2 elements"):
        InstanceNorm2d(3)(torch.randn(4, 3, 1, 1))


def test_unknown_arguments() -> None:
    with pytest.raises(NormRewriteError, match=r"unknown gain 'Exact'"):
        LayerNorm(3, gain="Exact")  # type: ignore[arg-type]
    with pytest.raises(NormRewriteError, match="Did you mean 'linf'"):
        RMSNorm(3, metric="lnf")
    with pytest.raises(NormRewriteError, match="7 channels can't be divided into 2 groups"):
        GroupNorm(2, 7)
    with pytest.raises(NormRewriteError, match="channels_first normalises over one dimension"):
        LayerNorm((3, 4), channels_first=True)


# --- dtypes, layouts, copies, files ----------------------------------------------------------------------------------


@every_spec
@every_module
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(spec: str, name: str, dtype: torch.dtype) -> None:
    norm, x = made(name, spec)
    norm, x = norm.to(dtype), x.to(dtype)
    if dtype is torch.float64:
        norm.eps = norm.eps or torch.finfo(torch.float32).eps
    y = norm(x)
    assert y.dtype == dtype
    check_close("y", y, expected(norm, x), TOLERANCES[dtype].y)


@every_spec
@every_module
def test_fp16_far_out(spec: str, name: str) -> None:
    """Mean 300, standard deviation 10 000, in half precision and under autocast's mixture."""
    norm, x = made(name, spec)
    x = (300 + 10_000 * torch.randn(x.shape)).clamp(-65_000, 65_000).half()
    for parameters in (norm.half(), norm.float()):
        check_close("y", parameters(x), expected(parameters, x), 2e-3)


def test_autocast() -> None:
    """Behind a linear layer y is bfloat16, as its input is; parameters and their gradients stay fp32."""
    linear, norm = nn.Linear(12, 12), LayerNorm(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(linear(torch.randn(4, 12)))
    assert y.dtype is torch.bfloat16
    y.float().square().sum().backward()
    assert norm.weight is not None and norm.weight.grad is not None and norm.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("name", ["group", "instance", "channels first"])
def test_channels_last_is_kept(name: str) -> None:
    norm, x = made(name, "l1")
    leaf = x.to(memory_format=torch.channels_last).requires_grad_()
    y = norm(leaf)
    y.square().sum().backward()
    assert leaf.grad is not None
    for tensor in (y, leaf.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    check_close("y", y, norm(x), 1e-6)


@every_module
def test_input_that_is_not_contiguous(name: str) -> None:
    norm, x = made(name, "topk:3")
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert not turned.is_contiguous()
    check_close("y", norm(turned), norm(x), 1e-6)


@every_module
def test_copies_and_files(name: str) -> None:
    norm, x = made(name, "l1")
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    fresh = LAYOUTS[name][0](metric="l1")
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), norm(x)) and torch.equal(copy.deepcopy(norm)(x), norm(x))
    fresh.reset_parameters()
    untouched = LAYOUTS[name][0](metric="l1").state_dict()
    assert all(torch.equal(value, untouched[key]) for key, value in fresh.state_dict().items())


def test_repr() -> None:
    assert repr(LayerNorm(4)) == "LayerNorm((4,), metric='l1', eps=1e-05, affine=True)"
    assert repr(RMSNorm(4, channels_first=True, metric="TOPK", gain="paper")) == (
        "RMSNorm((4,), channels_first=True, metric='topk:10', gain='paper', eps=None, affine=True)"
    )
    assert repr(GroupNorm(2, 4, affine=False, centred=False)) == (
        "GroupNorm(2, 4, centred=False, metric='l1', eps=1e-05, affine=False)"
    )
    assert repr(InstanceNorm2d(4)) == (
        "InstanceNorm2d(4, momentum=0.1, track_running_stats=False, metric='l1', eps=1e-05, affine=False)"
    )


# --- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spec"), [("layer", "l1"), ("channels first", "l1"), ("group", "topk:20%"), ("instance", "range")]
)
def test_torch_compile_with_dynamic_sizes(name: str, spec: str) -> None:
    torch._dynamo.reset()
    norm, x = made(name, spec)
    compiled = torch.compile(copy.deepcopy(norm), fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for function, leaf in zip((compiled, norm), leaves, strict=True):
        function(leaf).pow(3).sum().backward()
    check_close("dx", leaves[0].grad, leaves[1].grad, 1e-5)


@pytest.mark.parametrize("spec", ["l1", "topk:3"])
@every_module
def test_torch_export_with_a_dynamic_batch(spec: str, name: str) -> None:
    norm, x = made(name, spec)
    program = torch.export.export(norm.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    larger = torch.cat([x, 2 * x])
    check_close("y", program.module()(larger), norm(larger), 1e-6)


@every_module
def test_one_node_when_traced(name: str) -> None:
    norm, x = made(name, "l1")
    traced = fx.symbolic_trace(nn.Sequential(norm, nn.Identity(), norm))
    assert [node.target for node in traced.graph.nodes if node.op.startswith("call")] == ["0", "1", "0"]
    assert torch.equal(traced(x), norm(norm(x)))


# --- training --------------------------------------------------------------------------------------------------------


@every_spec
@pytest.mark.parametrize(
    "make", [lambda s: LayerNorm(32, metric=s), lambda s: RMSNorm(32, metric=s)], ids=["layer", "rms"]
)
def test_training_on_digits(spec: str, make: Callable[[str], nn.Module]) -> None:
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(values) for values in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 32), make(spec), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in itertools.chain(*(torch.randperm(len(labels)).split(64) for _ in range(5))):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
    with torch.no_grad():
        assert float((model(images).argmax(1) == labels).float().mean()) >= 0.9


def test_statistics_that_are_switched_off_stay() -> None:
    """Eval measures then, as torch's."""
    norm, x = InstanceNorm2d(3, track_running_stats=True, metric="l2"), lognormal((4, 3, 5, 7))
    norm(x)
    before, theirs = copy.deepcopy(norm), torch.nn.InstanceNorm2d(3, eps=0.0, track_running_stats=True)
    norm.track_running_stats = theirs.track_running_stats = False
    for training in (True, False):
        y = norm.train(training)(2 * x)
        torch.testing.assert_close(y, theirs.train(training)(2 * x), rtol=1e-3, atol=1e-3)
        assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before.buffers(), strict=True))
    assert not torch.allclose(before.eval()(2 * x), y, atol=0.1)
