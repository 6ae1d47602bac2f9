"""forget: nothing of the original stays in a twin or its files, and the function does."""

from pathlib import Path

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite import files
from normrewrite.commands.audit import audit
from normrewrite.commands.source import Source
from normrewrite.errors import NormRewriteError
from normrewrite.files.writing import Form
from tests.conftest import Command, randomise
from tests.forms import REVERSIBLE, Chain, PreActivation, inputs, rewritten, same_bits, start

BATCH_SCOPE = ("l1", "topk:10", "range", "frozen", "renorm")


def _kept(twin: nn.Module) -> list[str]:
    """Names of what a state_dict holds beside what the network computes with."""
    return [name for name in twin.state_dict() if ".origin." in f".{name}" or name.endswith(".checksum")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With two layers of some size."""
    code = "nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))"
    (tmp_path / "two.py").write_text(f"from torch import nn\ndef net(): return {code}\n")
    torch.save({"state_dict": randomise(eval(code)).state_dict()}, tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("to", REVERSIBLE)
@pytest.mark.parametrize("network", ["chain", "pre-activation"])
def test_nothing_is_left_but_the_function(to: str, network: str) -> None:
    twin = nr.convert(start(to, network), to)
    plain, x = nr.forget(twin), inputs(network)
    assert _kept(twin) and not _kept(plain)
    assert torch.equal(plain(x), twin(x))
    assert torch.equal(plain.train()(x), twin.train()(x))  # statistics move as they would have
    before = {name: value for name, value in twin.state_dict().items() if name not in _kept(twin)}
    assert list(before) == list(plain.state_dict()) and all(
        torch.equal(before[n], v) for n, v in plain.state_dict().items()
    )
    assert [site.label for site in rewritten(plain)] == [site.label for site in rewritten(twin)]


@pytest.mark.parametrize("form", ["state_dict", "safetensors", "module"])
@pytest.mark.parametrize("to", ["l1", "group:4", "frozen", "wn", "bwn"])
def test_it_stays_forgotten_through_files(to: str, form: Form, tmp_path: Path) -> None:
    path = tmp_path / ("twin.safetensors" if form == "safetensors" else "twin.pt")
    twin = nr.calibrate(nr.convert(start(to, "chain"), to), inputs("chain"))[0] if to == "l1" else None
    twin = nr.forget(twin or nr.convert(start(to, "chain"), to))
    nr.save(twin, path, form=form)
    again = nr.load(path, arch=Chain, allow=["tests.forms:Chain"]).eval()
    assert same_bits(again, twin) and torch.equal(again(inputs("chain")), twin(inputs("chain")))
    with pytest.raises(NormRewriteError, match=r"has been forgotten.*Give it as --teacher"):
        nr.finetune(again, inputs("chain"), epochs=1)
    if form == "state_dict":
        record = files.read(path, Chain).manifest
        assert record is not None and all(entry["forgotten"] for entry in record["sites"])
        told = audit(Source(path, arch=Chain), None, None)  # type: ignore[arg-type]
        assert told.ok, told


@pytest.mark.parametrize("to", BATCH_SCOPE)
def test_the_nearest_batch_norms_come_back(to: str) -> None:
    model, x = start(to, "chain"), inputs("chain")
    back = nr.revert(nr.forget(nr.convert(model, to)))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(back(x), model(x), rtol=1e-4, atol=1e-5)
    assert not same_bits(back, model) or to == "frozen"


@pytest.mark.parametrize("to", ["group:4", "wn"])
def test_what_has_no_way_back_says_so(to: str) -> None:
    twin = nr.forget(nr.convert(start(to, "chain"), to))
    with pytest.raises(NormRewriteError, match="what its norms were was forgotten, so there is nothing to revert"):
        nr.revert(twin)
    if to == "wn":
        torch.testing.assert_close(nr.bake(twin)(inputs("chain")), twin(inputs("chain")), rtol=1e-5, atol=1e-6)


def test_norms_within_a_sample_of_another_metric_come_back_nearest() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)).eval()
    twin = nr.forget(nr.convert(model, "l1", scope="layer"))
    back = nr.revert(twin)
    assert type(back[1]) is nn.LayerNorm and torch.equal(back[1].weight, twin[1].weight)  # type: ignore[index]


def test_an_original_that_is_given_fits_a_twin_that_has_none() -> None:
    model = start("group:4", "chain")
    twin, data = nr.convert(model, "group:4"), inputs("chain")
    fitted = nr.calibrate(twin, data)[0]
    forgetful = nr.forget(twin)
    with pytest.raises(NormRewriteError, match=r"has been forgotten.*Give that one as `original`"):
        nr.calibrate(forgetful, data)
    again = nr.calibrate(forgetful, data, original=model)[0]
    assert torch.equal(again(data), fitted(data))
    l1 = nr.forget(nr.convert(model, "l1"))
    assert nr.verify(l1, nr.calibrate(l1, data)[0], data).ok


def test_what_is_no_twin_is_refused_and_in_place_is_in_place() -> None:
    with pytest.raises(NormRewriteError, match="Chain holds no rewritten norm, so there is nothing to forget"):
        nr.forget(Chain())
    twin = nr.convert(PreActivation(), "layer")
    assert nr.forget_(twin) is twin and not _kept(twin)


def test_the_command_writes_a_smaller_file_without_a_way_back(run: Command) -> None:
    assert run("convert weights.pt --arch two.py:net --to wn").code == 0
    assert run("convert weights.pt --arch two.py:net --to wn --forget -o less.pt").code == 0
    assert Path("less.pt").stat().st_size < 0.55 * Path("weights.wn.pt").stat().st_size
    told = run("revert less.pt --arch two.py:net")
    assert told.code == 2 and "what its norms were was forgotten" in told.err
    assert run("verify weights.pt less.pt --arch two.py:net --input-shape 4,3,8,8").code == 0
    told = run("verify less.pt --manifest less.pt --arch two.py:net")
    assert told.code == 0 and "not checked: the way back and the sites' figures: the original was forgotten" in told.out
    assert "the original was forgotten" in run("report less.pt --arch two.py:net").out
    assert run("convert weights.pt --arch two.py:net --replay less.pt -o again.pt").code == 0
    assert run("revert again.pt --arch two.py:net -o back.pt").code == 0  # a manifest is replayed with its way back
    before, after = (torch.load(name)["state_dict"] for name in ("weights.pt", "back.pt"))
    assert all(torch.equal(before[name], after[name]) for name in before)
