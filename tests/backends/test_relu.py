"""Norm, residual and ReLU as one operator, by torch; by the kernels it is tests/backends/triton's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normrewrite.backends import operators, relu, torch_batch
from normrewrite.backends.triton import geometry
from tests.backends.test_torch_batch import EPS, ROWS, affine_of, samples, variants
from tests.backends.test_torch_sample import affine_of as row_affine_of
from tests.backends.test_torch_sample import variants as row_variants

every_row = pytest.mark.parametrize("spec", ROWS)
with_and_without = pytest.mark.parametrize("added", [False, True], ids=["relu", "add+relu"])


def outcome(function: object, g: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """y and the gradients of all inputs that are there."""
    leaves = [None if value is None else value.detach().clone().requires_grad_() for value in inputs]
    y = function(*leaves)  # type: ignore[operator]
    return [y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], g)]


@every_row
@with_and_without
@pytest.mark.parametrize("layout", ["contiguous", "gapped", "turned", "channels_last"])
def test_batch_scope_is_the_norm_then_the_rest(spec: str, added: bool, layout: str) -> None:
    x = variants(samples("laplace", (2, 5, 3, 7), torch.float32))[layout]
    (weight, bias), g = affine_of(5, torch.float32), torch.randn(x.shape)
    residual = torch.randn(x.shape) if added else None

    def apart(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        y = operators.batch_norm(x, weight, bias, spec, "exact", EPS)[0]
        return F.relu(y if residual is None else y + residual)

    together = lambda *inputs: operators.norm_relu(*inputs, spec, "exact", EPS)[0]  # noqa: E731
    found, wanted = (outcome(each, g, x, residual, weight, bias) for each in (together, apart))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # where g's layout changes, so does the order of a sum


@every_row
@with_and_without
@pytest.mark.parametrize("layout", ["contiguous", "gapped", "channels_last"])
def test_within_a_sample_it_is_the_norm_then_the_rest(spec: str, added: bool, layout: str) -> None:
    shape = (2, 3, 4, 21)
    x, (weight, bias) = row_variants(torch.randn(shape))[layout], row_affine_of(shape, torch.float32)
    g, residual = torch.randn(shape), torch.randn(shape) if added else None

    def apart(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        y = operators.sample_norm(x, weight, bias, spec, "exact", EPS)[0]
        return F.relu(y if residual is None else y + residual)

    together = lambda *inputs: operators.norm_relu(*inputs, spec, "exact", EPS, sample=True)[0]  # noqa: E731
    found, wanted = (outcome(each, g, x, residual, weight, bias) for each in (together, apart))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "gapped", "turned", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (2, 16, 4, 2), (9, 3)], ids=str)
def test_bits_come_back(shape: tuple[int, ...], layout: str) -> None:
    flags = torch.randn(shape) > 0
    if layout == "channels_last" and len(shape) < 4:
        pytest.skip("two dimensions are channels-last already")
    seen = geometry.of_batch(variants(flags.float())[layout])
    packed = relu.pack(flags, seen)
    assert packed.dtype == torch.uint8 and packed.shape == seen.bits
    assert torch.equal(relu.unpack(packed, seen, flags.shape), flags)


def test_nan_and_its_gradient_go_through() -> None:
    x = torch.randn(4, 3, 5)
    x[0, 1, 0] = float("nan")
    y, dx = outcome(lambda x: operators.norm_relu(x, None, None, None, "l1", "exact", EPS)[0], torch.ones_like(x), x)
    assert bool(y[:, 1].isnan().all() and dx[:, 1].isnan().all() and dx[:, [0, 2]].isfinite().all())


@every_row
@with_and_without
def test_nothing_of_the_size_of_x_is_saved_but_x(spec: str, added: bool) -> None:
    x = torch.randn(8, 16, 6, 6).requires_grad_()
    saved: list[Tensor] = []
    residual = torch.randn(x.shape) if added else None
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):  # type: ignore[func-returns-value]
        operators.norm_relu(x, residual, *affine_of(16, torch.float32), spec, "exact", EPS)
    assert [value.data_ptr() for value in saved if value.numel() == x.numel()] == [x.data_ptr()]
    bits = sum(value.numel() for value in saved if value.dtype is torch.uint8)
    assert bits == (16 * 8 * 5 if added else 0)  # rows of 36 bits, in bytes


@pytest.mark.parametrize("spec", ["l1", "topk:3", "range"])
@with_and_without
@pytest.mark.parametrize("layout", ["turned", "channels_last"])
def test_operators_are_what_compilers_are_told(spec: str, added: bool, layout: str) -> None:
    x, (weight, bias) = variants(torch.randn(2, 4, 3, 7))[layout], affine_of(4, torch.float32)
    arguments, checks = (spec, "exact", EPS, False, True), ("test_schema", "test_faketensor")
    forward, backward = torch.ops.normrewrite.norm_relu.default, torch.ops.normrewrite.norm_relu_backward.default
    residual = torch.randn(x.shape) if added else None
    torch.library.opcheck(forward, (x, residual, weight, bias, *arguments), test_utils=checks)
    kept = forward(x, residual, weight, bias, *arguments)[1:]
    told = (torch.randn(x.shape), x, weight, bias, *kept, *arguments, added)
    torch.library.opcheck(backward, told, test_utils=checks)


@with_and_without
def test_statistics_that_stand(added: bool) -> None:
    x, (weight, bias) = torch.randn(2, 4, 3, 7), affine_of(4, torch.float32)
    mean, scale, residual = torch.randn(4), 1 + torch.rand(4), torch.randn(x.shape) if added else None
    y = torch_batch.affine(x, mean, scale, weight, bias)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = operators.affine_relu(x, residual, mean, scale, weight, bias)
        assert torch.equal(found, F.relu(y if residual is None else y + residual))
