"""How a checkpoint holds weights: found, fitted to a network, and written again as it was."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normrewrite as nr
from normrewrite import files
from normrewrite.files import layout

Make = Callable[[], nn.Module]
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def net() -> nn.Module:
    blocks = OrderedDict(stem=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), head=nn.Sequential(nn.Conv2d(4, 2, 1)))
    return nn.Sequential(blocks).eval()


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def compiled(*modules: str) -> Callable[[State], State]:
    """torch.compile on some modules of a network."""

    def wrap(state: State) -> State:
        for module in modules:
            state = {name.replace(f"{module}.", f"{module}._orig_mod.", 1): value for name, value in state.items()}
        return state

    return wrap


WRAPS: dict[str, tuple[Callable[[State], Any], str]] = {
    "own names": (lambda state: {"net": state}, ""),
    "module.": (lambda state: {"net": prefixed("module.")(state)}, ""),
    "net.": (lambda state: {"net": prefixed("net.")(state)}, "'net.'"),
    "model._orig_mod.": (lambda state: {"model": prefixed("model._orig_mod.")(state)}, "'model.'"),
    "inner": (lambda state: {"model": compiled("head", "stem")(state)}, ""),
    "inner and outer": (lambda state: {"model": prefixed("module.")(compiled("head")(state))}, ""),
    "all of it": (lambda state: {"ema": prefixed("a.b._orig_mod.")(compiled("head.0")(state))}, "'a.b.'"),
    "averaged": (lambda state: {"net": prefixed("module.")(state) | {"n_averaged": torch.tensor(7)}}, ""),
    "nested": (lambda state: {"a": {"model": state, "step": 5}, "lr": [0.1, {"b": (1, None)}], "done": True}, "--key"),
    "the only weights": (lambda state: {"params": state, "epoch": 3, "scale": {"x": 1.0}}, ""),
    "a key with a dot": (lambda state: {"v1.0": state, "epoch": 3}, ""),
    "numbers among them": (lambda state: {"net": {**state, "epoch": 7}}, ""),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("how", WRAPS)
def test_layout_goes_out_as_it_came(how: str, suffix: str) -> None:
    """Also by way of .safetensors, which has no room for what stands beside."""
    wrap, said = WRAPS[how]
    content = wrap(net().state_dict())
    torch.save(content, "c.pt")
    file = files.read("c.pt", net, key="a.model" if said == "--key" else None)
    assert ([note for note in file.notes if said in note] == file.notes) and bool(file.notes) == ("." in said)
    nr.save(nr.convert(file.model, "l1"), f"t{suffix}", layout=file.layout)
    twin = files.read(f"t{suffix}", net)
    assert twin.notes == [] and any(isinstance(module, nr.nn.BatchNorm) for module in twin.model.modules())
    nr.save(nr.revert(twin.model), "back.pt", layout=twin.layout)
    back = torch.load("back.pt", weights_only=True)
    assert back.pop("normrewrite")["sites"] == []
    found, _, _ = layout.find(back, None if said != "--key" else "a.model", Path("back.pt"))
    assert isinstance(found, dict) and len(found) == len(net().state_dict())
    if suffix == ".pt":
        assert _plain(back) == _plain(content)


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _plain(value) for name, value in content.items()}
    return content.tolist() if isinstance(content, Tensor) else content


def test_metadata_of_safetensors_stays() -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file(net().state_dict(), "w.safetensors", {"format": "pt", "made by": "someone"})
    file = files.read("w.safetensors", net)
    nr.save(nr.convert(file.model, "l1"), "t.safetensors", layout=file.layout)
    with safe_open("t.safetensors", framework="pt") as twin:
        assert {name: twin.metadata()[name] for name in ("format", "made by")} == {"format": "pt", "made by": "someone"}


def test_a_pickled_module_stays_in_its_checkpoint() -> None:
    torch.save({"model": net(), "epoch": 3}, "c.pt")
    file = files.read("c.pt")
    assert nr.save(nr.convert(file.model, "l1"), "t.pt", form=file.form, layout=file.layout) == "module"
    back = files.read("t.pt")
    assert back.form == "module" and back.layout.beside == {"epoch": 3} and back.manifest is not None


@pytest.mark.parametrize("child", ["module", "net"])
def test_a_network_s_own_child_is_no_prefix(child: str) -> None:
    def wrapped() -> nn.Module:
        return nn.Sequential(OrderedDict({child: net()}))

    torch.save(wrapped().state_dict(), "w.pt")
    file = files.read("w.pt", wrapped)
    assert file.notes == [] and file.layout.prefix == ""


def test_a_prefix_that_does_not_make_all_fit_stays() -> None:
    state = prefixed("net.")(net().state_dict())
    torch.save(state | {"net.more": torch.zeros(1)}, "w.pt")
    with pytest.raises(nr.NormRewriteError, match=r"missing stem.weight, .* unexpected|missing stem.weight"):
        nr.load("w.pt", net)


def test_the_api_warns_of_what_it_chose() -> None:
    state = net().state_dict()
    torch.save({"state_dict": prefixed("net.")(state), "state_dict_ema": state}, "w.pt")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        nr.load("w.pt", net)
    assert [str(each.message).partition(": ")[2][:17] for each in told] == ["the weights under", "every name begins"]


def _knot() -> list[Any]:
    knot: list[Any] = []
    for _ in range(40):
        knot = [knot, knot]
    return knot


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1 << 20),
        torch.zeros(1 << 20)[:2],  # a view brings all of it into a file
        [torch.zeros(1 << 10)] * (1 << 10),
        "x" * (1 << 21),
        _knot(),
        nn.Linear(2, 2),
        {"a": [b"b"]},
        [{"state": {}, "param_groups": []}],  # an optimiser's, of Lightning
        {"fc.weight": torch.zeros(2, 2)},  # other weights
    ],
)
def test_what_is_no_small_plain_data_is_left(value: object) -> None:
    file = files.layout.find({"net": net().state_dict(), "epoch": 3, "rest": value}, None, Path("c.pt"))[1]
    assert file.left == ("rest",) and file.beside == {"epoch": 3}


@pytest.mark.parametrize(
    "odd", [3, {"key": "net"}, {"key": [3]}, {"prefix": None}, {"compiled": {}}, {"key": ["x"] * 99}, {"prefix": "zz."}]
)
def test_a_manifest_s_layout_is_not_believed(odd: object) -> None:
    nr.save(nr.convert(net(), "l1"), "t.pt")
    content = torch.load("t.pt", weights_only=True)
    content["normrewrite"]["layout"] = odd
    torch.save(content, "t.pt")
    try:
        model = nr.load("t.pt", net)
    except nr.NormRewriteError as error:
        assert "layout" in str(error)
    else:
        assert model.state_dict().keys() == nr.convert(net(), "l1").state_dict().keys()


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda state: {"model": {"name": "r", "depth": 20}, "weights": state}, None),
        (lambda state: {"model": {}, "weights": state}, None),
        (lambda state: {"my.net": state, "other": {"a": 1}}, "my.net"),
        (lambda state: {"x": {"my.net": {"y": state}}, "z": state}, "x.my.net.y"),
        (lambda state: {0: {}, 1: state}, "1"),
        (lambda state: [{}, state], "1"),
        (lambda state: {"nets": [{}, {"a.b": state}]}, "nets.1.a.b"),
        (lambda state: {"state_dict": prefixed("model.")(state) | {"criterion.weight": torch.ones(2)}}, None),
        (lambda state: prefixed("a.b.")(state) | {"criterion.weight": torch.ones(2)}, None),
    ],
)
def test_weights_are_found_where_they_are(wrap: Callable[[State], Any], key: str | None) -> None:
    original = net()
    torch.save(wrap(original.state_dict()), "a.pt")
    file = files.read(Path("a.pt"), net, key=key)
    twin = nr.convert(file.model, to="l1")
    files.save(twin, "b.pt", layout=file.layout)
    again = files.read(Path("b.pt"), net)
    for model in (file.model, nr.revert(again.model)):
        assert all(torch.equal(value, original.state_dict()[name]) for name, value in model.state_dict().items())
    assert set(again.layout.among) == set(file.layout.among)


def test_names_of_another_network_beside_are_carried_along() -> None:
    state = prefixed("model.")(net().state_dict())
    torch.save({"state_dict": state | {"criterion.weight": torch.ones(2)}}, "a.pt")
    file = files.read(Path("a.pt"), net)
    assert list(file.layout.among) == ["criterion.weight"] and "begin with 'model.' fit" in file.notes[0]
    torch.save({"state_dict": state | prefixed("ema.")(net().state_dict())}, "a.pt")
    with pytest.raises(nr.NormRewriteError, match="missing"):  # either could be meant
        files.read(Path("a.pt"), net)


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        ({"model": {"depth": 20}, "other": 1}, None, "keys: model, other"),
        ({"model": {"depth": 20}, "other": 1}, "model", "keys: model, other; under model: depth"),
        ([{"a": 1}, 2], None, "holds a list, .* --key takes one of 0, 1"),
        ({"a": {"b": {}}}, "a.c", "there is no 'c'. Keys: b"),
        ({"a": [1]}, "a.1", "there is no '1'. Keys: 0"),
    ],
)
def test_what_keys_there_are(content: Any, key: str | None, said: str) -> None:
    torch.save(content, "a.pt")
    with pytest.raises(nr.NormRewriteError, match=said):
        files.read(Path("a.pt"), net, key=key)


class Counting(nn.Linear):
    """A layer with a further state that is no tensor."""

    seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state}, prefixed("module.")])
def test_a_further_state_of_a_module_comes_back(wrap: Callable[[State], Any]) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(3), Counting(3, 3)).eval()

    model: Any = make()
    model[1].seen = 7
    torch.save(wrap(model.state_dict()), "a.pt")
    file = files.read(Path("a.pt"), make)
    files.save(nr.convert(file.model, to="l1"), "b.pt", layout=file.layout)
    for name in ("a.pt", "b.pt"):
        read: Any = files.read(Path(name), make).model
        assert read[1].seen == 7
    plain = files.read(Path("a.pt"), lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)))
    assert [name.rpartition(".")[2] for name in plain.layout.among] == ["_extra_state"]
