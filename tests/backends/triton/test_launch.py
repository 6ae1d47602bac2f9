"""The kernels through Triton's interpreter: every row, scope, memory format and dtype through one suite, against float64.

What they are compared with, and how closely, is what the torch backend is: tests/backends/tolerances.py.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normrewrite.backends import operators, relu, torch_batch, torch_sample  # noqa: F401 -- and their operators
from normrewrite.backends.dispatch import kernels
from normrewrite.backends.triton import launch
from normrewrite.errors import NormRewriteError
from normrewrite.norms import Metric, metric
from tests.backends import test_torch_batch as batch
from tests.backends import test_torch_sample as sample
from tests.backends.test_torch_batch import EPS, ROWS, gradients
from tests.backends.tolerances import TOLERANCES, check_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_row = pytest.mark.parametrize("spec", ROWS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = [
    pytest.mark.usefixtures("small_tiles", "by_kernels"),
    # numpy's, of what a GPU passes over in silence, and of lanes that are masked out.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]


@pytest.fixture
def by_kernels() -> Iterator[None]:
    with kernels("triton"):
        yield


# --- batch scope -----------------------------------------------------------------------------------------------------

# 3 × 7 and 5 channels fit no vector; 8 channels at 2 × 16 fit all; single elements side by side; one channel.
BATCHES = ((2, 5, 3, 7), (2, 8, 2, 16), (7, 5), (37, 1, 2))


def both(
    row: Metric, x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, eps: float = EPS
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(y, mean, C * S) and (dx, dweight, dbias)."""
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
    y, *statistics = operators.batch_norm(*leaves, row, "exact", eps)
    return (y, *statistics), torch.autograd.grad(y, leaves, g)


def check(row: Metric, x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> None:
    forward, backward = both(row, x, weight, bias, g)
    batch.check_forward(forward, x, weight, bias, row)
    batch.check_backward(backward, x, weight, bias, g, row)


def batch_layouts(x: Tensor) -> list[Tensor]:
    return [x, x.to(memory_format=torch.channels_last)] if x.dim() == 4 else [x]


@every_row
@every_dtype
def test_batch_scope(spec: str, dtype: torch.dtype) -> None:
    channels_last = (ROWS.index(spec) + DTYPES.index(dtype)) % 2 == 1  # each row and each dtype in both
    x, weight, bias, g = batch.backward_case(BATCHES[0], dtype)
    check(metric(spec), batch_layouts(x)[channels_last], weight, bias, batch_layouts(g)[channels_last])


@every_row
@pytest.mark.parametrize("shape", BATCHES[1:], ids=str)
def test_batch_scope_of_other_shapes(spec: str, shape: tuple[int, ...]) -> None:
    x, weight, bias, g = batch.backward_case(shape, torch.float16)
    for seen in batch_layouts(x):
        check(metric(spec), seen, weight, bias, g)


@every_row
def test_one_percent_is_caught(spec: str) -> None:
    """In bf16 too, where the most is allowed."""
    row = metric(spec)
    x, weight, bias, g = batch.backward_case((2, 5, 3, 7), torch.bfloat16)
    forward, backward = both(row, x, weight, bias, g)
    for place in (0, 2):
        with pytest.raises(AssertionError, match="off by"):
            batch.check_forward(_one_percent_off(forward, place), x, weight, bias, row)
    for place in range(3):
        with pytest.raises(AssertionError, match="off by"):
            batch.check_backward(_one_percent_off(backward, place), x, weight, bias, g, row)


def _one_percent_off(found: tuple[Tensor, ...], place: int) -> tuple[Tensor, ...]:
    return tuple(value.double() * 1.01 if i == place else value for i, value in enumerate(found))


@pytest.mark.parametrize(("spec", "name"), [*((spec, "gain") for spec in ROWS), ("l1", "n")])
def test_a_constant_one_percent_off_is_caught(spec: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from inside, for what kernels are told."""
    row, run = metric(spec), launch.run
    x, weight, bias, g = batch.backward_case((2, 5, 3, 7), torch.float32)

    def off(kernel: Any, programs: int, warps: int, told: dict[str, Any], *more: Any) -> None:
        run(kernel, programs, warps, told | ({name: 1.01 * told[name]} if name in told else {}), *more)

    monkeypatch.setattr(launch, "run", off)
    forward, backward = both(row, x, weight, bias, g)
    with pytest.raises(AssertionError, match="off by"):
        batch.check_forward(forward, x, weight, bias, row)
    with pytest.raises(AssertionError, match="off by"):
        batch.check_backward(backward, x, weight, bias, g, row)


OUTPUTS = [
    ("l2", "moments", "partial"),
    ("l1", "moments", "partial"),
    ("l1", "settle", "mean"),
    ("l1", "deviations", "partial"),
    ("l1", "settle", "spread"),
    ("range", "select", "mean"),
    ("topk:3", "select", "spread"),
    ("l1", "apply", "y"),
    ("l1", "collect", "partial"),
    ("l2", "coefficients", "terms"),
    ("topk:3", "coefficients", "dweight"),
    ("l1", "coefficients", "dbias"),
    ("l1", "gradient", "dx"),
]


@pytest.mark.parametrize(("spec", "kernel", "output"), OUTPUTS)
def test_a_kernel_one_percent_off_is_caught(
    spec: str, kernel: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of them it is, and whatever it writes."""
    x, weight, bias, g = batch.backward_case((2, 5, 3, 7), torch.float32)
    _put_off(kernel, output, monkeypatch)
    with pytest.raises(AssertionError, match="off by"):
        check(metric(spec), x, weight, bias, g)


@pytest.mark.parametrize(
    ("scope", "kernel", "output"),
    [("layer", "row_forward", name) for name in ("y", "mean", "spread")]
    + [("layer", "row_backward", name) for name in ("dx", "partial")]
    + [("group", "parameters", name) for name in ("dweight", "dbias")],
)
def test_a_kernel_within_a_sample_one_percent_off_is_caught(
    scope: str, kernel: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_off(kernel, output, monkeypatch)
    with pytest.raises(AssertionError, match="off by"):
        check_scope(metric("l1"), SCOPES[scope], torch.float32, True)


def _put_off(kernel: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = launch.run

    def off(ran: Any, programs: int, warps: int, told: dict[str, Any], *more: Any) -> None:
        run(ran, programs, warps, told, *more)
        if ran.__name__ == kernel:
            told[f"{output}_ptr"].mul_(1.01)

    monkeypatch.setattr(launch, "run", off)


@pytest.mark.parametrize("spec", ["l2", "l1", "topk:3", "range"])
def test_many_elements_in_large_tiles(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU gets them: 1023 samples, and tiles as large as they come."""
    monkeypatch.undo()
    row = metric(spec)
    for shape in ((1023, 2), (8, 12, 7, 8)):
        x = batch.samples("laplace", shape, torch.float32)
        (weight, bias), g = batch.affine_of(shape[1], torch.float32), torch.randn(shape) + 0.5
        with kernels("triton"):
            check(row, x, weight, bias, g)


@every_row
def test_a_large_mean_costs_no_spread(spec: str) -> None:
    batch.test_a_large_mean_costs_no_spread(spec)


@pytest.mark.parametrize("spec", ["l2", "l1", "topk:3"])
def test_the_same_bits_on_every_run(spec: str) -> None:
    x, weight, bias, g = batch.backward_case((2, 5, 3, 7), torch.float16)
    once, again = (sum(both(metric(spec), x, weight, bias, g), ()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("spec", ["l1", "l2", "topk:3", "range"])
@pytest.mark.parametrize("layout", ["gapped", "channels_last"])
def test_operators_are_what_compilers_are_told(spec: str, layout: str) -> None:
    """Shapes, dtypes and strides as announced, nothing changed in place, no output a view of another."""
    x, weight, bias, g = batch.backward_case((2, 4, 3, 7), torch.float16)
    x, arguments, checks = batch.variants(x)[layout], (spec, "exact", EPS), ("test_schema", "test_faketensor")
    forward, backward = torch.ops.normrewrite.batch_norm.default, torch.ops.normrewrite.batch_norm_backward.default
    torch.library.opcheck(forward, (x, weight, bias, *arguments), test_utils=checks)
    kept = forward(x, weight, bias, *arguments)[1:]
    torch.library.opcheck(backward, (g, x, weight, *kept, *arguments), test_utils=checks)


@pytest.mark.parametrize("spec", ["l2", "l1", "topk:3"])
@pytest.mark.parametrize(("first", "second"), [("triton", "torch"), ("torch", "triton")])
def test_a_backward_may_be_the_other_lowerings(spec: str, first: str, second: str) -> None:
    """The switch may be turned between the two."""
    row = metric(spec)
    x, weight, bias, g = batch.backward_case((2, 5, 3, 7), torch.float32)
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
    with kernels(first):
        y, *_ = operators.batch_norm(*leaves, row, "exact", EPS)
    with kernels(second):
        batch.check_backward(torch.autograd.grad(y, leaves, g), x, weight, bias, g, row)


# Three deviations of each channel are exactly 0: sum and mean are exact in fp32.
AT_THE_MEAN = torch.tensor([-2.0, -1.0, 0.0, 0.0, 0.0, 3.0]).repeat(2, 4, 2)


@every_row
def test_what_is_kept_is_what_torch_keeps(spec: str) -> None:
    """Shapes, dtypes and meaning. Of equal extremes either may be named."""
    found = {}
    for choice in ("torch", "triton"):
        with kernels(choice):
            found[choice] = torch.ops.normrewrite.batch_norm(AT_THE_MEAN, None, None, spec, "exact", EPS)
    for ours, torchs in zip(found["triton"], found["torch"], strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (torchs.shape, torchs.dtype, torchs.stride())
    (y, mean, spread, indices, signs), (*others, other_indices, other_signs) = found["triton"], found["torch"]
    torch.testing.assert_close([y, mean, spread], others)
    if indices.numel():
        rows_ = AT_THE_MEAN.transpose(0, 1).flatten(1)
        signs, other_signs = (
            (rows_.gather(1, at) * sign).sort(1).values for at, sign in ((indices, signs), (other_indices, other_signs))
        )
    torch.testing.assert_close(signs, other_signs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", ["torch", "triton"])
@pytest.mark.parametrize("second", ["torch", "triton"])
def test_a_gradient_sums_to_zero_where_deviations_are_zero(first: str, second: str) -> None:
    """As it must, whatever subgradient is taken there, whichever backend computed the forward and which the backward."""
    x = AT_THE_MEAN.clone().requires_grad_()
    with kernels(first):
        y, *_ = operators.batch_norm(x, None, None, "l1", "exact", EPS)
    with kernels(second):
        (dx,) = torch.autograd.grad(y, x, torch.randn(x.shape) + x.detach())
    assert float(dx.abs().sum((0, 2)).min()) > 1
    torch.testing.assert_close(dx.sum((0, 2)), torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", ["l2", "l1", "topk:3"])
def test_gapped_inputs_and_expanded_gradients(spec: str) -> None:
    row = metric(spec)
    x, weight, bias, g = batch.backward_case((2, 5, 3, 7), torch.float32)
    upstream = g[:, :, :1].expand_as(g)
    for layout in ("gapped", "turned"):
        check(row, batch.variants(x)[layout], weight, bias, upstream)


@every_row
def test_a_dead_channel_stays_finite(spec: str) -> None:
    """y of a constant channel is the bias; dx, which 1/eps carries beyond fp16's range, is held at its largest."""
    x, weight, bias, g = batch.backward_case((2, 5, 3, 7), torch.float16)
    x[:, 1], x[:, 2] = 0.0, 3.0
    (y, *_), (dx, *_) = both(metric(spec), x, weight, bias, 100 * g)
    check_close("y", y[:, 1:3], bias[None, 1:3, None, None].expand(2, 2, 3, 7), tolerance=4e-3)
    assert float(dx.abs().max()) == 65504


@pytest.mark.parametrize(
    ("spec", "bad"), [*((spec, math.nan) for spec in ROWS), ("l1", math.inf), ("linf", math.inf), ("range", -math.inf)]
)
def test_a_channel_that_is_not_finite_spoils_no_other(spec: str, bad: float) -> None:
    x, weight, bias, g = batch.backward_case((2, 5, 3, 7), torch.float32)
    (wanted, *_), (wanted_dx, *_) = both(metric(spec), x, weight, bias, g)
    x[0, 2, 1, 3] = bad
    (y, mean, spread), (dx, *_) = both(metric(spec), x, weight, bias, g)
    live = [0, 1, 3, 4]
    assert torch.equal(y[:, live], wanted[:, live]) and torch.equal(dx[:, live], wanted_dx[:, live])
    assert not bool(y[:, 2].isfinite().any() or mean[2].isfinite() or spread[2].isfinite())


def test_of_equal_extremes_the_first_counts() -> None:
    x = torch.tensor([0.0, 3.0, -3.0, 3.0, -3.0, 0.0, 0.0, 0.0]).view(8, 1).expand(8, 16).contiguous()
    for layout in (x, x.view(2, 4, 16).transpose(1, 2).contiguous()):
        _, _, _, indices, signs = torch.ops.normrewrite.batch_norm(layout, None, None, "linf", "exact", EPS)
        assert indices.unique().tolist() == [1] and signs.unique().tolist() == [1]
        _, _, _, indices, _ = torch.ops.normrewrite.batch_norm(layout, None, None, "range", "exact", EPS)
        assert indices.unique(dim=0).tolist() == [[1, 2]]


def test_a_k_beyond_what_kernels_search_is_found_by_torch() -> None:
    """Statistics by torch, the rest by kernels; tiles of the tests search for 16."""
    row, ran, run = metric("topk:17"), [], launch.run
    x, weight, bias, g = batch.backward_case((2, 5, 3, 7), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", lambda *parts: ran.append(parts[0].__name__) or run(*parts))
        check(row, x, weight, bias, g)
    assert ran == ["apply", "collect", "coefficients", "gradient", "correct"]


def test_the_same_within_a_sample() -> None:
    x, (weight, bias) = (
        sample.without_ties((2, 3, 4, 21), torch.float32),
        sample.affine_of((2, 3, 4, 21), torch.float32),
    )
    for seen in sample_layouts(x):
        check_sample(seen, torch.randn(x.shape), weight, bias, metric("topk:17"), True)


# --- within a sample -------------------------------------------------------------------------------------------------

# What registers hold: a layer norm's rows. Groups of 4 channels; instances. Then groups that fit vectors, and rows of groups.
SCOPES = {"layer": (5, 1, 24, 1), "group": (2, 2, 4, 21), "instance": (2, 3, 1, 21)}
SAMPLES = (*SCOPES.values(), (2, 1, 8, 16), (3, 2, 37, 1))


@every_row
@pytest.mark.parametrize("scope", [*SCOPES, "rms"])
def test_scopes_within_a_sample(spec: str, scope: str) -> None:
    dtype = DTYPES[(ROWS.index(spec) + [*SCOPES, "rms"].index(scope)) % 3]  # each row and each scope in all
    check_scope(metric(spec), SCOPES["layer" if scope == "rms" else scope], dtype, scope != "rms")


@every_row
@pytest.mark.parametrize(("shape", "centred"), [(SAMPLES[3], True), (SAMPLES[4], True), (SAMPLES[1], False)], ids=str)
def test_scopes_of_other_shapes(spec: str, shape: sample.Shape, centred: bool) -> None:
    check_scope(metric(spec), shape, torch.float16, centred)


def check_scope(row: Metric, shape: sample.Shape, dtype: torch.dtype, centred: bool) -> None:
    weight, bias = sample.affine_of(shape, torch.promote_types(dtype, torch.float32))
    x, g = sample.without_ties(shape, dtype), (torch.randn(shape) + 0.5).to(dtype)
    for seen, upstream in zip(sample_layouts(x), sample_layouts(g), strict=True):
        check_sample(seen, upstream, weight, bias, row, centred)


def sample_layouts(x: Tensor) -> list[Tensor]:
    layouts = sample.variants(x)
    return [layouts["contiguous"], layouts["channels_last"]] if x.shape[3] > 1 else [x]


def check_sample(x: Tensor, g: Tensor, weight: Tensor, bias: Tensor, row: Metric, centred: bool) -> None:
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
    y, *statistics = operators.sample_norm(*leaves, row, "exact", EPS, centred)
    sample.check_forward((y, *statistics), x, weight, bias, row, centred)
    found = torch.autograd.grad(y, leaves, g)
    wide = [value.double() for value in (x, weight, bias)]
    wanted = gradients(lambda *inputs: sample.plain(*inputs, row, centred), g.double(), *wide)
    terms, tolerance = float(g.double().abs().sum((0, 3)).max()), TOLERANCES[x.dtype]
    check_close("dx", found[0], wanted[0], tolerance.dx)
    check_close("dweight", found[1], wanted[1], tolerance.sums, unit=max(terms, float(wanted[1].abs().max())))
    check_close("dbias", found[2], wanted[2], tolerance.sums, unit=terms)


@pytest.mark.parametrize("spec", ["l2", "l1", "topk:3", "range"])
@pytest.mark.parametrize("shape", [(2, 1, 1023, 1), (2, 2, 4, 196)], ids=str)
def test_rows_of_many_elements_in_large_tiles(spec: str, shape: sample.Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, (weight, bias) = sample.samples("laplace", shape, torch.float32), sample.affine_of(shape, torch.float32)
    with kernels("triton"):
        check_sample(x, torch.randn(shape) + 0.5, weight, bias, metric(spec), True)


@pytest.mark.parametrize(("spec", "shape"), [("l1", SAMPLES[1]), ("topk:3", SAMPLES[0]), ("range", SAMPLES[0])])
def test_row_operators_are_what_compilers_are_told(spec: str, shape: sample.Shape) -> None:
    x, (weight, bias) = sample.samples("laplace", shape, torch.float16), sample.affine_of(shape, torch.float16)
    x, arguments, checks = sample_layouts(x)[-1], (spec, "exact", EPS, True), ("test_schema", "test_faketensor")
    forward, backward = torch.ops.normrewrite.row_norm.default, torch.ops.normrewrite.row_norm_backward.default
    torch.library.opcheck(forward, (x, weight, bias, *arguments), test_utils=checks)
    kept = forward(x, weight, bias, *arguments)[1:]
    torch.library.opcheck(backward, (torch.randn(shape), x, weight, *kept, *arguments), test_utils=checks)


@pytest.mark.parametrize(("spec", "bad"), [*((spec, math.nan) for spec in ROWS), ("linf", math.inf)])
def test_a_row_that_is_not_finite_spoils_no_other(spec: str, bad: float) -> None:
    x = torch.randn(3, 1, 20, 1)
    x[1, 0, 4] = bad
    y, mean, spread = operators.sample_norm(x, None, None, metric(spec), "exact", EPS)
    assert bool(y[[0, 2]].isfinite().all())
    assert not bool(y[1].isfinite().any() or mean[1].isfinite() or spread[1].isfinite())


@every_row
def test_dead_rows_and_no_rows_at_all(spec: str) -> None:
    x = torch.randn(3, 1, 20, 1, dtype=torch.float16)
    x[1] = 0.5
    weight, bias = sample.affine_of((3, 1, 20, 1), torch.float16)
    leaf = x.requires_grad_()
    y = operators.sample_norm(leaf, weight, bias, metric(spec), "exact", EPS)[0]
    check_close("y", y[1, 0, :, 0], bias[0], tolerance=1e-3)
    (dx,) = torch.autograd.grad(y, leaf, torch.full_like(y, 100) * torch.randn(y.shape).half())
    assert float(dx.abs().max()) == 65504
    sample.test_no_rows_at_all(spec)
    empty = torch.zeros(0, 1, 8, 1, requires_grad=True)
    operators.sample_norm(empty, None, None, metric(spec), "exact", EPS)[0].sum().backward()
    assert empty.grad is not None and empty.grad.shape == empty.shape


# --- what the kernels refuse -----------------------------------------------------------------------------------------


def test_what_kernels_do_not_serve_is_told() -> None:
    with pytest.raises(NormRewriteError, match=r"take fp32, fp16 and bf16, got torch\.float64"):
        operators.batch_norm(torch.randn(4, 3).double(), None, None, "l1", "exact", EPS)
    with pytest.raises(NormRewriteError, match="rows of up to 8192 elements, got 8193"):
        operators.sample_norm(torch.randn(2, 1, 8193, 1), None, None, "l1", "exact", EPS)
    with pytest.raises(NormRewriteError, match=r"up to 128 extremes of such a row, topk:10% asks for 150"):
        operators.sample_norm(torch.randn(2, 1, 1500, 1), None, None, "topk:10%", "exact", EPS)


@every_row
def test_one_element(spec: str) -> None:
    """Has no spread: refused, as by torch. One of each sample is normalised; so is one alone by statistics that stand."""
    one = torch.full((1, 1, 1, 1), 3.0)
    for refused in (
        lambda: operators.batch_norm(one, None, None, spec, "exact", EPS),
        lambda: operators.sample_norm(one, None, None, spec, "exact", EPS),
    ):
        with pytest.raises(NormRewriteError, match="at least"):
            refused()
    x, g = torch.tensor([[1.0, 4.5, -2.0], [2.0, 1.0, 0.5]]).view(2, 3, 1, 1, 1)
    check(metric(spec), x, torch.ones(1), torch.zeros(1), g)
    y = launch.affine(one, None, torch.ones(1), torch.full((1,), 4.0), None, None, True)
    assert float(y) == 0.5


# --- ReLU and residual -----------------------------------------------------------------------------------------------


def fused(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, spec: str, **told: Any
) -> Callable[..., Any]:
    """Forward, then a function of g that gives all gradients."""
    row = metric(spec)
    y, *measured = launch.forward(x, residual, weight, bias, row, "exact", EPS, relu=True, **told)
    more = {"relu": True, "residual": residual is not None, **told}
    return y, lambda g: launch.backward(g, x, weight, bias, *measured, row, "exact", EPS, **more)  # type: ignore[return-value]


@every_row
@pytest.mark.parametrize("with_residual", [False, True], ids=["relu", "add+relu"])
def test_relu_and_residual(spec: str, with_residual: bool) -> None:
    dtype = torch.float16
    x, weight, bias, g = batch.backward_case((2, 5, 3, 7), dtype)
    residual = torch.randn(x.shape).to(dtype) if with_residual else None
    added = [] if residual is None else [residual.double()]

    def plain(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> Tensor:
        return F.relu(batch.plain(x, weight, bias, metric(spec)) + sum(residual))

    inputs = [x.double(), weight.double(), bias.double(), *added]
    wanted_y, wanted = plain(*inputs), gradients(plain, g.double(), *inputs)
    tolerance = TOLERANCES[dtype]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        seen, upstream = x.to(memory_format=memory_format), g.to(memory_format=memory_format)
        y, back = fused(seen, residual, weight, bias, spec)
        dx, dweight, dbias, dresidual = back(upstream)
        check_close("y", y, wanted_y, tolerance.y)
        check_close("dx", dx, wanted[0], tolerance.dx)
        terms = float(g.double().abs().sum((0, 2, 3)).max())
        check_close("dweight", dweight, wanted[1], tolerance.sums, unit=terms)
        check_close("dbias", dbias, wanted[2], tolerance.sums, unit=terms)
        if with_residual:
            assert torch.equal(dresidual.double(), wanted[3])
            assert dresidual.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("spec", ["l1", "l2", "topk:3"])
@pytest.mark.parametrize(("shape", "within"), [((2, 5, 3, 7), False), (SCOPES["group"], True)], ids=["batch", "group"])
def test_operators_with_relu_are_what_compilers_are_told(spec: str, shape: sample.Shape, within: bool) -> None:
    """And what torch's form of them keeps, so that either backward may follow either forward."""
    x, residual, g = (torch.randn(shape) for _ in range(3))
    weight, bias = sample.affine_of(shape, torch.float32) if within else batch.affine_of(shape[1], torch.float32)
    arguments, checks = (spec, "exact", EPS, within, True), ("test_schema", "test_faketensor")
    forward, backward = torch.ops.normrewrite.norm_relu.default, torch.ops.normrewrite.norm_relu_backward.default
    torch.library.opcheck(forward, (x, residual, weight, bias, *arguments), test_utils=checks)
    found = {}
    for choice in ("torch", "triton"):
        with kernels(choice):
            found[choice] = forward(x, residual, weight, bias, *arguments)
    for ours, torchs in zip(found["triton"], found["torch"], strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (torchs.shape, torchs.dtype, torchs.stride())
    assert torch.equal(found["triton"][-1], found["torch"][-1])  # bits of what ReLU let through
    told = [(g, x, weight, bias, *kept[1:], *arguments, True) for kept in found.values()]
    torch.library.opcheck(backward, told[0], test_utils=checks)
    for a, b in zip(backward(*told[0]), backward(*told[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_row
@pytest.mark.parametrize("centred", [True, False], ids=["centred", "rms"])
def test_relu_within_a_sample(spec: str, centred: bool) -> None:
    shape = (2, 2, 4, 8)
    x, (weight, bias) = sample.without_ties(shape, torch.float32), sample.affine_of(shape, torch.float32)
    g, residual = torch.randn(shape), torch.randn(shape)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.relu(sample.plain(x, weight, bias, metric(spec), centred) + residual)

    inputs = [value.double() for value in (x, weight, bias, residual)]
    wanted_y, wanted = plain(*inputs), gradients(plain, g.double(), *inputs)
    for seen, upstream in zip(sample_layouts(x), sample_layouts(g), strict=True):
        y, back = fused(seen, residual, weight, bias, spec, sample=True, centred=centred)
        check_close("y", y, wanted_y, 2e-6)
        for what, found, value in zip(("dx", "dweight", "dbias", "dresidual"), back(upstream), wanted, strict=True):
            check_close(what, found, value, 3e-6)


def test_relu_lets_nan_through() -> None:
    x = torch.randn(4, 8, 5)
    x[0, 3, 0] = float("nan")
    y, back = fused(x, None, torch.ones(8), torch.zeros(8), "l1")
    assert bool(y[:, 3].isnan().all() and back(torch.ones_like(x))[0][:, 3].isnan().all())


def test_affine_with_statistics_that_stand() -> None:
    mean, scale, (weight, bias) = torch.randn(8), 1 + torch.rand(8), batch.affine_of(8, torch.float32)
    for x in batch_layouts(torch.randn(3, 8, 5, 4)):
        residual, plain = torch.randn(x.shape), torch_batch.affine(x, mean, scale, weight, bias)
        check_close("affine", launch.affine(x, None, mean, scale, weight, bias, False), plain, 1e-6)
        check_close("relu", launch.affine(x, residual, mean, scale, weight, bias, True), F.relu(plain + residual), 1e-6)
