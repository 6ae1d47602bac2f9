"""calibrate: train mode matched on unlabelled data; eval and the way back stay exact."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from benchmarks.calibrate import in_training
from normrewrite.backends import reference
from normrewrite.norms import metric
from normrewrite.passes.reversion import reverted
from tests.conftest import TARGETS, RealNetwork, randomise

# How far train mode may be from the original's eval, in units of what the original batch norm's own train mode is.
REACHED = {"l1": 0.7, "topk:10": 0.8, "linf": 0.95}


def _far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.slow
def test_training_is_matched_on_a_real_network(resnet20: RealNetwork, tmp_path: Path) -> None:
    model = resnet20.make()
    images = resnet20.inputs(410)[0]
    unlabelled, x = images[200:], images[:200]
    with torch.no_grad():
        expected = model(x)
    own = _far(in_training(model, x), expected)
    for to, most in REACHED.items():
        twin, calibration = nr.calibrate(nr.convert(model, to), unlabelled, batch_size=100)
        assert _far(in_training(twin, x), expected) <= most * own
        assert calibration.inputs == 200  # the last batch is smaller, and another size would read another scale
        assert nr.verify(model, twin, x[:100]).max_abs <= 1e-4
        nr.save(twin, tmp_path / "twin.pt", force=True)
        for again in (twin, nr.load(tmp_path / "twin.pt", arch=resnet20.arch)):
            for name, value in nr.revert(again).state_dict().items():
                assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("to", TARGETS)
def test_the_scale_is_what_the_float64_reference_reads(to: str) -> None:
    norm = randomise(nn.BatchNorm2d(5)).eval()
    x = torch.randn(40, 5, 6, 6).exp()
    twin, calibration = nr.calibrate(nr.convert(norm, to), x, batch_size=20)
    assert isinstance(twin, nr.nn.BatchNorm) and twin.running_scale is not None and twin.weight is not None
    read = [reference.batch_norm(half.numpy(), metric(to))[2] for half in x.split(20)]
    expected = torch.from_numpy(sum(read) / 2).float()
    torch.testing.assert_close(twin.running_scale, expected, rtol=1e-5, atol=1e-6)
    ratio = (expected + twin.eps) / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    torch.testing.assert_close(twin.weight, norm.weight * ratio, rtol=1e-5, atol=1e-6)
    assert calibration.sites[0].calls == 2 and calibration.sites[0].difference < 5e-6  # type: ignore[operator]


def test_parameters_stay_the_same_objects_in_place(small: Callable[[], nn.Module]) -> None:
    twin = nr.convert(small())
    before = list(twin.parameters())
    after = list(nr.calibrate_(twin, torch.randn(20, 3, 4, 4), batch_size=10)[0].parameters())
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_a_second_calibration_and_training_keep_the_way_back(small: Callable[[], nn.Module]) -> None:
    model = small()
    twin, _ = nr.calibrate(nr.convert(model), torch.randn(20, 3, 4, 4))
    twin, _ = nr.calibrate(twin, 3 * torch.randn(20, 3, 4, 4))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in nr.revert(twin).state_dict().items())
    with torch.no_grad():
        twin[1].weight[2] += 1  # type: ignore[index]
    back, x = nr.revert(twin), torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(back(x), twin(x), rtol=1e-5, atol=1e-5)  # the nearest: the same function in eval
    assert torch.equal(back[1].weight[:2], model[1].weight[:2])  # type: ignore[index]


def test_batches_that_are_not_finite_are_left_out_and_counted(small: Callable[[], nn.Module]) -> None:
    twin, x = nr.convert(small()), torch.randn(30, 3, 4, 4)
    clean = nr.calibrate(twin, torch.cat([x[:10], x[20:]]), batch_size=10)[0]
    x[13, 1, 2, 2] = float("nan")
    dirty, calibration = nr.calibrate(twin, x, batch_size=10)
    assert calibration.skipped_batches == 1 and calibration.inputs == 20
    assert all(torch.equal(value, clean.state_dict()[name]) for name, value in dirty.state_dict().items())
    with pytest.raises(nr.NormRewriteError, match="not finite"):
        nr.calibrate(twin, torch.full((4, 3, 4, 4), float("nan")))


def test_dead_channels_are_counted_and_harmless() -> None:
    twin = nr.convert(randomise(nn.BatchNorm1d(3)).eval())
    x = torch.randn(64, 3)
    x[:, 1] = 5.0
    calibrated, calibration = nr.calibrate(twin, x)
    assert calibration.sites[0].dead == 1
    assert nr.verify(twin, calibrated, x).max_abs < 1e-5 and torch.isfinite(calibrated.train()(x)).all()


class _Shared(nn.Module):
    """One norm at two places, with inputs of different spread."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = randomise(nn.BatchNorm1d(4))
        self.frozen = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm(3 * x) + self.frozen(x)


def test_a_shared_norm_takes_the_average_and_no_affine_is_said_so() -> None:
    twin, calibration = nr.calibrate(nr.convert(_Shared().eval()), torch.randn(500, 4))
    assert calibration.sites[0].calls == 4
    torch.testing.assert_close(twin.norm.running_scale, torch.full((4,), 2.0), rtol=0.1, atol=0)  # of 1 and 3
    assert "no affine" in calibration.sites[1].note and "no affine" in str(calibration)


@pytest.mark.parametrize(
    ("data", "message"),
    [(torch.randn(4, 5, 4, 4), "can't run on"), ([], "no batch"), (["text"], "a batch is a tensor")],
    ids=["shape", "empty", "text"],
)
def test_bad_data(small: Callable[[], nn.Module], data: object, message: str) -> None:
    twin = nr.convert(small())
    with pytest.raises(nr.NormRewriteError, match=message):
        nr.calibrate(twin, data)  # type: ignore[arg-type]
    with pytest.raises(nr.NormRewriteError, match="Convert it first"):
        nr.calibrate(small(), torch.randn(4, 3, 4, 4))


def test_trained_then_calibrated_reverts_to_the_nearest_and_says_so(small: Callable[[], nn.Module]) -> None:
    twin = nr.convert(small()).train()
    for _ in range(10):
        twin(5 * torch.randn(8, 3, 4, 4))
    twin, _ = nr.calibrate(twin.eval(), torch.randn(16, 3, 4, 4))
    x = torch.randn(4, 3, 4, 4)
    expected = twin(x)
    back, names, trained = reverted(copy.deepcopy(twin))
    torch.testing.assert_close(back(x), expected, rtol=1e-4, atol=1e-4)
    assert names == trained == ["1", "4"]


def test_calibration_leaves_tied_weights_alone() -> None:
    model = randomise(nn.Sequential(nn.BatchNorm1d(8), nn.Tanh(), nn.BatchNorm1d(8), nn.BatchNorm1d(8))).eval()
    model[2].weight = model[0].weight
    twin, calibration = nr.calibrate(nr.convert(model), torch.randn(64, 8) ** 3)
    x = torch.randn(5, 8)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
    assert [bool(site.note) for site in calibration.sites] == [True, True, False]
