"""The torch backend: every row of the table through one suite, against float64."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from operator import mul
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normrewrite.backends import dispatch, measuring, reference
from normrewrite.backends.operators import batch_norm as normalise
from normrewrite.norms import Metric, metric
from tests.backends.tolerances import TOLERANCES, check_close

ROWS = ("l2", "l1", "linf", "topk:3", "topk:20%", "range")
SHAPES = ((7, 5), (1023, 2), (5, 3, 7), (2, 4, 3, 7), (3, 2, 2, 3, 7))
DTYPES = tuple(TOLERANCES)
EPS = 1e-5

every_row = pytest.mark.parametrize("spec", ROWS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PROPERTY = settings(deadline=None, max_examples=50, derandomize=True, database=None)


def laplace(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    u = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


# Nothing here is Gaussian: a gain that is applied twice, or to the wrong statistic, must not come out right by chance.
DATA: dict[str, Callable[[torch.Generator, tuple[int, ...]], Tensor]] = {
    "lognormal": lambda g, shape: torch.randn(shape, generator=g, dtype=torch.float64).exp(),
    "laplace": laplace,
    "uniform": lambda g, shape: torch.rand(shape, generator=g, dtype=torch.float64),
}


def samples(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """x: (N, C, *); no two channels share a mean or a spread."""
    generator = torch.Generator().manual_seed(seed)
    channel = measuring.per_channel(torch.arange(1, shape[1] + 1, dtype=torch.float64), len(shape))
    return (DATA[kind](generator, shape) * channel - channel / 2).to(dtype)


def affine_of(channels: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """weight of both signs away from zero, and bias."""
    generator = torch.Generator().manual_seed(seed)
    weight = (0.5 + torch.rand(channels, generator=generator)) * (1 - 2 * (torch.arange(channels) % 2))
    return weight.to(dtype), torch.randn(channels, generator=generator).to(dtype)


def plain(x: Tensor, weight: Tensor, bias: Tensor, row: Metric) -> Tensor:
    """The same function in differentiable torch operations: autograd's own gradient is the oracle of ours."""
    rows = x.transpose(0, 1).flatten(1)
    d = rows - rows.mean(1, keepdim=True)
    n = d.shape[1]
    if row.family == "mean":
        spread = d.abs().pow(row.power).mean(1).pow(1 / row.power)
    elif row.family == "top":
        spread = d.abs().sort(1).values[:, n - row.k(n) :].mean(1)
    else:
        spread = d.amax(1) - d.amin(1)
    rows = weight[:, None] * d / (row.gain(n) * spread + EPS)[:, None] + bias[:, None]
    y: Tensor = rows.unflatten(1, (x.shape[0], *x.shape[2:])).transpose(0, 1)
    return y


def gradients(function: Callable[[Tensor, Tensor, Tensor], Tensor], g: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """(dx, dweight, dbias) for upstream g."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    return torch.autograd.grad(function(*leaves), leaves, g)


def ours(row: Metric) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, weight, bias: normalise(x, weight, bias, row, "exact", EPS)[0]


# --- forward ---------------------------------------------------------------------------------------------------------


def check_forward(found: tuple[Tensor, ...], x: Tensor, weight: Tensor, bias: Tensor, row: Metric) -> None:
    wanted = in_float64(x, weight, bias, row, EPS)
    tolerance = TOLERANCES[x.dtype]
    check_close("y", found[0], wanted[0], tolerance.y)
    check_close("mean", found[1], wanted[1], tolerance.statistics, unit=float(x.double().abs().mean()))
    check_close("C * S", found[2], wanted[2], tolerance.statistics)


def in_float64(x: Tensor, weight: Tensor, bias: Tensor, row: Metric, eps: float) -> tuple[reference.Array, ...]:
    """y, mean and C * S of the reference."""
    values, *affine = (value.detach().double().numpy() for value in (x, weight, bias))
    return reference.batch_norm(values, row, affine[0], affine[1], eps)


@every_row
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_the_reference(spec: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight, bias = affine_of(shape[1], dtype)
    for kind in DATA:
        x = samples(kind, shape, dtype)
        kept = x.clone()
        found = normalise(x, weight, bias, metric(spec), "exact", EPS)
        check_forward(found, x, weight, bias, metric(spec))
        assert found[0].dtype == dtype
        assert {found[1].dtype, found[2].dtype} == {torch.promote_types(dtype, torch.float32)}
        assert torch.equal(x, kept)


@every_row
@every_dtype
@pytest.mark.parametrize("which", [0, 2], ids=["y", "spread"])
def test_a_forward_one_percent_off_is_caught(spec: str, dtype: torch.dtype, which: int) -> None:
    x, (weight, bias) = samples("laplace", (5, 3, 7), dtype), affine_of(3, dtype)
    found = list(normalise(x, weight, bias, metric(spec), "exact", EPS))
    found[which] = found[which].double() * 1.01
    with pytest.raises(AssertionError, match="off by"):
        check_forward(tuple(found), x, weight, bias, metric(spec))


@every_row
def test_a_measure_one_percent_off_is_caught(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from inside: the spread itself is wrong, and with it y."""
    x, (weight, bias) = samples("laplace", (5, 3, 7), torch.bfloat16), affine_of(3, torch.bfloat16)
    measure = measuring.measure
    monkeypatch.setattr(measuring, "measure", lambda *args: (1.01 * measure(*args)[0], measure(*args)[1]))
    found = normalise(x, weight, bias, metric(spec), "exact", EPS)
    with pytest.raises(AssertionError, match="off by"):
        check_forward(found, x, weight, bias, metric(spec))


@every_row
@pytest.mark.parametrize("gain", ["exact", "paper"])
def test_gain_and_missing_affine(spec: str, gain: Any) -> None:
    x = samples("lognormal", (5, 3, 7), torch.float64)
    found = normalise(x, None, None, metric(spec), gain, 0.125)
    wanted = reference.batch_norm(x.numpy(), metric(spec), eps=0.125, gain=gain)
    for what, a, b in zip(("y", "mean", "C * S"), found, wanted, strict=True):
        check_close(what, a, b, TOLERANCES[torch.float64].y)


@every_row
def test_a_large_mean_costs_no_spread(spec: str) -> None:
    """Deviations are taken before they are measured: E[x²] - E[x]² would leave no digit of a spread of 3e-4 of the mean.

    An fp32 mean near 1000 is rounded by up to 3e-5, which is 2e-4 of the spread; the reference sees the same x.
    """
    x = (samples("uniform", (64, 2, 31), torch.float64) + 1000).float()
    _, _, spread = normalise(x, None, None, metric(spec), "exact", EPS)
    check_close("C * S", spread, reference.batch_norm(x.double().numpy(), metric(spec))[2], tolerance=2e-4)


# --- backward --------------------------------------------------------------------------------------------------------


def variants(x: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts."""
    gapped = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]
    turned = torch.empty(x.transpose(0, -1).shape, dtype=x.dtype).transpose(0, -1)
    layouts = {"contiguous": x.clone(), "gapped": gapped.copy_(x), "turned": turned.copy_(x)}
    if x.dim() == 4:
        layouts["channels_last"] = x.to(memory_format=torch.channels_last)
    return layouts


def grad_checks(row: Metric, x: Tensor, with_affine: bool) -> bool:
    weight, bias = (value.requires_grad_() if with_affine else None for value in affine_of(x.shape[1], x.dtype))
    inputs: Any = (x.detach().requires_grad_(), weight, bias)
    passed: bool = torch.autograd.gradcheck(ours(row), inputs)
    return passed


@every_row
@pytest.mark.parametrize("with_affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("shape", [(7, 2), (4, 2, 5), (2, 3, 3, 2), (2, 2, 2, 3, 1)], ids=str)
def test_gradcheck(spec: str, with_affine: bool, shape: tuple[int, ...]) -> None:
    """With weight and bias in every layout, which they have no part in."""
    layouts = variants(samples("laplace", shape, torch.float64))
    for x in layouts.values() if with_affine else [layouts["contiguous"]]:
        assert grad_checks(metric(spec), x, with_affine)


def scale_backwards(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One result of every backward in the table is 1 % off."""
    factors = [1.01 if position == which else 1.0 for position in range(3)]

    def scaled(backend: dispatch.Halves) -> dispatch.Halves:
        return replace(backend, backward=lambda *args: tuple(map(mul, backend.backward(*args), factors)))

    monkeypatch.setattr(dispatch, "HALVES", tuple(map(scaled, dispatch.HALVES)))


@every_row
@pytest.mark.parametrize("which", [0, 1, 2], ids=["dx", "dweight", "dbias"])
def test_gradcheck_catches_one_percent(spec: str, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_backwards(which, monkeypatch)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        grad_checks(metric(spec), samples("laplace", (4, 2, 5), torch.float64), with_affine=True)


def without_ties(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Distinct x, and distinct |x - mean|: else half precision and float64 may pick different extremes, both rightly.

    Eight bits hold every value; a quarter more above the mean than below keeps the mean off all midpoints.
    """
    n = math.prod(shape) // shape[1]
    values = torch.arange(n, dtype=torch.float64).clamp_min(0)
    values[n - 1], values[n - 2] = values[n - 1] + n // 2, values[n - 2] + n // 3
    orders = [values[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] for seed in range(shape[1])]
    rows = torch.stack(orders) * 2.0 ** -torch.arange(shape[1])[:, None]
    x: Tensor = rows.unflatten(1, (shape[0], *shape[2:])).transpose(0, 1)
    return x.contiguous().to(dtype)


def check_backward(found: tuple[Tensor, ...], x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, row: Metric) -> None:
    wide_inputs = [value.double() for value in (x, weight, bias)]
    wanted = gradients(lambda x, weight, bias: plain(x, weight, bias, row), g.double(), *wide_inputs)
    tolerance = TOLERANCES[x.dtype]
    terms = float(g.double().abs().transpose(0, 1).flatten(1).sum(1).max())
    check_close("dx", found[0], wanted[0], tolerance.dx)
    check_close("dweight", found[1], wanted[1], tolerance.sums, unit=max(terms, float(wanted[1].abs().max())))
    check_close("dbias", found[2], wanted[2], tolerance.sums, unit=terms)


def backward_case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, fp32-or-wider weight and bias, as under mixed precision, and g with a mean, so that dbias is no residue."""
    weight, bias = affine_of(shape[1], torch.promote_types(dtype, torch.float32))
    g = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)
    return without_ties(shape, dtype), weight, bias, g


@every_row
@every_dtype
@pytest.mark.parametrize("shape", [(7, 5), (37, 3), (5, 3, 7), (2, 4, 3, 7), (3, 2, 2, 3, 7)], ids=str)
def test_backward_matches_autograd_in_float64(spec: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias, g = backward_case(shape, dtype)
    kept = g.clone()
    found = gradients(ours(metric(spec)), g, x, weight, bias)
    check_backward(found, x, weight, bias, g, metric(spec))
    assert [value.dtype for value in found] == [dtype, weight.dtype, bias.dtype]
    assert torch.equal(g, kept)


@every_row
@pytest.mark.parametrize("kind", DATA)
def test_float32_backward_of_many_elements(spec: str, kind: str) -> None:
    x = samples(kind, (1023, 2), torch.float32)
    weight, bias = affine_of(2, torch.float32)
    g = torch.randn(1023, 2) + 0.5
    check_backward(gradients(ours(metric(spec)), g, x, weight, bias), x, weight, bias, g, metric(spec))


@every_row
@pytest.mark.parametrize("which", [0, 1, 2], ids=["dx", "dweight", "dbias"])
@every_dtype
def test_a_backward_one_percent_off_is_caught(spec: str, which: int, dtype: torch.dtype) -> None:
    x, weight, bias, g = backward_case((5, 3, 7), dtype)
    found = list(gradients(ours(metric(spec)), g, x, weight, bias))
    found[which] = found[which].double() * 1.01
    with pytest.raises(AssertionError, match="off by"):
        check_backward(tuple(found), x, weight, bias, g, metric(spec))


@every_row
@every_dtype
def test_parameters_in_half_precision_get_gradients_in_it(spec: str, dtype: torch.dtype) -> None:
    x, weight, bias, g = backward_case((5, 3, 7), dtype)
    wanted = gradients(ours(metric(spec)), g, x, weight.to(dtype).to(weight.dtype), bias)
    found = gradients(ours(metric(spec)), g, x, weight.to(dtype), bias.to(dtype))
    assert torch.equal(found[0], wanted[0])
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


# --- edges -----------------------------------------------------------------------------------------------------------


@every_row
@every_dtype
def test_a_dead_channel_stays_finite(spec: str, dtype: torch.dtype) -> None:
    """Constants that fp32 holds and constants that it does not: y is the bias, dx finite, the live channel untouched."""
    x = samples("laplace", (8, 4, 9), dtype)
    x[:, 0], x[:, 1], x[:, 2] = 0.0, 0.1, -3.0
    weight, bias = affine_of(4, dtype)
    y, _, spread = normalise(x, weight, bias, metric(spec), "exact", EPS)
    # A mean of equal values may be off by a rounding of them, 1e-7 of 0.1 or 3, which eps = 1e-5 turns into 1e-2.
    check_close("y", y[:, :3], bias[:3, None].expand(8, 3, 9), tolerance=5e-2, unit=1.0)
    check_close("C * S", spread[:3], torch.zeros(3), tolerance=1e-6, unit=1.0)
    alone = normalise(x[:, 3:], weight[3:], bias[3:], metric(spec), "exact", EPS)[0]
    check_close("live channel", y[:, 3:], alone, TOLERANCES[dtype].y)
    # 1/eps = 1e5 is beyond fp16, so dx may not be left to overflow: torch's own batch norm stays finite here too.
    for gradient in gradients(ours(metric(spec)), torch.randn(y.shape).to(dtype), x, weight, bias):
        assert torch.equal(gradient.isfinite(), torch.ones_like(gradient, dtype=torch.bool))


@every_row
def test_ties_share_nothing_but_stay_right(spec: str) -> None:
    """Several elements at the same extreme: any one of them may carry the slope, so only what all choices share holds.

    The sum of dx is zero, since y ignores a shift of x; and sum of dx * x is nearly so, since y ignores its scale.
    """
    x = torch.tensor([-2.0, -2.0, -2.0, 1.0, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)[:, None].repeat(1, 2)
    weight, bias = affine_of(2, torch.float64)
    g = torch.randn(8, 2, dtype=torch.float64)
    y, _, spread = normalise(x, weight, bias, metric(spec), "exact", 1e-30)
    check_close("y", y, in_float64(x, weight, bias, metric(spec), 1e-30)[0], 1e-14)
    assert bool((spread > 0).all())
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(normalise(leaf, weight, bias, metric(spec), "exact", 1e-30)[0], leaf, g)
    check_close("sum dx", dx.sum(0), torch.zeros(2), tolerance=1e-13, unit=1.0)
    check_close("sum dx * x", (dx * x).sum(0), torch.zeros(2), tolerance=1e-13, unit=1.0)


@every_row
def test_only_what_requires_a_gradient_gets_one(spec: str) -> None:
    x, weight, bias, g = backward_case((5, 3, 7), torch.float32)
    wanted = gradients(ours(metric(spec)), g, x, weight, bias)
    for wants in itertools.product([False, True], repeat=3):
        leaves = [value.clone().requires_grad_(want) for value, want in zip((x, weight, bias), wants, strict=True)]
        y = ours(metric(spec))(*leaves)
        assert y.requires_grad == any(wants)
        if y.requires_grad:
            y.backward(g)
        for leaf, want, gradient in zip(leaves, wants, wanted, strict=True):
            assert (leaf.grad is not None and torch.equal(leaf.grad, gradient)) if want else leaf.grad is None


@every_row
def test_an_expanded_upstream_gradient(spec: str) -> None:
    """y.sum() hands a g with strides of zero back."""
    x, weight, bias, g = backward_case((5, 3, 7), torch.float64)
    for stretched in (g[:1].expand_as(g), g[:, :, :1].expand_as(g)):
        check_backward(
            gradients(ours(metric(spec)), stretched, x, weight, bias), x, weight, bias, stretched, metric(spec)
        )
    dx, dweight, dbias = gradients(ours(metric(spec)), g.new_ones(()).expand_as(g), x, weight, bias)
    check_close("dx", dx, torch.zeros_like(x), tolerance=1e-13, unit=1.0)  # the sum of y does not depend on x
    check_close("dweight", dweight, torch.zeros(3), tolerance=1e-13, unit=1.0)
    check_close("dbias", dbias, torch.full((3,), 35.0), tolerance=1e-14)


@every_row
def test_statistics_are_detached(spec: str) -> None:
    leaf = samples("laplace", (5, 3, 7), torch.float32).requires_grad_()
    y, mean, spread = normalise(leaf, None, None, metric(spec), "exact", EPS)
    assert (y.requires_grad, mean.requires_grad, spread.requires_grad) == (True, False, False)


@every_row
@every_dtype
def test_nothing_of_the_size_of_x_is_saved_but_x(spec: str, dtype: torch.dtype) -> None:
    """Beside x itself, not a copy: two numbers a channel, the weight, and k index-sign pairs a channel."""
    x = samples("laplace", (16, 3, 7, 7), dtype).requires_grad_()
    weight, bias = (value.requires_grad_() for value in affine_of(3, dtype))
    saved: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        normalise(x, weight, bias, metric(spec), "exact", EPS)
    large = [value for value in saved if value.numel() >= x.numel()]
    assert [value.data_ptr() for value in large] == [x.data_ptr()]
    small = sum(value.numel() * value.element_size() for value in saved if value.numel() < x.numel())
    row, n = metric(spec), 16 * 49
    indices = {"mean": 0, "top": row.k(n), "span": 2}[row.family]
    assert small <= 3 * (4 * 8 + indices * (8 + 8))


@every_row
@every_dtype
def test_channels_last_is_kept(spec: str, dtype: torch.dtype) -> None:
    x, weight, bias, g = backward_case((2, 4, 3, 7), dtype)
    wanted = gradients(ours(metric(spec)), g, x, weight, bias)
    leaf = x.to(memory_format=torch.channels_last).requires_grad_()
    y = normalise(leaf, weight, bias, metric(spec), "exact", EPS)[0]
    (dx,) = torch.autograd.grad(y, leaf, g.to(memory_format=torch.channels_last))
    for tensor in (y, dx):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
    check_close("y", y, normalise(x, weight, bias, metric(spec), "exact", EPS)[0], TOLERANCES[dtype].y)
    check_close("dx", dx, wanted[0], TOLERANCES[dtype].dx)


class _Backwards(TorchDispatchMode):
    """The weight that each call of torch's batch norm backward is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor | None] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.native_batch_norm_backward.default:
            self.weights.append(args[2])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_sums_are_asked_for_as_cuda_gives_them(memory_format: torch.memory_format) -> None:
    """Its kernels leave out what they would write into a weight's gradient, where there is no weight."""
    x, g = (torch.randn(4, 6, 8, 8).contiguous(memory_format=memory_format) for _ in range(2))
    with _Backwards() as seen:
        measuring.power_sums(x, torch.zeros(6), metric("l1"))
        measuring.sums(g.half(), x.half(), torch.zeros(6), torch.ones(6))
    assert seen.weights and all(given is not None and given.dtype is torch.float32 for given in seen.weights)


@every_row
@pytest.mark.parametrize("layout", ["contiguous", "gapped", "turned", "channels_last"])
def test_operators_are_what_compilers_are_told(spec: str, layout: str) -> None:
    """Shapes, dtypes and strides as announced, nothing changed in place: inductor asserts each of them when it runs."""
    x, weight, bias, g = backward_case((2, 4, 3, 7), torch.float32)
    arguments = (spec, "exact", EPS)
    x = variants(x)[layout]
    forward, backward = torch.ops.normrewrite.batch_norm.default, torch.ops.normrewrite.batch_norm_backward.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (x, weight, bias, *arguments), test_utils=checks)
    kept = forward(x, weight, bias, *arguments)[1:]
    for upstream in variants(g).values():
        torch.library.opcheck(backward, (upstream, x, weight, *kept, *arguments), test_utils=checks)


# --- properties ------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(3, 9), st.integers(1, 4), st.lists(st.integers(1, 5), max_size=3)).map(
    lambda parts: (parts[0], parts[1], *parts[2])
)


@PROPERTY
@given(
    spec=st.sampled_from(ROWS),
    shape=shapes,
    dtype=st.sampled_from((torch.float64, torch.float32)),
    seed=st.integers(0, 2**16),
    factor=st.floats(0.01, 100),
    shift=st.floats(-10, 10),
)
def test_shift_and_scale_do_not_show(
    spec: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, factor: float, shift: float
) -> None:
    x = samples("laplace", shape, torch.float64, seed)
    y = normalise(x, None, None, metric(spec), "exact", 1e-30)[0]
    moved = factor * (x + shift)  # so that the shift is never more than ten times the spread, or x would lose it
    found, mean, spread = normalise(moved.to(dtype), None, None, metric(spec), "exact", 1e-30)
    check_close("y", found, y, tolerance=1e4 * torch.finfo(dtype).eps)
    negated, negated_mean, negated_spread = normalise(-moved.to(dtype), None, None, metric(spec), "exact", 1e-30)
    check_close("-y", -negated, found, tolerance=1e-15)
    assert torch.equal(negated_mean, -mean)
    assert torch.equal(negated_spread, spread)


@PROPERTY
@given(spec=st.sampled_from(ROWS), shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**16))
def test_order_does_not_matter(spec: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    """Samples and channels may come in any order, and positions along any axis."""
    x = samples("uniform", shape, dtype, seed)
    weight, bias = affine_of(shape[1], dtype, seed)
    y = normalise(x, weight, bias, metric(spec), "exact", EPS)[0]
    for axis, size in enumerate(shape):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        by_channel = (weight[order], bias[order]) if axis == 1 else (weight, bias)
        found = normalise(x.index_select(axis, order), *by_channel, metric(spec), "exact", EPS)[0]
        # Sums in another order round differently; a half-precision y may then fall on the other side.
        check_close("y", found, y.index_select(axis, order), 4 * TOLERANCES[dtype].y)
