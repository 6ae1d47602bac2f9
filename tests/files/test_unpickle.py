"""What a pickle may name, and that nothing else of it is built or run."""

import importlib
import pickle
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from normrewrite import NormRewriteError, convert
from normrewrite import nn as nr_nn
from normrewrite.files import unpickle
from tests.conftest import TARGETS


def public(module: ModuleType) -> list[type[Any]]:
    return [value for name, value in vars(module).items() if not name.startswith("_") and isinstance(value, type)]


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


LAYERS = [cls for cls in public(nn.modules) if issubclass(cls, nn.Module)]
FILES = [importlib.import_module(name) for name in sorted({cls.__module__ for cls in LAYERS})]


@pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)
def test_every_layer_of_torch_is_allowed_under_its_own_name(cls: type) -> None:
    assert unpickle._allowed(full_name(cls), ()) is cls


def test_layers_are_allowed_after_torch_compile_has_changed_how_they_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch._dynamo.mutation_guard does, for good, in a process that compiles."""

    def patched(self: nn.Module, state: dict[str, Any]) -> None: ...

    patched.__module__ = "torch._dynamo.mutation_guard"
    monkeypatch.setattr(nn.Module, "__setstate__", patched)
    assert unpickle._allowed(full_name(nn.BatchNorm2d), ()) is nn.BatchNorm2d


def test_layers_are_all_there() -> None:
    assert len(LAYERS) > 150 and {nn.Linear, nn.BatchNorm2d, nn.Transformer} <= set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__)
def test_nothing_else_in_the_files_of_layers_is_allowed(file: ModuleType) -> None:
    """Functions, constants, imported modules, classes that are no layers, and names imported from elsewhere."""
    for name, value in vars(file).items():
        layer = isinstance(value, type) and issubclass(value, nn.Module)
        own = layer and full_name(value) == f"{file.__name__}.{name}"
        assert unpickle._allowed(f"{file.__name__}.{name}", ()) is (value if own else None), name


@pytest.mark.parametrize(
    "name",
    [
        "posix.system",
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load",
        "torch.jit.load",
        "torch.nn.Linear",  # a layer, but not where it is defined
        "torch.nn.modules.Linear",
        "torch.nn.modules.batchnorm.Module",
        "torch.nn.modules.linear.torch",
        "torch.nn.modules.linear.torch.os.system",
        "torch.nn.modules.linear.torch.os.popen",
        "torch.nn.modules.module.functools.partial",
        "torch.nn.modules.module.OrderedDict",
        "torch.nn.modules.module.register_module_forward_hook",
        "torch.nn.modules.utils._ntuple",
        "torch.nn.modules.container.Sequential.forward",
        "torch.nn.modules.container.Sequential.__class__",
        "torch.nn.modules.container.",
        "torch.nn.modules..Linear",
        "torch.nn.modules.",
        "torch.nn.modules.nosuch.Linear",
        "torch.nn.modulesx.linear.Linear",
        "torch.nn.parallel.distributed.os",
        "torch.nn.parallel.distributed.os.system",
        "torch.nn.parallel.distributed.DistributedDataParallel",
        "torch.nn.parallel.data_parallel.DataParallel",
        "torch.nn.utils.parametrize.ParametrizationList",
        "torch.nn.functional.handle_torch_function",
        "torch.fx.graph_module.GraphModule",
        "normrewrite.nn.BatchNorm2d",
        "normrewrite.nn.batch.Callable",
        "normrewrite.nn.batch.torch.os.system",
        "normrewrite.nn.functional.batch_norm",
        "normrewrite.nn.parts.assemble",
        "normrewrite.files.load",
        "normrewrite.files.os",
        "",
        ".",
        "Linear",
    ],
)
def test_refused(name: str) -> None:
    assert unpickle._allowed(name, ()) is None


@pytest.mark.parametrize("name", ["batch.BatchNorm", "batch.BatchNorm2d", "origin.Origin", "affine.ChannelAffine"])
def test_our_own_modules_are_allowed(name: str) -> None:
    assert unpickle._allowed(f"normrewrite.nn.{name}", ()).__name__ == name.rpartition(".")[2]


@pytest.mark.parametrize("name", unpickle.FUNCTIONS)
def test_plain_functions_are_what_they_are_called(name: str) -> None:
    """Each is what pickle would find under the name, and only computes."""
    module, _, attribute = name.rpartition(".")
    function = unpickle._allowed(name, ())
    assert function is getattr(importlib.import_module(module), attribute)
    assert function(torch.ones(2)).shape == (2,)


# --- through files ----------------------------------------------------------------------------------------------------


class Effect:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


@dataclass(frozen=True)
class Userland:
    """A module of the user's own, importable, and files that need it."""

    folder: Path

    def save(self, obj: object, name: str = "model.pt", **options: bool) -> Path:
        torch.save(obj, self.folder / name, **options)
        return self.folder / name

    def make(self, name: str) -> nn.Module:
        made: nn.Module = getattr(importlib.import_module("userland"), name)(nn.Linear(2, 2), nn.BatchNorm1d(2))
        return made


@pytest.fixture
def userland(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Userland]:
    source = """
from torch import nn
class Net(nn.Sequential): pass
class Other(nn.Sequential): pass
class Settings: width = 3
class Outer:
    class Net(nn.Sequential): pass
def function(): return 3
Alias = nn.Linear
"""
    (tmp_path / "userland.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield Userland(tmp_path)
    sys.modules.pop("userland", None)


def test_allow_lets_one_class_through(userland: Userland) -> None:
    path = userland.save(userland.make("Net"))
    with pytest.raises(NormRewriteError, match=r"asks for 1 .*: userland\.Net\. .*--allow userland:Net"):
        unpickle.load(path)
    with pytest.raises(NormRewriteError, match=r"userland\.Net"):
        unpickle.load(path, allow=["userland:Other", "userland.Net", "Net", "userland:"])
    assert type(unpickle.load(path, allow=["userland:Other", "userland:Net"])).__name__ == "Net"
    with pytest.raises(NormRewriteError):  # and it was let through once, not for good
        unpickle.load(path)


def test_allow_takes_classes_that_are_no_modules(userland: Userland) -> None:
    """A layer may keep its settings in an object of the user's."""
    net = userland.make("Net")
    net.settings = importlib.import_module("userland").Settings()
    path = userland.save(net)
    with pytest.raises(NormRewriteError, match=r"asks for 2 .*--allow userland:Net --allow userland:Settings"):
        unpickle.load(path)
    assert unpickle.load(path, allow=["userland:Net", "userland:Settings"]).settings.width == 3


@pytest.mark.parametrize("allow", ["nosuch:Net", "userland:Net", "userland:function", "posix:system", "builtins:eval"])
def test_allow_of_something_else_or_of_a_function_runs_nothing(userland: Userland, allow: str) -> None:
    marker = userland.folder / "marker"
    path = userland.save({"state_dict": Effect(marker)})
    with pytest.raises(NormRewriteError, match=r"nothing of it was run: .*eval"):
        unpickle.load(path, allow=[allow])
    assert not marker.exists()


@pytest.mark.parametrize("name", ["userland.function", "userland.Alias", "userland.nosuch", "userland.Outer"])
def test_allow_asks_for_a_class_under_its_own_name(userland: Userland, name: str) -> None:
    allow = [":".join(name.rsplit(".", 1))]
    if name.endswith("nosuch"):
        with pytest.raises(NormRewriteError, match="--allow userland:nosuch"):
            unpickle._allowed(name, allow)
    else:
        found = unpickle._allowed(name, allow)
        assert found is None or found.__qualname__ == "Outer"


def test_trust_runs_what_the_file_contains(userland: Userland) -> None:
    """The one way; it also shows that the marker of the other tests can appear."""
    marker = userland.folder / "marker"
    path = userland.save({"state_dict": Effect(marker)})
    with pytest.raises(NormRewriteError, match="nothing of it was run"):
        unpickle.load(path)
    assert not marker.exists()
    unpickle.load(path, trust=True)
    assert marker.exists()
    assert type(unpickle.load(userland.save(userland.make("Net")), trust=True)).__name__ == "Net"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_come_back_in_both_formats_of_torch(userland: Userland, zipped: bool) -> None:
    state = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()
    back = unpickle.load(userland.save({"state_dict": state, "epoch": 3}, _use_new_zipfile_serialization=zipped))
    torch.testing.assert_close(back["state_dict"], state, rtol=0, atol=0)


def test_module_in_the_format_before_torch_1_6_needs_trust(userland: Userland) -> None:
    """torch's restricted unpickler reads no classes from it. Nothing is wrong with the file, and the message says so."""
    path = userland.save(nn.Sequential(nn.Linear(2, 2)), _use_new_zipfile_serialization=False)
    with pytest.raises(NormRewriteError, match=r"model\.pt.*--trust") as refused:
        unpickle.load(path)
    assert "truncated" not in str(refused.value) and "\x1b" not in str(refused.value)  # torch's words are in colour
    assert type(unpickle.load(path, trust=True)[0]) is nn.Linear


def tried(layer: nn.Module, userland: Userland) -> None:
    path = userland.save(nn.Sequential(layer, nn.BatchNorm1d(3)).eval())
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(unpickle.load(path)(x), torch.load(path, weights_only=False)(x), rtol=0, atol=0)


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU()])
def test_transformers_come_back(userland: Userland, activation: str | nn.Module) -> None:
    tried(nn.TransformerEncoderLayer(4, 2, 8, 0.0, activation, batch_first=True), userland)


@pytest.mark.parametrize("name", unpickle.FUNCTIONS)
def test_layers_that_keep_a_plain_function_come_back(userland: Userland, name: str) -> None:
    """A row of the table is of use only if pickle writes the function under that name."""
    function: Any = unpickle.FUNCTIONS[name]
    tried(nn.TransformerEncoderLayer(4, 2, 8, 0.0, function, batch_first=True), userland)


@pytest.mark.parametrize("to", TARGETS)
def test_twins_come_back(userland: Userland, to: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4)).eval()
    twin = convert(net, to=to)
    back = unpickle.load(userland.save(twin))
    assert str(back) == str(twin)
    torch.testing.assert_close(back.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("trust", [False, True])
def test_norms_of_a_sample_come_back_by_the_module_they_were_in(
    userland: Userland, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    """Files made before normrewrite.nn.rows became normrewrite.nn.sample."""
    norms = [nr_nn.LayerNorm(4), nr_nn.RMSNorm(4), nr_nn.GroupNorm(1, 3), nr_nn.InstanceNorm1d(3, affine=True)]
    with monkeypatch.context() as then:
        for norm in norms:
            then.setattr(type(norm), "__module__", "normrewrite.nn.rows")
        path = userland.save(nn.Sequential(*norms))
    assert b"normrewrite.nn.rows" in path.read_bytes()
    back = unpickle.load(path, trust=trust)
    assert [type(norm) for norm in back] == [type(norm) for norm in norms]
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(back(x), nn.Sequential(*norms)(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"PK\x03\x04" + b"\0" * 200,
        b"\x80\x02.",
        b"\x80\x05K",
        b"text\n",
        b"\x89PNG\r\n",
        b"\0" * 64,
    ],
)
@pytest.mark.parametrize("trust", [False, True])
def test_damage_is_told(tmp_path: Path, content: bytes, trust: bool) -> None:
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(NormRewriteError, match=r"damaged\.pt: can't be read as a torch file .*Give a file") as told:
        unpickle.load(path, trust=trust)
    assert "weights_only" not in str(told.value)  # torch's own advice is to unpickle freely


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncation_is_told(userland: Userland, keep: float, zipped: bool) -> None:
    path = userland.save(nn.Linear(30, 30).state_dict(), _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(NormRewriteError, match="may be truncated"):
        unpickle.load(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_pickle_protocols(userland: Userland, protocol: int) -> None:
    """torch's restricted unpickler knows protocols 2 and 3, and warns of 3; nothing is wrong with a file of 4 or 5."""
    path, state = userland.folder / "model.pt", nn.Linear(2, 2).state_dict()
    torch.save(state, path, pickle_protocol=protocol)
    if protocol > 3:
        with pytest.raises(NormRewriteError, match=f"protocol {protocol}.*--trust"):
            unpickle.load(path)
    back = unpickle.load(path, trust=protocol > 3)
    torch.testing.assert_close(back, state, rtol=0, atol=0)


def test_plain_pickle_of_tensors_is_no_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    path.write_bytes(pickle.dumps({"weight": torch.zeros(2)}))
    with pytest.raises(NormRewriteError, match=r"plain\.pt"):
        unpickle.load(path)


NUMBERS = [np.float64(0.5), np.float32(0.25), np.int64(-3), np.bool_(True), np.str_("hé"), np.array([1.5], ">f4")[0]]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_are_plain(tmp_path: Path, number: Any, zipped: bool) -> None:
    torch.save({"best": number}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    best = unpickle.load(tmp_path / "a.pt")["best"]
    assert best == number.item() and type(best) is type(number.item())


class Forged:
    """What a pickle says of a number of numpy's."""

    def __init__(self, *said: Any) -> None:
        self.said = said

    def __reduce__(self) -> Any:
        return self.said


SCALAR: Any = np.float64(1).__reduce__()[0]


@pytest.mark.parametrize(
    "said",
    [
        (SCALAR, (np.dtype("O"), "text")),
        (SCALAR, (np.dtype("V100000000"), b"x")),
        (SCALAR, ("f8", b"12345678")),
        (SCALAR, (np.dtype("f8"), "12345678")),
        (SCALAR, (np.dtype("f8"), b"123")),
        (np.dtype, ([("a", "f8")],)),
        (np.dtype, ("f8", False, True), (3, "<", None, ("a",), {"a": 1}, -1, -1, 0)),
    ],
)
def test_numbers_of_numpy_are_nothing_else(tmp_path: Path, said: tuple[Any, ...]) -> None:
    torch.save({"best": Forged(*said)}, tmp_path / "a.pt")
    with pytest.raises(NormRewriteError):
        unpickle.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"state_dict": {"w": torch.ones(2)}, "when": datetime(2026, 1, 1)},
            "in its entry 'when'.* --allow datetime:datetime",
        ),
        (
            {"epoch": 1, "state_dict": {}, "x": {"args": Namespace(a=1)}},
            "in its entry 'x'.* --allow argparse:Namespace",
        ),
        ({"model": {"a": Namespace(a=1)}, "epoch": 1}, "Best: save a state_dict and name its code"),
    ],
)
def test_a_refusal_says_which_entry_it_is_about(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(NormRewriteError, match=said):
        unpickle.load(tmp_path / "a.pt")
