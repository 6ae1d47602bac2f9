"""What is read off a pickle: all that torch.save writes passes, and what it never writes is told before any of it runs."""

import collections
import contextlib
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._weights_only_unpickler import load

from normrewrite import NormRewriteError
from normrewrite.files import pickled, unpickle


def written(path: Path, data: bytes) -> Path:
    """A file of torch's, around a pickle that it did not write."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return path


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


# --- what torch.save writes -------------------------------------------------------------------------------------------

PARAMETER = nn.Parameter(torch.ones(3))
PARAMETER.note = "mine"  # type: ignore[attr-defined]
BASE = torch.arange(12.0)
COMMON: dict[str, Any] = {
    "dtypes": [
        torch.ones(3, dtype=dtype) for dtype in (torch.half, torch.bfloat16, torch.int8, torch.bool, torch.cdouble)
    ],
    "new dtypes": [torch.ones(3).to(torch.float8_e4m3fn), torch.ones(3, dtype=torch.uint16)],
    "views": [BASE, BASE[3:5], BASE.view(3, 4).t(), BASE[::2], torch.ones(1).expand(1000), torch.ones(0, 3)],
    "kinds": [torch.eye(3).to_sparse(), torch.empty(10**6, 10**6, device="meta")],
    "conjugate": torch.ones(3, dtype=torch.cfloat).conj(),
    "parameters": [PARAMETER, nn.Parameter(torch.ones(2), requires_grad=False), nn.Buffer(torch.ones(2))],
    "plain": {
        "a": (1, -(2**70), 1.5, True, None),
        "b": [b"\0\xff", bytearray(b"\xff"), 1 + 2j, {1, 2}, set(), "é\ud800"],
    },
    "containers": [OrderedDict(a=1), collections.Counter("aab"), {(1, "a"): 2, 3: 4, None: 5}],
    "torch's": [torch.Size([2, 3]), torch.device("cuda", 1), torch.float16, torch.strided],
    "optimizer": torch.optim.Adam(nn.Linear(2, 2).parameters()).state_dict(),
    "state": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict(),
    "layers": [
        nn.LSTM(2, 3, 2),
        nn.MultiheadAttention(4, 2),
        nn.Embedding(5, 2, padding_idx=1),
        nn.ModuleDict({"a": nn.GELU()}),
    ],
}


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_torch_writes_passes(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save(COMMON[name], tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    if name == "layers" and not zipped:  # modules of that format carry their source, which torch reads freely alone
        with pytest.raises(pickled.Unknown):
            pickled.fault(tmp_path / "a.pt")
    else:
        assert pickled.fault(tmp_path / "a.pt") is None


# --- what it never writes ---------------------------------------------------------------------------------------------

LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
TENSOR = torch.ones(3)


def knot(times: int) -> bytes:
    """A tuple of two of the tuple before, and so on."""
    return b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(times))


HOSTILE: dict[str, tuple[Any, str]] = {
    "a layer, called": (Call(nn.Linear, 3, 4), "calls torch.nn.modules.linear.Linear"),
    "with no arguments": (Call(nn.ReLU), "calls torch.nn.modules.activation.ReLU"),
    "made with arguments": (LINEAR + b"K\x03\x85\x81.", "makes torch.nn.modules.linear.Linear with arguments"),
    "by a list": (LINEAR + b"]\x81.", "makes torch.nn.modules.linear.Linear with arguments"),
    "through a tensor's": (
        Call(torch._tensor._rebuild_from_type_v2, nn.Linear, torch.Tensor, (3, 4), {}),
        "_rebuild_from_type",
    ),
    "bytes": (Call(bytearray, 1 << 40), "calls builtins.bytearray"),
    "a codec": (Call(__import__("_codecs").encode, "x", "hex"), "calls _codecs.encode"),
    "a tensor's class": (Call(torch.Tensor, 1 << 40), "calls torch.Tensor"),
    "storage": (Call(torch.UntypedStorage, 1 << 40), "calls torch.storage.UntypedStorage"),
    "a function of ours": (Call(nn.functional.gelu, 1), "calls torch._C._nn.gelu"),
    "attributes of a set": (b"c__builtin__\nset\n]\x85R}b.", "gives attributes to what builtins.set made"),
    "and then what torch does not know": (
        b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R\x94.",
        "calls builtins.bytearray",
    ),
    "nested tuples": (knot(60) + b".", "nested without end"),
    "nested keys": (b"}" + knot(10) + b"Ns.", "a key that no checkpoint has"),
    "nested members": (b"c__builtin__\nset\n]" + knot(10) + b"a\x85R.", "calls builtins.set"),
    "keys of one hash": (b"}\x8a\x09" + (2**61 - 1).to_bytes(9, "little") + b"Ns.", "a key that no checkpoint has"),
    "layers without end": (b"}X\x0a\0\0\0num_layersJ\xff\xff\xff\x7fs.", "num_layers of more than"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_torch_never_writes_is_told(tmp_path: Path, name: str) -> None:
    content, said = HOSTILE[name]
    data = b"\x80\x02" + content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
    path = written(tmp_path / "a.pt", data)
    with pytest.raises(
        NormRewriteError, match=r"a\.pt: .*which torch\.save never writes; nothing of it was run"
    ) as told:
        unpickle.load(path)
    assert said in str(told.value)


def test_what_the_user_allows_may_be_called(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt", pickle.dumps(Call(nn.Linear, 3, 4), protocol=2))
    assert type(unpickle.load(path, allow=["torch.nn.modules.linear:Linear"])) is nn.Linear


# --- more than there is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 200])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_that_show_far_more_than_their_storage(tmp_path: Path, count: int, zipped: bool) -> None:
    shown = {str(i): torch.ones(4).expand((1 << 30) // count, 4) for i in range(count)}
    torch.save(shown, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(NormRewriteError, match="show far more than"):
        unpickle.load(tmp_path / "a.pt")


def claiming(path: Path, numel: int, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Path:
    """A tensor over a storage of four numbers, in a file that says other things of both."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, found: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if found is BASE else None

    data = io.BytesIO()
    arguments = BASE, offset, sizes, strides, False, OrderedDict()
    Pickler(data, protocol=2).dump(Call(torch._utils._rebuild_tensor_v2, *arguments))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data.getvalue())
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", "3\n")
    return path


def test_a_tensor_within_its_storage_passes(tmp_path: Path) -> None:
    assert unpickle.load(claiming(tmp_path / "a.pt", 4, (2, 2), (2, 1))).shape == (2, 2)


@pytest.mark.parametrize(
    ("numel", "sizes", "strides", "offset"),
    [
        (5, (2,), (1,), 0),
        (4, (5,), (1,), 0),
        (4, (2, 2), (3, 1), 0),
        (4, (4,), (1,), 1),
        (4, (2,), (-1,), 3),
        (-1, (), (), 0),
    ],
)
def test_claims_beyond_the_storage_are_told(tmp_path: Path, numel: int, sizes: Any, strides: Any, offset: int) -> None:
    path = claiming(tmp_path / "a.pt", numel, sizes, strides, offset)
    with pytest.raises(NormRewriteError, match=r"a\.pt: can't be read as a torch file .*(storage|claims)"):
        unpickle.load(path)


@pytest.mark.parametrize("spoil", ["deflated", "twice"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_does_not_write(tmp_path: Path, spoil: str) -> None:
    how = zipfile.ZIP_DEFLATED if spoil == "deflated" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "a.pt", "w", how) as archive:
        for _ in range(1 if spoil == "deflated" else 2):
            archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
    with pytest.raises(NormRewriteError, match="compressed or there twice"):
        unpickle.load(tmp_path / "a.pt")


# --- foretold ---------------------------------------------------------------------------------------------------------

CANARY: list[str] = []


class Canary(nn.ReLU):
    """Tells when it is called, or made with arguments."""

    def __new__(cls, *arguments: Any) -> Any:
        if arguments:
            CANARY.append("made with arguments")
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        CANARY.append("called")
        super().__init__()


CLASS = f"c{Canary.__module__}\nCanary\n".encode()
WORDS = (
    CLASS,
    CLASS,
    b")",
    b"]",
    b"}",
    b"(",
    b"K\x01",
    b"N",
    b"X\x01\0\0\0a",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"R",
    b"R",
    b"\x81",
)
WORDS += (
    b"q\0",
    b"h\0",
    b"q\1",
    b"h\1",
    b"s",
    b"a",
    b"e",
    b"u",
    b"b",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch\nTensor\n",
)


@settings(max_examples=600)
@given(st.lists(st.sampled_from(WORDS), min_size=2, max_size=14))
def test_what_passes_calls_nothing(tmp_path_factory: pytest.TempPathFactory, words: list[bytes]) -> None:
    """Whatever instructions a pickle is made of: where nothing is told of it, torch's reader calls no class out of it."""
    reader = pickled.Reader(100, {}, ())
    try:
        reader.read(b"\x80\x02" + b"".join(words) + b".", 0)
    except Exception:  # refused
        return
    if reader.wrong is None:
        CANARY.clear()
        with (
            torch.serialization.safe_globals([(Canary, f"{Canary.__module__}.Canary")]),
            contextlib.suppress(Exception),
        ):
            load(io.BytesIO(b"\x80\x02" + b"".join(words) + b"."))
        assert not CANARY


def test_the_canary_can_sing() -> None:
    with torch.serialization.safe_globals([(Canary, f"{Canary.__module__}.Canary")]):
        for words, told in ((b")R", "called"), (b"K\x01\x85\x81", "made with arguments")):
            CANARY.clear()
            load(io.BytesIO(b"\x80\x02" + CLASS + words + b"."))
            assert [told] == CANARY


def test_classes_that_do_more_when_they_are_read_are_not_on_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: type[nn.Module] = type("Layer", (nn.ReLU,), {"__module__": "torchvision.layers"})
    assert unpickle._is_made_plainly(layer)
    for name in ("__setstate__", "__new__"):
        function: Callable[..., Any] = lambda *rest: None  # noqa: E731
        function.__module__ = "torchvision.layers"
        assert not unpickle._is_made_plainly(type("Layer", (nn.ReLU,), {name: function}))
