"""ChangeScope: the norm of another scope, with an offset in front or the affine of the one that it was."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.nn.offset import OffsetNorm, largest, unfitted
from normrewrite.passes import ChangeScope
from normrewrite.passes.change_scope import directions
from normrewrite.passes.reversion import reverted
from tests.conftest import RealNetwork, randomise
from tests.sites.test_kinds import Frozen, NormAct


def expected(norm: Any, x: Tensor, groups: int, centred: bool = True) -> Tensor:
    """Float64, group by group: two roots of mean squares."""
    rows = x.double().reshape(x.shape[0], groups, -1)
    rows = rows - rows.mean(2, keepdim=True) * centred
    y = (rows / (rows.square().mean(2, keepdim=True) + norm.eps).sqrt()).view_as(x)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return norm.weight.double().view(shape) * y + norm.bias.double().view(shape)


@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 5), (3, 12, 4, 4), (2, 12, 2, 3, 2)], ids=str)
@pytest.mark.parametrize(
    ("target", "groups"), [("group:4", 4), ("group:5", 1), ("group:6", 6), ("layer", 1), ("instance", 12), ("rms", 1)]
)
def test_value_without_an_offset(target: str, groups: int, shape: tuple[int, ...]) -> None:
    """In training as in eval."""
    if target == "instance" and len(shape) == 2:
        return  # one value: nothing but the bias
    old = randomise({2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](12))
    x = torch.randn(shape) * 2 + 1
    for training in (True, False):
        wanted = expected(old, x, groups, centred=target != "rms")
        y = nr.convert(old.train(training), target, offset=0)(x)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(y.double() * 1.01, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["group:4", "layer", "instance", "rms"])
def test_parameters_are_the_same_objects_in_place(target: str) -> None:
    old = randomise(nn.BatchNorm2d(8))
    new: Any = nr.convert_(old, target, offset=0)
    assert new.weight is old.weight and new.bias is old.bias and not list(new._buffers)


def test_every_site_says_that_it_is_not_exact() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    notes = {to: nr.plan(model, to).choices[0].note for to in ("layer", "instance")}
    assert notes["layer"] == "not exact: statistics of each sample" and "channel means" in notes["instance"]


@pytest.mark.parametrize("norm", [NormAct(8), Frozen(8), nn.BatchNorm2d(8, affine=False), nn.SyncBatchNorm(8)])
def test_other_norms_and_the_way_back(norm: nn.Module) -> None:
    model = randomise(nn.Sequential(norm)).eval()
    twin, x = nr.convert(model, "group:2"), torch.randn(3, 8, 4, 4)
    assert twin(x).shape == x.shape and (not isinstance(norm, NormAct) or "act" in dict(twin[0].named_children()))  # type: ignore[index]
    back = nr.revert(twin)
    assert repr(back) == repr(model) and torch.equal(back(x), model(x))
    assert list(back.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("to", ["group:2", "rms", "wn", "bwn:mean-bn"])
def test_an_affine_that_the_original_lacks_is_not_lost_once_it_was_trained(to: str) -> None:
    model = randomise(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 2, 1))).eval()
    twin, x = nr.convert(model, to), torch.randn(3, 8, 4, 4)
    assert not reverted(copy.deepcopy(twin))[2]
    with torch.no_grad():
        twin[1].get_parameter("norm.bias" if isinstance(twin[1], OffsetNorm) else "bias").add_(0.5)  # type: ignore[index]
    back, _, trained = reverted(copy.deepcopy(twin))
    assert trained == ["1"]
    torch.testing.assert_close(back(x), twin(x), rtol=1e-4, atol=1e-4)


def test_no_running_statistics_are_needed() -> None:
    assert ChangeScope("layer").apply(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)))[1]


@pytest.mark.parametrize(
    ("to", "message"), [("group:0", "is no count"), ("group:x", "is no count"), ("layer:2", "no arg")]
)
def test_bad_arguments(to: str, message: str) -> None:
    with pytest.raises(nr.NormRewriteError, match=message):
        nr.convert(nn.BatchNorm2d(4), to)


# --- an offset in front ------------------------------------------------------------------------------------------------

WIDTHS = (2, 3, 5, 6, 8, 27)


def wide(channels: int) -> nn.Module:
    return randomise(nn.BatchNorm2d(channels)).double().eval()


def less_two_numbers(norm: Any, x: Tensor, groups: int, centred: bool) -> np.ndarray[Any, Any]:
    """gamma s (s w - m1 - m2 u) + beta, sample by sample and group by group: what is left where the offset has no end."""
    mean, var, gamma, beta = (
        getattr(norm, name).detach().numpy() for name in ("running_mean", "running_var", "weight", "bias")
    )
    y = np.empty(x.shape)
    for n, sample in enumerate(x.numpy()):
        for channels in np.split(np.arange(len(mean)), groups):
            k = len(channels)
            s, u = np.resize([1, 1, -1, -1], k), np.resize([1.0, -1.0], k)
            u = u - u.mean()
            u = u / np.sqrt((u * u).mean())
            by_channel = sample[channels].reshape(k, -1)
            w = s[:, None] * (by_channel - mean[channels, None]) / np.sqrt(var[channels, None] + norm.eps)
            m1, m2 = w.mean() * centred, (w * u[:, None]).mean()
            left = (gamma[channels] * s)[:, None] * (w - m1 - m2 * u[:, None]) + beta[channels, None]
            y[n, channels] = left.reshape(k, *sample.shape[1:])
    return y


@pytest.mark.parametrize("k", WIDTHS)
def test_directions(k: int) -> None:
    s, u = (values.numpy() for values in directions(k))
    assert set(np.unique(s)) <= {1, -1} and abs(u.sum()) < 1e-12 and abs((u * u).mean() - 1) < 1e-12
    if k % 4 == 0:
        assert s.sum() == 0 == s @ u


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("to", ["group", "rms"])
def test_a_large_offset_leaves_the_old_function_less_two_numbers(k: int, to: str) -> None:
    groups = 3 if to == "group" else 1
    old, x = wide(groups * k), torch.randn(2, groups * k, 4, 3).double() * 1.5
    target = f"group:{groups}" if to == "group" else to
    wanted = less_two_numbers(old, x, groups, centred=to != "rms")
    apart = [np.abs(nr.convert(old, target, offset=size)(x).detach().numpy() - wanted).max() for size in (1e2, 1e4)]
    assert apart[1] < 1e-2 and apart[1] < apart[0] / 30
    assert np.abs(nr.convert(old, target, offset=1e4)(x).detach().numpy() * 1.01 - wanted).max() > 1e-2


def test_the_nearer_the_larger() -> None:
    """Of samples that spread more and less than the data set does: what the offset is for."""
    old: Any = wide(64)
    factors = torch.linspace(0.3, 1.4, 50).view(-1, 1, 1, 1).double()
    x = factors * torch.randn(50, 64, 6, 6) * old.running_var.sqrt()[:, None, None] + old.running_mean[:, None, None]
    twins = [nr.convert(old, "layer", offset=size).requires_grad_(False) for size in (0, 1, 5, 30)]
    apart = [float((twin(x) - old(x).detach()).square().mean()) for twin in twins]
    assert apart == sorted(apart, reverse=True) and apart[3] < 0.003 < 0.05 < apart[1]


def test_dead_channels_do_not_scale_the_others() -> None:
    """Half of the channels have no spread, so that what is normalised has less than the others' own."""
    old: Any = wide(64)
    old.running_var[1::2] = 0
    x = torch.randn(50, 64, 6, 6).double() * old.running_var.sqrt()[:, None, None] + old.running_mean[:, None, None]
    y, wanted = (values.detach()[:, ::2] for values in (nr.convert(old, "layer", offset=1)(x), old(x)))
    y, wanted = (values - values.mean((0, 2, 3), keepdim=True) for values in (y, wanted))
    assert float((y * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("to", "norm", "note"),
    [
        ("instance", nn.BatchNorm2d(8), "no offset: it would not bring them back"),
        ("group:8", nn.BatchNorm2d(8), "only 1 channel a group.*no offset: a group of one channel"),
        ("layer", nn.BatchNorm2d(8, track_running_stats=False), "no offset: it has no running statistics"),
        ("group:4", nn.BatchNorm2d(8), "only 2 channels a group: take fewer groups"),
        ("layer", nn.BatchNorm2d(8), "statistics of each sample$"),
    ],
)
def test_what_has_no_offset_says_so(to: str, norm: nn.Module, note: str) -> None:
    choice = nr.plan(nn.Sequential(norm), to).choices[0]
    assert choice.note.startswith("not exact: statistics of each sample")
    assert re.search(note, choice.note)
    new = nr.convert(nn.Sequential(norm), to)[0]  # type: ignore[index]
    assert isinstance(new, OffsetNorm) != ("no offset" in note)


def test_what_is_not_finite_stays_plain_and_can_be_read_back(tmp_path: Any) -> None:
    model = nn.Sequential(randomise(nn.BatchNorm2d(8)), randomise(nn.BatchNorm2d(8)))
    model[1].running_mean[2] = float("nan")  # type: ignore[index,operator]
    twin = nr.convert(model, "layer")
    assert isinstance(twin[0], OffsetNorm) and type(twin[1]) is nn.GroupNorm  # type: ignore[index]
    nr.save(twin, tmp_path / "twin.pt")
    again = nr.load(tmp_path / "twin.pt", arch=lambda: nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)))
    assert type(again[1]) is nn.GroupNorm and repr(again) == repr(twin)  # type: ignore[index]


@pytest.mark.parametrize(
    ("channels", "groups"), [(3, 1), (16, 1), (31, 1), (32, 2), (48, 3), (64, 4), (96, 4), (81, 3), (128, 4), (67, 1)]
)
def test_groups_without_a_number(channels: int, groups: int) -> None:
    """The largest of 1 to 4 that divides the channels and leaves 16 each; 0.1.0 took gcd(32, channels)."""
    norm = nn.BatchNorm2d(channels)
    assert nr.convert(norm, "group", offset=0).num_groups == groups
    before = ChangeScope("group", offset=None).apply(copy.deepcopy(norm))[0]
    assert before.num_groups == np.gcd(32, channels)


def test_sizes() -> None:
    assert (unfitted("auto"), unfitted("free"), unfitted(3.0)) == (30, 30, 3)
    assert (largest("auto"), largest("free"), largest(3.0)) == (5, np.inf, 3)
    norm = randomise(nn.BatchNorm2d(16))
    twins = {size: nr.convert(norm, "layer", offset=size) for size in ("auto", "free", 30, "30", 5)}
    offsets = {size: twin.offset for size, twin in twins.items()}
    assert all(torch.equal(offsets["auto"], offsets[size]) for size in ("free", 30, "30"))
    assert not torch.allclose(offsets["auto"], offsets[5]) and twins["30"].origin.offset == 30.0


@pytest.mark.parametrize("size", ["-1", "nan", "inf", "much", "", [5], 10**400])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(nr.NormRewriteError, match=r"--offset .* is no size"):
        nr.convert(nn.BatchNorm2d(4), "layer", offset=size)


@pytest.mark.slow
@pytest.mark.parametrize(("to", "least"), [("layer", 0.87), ("rms", 0.88), ("group:4", 0.83)])
def test_a_trained_network_keeps_what_it_knows_without_data(to: str, least: float, resnet20: RealNetwork) -> None:
    """Of 500 images; 93.8 % are right before, about 10 % with plain norms."""
    images, labels = resnet20.inputs(500)
    right = (nr.convert(resnet20.make(), to)(images).argmax(1) == labels).double().mean()
    assert right > least
