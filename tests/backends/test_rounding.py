"""Digits that the mean's rounding would take: constant rows, means far from 0, long sums; torch's own layers are the measure."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from normrewrite.backends import measuring, operators, ranks
from normrewrite.backends.pieces import Pieces
from normrewrite.norms import metric

EPS = 1e-5
ROWS = ("l2", "l1", "linf", "topk:3", "range")
VALUES = (10.3, 1000.1, 1e-3, 50.7, 1e5)
every_row = pytest.mark.parametrize("spec", ROWS)

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_batch(spec: str) -> Norm:
    return lambda x, weight, bias: operators.batch_norm(x, weight, bias, spec, "exact", EPS)[0]


def by_sample(spec: str, groups: int) -> Norm:
    """(B, C, H, W) with statistics by `groups` a sample."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        view = x.view(len(x), groups, x.shape[1] // groups, -1)
        y, _, _ = operators.sample_norm(view, weight.view(groups, -1), bias.view(groups, -1), spec, "exact", EPS)
        return y.view(x.shape)

    return norm


def native_batch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)


def native_groups(groups: int) -> Norm:
    return lambda x, weight, bias: F.group_norm(x, groups, weight, bias, EPS)


def channels_last(norm: Norm) -> Norm:
    return lambda x, weight, bias: norm(x.contiguous(memory_format=torch.channels_last), weight, bias)


SCOPES: dict[str, tuple[Callable[[str], Norm], Norm]] = {
    "batch": (by_batch, native_batch),
    "batch, channels last": (lambda spec: channels_last(by_batch(spec)), channels_last(native_batch)),
    "layer": (lambda spec: by_sample(spec, 1), native_groups(1)),
    "group": (lambda spec: by_sample(spec, 2), native_groups(2)),
    "instance": (lambda spec: by_sample(spec, 6), native_groups(6)),
}
every_scope = pytest.mark.parametrize("scope", SCOPES)


def affine(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.linspace(0.5, 2, 6, dtype=dtype), torch.linspace(-1, 1, 6, dtype=dtype)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max())


# --- constant rows ---------------------------------------------------------------------------------------------------


@every_scope
@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_constant_rows_give_the_bias(dtype: torch.dtype, spec: str, scope: str) -> None:
    of, native = SCOPES[scope]
    weight, bias = affine(dtype)
    wanted = bias[:, None, None].expand(5, 6, 7, 9)
    for value in VALUES if dtype is not torch.float16 else VALUES[:-1]:
        x = torch.full(wanted.shape, value, dtype=dtype)
        if "batch" in scope:  # one channel that is as others are
            x[:, 3] = torch.randn(5, 7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
        y, torchs = (norm(x, weight, bias) for norm in (of(spec), native))
        kept = [0, 1, 2, 4, 5]
        assert off(y[:, kept], wanted[:, kept]) <= max(3 * off(torchs[:, kept], wanted[:, kept]), 1e-6), value


@every_scope
@every_row
def test_gradients_of_constant_rows(spec: str, scope: str) -> None:
    """d = 0 everywhere: dx = weight / eps * (g - mean g), whatever the metric, and dweight = 0."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.full((6,), 1.5), torch.zeros(6)
    x, g = torch.full((5, 6, 7, 9), 10.3), torch.randn(5, 6, 7, 9, generator=generator)
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    dx, dweight, _ = torch.autograd.grad(SCOPES[scope][0](spec)(*leaves), leaves, g)
    groups = {"layer": 1, "group": 2, "instance": 6}.get(scope)
    over = g.double() if groups is None else g.double().view(5, groups, -1)
    mean = over.mean((0, 2, 3), keepdim=True) if groups is None else over.mean(2, keepdim=True)
    wanted = (1.5 / EPS * (over - mean)).view(x.shape)
    assert off(dx, wanted) <= 3e-6 * float(wanted.abs().max())
    assert float(dweight.abs().max()) <= 1e-6


# --- means far from 0 ------------------------------------------------------------------------------------------------


@every_scope
@every_row
def test_a_mean_far_from_zero_costs_what_it_costs_torch(spec: str, scope: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = 1e5 + torch.randn(16, 6, 14, 14, generator=generator)  # a mean of 6 to 3136 elements lies near 1e5
    g, (weight, bias) = torch.randn(x.shape, generator=generator), affine(torch.float32)

    def errors(norm: Norm) -> list[float]:
        """Of y and dx, against the same in float64; but where fp32 can't tell x from the mean, l1's kink."""
        found = []
        for dtype in (torch.float32, torch.float64):
            leaf = x.to(dtype).requires_grad_()
            y = norm(leaf, weight.to(dtype), bias.to(dtype))
            found.append((y.detach(), *torch.autograd.grad(y, leaf, g.to(dtype))))
        told = (x - 1e5).abs() > 0.1
        return [off(one[told], other[told]) for one, other in zip(*found, strict=True)]

    ours, torchs = errors(SCOPES[scope][0](spec)), errors(SCOPES[scope][1])
    assert all(own <= 3 * other for own, other in zip(ours, torchs, strict=True)), (ours, torchs)


@every_row
def test_a_mean_far_from_zero_across_ranks(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank of one, its messages taken as sent."""
    monkeypatch.setattr(ranks, "summed", lambda values, group: values.double())
    monkeypatch.setattr(ranks, "gathered", lambda values, group: values[None])
    monkeypatch.setattr(ranks.distributed, "get_rank", lambda group: 0)
    weight, bias = affine(torch.float32)
    for value in VALUES:
        y, mean, spread = ranks.normalise(torch.full((5, 6, 7, 9), value), weight, bias, spec, "exact", EPS, object())
        assert off(y, bias[:, None, None].expand(y.shape)) <= 1e-6
        assert torch.equal(mean, torch.full((6,), value)) and not spread.any()


# --- long sums -------------------------------------------------------------------------------------------------------

PLANES = ((1, 2, 2048, 2048), (1, 2, 1_000_003))  # the second has no parts of one size


@pytest.mark.parametrize("innermost", [False, True], ids=["planes", "channels last"])
@pytest.mark.parametrize("shape", PLANES, ids=str)
def test_large_planes_keep_digits(shape: tuple[int, ...], innermost: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(shape, generator=generator) * 2 + 5, torch.randn(shape, generator=generator).abs()
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else x
    mean = measuring.channel_mean(x)
    d = x.double() - measuring.per_channel(mean, x.dim())
    total = d.abs().sum(measuring.over(x))
    assert off(measuring.power_sums(x, mean, metric("l1"))[0] / total, torch.ones(2)) <= 2e-7
    product, plain = measuring.sums(g, x, mean, torch.ones(2))
    assert off(plain / g.double().sum(measuring.over(x)), torch.ones(2)) <= 2e-7
    assert (
        off((product - (g * d).sum(measuring.over(x))) / (g * d).abs().sum(measuring.over(x)), torch.zeros(2)) <= 2e-7
    )


def test_a_plane_is_cut_into_short_parts_of_one_size() -> None:
    x = torch.empty(2, 3, 300, 300)
    assert Pieces(x).fold * Pieces(x).of(x)[0].shape[2] == 300 * 300 and Pieces(x).short
    assert not Pieces(torch.empty(2, 3, 100_003)).short


@pytest.mark.parametrize("spec", ["l1", "l2"])
def test_a_long_row_keeps_digits(spec: str) -> None:
    x = torch.randn(1, 1, 2048, 2048, generator=torch.Generator().manual_seed(0)) * 2 + 5
    _, _, spread = operators.sample_norm(x, None, None, spec, "exact", EPS)
    d = x.double() - x.double().mean()
    power = metric(spec).power
    wanted = metric(spec).gain(x.numel()) * (d.abs() ** power).mean() ** (1 / power)
    assert abs(float(spread) / float(wanted) - 1) <= 2e-7


@pytest.mark.parametrize("spec", ["linf", "topk:3", "range"])
@pytest.mark.parametrize("innermost", [False, True], ids=["planes", "channels last"])
def test_gradients_that_gather_on_few_elements(spec: str, innermost: bool) -> None:
    """All of a channel's upstream gradients meet in the elements that its scale was read from."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, 28, 28, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last) if innermost else x
    g = x * 0.7 + torch.randn(x.shape, generator=generator)
    weight, bias = torch.linspace(0.5, 2, 64), torch.zeros(64)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        y = by_batch(spec)(leaf, weight.to(dtype), bias.to(dtype))
        found += torch.autograd.grad(y, leaf, g.to(dtype))
    assert off(*found) <= 5e-7 * float(found[1].abs().max())
