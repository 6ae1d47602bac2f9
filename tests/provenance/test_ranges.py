"""The record of learned ranges: what it takes, and what it refuses."""

import json
from typing import Any

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite import LearnedRanges, NormRewriteError
from normrewrite.provenance import manifest, ranges
from tests.conftest import randomise

RANGES = LearnedRanges({"0": 2.640000104904175, "3": 1e-30, "4#2+left": 0.0}, ("7",))


def small() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Identity(), nn.Conv2d(4, 2, 1))
    return randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(2, 2))).eval()


def test_names_tell_their_module() -> None:
    for module in ("", "conv1", "layer1.0.conv1"):
        for time in (1, 2, 11):
            for side in ("", *ranges.SIDES):
                assert ranges.owner(ranges.called(module, time, side)) == module
    assert ranges.called("layer1.0", 2, "+left") == "layer1.0#2+left"


def test_ranges_travel_in_the_manifest_to_the_bit() -> None:
    record = json.loads(json.dumps(manifest.describe(small(), learned=RANGES)))
    assert ranges.of_record(manifest.check(record, "here"), "here") == RANGES
    assert torch.tensor(RANGES.amax["0"]).item() == RANGES.amax["0"]  # an fp32 number
    assert ranges.of_record(manifest.describe(small()), "here") is None and ranges.of_record(None, "here") is None


@pytest.mark.parametrize("form", ["state_dict", "safetensors", "module"])
def test_every_form_of_a_file_carries_them(form: Any, tmp_path: Any) -> None:
    model, path = nr.convert(small()), tmp_path / ("twin.safetensors" if form == "safetensors" else "twin.pt")
    assert nr.save(model, path, form=form, learned=RANGES) == form
    file = nr.files.read(path, None if form == "module" else small)  # type: ignore[attr-defined]
    assert ranges.of_record(file.manifest, "here") == RANGES and file.form == form
    x = torch.randn(2, 3, 1, 1)
    assert torch.equal(file.model.eval()(x), model.eval()(x))
    if form == "state_dict":  # as any other program reads it
        state = torch.load(path, weights_only=True)["state_dict"]
        assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_range_is_a_number(value: float) -> None:
    with pytest.raises(NormRewriteError, match=r"learned ranges: 'conv2' is .*Train again, or calibrate"):
        LearnedRanges({"conv1": 1.0, "conv2": value})


@pytest.mark.parametrize(
    "found",
    [[], {"amax": {}}, {"amax": [1.0], "kept": []}, {"amax": {"a": "1"}, "kept": []}, {"amax": {}, "kept": [3]}],
)
def test_a_damaged_record_is_told(found: object) -> None:
    with pytest.raises(NormRewriteError, match=r"here: the int8 ranges in its manifest are no numbers"):
        manifest.check({"normrewrite": "0", "format": 1, "sites": [], "int8": found}, "here")


def test_ranges_of_another_network_are_told() -> None:
    with pytest.raises(NormRewriteError, match=r"they know 'conv1', which Sequential has not"):
        ranges.check(LearnedRanges({"conv1": 1.0}), small())
    with pytest.raises(NormRewriteError, match=r"they know '9'"):
        ranges.check(LearnedRanges({"0": 1.0}, ("9",)), small())
    ranges.check(LearnedRanges({"0": 1.0}, ("3",)), small())
