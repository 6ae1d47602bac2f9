"""Renormalise: batch renorm with the tensors of the norm that it was; the limits that its statistics deserve."""

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite import sites
from normrewrite.nn.batch import FrozenBatchNorm
from normrewrite.nn.renorm import SCHEDULE, BatchRenorm
from normrewrite.passes import Renormalise
from normrewrite.passes.renormalise import is_fresh
from tests.conftest import randomise
from tests.sites.test_kinds import Frozen


def _site(norm: nn.Module) -> sites.Site:
    return sites.find(norm)[0]


def test_parameters_are_the_same_objects_and_statistics_are_taken_over() -> None:
    old = randomise(nn.BatchNorm2d(4, eps=1e-3, momentum=0.2))
    new, _ = Renormalise().apply(nn.Sequential(old))
    norm = new[0]  # type: ignore[index]
    assert isinstance(norm, BatchRenorm) and norm.weight is old.weight and norm.bias is old.bias
    assert (norm.momentum, norm.eps, norm.metric, norm.schedule) == (0.2, 1e-3, "l2", SCHEDULE)
    assert torch.equal(norm.running_mean, old.running_mean)
    torch.testing.assert_close(norm.running_scale + norm.eps, (old.running_var + old.eps).sqrt())


@pytest.mark.parametrize(("norm", "limits"), [(nn.BatchNorm1d(4), [1, 0]), (randomise(nn.BatchNorm1d(4)), [3, 5])])
def test_fresh_statistics_begin_the_schedule_and_trained_ones_have_it_behind_them(
    norm: nn.Module, limits: list[int]
) -> None:
    twin = nr.convert(norm, "renorm")
    assert isinstance(twin, BatchRenorm) and is_fresh(norm) == (limits == [1, 0])
    assert [float(value) for value in twin.limits()] == limits


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), "has no running statistics"),
        (Frozen(4), "is frozen"),
        (nr.nn.BatchNorm2d(4), "is l1 already: revert it first"),
    ],
)
def test_refusals(norm: nn.Module, reason: str) -> None:
    refusal = Renormalise().why_not(_site(norm))
    assert refusal is not None and reason in str(refusal)
    with pytest.raises(nr.NormRewriteError, match="none of 1 sites"):
        nr.convert(norm, "renorm")


def test_the_limits_come_back_from_a_file_of_other_statistics() -> None:
    """A buffer says that it was trained, so that a state_dict in a fresh twin does too."""
    trained, fresh = (nr.convert(norm, "renorm") for norm in (randomise(nn.BatchNorm1d(4)), nn.BatchNorm1d(4)))
    fresh.load_state_dict(trained.state_dict())
    assert [float(value) for value in fresh.limits()] == [3, 5]  # type: ignore[operator]
    assert not isinstance(trained, FrozenBatchNorm)
