"""ChangeScope: the norm of another scope, with the affine of the one that it was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.passes import ChangeScope
from normrewrite.passes.reversion import reverted
from tests.conftest import randomise
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
    ("target", "groups"), [("group", 4), ("group:5", 1), ("group:6", 6), ("layer", 1), ("instance", 12), ("rms", 1)]
)
def test_value(target: str, groups: int, shape: tuple[int, ...]) -> None:
    """`group` is gcd(32, channels). In training as in eval."""
    if target == "instance" and len(shape) == 2:
        return  # one value: nothing but the bias
    old = randomise({2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](12))
    x = torch.randn(shape) * 2 + 1
    for training in (True, False):
        wanted = expected(old, x, groups, centred=target != "rms")
        y = nr.convert(old.train(training), target)(x)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(y.double() * 1.01, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["group:4", "layer", "instance", "rms"])
def test_parameters_are_the_same_objects_in_place(target: str) -> None:
    old = randomise(nn.BatchNorm2d(8))
    new: Any = nr.convert_(old, target)
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
        twin[1].bias.add_(0.5)  # type: ignore[index]
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
