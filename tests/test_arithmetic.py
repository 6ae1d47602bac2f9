"""half_arithmetic: every norm of ours and of torch in half, products summed in fp32, and nothing else touched."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite import NormRewriteError
from normrewrite.backends import context, half
from normrewrite.backends.watch import watching
from normrewrite.nn.functional import normalise
from tests.backends.tolerances import check_close

SUMS = ("fp32", "half:1", "half:16")
IMAGES, SERIES, ROWS = (6, 8, 5, 5), (6, 8, 9), (6, 4, 10)

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), SERIES),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), IMAGES),
    "BatchNorm2d, untracked": (lambda: nn.BatchNorm2d(8, affine=False, track_running_stats=False), IMAGES),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(8), IMAGES),
    "InstanceNorm2d, tracked": (lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), IMAGES),
    "LayerNorm": (lambda: nn.LayerNorm((4, 10)), ROWS),
    "RMSNorm": (lambda: nn.RMSNorm(10), ROWS),
    "GroupNorm": (lambda: nn.GroupNorm(4, 8), IMAGES),
    "nr.BatchNorm2d": (lambda: nr.nn.BatchNorm2d(8, metric="l2"), IMAGES),
    "nr.LayerNorm": (lambda: nr.nn.LayerNorm(8, metric="l2", channels_first=True), IMAGES),
    "nr.RMSNorm": (lambda: nr.nn.RMSNorm(10, metric="l2"), ROWS),
    "nr.GroupNorm": (lambda: nr.nn.GroupNorm(4, 8, metric="l2"), IMAGES),
    "nr.InstanceNorm": (lambda: nr.nn.InstanceNorm(8, track_running_stats=True, metric="l2"), IMAGES),
    "nr.MeanOnlyBatchNorm": (lambda: nr.nn.MeanOnlyBatchNorm(8), IMAGES),
    "nr.BatchRenorm": (lambda: nr.nn.BatchRenorm(8, schedule=None), IMAGES),
}
every_norm = pytest.mark.parametrize("name", NORMS)


def halved(module: nn.Module) -> nn.Module:
    """Parameters in half; running statistics stay."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data = parameter.data.half()
    return module


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A norm with affine parameters of its own, an input and a gradient, all of half numbers."""
    norm, shape = NORMS[name][0](), NORMS[name][1]
    for parameter in norm.parameters():
        parameter.data = (0.5 + torch.rand(parameter.shape)).half().float()
    return norm, (2 * torch.randn(shape) + 0.5).half(), torch.randn(shape).half()


def ran(norm: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(g)
    gradients = {f"d{name}": parameter.grad for name, parameter in norm.named_parameters()}
    statistics = {name: value for name, value in norm.named_buffers() if name.startswith("running")}
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **gradients, **statistics}  # type: ignore[dict-item]


def in_half(norm: nn.Module, x: Tensor, g: Tensor, sums: str = "fp32") -> dict[str, Tensor]:
    with nr.half_arithmetic(sums):
        return ran(halved(norm), x, g)


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in found.items():
        statistic = name.startswith("running")
        assert value.dtype is (torch.float32 if statistic else torch.float16), name
        check_close(name, value, wanted[name], 8e-3 if name == "dx" else 4e-3)


@every_norm
@pytest.mark.parametrize("sums", SUMS)
def test_it_is_the_norm_of_fp32_to_half(name: str, sums: str) -> None:
    norm, x, g = made(name)
    check(in_half(norm, x, g, sums), ran(copy.deepcopy(norm), x.float(), g.float()))


@every_norm
def test_one_percent_off_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x, g = made(name)
    forwards = [half._Normalise, half._Centre]
    for function in forwards:
        whole = function.forward
        scaled = lambda *args, whole=whole: (1.01 * (out := whole(*args))[0], *out[1:])  # noqa: E731
        monkeypatch.setattr(function, "forward", staticmethod(scaled))
    with pytest.raises(AssertionError, match="off by"):
        check(in_half(norm, x, g), ran(copy.deepcopy(norm), x.float(), g.float()))


@pytest.mark.parametrize("name", [name for name in NORMS if "MeanOnly" not in name])
def test_squares_beyond_half_show(name: str) -> None:
    """Torch's kernels would hide them: y is the bias, or 0, and running statistics don't move."""
    norm, x, g = made(name)
    with watching() as watch:
        found = in_half(norm, 2000 * x, g)
    assert watch.spoilt
    bias = dict(norm.named_parameters()).get("bias", torch.zeros(()))
    if name != "nr.BatchRenorm":  # it adds what the mean is off by
        shape = (-1, *(1,) * (x.dim() - 2)) if bias.dim() == 1 and x.shape[1] == 8 else bias.shape
        assert torch.equal(found["y"], bias.half().view(shape).expand(x.shape))
    for statistic, before in norm.named_buffers():
        if statistic.startswith("running"):
            assert torch.equal(found[statistic], before)
            assert not torch.equal(ran(copy.deepcopy(norm), 2000 * x.float(), g.float())[statistic], before)


def test_eval_is_the_affine_of_the_running_statistics() -> None:
    for name in ("BatchNorm2d", "InstanceNorm2d, tracked", "nr.BatchNorm2d", "nr.InstanceNorm", "nr.MeanOnlyBatchNorm"):
        norm, x, _ = made(name)
        norm.train()(x.float())
        with nr.half_arithmetic("half:1"):
            found = halved(norm).eval()(x)
        check_close(name, found, norm.eval()(x.float()), 1e-3)


@every_norm
def test_fp32_and_what_is_outside_are_left_alone(name: str) -> None:
    norm, x, g = made(name)
    plain = ran(copy.deepcopy(norm), x.float(), g.float())
    with nr.half_arithmetic("half:1"):
        inside = ran(copy.deepcopy(norm), x.float(), g.float())
    assert all(torch.equal(value, plain[key]) for key, value in inside.items())


def test_it_ends_with_the_block_and_can_be_nested() -> None:
    x = torch.full((1, 5000), 16.0).half()
    x[0, ::2] = -16
    layer, seen = lambda: bool(F.layer_norm(x, (5000,)).any()), []
    with pytest.raises(KeyError), nr.half_arithmetic("half") as outer:
        seen += [str(outer), layer()]
        with nr.half_arithmetic():
            seen += [layer()]
        seen += [layer()]
        raise KeyError
    assert (
        seen == ["half:64", False, True, False]
        and layer()
        and half.chosen(x) is None
        and context.here.now == context.State()
    )
    with pytest.raises(NormRewriteError, match="write fp32, half"), nr.half_arithmetic("fp16"):
        pass


def test_other_threads_are_left_alone() -> None:
    """Neither norms of ours nor torch's, nor what watches them."""
    x = 50 * torch.randn(8, 4, 8, 8).half()
    norms = nr.nn.BatchNorm2d(4), nr.nn.LayerNorm(8), nr.nn.MeanOnlyBatchNorm(4), torch.nn.GroupNorm(2, 4).half()
    for norm in norms:
        outside, found = norm(x), []
        with nr.half_arithmetic("half:1"), watching() as watch:
            thread = threading.Thread(target=lambda norm=norm, found=found: found.append(norm(x)))
            thread.start()
            thread.join()
            assert torch.equal(found[0], outside) and watch.told == []
            assert not torch.equal(norm(x), outside) and len(watch.told) > 0


def test_compiled_networks_follow_the_switch() -> None:
    torch._dynamo.reset()
    which = torch.compile(lambda x: x if half.chosen(x) is None else -x, backend="eager", fullgraph=True)
    x = torch.ones(2, 3).half()
    assert torch.equal(which(x), x)
    with nr.half_arithmetic():
        assert torch.equal(which(x), -x)
    assert torch.equal(which(x), x)


def test_synchronised_statistics_are_refused() -> None:
    with nr.half_arithmetic(), pytest.raises(NormRewriteError, match="this norm is synchronised"):
        normalise(torch.randn(4, 2).half(), None, None, "l1", "exact", 1e-5, object())


# --- products ----------------------------------------------------------------------------------------------------------------

PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1), ((4, 6, 7, 7), (5, 6, 3, 3), (5,))),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w, stride=2), ((4, 6, 7), (6, 5, 3))),
    "linear": (F.linear, ((9, 20), (7, 20), (7,))),
    "matmul": (lambda a, b: a @ b, ((3, 9, 20), (20, 7))),
    "bmm": (lambda a, b: a.bmm(b), ((3, 9, 20), (3, 20, 7))),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), ((9, 20), (7, 20))),
    "attention": (F.scaled_dot_product_attention, ((2, 3, 6, 8),) * 3),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_rounded_once(name: str) -> None:
    function, shapes = PRODUCTS[name]
    inputs = [torch.randn(shape).half() for shape in shapes]

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves: list[Any] = [value.to(dtype).requires_grad_() for value in inputs]
        y = function(*leaves)
        g = torch.linspace(-1, 1, y.numel()).view(y.shape).half().to(dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]

    with nr.half_arithmetic():
        found = run(torch.float16)
    for value, wanted in zip(found, run(torch.float32), strict=True):
        assert torch.equal(value, wanted.half())


def test_weight_gradients_of_a_large_batch_are_whole() -> None:
    """One running half sum over the samples would stop at 2048."""
    weight = torch.zeros(1, 1, 1, 1).half().requires_grad_()
    with nr.half_arithmetic():
        y = F.conv2d(torch.ones(4096, 1, 1, 1).half(), weight)
    y.backward(torch.ones_like(y))
    assert weight.grad is not None and weight.grad.item() == 4096


def test_a_loop_of_ones_own() -> None:
    """As in the docstring: a model of half parameters, torch's norms and ours, a scale on the loss."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nr.nn.GroupNorm(2, 8))
    model = halved(model.append(nn.Flatten()).append(nn.Linear(8 * 16, 4)))
    x, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
    losses = []
    for _ in range(30):
        with nr.half_arithmetic("half:32"):
            loss = F.cross_entropy(model(x.half()).float(), labels)
        (1024 * loss).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= (0.05 * parameter.grad.float() / 1024).half()
                parameter.grad = None
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
