"""Norms within a sample: every row of the table through one suite, against float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normrewrite.backends import reference, torch_sample
from normrewrite.backends.operators import sample_norm as normalise
from normrewrite.errors import NormRewriteError
from normrewrite.norms import Metric, metric
from tests.backends.test_torch_batch import DATA, DTYPES, EPS, ROWS, gradients, scale_backwards
from tests.backends.tolerances import TOLERANCES, check_close

# (B, G, K, S): a layer norm, one at each position of few channels, groups, instances; 1023 and 3 × 7 fit no vector width.
SHAPES = ((2, 1, 1023, 1), (37, 1, 5, 1), (2, 3, 4, 21), (2, 5, 1, 21))

every_row = pytest.mark.parametrize("spec", ROWS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
both = pytest.mark.parametrize("centred", [True, False], ids=["centred", "rms"])

Shape = tuple[int, int, int, int]


def samples(kind: str, shape: Shape, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """No two rows share a mean or a spread."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(1, shape[0] * shape[1] + 1, dtype=torch.float64).view(*shape[:2], 1, 1)
    return (DATA[kind](generator, shape) * row - row / 2).to(dtype)


def affine_of(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight of both signs away from zero, and bias, by channel."""
    generator = torch.Generator().manual_seed(1)
    signs = 1 - 2 * (torch.arange(shape[1] * shape[2]) % 2).view(shape[1:3])
    weight = (0.5 + torch.rand(shape[1:3], generator=generator)) * signs
    return weight.to(dtype), torch.randn(shape[1:3], generator=generator).to(dtype)


def plain(x: Tensor, weight: Tensor, bias: Tensor, row: Metric, centred: bool) -> Tensor:
    """The same function in differentiable torch operations: autograd's own gradient is the oracle of ours."""
    flat = x.flatten(2)
    d = flat - flat.mean(2, keepdim=True) if centred else flat
    n = d.shape[2]
    if row.family == "mean":
        spread = d.abs().pow(row.power).mean(2).pow(1 / row.power)
    elif row.family == "top":
        spread = d.abs().sort(2).values[:, :, n - row.k(n) :].mean(2)
    else:
        spread = d.amax(2) - d.amin(2)
    y: Tensor = (d / (row.gain(n) * spread + EPS)[:, :, None]).view(x.shape)
    return weight[None, :, :, None] * y + bias[None, :, :, None]


def ours(row: Metric, centred: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, weight, bias: normalise(x, weight, bias, row, "exact", EPS, centred)[0]


def variants(x: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts; `channels_last` is what a group norm's view of such an input looks like."""
    gapped = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2]
    last = torch.empty(*(x.shape[i] for i in (0, 3, 1, 2)), dtype=x.dtype).permute(0, 2, 3, 1)
    return {"contiguous": x.clone(), "gapped": gapped.copy_(x), "channels_last": last.copy_(x)}


# --- forward ---------------------------------------------------------------------------------------------------------


def check_forward(
    found: tuple[Tensor, ...], x: Tensor, weight: Tensor, bias: Tensor, row: Metric, centred: bool
) -> None:
    values, *affine = (value.detach().double().numpy() for value in (x, weight, bias))
    wanted = reference.row_norm(values, row, *affine, EPS, centred=centred)
    tolerance = TOLERANCES[x.dtype]
    check_close("y", found[0], wanted[0], tolerance.y)
    check_close("mean", found[1], wanted[1], tolerance.statistics, unit=float(x.double().abs().mean()))
    check_close("C * S", found[2], wanted[2], tolerance.statistics)


@every_row
@both
@every_dtype
@every_shape
def test_forward_matches_the_reference(spec: str, centred: bool, dtype: torch.dtype, shape: Shape) -> None:
    weight, bias = affine_of(shape, dtype)
    for kind in DATA:
        x = samples(kind, shape, dtype)
        kept = x.clone()
        found = normalise(x, weight, bias, metric(spec), "exact", EPS, centred)
        check_forward(found, x, weight, bias, metric(spec), centred)
        assert found[0].dtype == dtype
        assert {found[1].dtype, found[2].dtype} == {torch.promote_types(dtype, torch.float32)}
        assert torch.equal(x, kept)


@every_row
@every_dtype
def test_a_measure_one_percent_off_is_caught(spec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight, bias) = samples("laplace", SHAPES[2], dtype), affine_of(SHAPES[2], dtype)
    measure = torch_sample.measure_lines
    monkeypatch.setattr(torch_sample, "measure_lines", lambda *args: (1.01 * measure(*args)[0], measure(*args)[1]))
    found = normalise(x, weight, bias, metric(spec), "exact", EPS)
    with pytest.raises(AssertionError, match="y: off by"):
        check_forward(found, x, weight, bias, metric(spec), True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l2_is_torchs_own(shape: Shape) -> None:
    """With an eps too small to matter: torch adds it to the variance, ours is added to the scale."""
    x, (weight, bias) = samples("lognormal", shape, torch.float64), affine_of(shape, torch.float64)
    tiny, flat, n = 1e-30, (weight.flatten(), bias.flatten()), shape[2] * shape[3]
    grouped = F.group_norm(x.flatten(1, 2), shape[1], *flat, tiny).view(shape)
    found = normalise(x, weight, bias, "l2", "exact", tiny)[0]
    check_close("group_norm", found, grouped, 1e-13)
    bare = normalise(x, None, None, "l2", "exact", tiny)[0].flatten(2)
    check_close("layer_norm", bare, F.layer_norm(x.flatten(2), (n,), eps=tiny), 1e-13)
    rms = normalise(x, None, None, "l2", "exact", tiny, centred=False)[0].flatten(2)
    check_close("rms_norm", rms, F.rms_norm(x.flatten(2), (n,), eps=tiny), 1e-13)


@every_row
@both
@every_shape
def test_fp16_far_out_stays_finite(spec: str, centred: bool, shape: Shape) -> None:
    """Mean 300, standard deviation 10 000: squares lie 1500 times beyond fp16, sums of magnitudes too."""
    generator = torch.Generator().manual_seed(0)
    x = (300 + 10_000 * torch.randn(shape, generator=generator)).clamp(-65_000, 65_000).half()
    weight, bias = affine_of(shape, torch.float16)
    y = normalise(x, weight, bias, metric(spec), "exact", EPS, centred)[0]
    values, *affine = (value.double().numpy() for value in (x, weight, bias))
    check_close("y", y, reference.row_norm(values, metric(spec), *affine, EPS, centred=centred)[0], 2e-3)
    for gradient in gradients(ours(metric(spec), centred), torch.randn(shape).half(), x, weight, bias):
        assert bool(gradient.isfinite().all())


# --- backward --------------------------------------------------------------------------------------------------------


def grad_checks(row: Metric, x: Tensor, centred: bool, with_affine: bool = True) -> bool:
    shape: Any = tuple(x.shape)
    weight, bias = (value.requires_grad_() if with_affine else None for value in affine_of(shape, x.dtype))
    inputs: Any = (x.detach().requires_grad_(), weight, bias)
    passed: bool = torch.autograd.gradcheck(ours(row, centred), inputs)
    return passed


@every_row
@both
@pytest.mark.parametrize("with_affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("shape", [(2, 1, 7, 1), (2, 2, 3, 2), (1, 2, 1, 5)], ids=str)
def test_gradcheck(spec: str, centred: bool, with_affine: bool, shape: Shape) -> None:
    """With weight and bias in every layout, which they have no part in."""
    layouts = variants(samples("laplace", shape, torch.float64))
    for x in layouts.values() if with_affine else [layouts["contiguous"]]:
        assert grad_checks(metric(spec), x, centred, with_affine)


@every_row
@pytest.mark.parametrize("which", [0, 1, 2], ids=["dx", "dweight", "dbias"])
def test_gradcheck_catches_one_percent(spec: str, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scale_backwards(which, monkeypatch)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        grad_checks(metric(spec), samples("laplace", (2, 2, 3, 2), torch.float64), centred=True)


def without_ties(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Distinct |x| and |x - mean| in eight bits: else half precision and float64 may pick different extremes."""
    n = shape[2] * shape[3]
    values = torch.arange(n, dtype=torch.float64)
    values[n - 1], values[n - 2] = values[n - 1] + n // 2, values[n - 2] + n // 3
    orders = [
        values[torch.randperm(n, generator=torch.Generator().manual_seed(i))] for i in range(math.prod(shape[:2]))
    ]
    return torch.stack(orders).view(shape).to(dtype)


@every_row
@both
@every_dtype
@pytest.mark.parametrize("shape", [(2, 1, 37, 1), (2, 2, 3, 7), (2, 3, 1, 35)], ids=str)
def test_backward_matches_autograd_in_float64(spec: str, centred: bool, dtype: torch.dtype, shape: Shape) -> None:
    x = without_ties(shape, dtype)
    weight, bias = affine_of(shape, torch.promote_types(dtype, torch.float32))
    g = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)
    found = gradients(ours(metric(spec), centred), g, x, weight, bias)
    wide = [value.double() for value in (x, weight, bias)]
    wanted = gradients(lambda *inputs: plain(*inputs, metric(spec), centred), g.double(), *wide)
    terms, tolerance = float(g.double().abs().sum((0, 3)).max()), TOLERANCES[dtype]
    check_close("dx", found[0], wanted[0], tolerance.dx)
    check_close("dweight", found[1], wanted[1], tolerance.sums, unit=max(terms, float(wanted[1].abs().max())))
    check_close("dbias", found[2], wanted[2], tolerance.sums, unit=terms)
    assert [value.dtype for value in found] == [dtype, weight.dtype, bias.dtype]
    half = gradients(ours(metric(spec), centred), g, x, weight.to(dtype), bias.to(dtype))
    assert {value.dtype for value in half} == {dtype}


# --- edges -----------------------------------------------------------------------------------------------------------


@every_row
@both
@every_dtype
def test_a_dead_row_stays_finite(spec: str, centred: bool, dtype: torch.dtype) -> None:
    """y of a constant row is the bias, dx finite, other rows untouched. Not centred, zeros alone are dead."""
    x = samples("laplace", (2, 2, 3, 7), dtype)
    x[0, 0], x[0, 1] = 0.0, 0.1 if centred else 0.0
    weight, bias = affine_of((2, 2, 3, 7), dtype)
    y = normalise(x, weight, bias, metric(spec), "exact", EPS, centred)[0]
    check_close("y", y[0], bias[:, :, None].expand(2, 3, 7), tolerance=5e-2, unit=1.0)
    alone = normalise(x[1:], weight, bias, metric(spec), "exact", EPS, centred)[0]
    check_close("live rows", y[1:], alone, TOLERANCES[dtype].y)
    for gradient in gradients(ours(metric(spec), centred), torch.randn(y.shape).to(dtype), x, weight, bias):
        assert bool(gradient.isfinite().all())


@every_row
@both
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(spec: str, centred: bool, bad: float) -> None:
    x, (weight, bias) = samples("laplace", (2, 2, 3, 7), torch.float32), affine_of((2, 2, 3, 7), torch.float32)
    wanted = normalise(x, weight, bias, metric(spec), "exact", EPS, centred)[0]
    x[0, 1, 2, 3] = bad
    y = normalise(x, weight, bias, metric(spec), "exact", EPS, centred)[0]
    assert torch.equal(y[1], wanted[1]) and torch.equal(y[0, 0], wanted[0, 0])
    assert not bool(y[0, 1].isfinite().all())
    dx = gradients(ours(metric(spec), centred), torch.ones_like(x), x, weight, bias)[0]
    assert bool(dx[1].isfinite().all() and dx[0, 0].isfinite().all())


@every_row
def test_no_rows_at_all(spec: str) -> None:
    x = torch.zeros(0, 2, 3, 7, requires_grad=True)
    y = normalise(x, *affine_of((2, 2, 3, 7), torch.float32), metric(spec), "exact", EPS)[0]
    y.sum().backward()
    assert y.shape == x.shape and x.grad is not None and x.grad.shape == x.shape


def test_rows_that_are_too_short() -> None:
    with pytest.raises(NormRewriteError, match="l1 needs at least 2 elements that share statistics, got 1"):
        normalise(torch.randn(4, 3, 1, 1), None, None, "l1", "exact", EPS)
    with pytest.raises(NormRewriteError, match="topk:10 needs at least 10 elements"):
        normalise(torch.randn(4, 1, 8, 1), None, None, "topk:10", "exact", EPS)


@every_row
@both
@pytest.mark.parametrize("layout", ["contiguous", "gapped", "channels_last"])
def test_operators_are_what_compilers_are_told(spec: str, centred: bool, layout: str) -> None:
    """Shapes, dtypes and strides as announced, nothing changed in place: inductor asserts each of them when it runs."""
    shape = (2, 2, 3, 7)
    x, (weight, bias) = variants(samples("laplace", shape, torch.float32))[layout], affine_of(shape, torch.float32)
    arguments = (spec, "exact", EPS, centred)
    checks = ("test_schema", "test_faketensor")
    forward, backward = torch.ops.normrewrite.row_norm.default, torch.ops.normrewrite.row_norm_backward.default
    torch.library.opcheck(forward, (x, weight, bias, *arguments), test_utils=checks)
    y, *kept = forward(x, weight, bias, *arguments)
    assert y.stride() == torch.empty_like(x).stride()
    for upstream in variants(torch.randn(shape)).values():
        torch.library.opcheck(backward, (upstream, x, weight, *kept, *arguments), test_utils=checks)


@every_row
@both
def test_nothing_of_the_size_of_x_is_saved_but_x(spec: str, centred: bool) -> None:
    x = samples("laplace", (4, 3, 4, 21), torch.float16).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):  # type: ignore[func-returns-value]
        ours(metric(spec), centred)(x, *affine_of((4, 3, 4, 21), torch.float16))
    assert [value.data_ptr() for value in saved if value.numel() >= x.numel()] == [x.data_ptr()]
