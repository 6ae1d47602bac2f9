"""How far training is from eval: against the same by hand, in torch alone."""

import copy

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite.data import Batch
from normrewrite.diagnostics.training_mode import TrainingDistance, TrainingMode, measuring
from tests.conftest import randomise


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    return randomise(nn.Sequential(*layers)).eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    for module in model.modules():
        module.training = isinstance(module, nn.BatchNorm1d | nr.nn.BatchNorm)
    return torch.cat([model(part) for part in x.split(16)]).detach()


def test_both_distances_are_those_by_hand() -> None:
    model, x = net(), torch.randn(40, 6).exp()
    twin = nr.convert(model, to="linf")
    calibrated, found = nr.calibrate(twin, x, batch_size=16)
    assert found.training is not None and found.training.inputs == 32  # two batches
    x = x[:32]
    expected, training = model(x).detach(), by_hand(model, x)
    for place, network in enumerate((twin, calibrated)):
        assert found.training.from_eval[place] == pytest.approx(relative(by_hand(network, x), expected), rel=1e-4)
        assert found.training.from_training is not None
        assert found.training.from_training[place] == pytest.approx(relative(by_hand(network, x), training), rel=1e-4)
    assert found.training.original == pytest.approx(relative(training, expected), rel=1e-4)
    assert "from the original's eval" in str(found) and "from the original's training" in str(found)
    assert found.as_dict()["training"]["from_eval"] == found.training.from_eval


def test_nothing_moves() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with measuring(model):
        assert model[1].training and not model[3].training  # type: ignore[index]
        model(torch.randn(8, 6))
    assert not model[1].training  # type: ignore[index]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_an_original_its_own_eval_is_what_counts() -> None:
    twin = nr.convert(net())
    with torch.no_grad():
        twin[1].running_scale *= 1.1  # type: ignore[index, operator]
    found = nr.calibrate(twin, torch.randn(32, 6), batch_size=16)[1].training
    assert found is not None and found.from_training is None and "from its own eval" in str(found)
    given = nr.calibrate(twin, torch.randn(32, 6), batch_size=16, original=net())[1].training
    assert given is not None and given.from_training is not None


def test_what_cannot_train_is_told_and_calibrated_all_the_same() -> None:
    """torch's own norm behind ours gets one value a channel."""
    layers = (nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    twin = nr.convert(nn.Sequential(*layers).eval(), exclude="3")
    found = nr.calibrate(twin, torch.randn(2, 3, 4, 4), batch_size=1)[1]
    assert found.training is None and "training was not measured" in str(found)
    assert found.sites[0].ratio is not None


def test_a_network_without_numbers_has_no_distance() -> None:
    mode = TrainingMode([Batch({"x": torch.randn(4, 6)})], nn.Flatten(), None)
    assert mode.apart(nn.Flatten()) == (0.0, None)


@pytest.mark.parametrize(("now", "told"), [(0.733, True), (0.7, False)])
def test_a_calibration_of_no_use_is_told(now: float, told: bool) -> None:
    assert ("no nearer to eval" in str(TrainingDistance(4, (0.72, now), None, 0.1))) == told
