"""Re-estimation: float64 numpy over the same batches; what is reported, what stays, and the way back afterwards."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from tests.conftest import randomise
from tests.forms import same_bits

IMAGES = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 + 1


@pytest.fixture
def model() -> nn.Sequential:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    net = nn.Sequential(*layers)
    randomise(net)
    return net.eval()


def _measured(model: nn.Sequential, batches: list[Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By site, mean and unbiased variance of what it is given, each the average over the batches; dropout is none."""
    wide = copy.deepcopy(model).double()
    statistics: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"1": [], "5": []}
    for batch in batches:
        x = batch.double()
        for name, layer in wide.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                values = x.detach().numpy()
                statistics[name].append((values.mean((0, 2, 3)), values.var((0, 2, 3), ddof=1)))
                x = F.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
            else:
                x = layer(x)
    return {name: tuple(np.mean(each, 0) for each in zip(*pairs, strict=True)) for name, pairs in statistics.items()}  # type: ignore[misc]


def test_statistics_and_report_are_those_of_float64(model: nn.Sequential) -> None:
    old = copy.deepcopy(model)
    wanted = _measured(model, [IMAGES[:10], IMAGES[10:20]])  # the last four are no whole batch
    report = nr.reestimate_(model, IMAGES, batch_size=10)
    assert (report.inputs, report.skipped_batches) == (20, 0) and not model.training
    for site in report.sites:
        mean, variance = wanted[site.name]
        norm, was = model.get_submodule(site.name), old.get_submodule(site.name)
        assert isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor)
        np.testing.assert_allclose(norm.running_mean, mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(norm.running_var, variance, rtol=1e-5)
        before, scale = (value.double().numpy() for value in (was.running_mean, (was.running_var + 1e-5).sqrt()))  # type: ignore[operator, union-attr]
        shift, ratio = np.sort(np.abs(mean - before) / scale), np.sort(np.sqrt(variance + 1e-5) / scale)
        middle = (len(shift) - 1) // 2  # as torch's median
        np.testing.assert_allclose(site.mean, (shift[middle], shift[-1]), rtol=1e-4)
        np.testing.assert_allclose(site.scale, (ratio[middle], ratio[0], ratio[-1]), rtol=1e-4)
    a, b = model(IMAGES[:10]).detach(), old(IMAGES[:10]).detach()
    assert report.moved == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-4)
    assert "2 sites measured anew on 20 inputs" in str(report) and "labels were not used" in str(report)


def test_the_reference_would_show_one_percent(model: nn.Sequential) -> None:
    wanted = _measured(model, [IMAGES])
    nr.reestimate_(model, 1.01 * IMAGES)
    assert not np.allclose(model[1].running_var, wanted["1"][1], rtol=1e-5)


def test_a_batch_that_is_not_finite_is_left_out_and_told(model: nn.Sequential) -> None:
    wanted = _measured(model, [IMAGES[10:20]])
    report = nr.reestimate_(model, [torch.full((10, 3, 6, 6), torch.nan), IMAGES[10:20]])
    assert report.skipped_batches == 1 and report.as_dict()["inputs"] == 10 and "1 batches left out" in str(report)
    np.testing.assert_allclose(model[1].running_mean, wanted["1"][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("data", "words"),
    [([IMAGES * torch.nan], "1 batches were not finite"), ([], "no batch"), ([IMAGES, IMAGES[:, :2]], "can't run on")],
)
def test_where_it_fails_nothing_has_changed(model: nn.Sequential, data: list[Tensor], words: str) -> None:
    before = copy.deepcopy(model)
    with pytest.raises(nr.NormRewriteError, match=words):
        nr.reestimate_(model, data)
    assert same_bits(model, before)


def test_a_network_without_such_norms_is_told_so() -> None:
    with pytest.raises(nr.NormRewriteError, match="holds no batch norm that measures"):
        nr.reestimate_(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(5, 4))


@pytest.mark.parametrize("to", ["l1", "topk:10", "renorm", "wn:mean-bn"])
def test_a_twin_gives_back_the_nearest_with_the_statistics_of_now(model: nn.Sequential, to: str) -> None:
    """The original's bits would be those of statistics that were just replaced."""
    twin = nr.convert(model, to)
    nr.reestimate_(twin, IMAGES)
    back = nr.revert(twin)
    assert torch.allclose(back(IMAGES), twin(IMAGES), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(back(IMAGES), model(IMAGES), rtol=1e-2, atol=1e-2)
    with pytest.raises(nr.NormRewriteError, match="trained since"):  # nor does it pass for the original
        nr.passes.reversion.untrained(twin, "")  # type: ignore[attr-defined]


def test_what_stands_still_keeps_its_bits_and_says_so(model: nn.Sequential) -> None:
    twin = nr.convert(model, "l1", rules={"1": "frozen"})
    before = copy.deepcopy(twin[1])
    report = nr.reestimate_(twin, IMAGES)
    assert same_bits(twin[1], before) and report.sites[0].mean is None and "frozen" in report.sites[0].note
    assert report.sites[1].mean is not None and same_bits(nr.revert(twin)[1], model[1])  # type: ignore[index]


def test_a_mean_alone_is_told_in_units_of_the_input(model: nn.Sequential) -> None:
    twin = nr.convert(model, "wn:mean-bn")
    old = twin[1].running_mean.clone()
    (first, _) = nr.reestimate_(twin, IMAGES).sites
    assert first.scale is None and "no scale" in first.note and first.mean is not None
    assert first.mean[1] == pytest.approx(float((twin[1].running_mean - old).abs().max()), rel=1e-5)


def test_a_metric_that_was_not_calibrated_is_told(model: nn.Sequential) -> None:
    """Its scale changes from the original's standard deviation to what it reads, on the same inputs too."""
    told = "Calibrate first"
    twin = nr.convert(model, "l1")
    assert told in str(nr.reestimate_(twin, IMAGES)) and told not in str(
        nr.reestimate_(twin, IMAGES)
    )  # its own by then
    calibrated, _ = nr.calibrate(nr.convert(model, "l1"), IMAGES)
    assert told not in str(nr.reestimate_(calibrated, IMAGES)) and told not in str(nr.reestimate_(model, IMAGES))
