"""Second derivatives, forward mode, torch.func and many gradients at once, of every row and scope."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu

from normrewrite.backends import families, half, operators, plain
from normrewrite.backends.accumulate import Accumulator
from normrewrite.backends.dispatch import kernels
from normrewrite.errors import NormRewriteError
from normrewrite.norms import metric
from tests.backends import test_torch_batch, test_torch_sample
from tests.backends.test_torch_batch import EPS, ROWS
from tests.backends.tolerances import check_close

Function = Callable[..., Tensor]
SHAPE = (3, 2, 2, 3)  # (B, G, K, S); as (N, C, *), two channels
SCOPES = ("batch", "row", "rms")

every_row = pytest.mark.parametrize("spec", ROWS)
every_scope = pytest.mark.parametrize("scope", SCOPES)


def inputs(scope: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64).exp().to(dtype)
    affine = test_torch_batch.affine_of(2, dtype) if scope == "batch" else test_torch_sample.affine_of(SHAPE, dtype)
    return tuple(value.requires_grad_() for value in (x, *affine))  # type: ignore[return-value]


def ours(scope: str, spec: str) -> Function:
    def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if scope == "batch":
            return operators.batch_norm(x, weight, bias, spec, "exact", EPS)[0]
        return operators.sample_norm(x, weight, bias, spec, "exact", EPS, centred=scope == "row")[0]

    return norm


def theirs(scope: str, spec: str) -> Function:
    """Formulas of the tests' own, that torch differentiates."""
    if scope == "batch":
        return lambda *values: test_torch_batch.plain(*values, metric(spec))
    return lambda *values: test_torch_sample.plain(*values, metric(spec), scope == "row")


def second(function: Function, *values: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a penalty of first gradients, whose upstream gradient depends on x, too."""
    first = torch.autograd.grad(function(*values).sin().sum(), values, create_graph=True)
    return torch.autograd.grad(sum((value**2).sum() for value in first), values)  # type: ignore[arg-type]


@every_row
@every_scope
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_are_those_of_the_formulas(scope: str, spec: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    values = inputs(scope, dtype)
    wide = [value.detach().double().requires_grad_() for value in values]
    wanted = second(theirs(scope, spec), *wide)
    for name, found, expected, value in zip("xwb", second(ours(scope, spec), *values), wanted, values, strict=True):
        assert found.dtype == value.dtype
        check_close(name, found, expected, tolerance)
    with pytest.raises(AssertionError, match="off by"):
        check_close("x", 1.01 * wanted[0], wanted[0], min(tolerance, 1e-4))


@every_row
@every_scope
def test_higher_derivatives_are_those_of_the_formulas(scope: str, spec: str) -> None:
    x, weight, bias = inputs(scope)

    def value(function: Function) -> Tensor:
        (first,) = torch.autograd.grad(function(x, weight, bias).sin().sum(), x, create_graph=True)
        (twice,) = torch.autograd.grad(first.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(twice.square().sum(), x)[0]

    check_close("third", value(ours(scope, spec)), value(theirs(scope, spec)), 1e-9)


@every_row
@every_scope
def test_torch_func_gives_what_autograd_gives(scope: str, spec: str) -> None:
    x, weight, bias = (value.detach() for value in inputs(scope))
    loss = lambda norm: lambda *values: norm(*values).sin().sum()  # noqa: E731
    found, wanted = loss(ours(scope, spec)), loss(theirs(scope, spec))
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        check_close(transform.__name__, transform(found)(x, weight, bias), transform(wanted)(x, weight, bias), 1e-12)
    many = torch.stack([x, 2 * x.flip(0), x.cos()])
    by_sample = torch.vmap(torch.func.grad(found, (0, 1, 2)), (0, None, None))(many, weight, bias)
    alone = [torch.func.grad(wanted, (0, 1, 2))(one, weight, bias) for one in many]
    for name, value, expected in zip("xwb", by_sample, zip(*alone, strict=True), strict=True):
        check_close(name, value, torch.stack(expected), 1e-12)


@every_row
@every_scope
def test_forward_mode(scope: str, spec: str) -> None:
    """An operator would lose the tangent without a word."""
    assert gradcheck(ours(scope, spec), inputs(scope), check_forward_ad=True, check_backward_ad=False, fast_mode=True)
    x, tangent = inputs(scope)[0].detach(), torch.ones(SHAPE, dtype=torch.float64)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(ours(scope, spec)(forward_ad.make_dual(x, tangent))).tangent is not None


@every_row
@every_scope
def test_many_gradients_at_once(scope: str, spec: str) -> None:
    values = inputs(scope)
    y = ours(scope, spec)(*values)
    many = torch.randn(4, *y.shape, dtype=y.dtype)
    together = torch.autograd.grad(y, values, many, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(many):
        for found, wanted in zip(together, torch.autograd.grad(y, values, g, retain_graph=True), strict=True):
            check_close("gradient", found[i], wanted, 1e-12)


@pytest.mark.parametrize("spec", ["l1", "range"])
@pytest.mark.parametrize("sample", [False, True], ids=["batch", "row"])
@pytest.mark.parametrize("added", [False, True], ids=["relu", "add+relu"])
def test_with_relu_as_one_operator(spec: str, sample: bool, added: bool) -> None:
    x, weight, bias = inputs("row" if sample else "batch")
    values = [x, weight, bias, *([torch.randn_like(x).requires_grad_()] if added else [])]

    def together(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return operators.norm_relu(x, residual, weight, bias, spec, "exact", EPS, sample)[0]

    def apart(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        y = theirs("row" if sample else "batch", spec)(x, weight, bias)
        return (y if residual is None else y + residual).relu()

    for found, wanted in zip(second(together, *values), second(apart, *values), strict=True):
        check_close("second", found, wanted, 1e-11)
    y, many = together(*values), torch.randn(2, *SHAPE, dtype=x.dtype)
    batched = torch.autograd.grad(y, values, many, is_grads_batched=True, retain_graph=True)
    for found, wanted in zip(batched, torch.autograd.grad(y, values, many[1]), strict=True):
        check_close("many", found[1], wanted, 1e-12)


def test_no_fused_operator_under_torch_func() -> None:
    with kernels("triton"):
        seen = []
        torch.func.vmap(lambda x: seen.append(operators.as_one(x, None)) or x)(torch.randn(2, 3))
        assert operators.as_one(torch.randn(2, 3), None) and seen == [False]


def test_the_root_of_zero_and_zeros_among_deviations() -> None:
    """A dead channel has no slope; at d = 0 the square still has a second derivative."""
    x = torch.randn(6, 3, dtype=torch.float64)
    x[:, 1] = 2
    for spec in ROWS:
        (found,) = second(ours("batch", spec), x.clone().requires_grad_())
        assert found.isfinite().all() and not found[:, 1].any(), spec
    x = torch.randn(SHAPE, dtype=torch.float64).relu()
    assert gradgradcheck(ours("rms", "l2"), [x.requires_grad_()], fast_mode=True)


@every_row
def test_a_dead_channel_in_fp16_stays_finite(spec: str) -> None:
    x = torch.randn(6, 3).half()
    x[:, 1] = 2
    g = torch.randn_like(x).requires_grad_()
    (first,) = torch.autograd.grad(ours("batch", spec)(x.requires_grad_()), x, g, create_graph=True)
    for found in torch.autograd.grad(first, (g, x), torch.randn_like(x)):
        assert found.isfinite().all()


def test_saved_tensors_may_be_kept_elsewhere() -> None:
    """torch.func refuses hooks on saved tensors, and so isn't what computes a second derivative."""
    values = inputs("batch")
    with save_on_cpu():
        found = second(ours("batch", "topk:3"), *values)
    for a, b in zip(found, second(ours("batch", "topk:3"), *values), strict=True):
        assert torch.equal(a, b)


def test_first_derivatives_save_as_before() -> None:
    """What is kept for a second derivative is kept where one is asked for."""
    kept: list[Tensor] = []
    x = torch.randn(64, 8, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        y = ours("batch", "l1")(x)
        y.backward(torch.randn_like(y))
    assert [value.numel() for value in kept if value.numel() > 64] == [x.numel()]


def test_half_arithmetic_refuses_by_name() -> None:
    rule = half.Rule(metric("l1"), "exact", EPS, Accumulator(64))
    x = torch.randn(4, 6).half().requires_grad_()
    for norm in (
        lambda x: half.normalise_batch(x, None, None, rule)[0],
        lambda x: half.centre(x, torch.zeros(6).half(), Accumulator(64))[0],
    ):
        with pytest.raises(NormRewriteError, match=r"half arithmetic is neither for torch\.func"):
            torch.func.vmap(norm)(x[None])
        (first,) = torch.autograd.grad(norm(x).float().square().sum(), x, create_graph=True)
        with pytest.raises(NormRewriteError, match="half arithmetic has first derivatives alone"):
            first.float().square().sum().backward()


def test_a_refusal_sees_variables_behind_a_constant_gradient() -> None:
    """Torch's own `once_differentiable` would answer with a gradient that misses them."""
    rule = half.Rule(metric("l1"), "exact", EPS, Accumulator(64))
    x = torch.randn(4, 6).half().requires_grad_()
    g = torch.randn(4, 6).half()
    (first,) = torch.autograd.grad(half.normalise_batch(x, None, None, rule)[0], x, g, create_graph=True)
    with pytest.raises(NormRewriteError, match="half arithmetic has first derivatives alone"):
        first.float().square().sum().backward()


def test_a_batch_norm_is_a_row_norm_of_its_channels() -> None:
    x = torch.randn(4, 3, 2, 5)
    assert families.by_batch(x).shape == (1, 3, 1, 40) and torch.equal(families.from_batch(families.by_batch(x), x), x)
    assert not plain.transformed()
