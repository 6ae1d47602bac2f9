"""Batch Renorm against the paper's formulas in float64: values, clipping, schedule, gradients, running statistics."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normrewrite.errors import NormRewriteError
from normrewrite.nn import BatchNorm, BatchRenorm, recomputation
from normrewrite.nn.renorm import SCHEDULE
from tests.backends.tolerances import TOLERANCES, check_close

LIMITS = [(1.0, 0.0), (1.5, 0.4), (3.0, 5.0), (100.0, 100.0)]  # plain batch norm, both clipped, the paper's, free


def trained(r_max: float = 3.0, d_max: float = 5.0, dtype: torch.dtype = torch.float64, **options: Any) -> BatchRenorm:
    """Four channels whose batches are alike, shifted, narrower and wider than what the running statistics say."""
    norm = BatchRenorm(4, r_max=r_max, d_max=d_max, dtype=dtype, **{"schedule": None, **options})
    state = {
        "running_mean": [0.0, 1.0, 0.2, -0.2],
        "running_scale": [1.0, 1.1, 4.0, 0.2],
        "weight": [2.0, -0.5, 1.0, 0.3],
        "bias": [0.5, 0.0, -1.0, 2.0],
    }
    norm.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=False)
    return norm


def reference(norm: BatchRenorm, x: Tensor, r_max: float, d_max: float) -> Tensor:
    """Ioffe 2017, algorithm 1, by autograd alone, with the eps of this project: added to the scale."""
    shape = (1, -1, *(1,) * (x.dim() - 2))
    dims = [0, *range(2, x.dim())]
    mean, scale = x.mean(dims), x.std(dims, correction=0) + norm.eps
    running_mean, running = norm.running_mean, norm.running_scale + norm.eps  # type: ignore[operator]
    r = (scale.detach() / running).clamp(1 / r_max, r_max)
    d = ((mean.detach() - running_mean) / running).clamp(-d_max, d_max)
    x_hat = (x - mean.view(shape)) / scale.view(shape) * r.view(shape) + d.view(shape)
    y: Tensor = norm.weight.view(shape) * x_hat + norm.bias.view(shape)  # type: ignore[union-attr]
    return y


def batch(shape: tuple[int, ...] = (6, 4, 3, 3)) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
@pytest.mark.parametrize("shape", [(9, 4), (6, 4, 5), (6, 4, 3, 3), (3, 4, 2, 3, 2)], ids=str)
def test_values_and_gradients(shape: tuple[int, ...], r_max: float, d_max: float) -> None:
    """Through x, weight and bias; none through r and d."""
    norm, x = trained(r_max, d_max), batch(shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    twin, g = copy.deepcopy(norm), torch.randn_like(x)
    wanted = reference(twin, theirs, r_max, d_max)
    y = norm(ours)
    check_close("y", y, wanted, TOLERANCES[torch.float64].y)
    with pytest.raises(AssertionError, match="y: off by"):
        check_close("y", y * 1.01, wanted, TOLERANCES[torch.float64].y)
    (y * g).sum().backward()
    (wanted * g).sum().backward()
    for found, expected in ((ours, theirs), *zip(norm.parameters(), twin.parameters(), strict=True)):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)


def test_a_gradient_through_the_corrections_would_be_seen() -> None:
    """The reference without its detach differs: so the test above says that they carry none."""
    norm, x = trained(100.0, 100.0), batch().requires_grad_()
    free = norm.weight.view(1, -1, 1, 1) * (x - norm.running_mean.view(1, -1, 1, 1))  # type: ignore[union-attr]
    free = free / (norm.running_scale + norm.eps).view(1, -1, 1, 1)  # type: ignore[operator]
    g = torch.randn_like(x)
    found = torch.autograd.grad((norm(x) * g).sum(), x)[0]
    assert not torch.allclose(found, torch.autograd.grad((free * g).sum(), x)[0], rtol=1e-3, atol=1e-3)


def test_with_free_limits_training_computes_what_eval_does() -> None:
    norm, x = trained(100.0, 100.0), batch()
    check_close("y", norm(x), copy.deepcopy(trained(100.0, 100.0)).eval()(x), TOLERANCES[torch.float64].y)


def test_with_closed_limits_it_is_batch_norm() -> None:
    norm, x = trained(1.0, 0.0), batch()
    plain = BatchNorm(4, metric="l2", dtype=torch.float64)
    plain.load_state_dict({name: value for name, value in norm.state_dict().items() if name != "trained"})
    check_close("y", norm(x), plain(x), TOLERANCES[torch.float64].y)
    for name, value in plain.named_buffers():
        assert torch.equal(value, norm.get_buffer(name)), name


@pytest.mark.parametrize("step", [0, 5_000, 15_000, 25_000, 40_000, 90_000])
def test_schedule(step: int) -> None:
    """r_max from 1 to 3 over steps 5k to 40k, d_max from 0 to 5 over 5k to 25k."""
    norm = trained(schedule=SCHEDULE)
    norm.get_buffer("num_batches_tracked").fill_(step)
    r_max, d_max = (float(value) for value in norm.limits())
    assert r_max == pytest.approx(1 + 2 * min(max((step - 5_000) / 35_000, 0), 1))
    assert d_max == pytest.approx(5 * min(max((step - 5_000) / 20_000, 0), 1))
    norm.get_buffer("trained").fill_(True)
    assert [float(value) for value in norm.limits()] == [3.0, 5.0]


def test_limits_travel_with_the_state() -> None:
    norm = trained(schedule=SCHEDULE)
    norm.get_buffer("num_batches_tracked").fill_(20_000)
    other = BatchRenorm(4, dtype=torch.float64)
    other.load_state_dict(norm.state_dict())
    assert torch.equal(torch.stack(other.limits()), torch.stack(norm.limits()))


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics_follow_the_batch(momentum: float | None) -> None:
    norm, x = trained(momentum=momentum), batch()
    before = copy.deepcopy(norm)
    norm(x)
    factor = 1.0 if momentum is None else momentum  # the first batch of a cumulative average
    scale = x.std((0, 2, 3), correction=0)
    for name, seen in (("running_mean", x.mean((0, 2, 3))), ("running_scale", scale)):
        torch.testing.assert_close(norm.get_buffer(name), torch.lerp(before.get_buffer(name), seen, factor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half(dtype: torch.dtype) -> None:
    norm, x = trained(dtype=torch.float32), batch()
    wanted = reference(trained(), x.to(dtype).double(), 3.0, 5.0)
    y = norm.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and norm.get_buffer("running_scale").dtype == torch.float32
    check_close("y", y, wanted, TOLERANCES[dtype].y, unit=10.0)


@pytest.mark.parametrize("metric", ["l1", "topk:3"])
def test_other_metrics(metric: str) -> None:
    """The batch's own reading, against the running one of the same metric."""
    norm, x = trained(100.0, 100.0, metric=metric), batch()
    check_close("y", norm(x), trained(100.0, 100.0, metric=metric).eval()(x), TOLERANCES[torch.float64].y)


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_gradients(backend: str) -> None:
    """The backward must not compute r and d anew from running statistics that the forward has moved since."""
    torch._dynamo.reset()
    norm, x, g = trained(dtype=torch.float32), batch().float(), batch().float()
    eager = copy.deepcopy(norm)
    for module in (torch.compile(norm, fullgraph=True, backend=backend), eager):
        (module(x) * g).sum().backward()
    for found, wanted in zip(norm.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
def test_second_derivatives(r_max: float, d_max: float) -> None:
    """Autograd alone and torch.func, against the paper's formulas."""
    norm, x = trained(r_max, d_max), batch()
    parameters = dict(norm.named_parameters())

    def second(function: Any, x: Tensor) -> tuple[Tensor, ...]:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, norm.weight, norm.bias))

    fixed = copy.deepcopy(norm)
    wanted = second(lambda x: reference(norm, x, r_max, d_max), x)
    state = {name: value.clone() for name, value in fixed.named_buffers()}
    with_state = lambda x: torch.func.functional_call(  # noqa: E731
        norm, parameters | {name: value.clone() for name, value in state.items()}, x
    )
    first = lambda x: torch.func.grad(lambda x: with_state(x).sin().sum())(x)  # noqa: E731
    torch.testing.assert_close(torch.func.grad(lambda x: first(x).square().sum())(x), wanted[0], rtol=1e-9, atol=1e-9)
    for found, expected in zip(second(norm, x), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# --- activation checkpointing -----------------------------------------------------------------------------------------


def chain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two norms, one of them at two places, whose corrections show."""
    torch.manual_seed(3)
    norm = trained(dtype=dtype)
    return nn.Sequential(
        nn.Conv2d(4, 4, 2, dtype=dtype), norm, nn.Tanh(), nn.Conv2d(4, 4, 2, dtype=dtype), norm, nn.Tanh()
    )


def after(model: nn.Module, run: Any, steps: int = 3) -> list[Tensor]:
    """Every step's gradients, and the buffers at the end. The first two steps see the same batch."""
    found = []
    for seed in [0, 0, *range(1, steps - 1)]:
        x = torch.randn((6, 4, 5, 5), generator=torch.Generator().manual_seed(seed)).requires_grad_()
        model.zero_grad()
        run(x).pow(3).mean().backward()
        found += [x.grad, *(value.grad.clone() for value in model.parameters())]  # type: ignore[union-attr, list-item]
    return found + list(model.buffers())


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    """Gradients, the steps after, and running statistics, which a batch enters once."""
    wanted, model = after(plain := chain(), plain), chain()
    found = after(model, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_checkpointed_parts_in_each_other_and_gradients_twice() -> None:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(model[:3], x, use_reentrant=False)  # type: ignore[no-any-return]

    wanted, model = after(plain := chain(), plain), chain()
    outer = lambda x: checkpoint(lambda x: model[3:](inner(x)), x, use_reentrant=False)  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(after(model, outer), wanted, strict=True))
    x = batch().float().requires_grad_()
    y = checkpoint(model, batch((6, 4, 5, 5)).float().requires_grad_(), use_reentrant=False).sum() + x.sum()
    first = torch.autograd.grad(y, list(model.parameters()), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, list(model.parameters())), strict=True):
        assert torch.equal(a, b)


def test_micro_batches_before_their_backwards() -> None:
    """As a pipeline runs them: each is repeated with its own corrections."""
    batches = [torch.randn(6, 4, 5, 5).requires_grad_() for _ in range(4)]
    found = []
    for checkpointed in (False, True):
        model = chain()
        run = (lambda x, model=model: checkpoint(model, x, use_reentrant=False)) if checkpointed else model
        for y in [run(x).pow(3).mean() for x in batches]:
            y.backward()
        found.append([value.grad for value in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_compiled_network_inside_a_checkpoint() -> None:
    torch._dynamo.reset()
    plain, model = chain(), chain()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
    x, grads = torch.randn(6, 4, 5, 5), []
    for run in (plain, lambda x: checkpoint(compiled, x, use_reentrant=False)):
        run(x.clone().requires_grad_()).pow(3).mean().backward()
        grads.append([value.grad for value in (plain if run is plain else model).parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_that_is_not_finite_is_recomputed_too() -> None:
    model = chain()
    x = torch.full((6, 4, 5, 5), torch.inf).requires_grad_()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert model[0].weight.grad.isnan().all()  # type: ignore[union-attr]


def test_what_is_no_repetition_is_refused() -> None:
    norm, x = trained(), batch().requires_grad_()
    noise = lambda x: norm(x + torch.rand_like(x)).tanh()  # noqa: E731
    with pytest.raises(NormRewriteError, match="none of the last 32 it was trained on"):
        checkpoint(noise, x, use_reentrant=False, preserve_rng_state=False).sum().backward()


def test_what_is_remembered_goes_with_the_norm() -> None:
    norm = trained()
    for _ in range(2 * recomputation.FORWARDS):
        norm(batch())
    kept = recomputation._recent
    assert len(kept[norm.trained]) == recomputation.FORWARDS and pickle.loads(pickle.dumps(norm))
    size = len(kept)
    del norm
    gc.collect()
    assert len(kept) < size


def test_statistics_that_are_switched_off_stay() -> None:
    """And still correct, so that a second look at a batch computes what the first did."""
    norm, x = trained(), batch()
    before = copy.deepcopy(norm)
    norm.track_running_stats = False
    y = norm(x)
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), before.buffers(), strict=True))
    assert torch.equal(y, before(x)) and not torch.equal(norm.running_mean, before.running_mean)  # type: ignore[arg-type]


def test_a_trace_is_one_node() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(trained()))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]


def test_one_value_a_channel_is_refused() -> None:
    norm = trained()
    norm.site = "layer1.bn1"
    with pytest.raises(NormRewriteError, match=r"layer1\.bn1: .*more than one value a channel.*\(input \(1, 4\)\)"):
        norm(batch((1, 4)))


def test_without_statistics_it_is_batch_norm() -> None:
    norm = BatchRenorm(4, track_running_stats=False, dtype=torch.float64)
    x = batch()
    assert torch.equal(norm(x), BatchNorm(4, track_running_stats=False, metric="l2", dtype=torch.float64)(x))


def test_repr() -> None:
    assert repr(BatchRenorm(4)).endswith("r_max=3.0, d_max=5.0, schedule=(5000, 40000, 25000))")
