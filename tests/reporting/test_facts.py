"""What the report tells, against numpy and against `advise`, whose statistics it shares."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.api.advise import advise
from normrewrite.data import Batch, Data
from normrewrite.reporting.facts import Facts, Spread, gather
from normrewrite.reporting.histograms import BINS, REACH, gaussian
from tests.reporting.networks import ResNet, Twice, images, prepared


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return prepared(ResNet())


@pytest.fixture(scope="module")
def labelled(original: nn.Module) -> Data:
    x = images()
    labels = original(x).argmax(1)
    labels[:4] = (labels[:4] + 1) % 3  # the original gets four wrong
    return Data(Batch({"x": x}, labels))


@pytest.fixture(scope="module")
def facts(original: nn.Module, labelled: Data) -> Facts:
    twin = nr.calibrate(nr.convert(original, rules={"norm": "linf"}), images(), batch_size=20)[0]
    return gather(twin, original, labelled, batch_size=20)


def test_statistics_are_those_of_advise(facts: Facts, original: nn.Module, labelled: Data) -> None:
    advised = advise(original, labelled, batch_size=20)
    assert [site.advice for site in facts.sites] == advised.sites
    for site, advice in zip(facts.sites, advised.sites, strict=True):
        assert advice.kappa is not None and site.kappa == advice.kappa[str(site.target)]


def test_scales_before_and_after(facts: Facts, original: nn.Module) -> None:
    site = facts.sites[0]
    norm: nn.BatchNorm2d = original.norm  # type: ignore[assignment]
    assert norm.running_var is not None
    scale = np.sqrt(norm.running_var.double().numpy() + norm.eps)
    assert site.scale_before == Spread(
        pytest.approx(np.sort(scale)[1]), pytest.approx(scale.min()), pytest.approx(scale.max())
    )  # type: ignore[arg-type]
    live: nr.nn.BatchNorm2d = facts.model.norm  # type: ignore[assignment]
    assert live.running_scale is not None and site.scale_after is not None
    assert site.scale_after.high == pytest.approx(float(live.running_scale.max() + live.eps))
    assert site.scale_after != site.scale_before  # calibrated


def test_weight_norms_are_those_in_front(facts: Facts, original: nn.Module) -> None:
    weight = original.stem.weight.detach().double().flatten(1).numpy()  # type: ignore[union-attr, operator]
    norms = np.linalg.norm(weight, axis=1)
    site = facts.sites[0]
    assert site.weight_before is not None and site.weight_after is None
    assert (site.weight_before.low, site.weight_before.high) == pytest.approx((norms.min(), norms.max()), rel=1e-6)
    bounded = gather(nr.convert(original, "bwn"), original).sites[0]
    assert bounded.weight_after is not None and bounded.weight_after != bounded.weight_before


def test_histogram_is_numpys(facts: Facts, original: nn.Module) -> None:
    norm: nn.BatchNorm2d = original.norm  # type: ignore[assignment]
    with torch.no_grad():
        z = nn.functional.batch_norm(original.stem(images()), norm.running_mean, norm.running_var, eps=norm.eps)  # type: ignore[operator]
    clipped = z.double().clamp(-REACH, REACH).numpy().ravel()
    expected = np.histogram(clipped, BINS, (-REACH, REACH))[0] / clipped.size
    assert np.abs(np.array(facts.sites[0].histogram) - expected).max() < 2 / clipped.size + 1e-9
    assert sum(facts.sites[0].histogram) == pytest.approx(1)


def test_gaussian_has_the_shares_of_one() -> None:
    drawn = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).clamp(-REACH, REACH).numpy()
    shares = np.histogram(drawn, BINS, (-REACH, REACH))[0] / drawn.size
    assert np.abs(shares - np.array(gaussian())).max() < 1e-3 and sum(gaussian()) == pytest.approx(1)


def test_accuracy_is_of_both(facts: Facts) -> None:
    assert facts.comparison is not None
    (output,) = facts.comparison.outputs
    assert (output.rows, output.right) == (40, [36, 36])


def test_figures_are_of_the_conversion(original: nn.Module) -> None:
    twin, report = nr.plan(original, "topk:3").apply()
    figures = {site.name: site for site in gather(twin).sites}
    assert {site.names[0]: (site.difference, site.error) for site in report.sites} == {
        name: (site.difference, site.error) for name, site in figures.items()
    }
    assert gather(twin).ok and gather(twin).came == "had back"


def test_a_false_weight_is_told(original: nn.Module) -> None:
    twin = nr.convert(original)
    with torch.no_grad():
        twin.norm.weight *= 1.01  # type: ignore[union-attr, operator]
    assert not gather(twin, original).ok
    assert gather(nr.convert(original), original).ok


def test_another_original_is_refused(original: nn.Module) -> None:
    twin = nr.convert(original)
    for other, said in (
        (ResNet(6), "norm has 4 channels, and 6 there"),
        (nn.Sequential(nn.BatchNorm2d(4)), "none of the sites, such as norm"),
        (nr.convert(original, "layer"), "norm was BatchNorm2d, and is OffsetNorm there"),
    ):
        with pytest.raises(nr.NormRewriteError, match=said):
            gather(twin, other)


def test_dead_channels_and_kept_sites(original: nn.Module) -> None:
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.stem.weight[0] = 0  # type: ignore[union-attr, index]
    model.stages[1][1].bn2 = Twice(4).eval()  # type: ignore[index, union-attr]
    twin, report = nr.plan(model, exclude=["norm"]).apply()
    facts = gather(twin, model, Data(Batch({"x": images()})), record={"report": report.as_dict()}, batch_size=20)
    first, last = facts.sites[0], facts.sites[-1]
    assert first.advice is not None and first.advice.dead == 1
    assert (first.target, first.refused, first.note) == (None, False, "in --exclude")
    assert last.refused and "Twice overrides forward" in last.note


def test_an_original_alone(original: nn.Module) -> None:
    facts = gather(original, data=Data(Batch({"x": images()})), batch_size=20)
    assert facts.came == "" and not facts.rewritten and facts.difference is None
    assert all(site.advice is not None and site.advice.target == "l1" and site.kappa for site in facts.sites)


def test_norms_of_samples_have_nothing_to_read(original: nn.Module) -> None:
    twin = nr.convert(original, "layer")
    with_data = gather(twin, data=Data(Batch({"x": images()})), batch_size=20)
    assert all(site.difference is None and site.note for site in with_data.rewritten)
    assert all(site.histogram for site in with_data.sites)  # the original that was had back is read


def test_trained_since(original: nn.Module) -> None:
    twin = nr.convert(original)
    twin.norm.running_scale *= 1.5  # type: ignore[union-attr, operator]
    alone, beside = gather(twin), gather(twin, original)
    assert "Trained since the rewrite: 1 of the sites, so the original is not in it any more" in alone.notes[0]
    assert (alone.came, beside.came) == ("", "given")
    assert alone.sites[0].difference is None and "trained" in alone.sites[0].note
    assert beside.sites[0].difference is not None and beside.sites[0].difference > 0.1 and len(beside.exact) == 8
