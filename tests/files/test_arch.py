"""Architectures named by the user: found, made, and every way in which that can go wrong."""

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from normrewrite import NormRewriteError
from normrewrite.files.arch import attribute, build, find, parse_arguments

NETS = """
import os, sys
from dataclasses import dataclass
from torch import nn
import helper

width = 3

@dataclass
class Config:
    width: int = helper.width

def net(width=2, bias=True): return nn.Linear(width, width, bias=bias)
def configured(): return nn.Linear(Config().width, 1)
def late():
    import later
    return nn.Linear(later.width, 1)
class Net(nn.Linear):
    def __init__(self): super().__init__(4, 4)
def text(): return "a network"
def none(): pass
def a_class(): return nn.Linear
def raises(): raise RuntimeError("no\\nGPU")
def asserts(): assert False
def exits(): sys.exit("no data set")
def cleans(): sys.path[:] = [entry for entry in sys.path if os.path.basename(entry) != "nets"]; return net()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """nets/nets.py and the modules beside it; the current folder is the one above."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    beside = tmp_path / "nets"
    beside.mkdir()
    (beside / "nets.py").write_text(NETS)
    (beside / "helper.py").write_text("width = 5")
    (beside / "later.py").write_text("width = 6")
    (beside / "broken.py").write_text("import torch\n1 / 0")
    (beside / "exits.py").write_text("raise SystemExit(0)")
    (tmp_path / "importable.py").write_text("from torch import nn\ndef net(): return nn.Linear(7, 7)\n")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("helper", "later", "importable") or name.startswith("normrewrite_arch_"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("arch", "arguments", "width"),
    [
        ("nets/nets.py:net", {}, 2),
        ("nets/nets.py:net", {"width": 9, "bias": False}, 9),
        ("./nets/../nets/nets.py:net", {}, 2),
        ("nets/nets.py:configured", {}, 5),  # a dataclass, and an import from beside the file
        ("nets/nets.py:late", {}, 6),  # an import while the factory runs
        ("nets/nets.py:Net", {}, 4),  # a class makes modules as well
        ("importable:net", {}, 7),  # the current folder, as if python had been started in it
        ("torch.nn:Linear", {"in_features": 8, "out_features": 1}, 8),
        (lambda: nn.Linear(3, 3), {}, 3),
        (nn.Linear, {"in_features": 3, "out_features": 3}, 3),
    ],
)
def test_build(arch: str, arguments: dict[str, object], width: int) -> None:
    path = list(sys.path)
    model = build(arch, arguments)
    assert isinstance(model, nn.Linear) and model.in_features == width
    assert sys.path == path


def test_absolute_path_from_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    model = build(f"{folder / 'nets' / 'nets.py'}:configured")
    assert isinstance(model, nn.Linear) and model.in_features == 5


def test_module_is_copied() -> None:
    model = nn.Linear(2, 2)
    built = build(model)
    assert built is not model and torch.equal(built.weight, model.weight)  # type: ignore[arg-type]


def test_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    build("nets/nets.py:net")
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    ("source", "module", "function"),
    [("timm", "timm", "create_model"), ("torchvision", "torchvision.models", "get_model")],
)
def test_collections_make_networks_without_weights(
    monkeypatch: pytest.MonkeyPatch, source: str, module: str, function: str
) -> None:
    """Nothing may be downloaded: `pretrained=False`, `weights=None`."""
    calls: list[tuple[str, dict[str, object]]] = []

    def create(name: str, **arguments: object) -> nn.Module:
        calls.append((name, arguments))
        return nn.Linear(1, 1)

    for name in (source, module):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    setattr(sys.modules[module], function, create)
    assert isinstance(build(f"{source}:resnet18", {"num_classes": 10}), nn.Linear)
    off: dict[str, object] = {"pretrained": False} if source == "timm" else {"weights": None}
    assert calls == [("resnet18", {"num_classes": 10, **off})]


BAD = [
    ("", "no factory named. Write PATH.py:factory, module:factory, timm:NAME or torchvision:NAME"),
    ("nets", "no factory named"),
    ("nets/nets.py", "no factory named"),
    ("nets/nets.py:", "no factory named"),
    (":net", "no factory named"),
    (":", "no factory named"),
    ("nosuch.py:net", "there is no file nosuch.py. Write"),
    ("nets.py:net", "there is no file nets.py"),  # in another folder
    ("nosuch:net", "can't import nosuch: ModuleNotFoundError"),
    ("nosuch.sub:net", "can't import nosuch.sub: ModuleNotFoundError"),
    ("..nets:net", "can't import ..nets"),
    ("nets/nets.pt:net", "can't import"),
    ("nets/nets.py:Nett", "there is no 'Nett' in .*Did you mean 'Net'"),
    ("nets/nets.py:configuerd", "Did you mean 'configured'"),
    ("nets/nets.py:zzzzzz", "there is no 'zzzzzz' in [a-z_]*nets.$"),  # nothing is near
    ("nets/nets.py:width", "'width' is a int, not a function or class"),
    ("nets/nets.py:nn", "'nn' is a module, not a function or class"),
    ("nets/nets.py:Net.forward", "there is no 'Net.forward'"),
    ("nets/nets.py:text", "the factory gave a str, not a torch.nn.Module"),
    ("nets/nets.py:none", "the factory gave a NoneType"),
    ("nets/nets.py:a_class", "the factory gave a type"),
    ("nets/nets.py:raises", "the factory raised RuntimeError: no\nGPU"),
    ("nets/nets.py:asserts", "the factory raised AssertionError"),
    ("nets/nets.py:exits", "SystemExit"),
    ("nets/broken.py:net", "nets/broken.py raised ZeroDivisionError: division by zero"),
    ("nets/exits.py:net", "SystemExit"),
    (nn.Linear, "the factory raised TypeError"),
    (3, "the factory raised TypeError"),
]


@pytest.mark.parametrize(("arch", "said"), BAD, ids=[str(arch) for arch, _ in BAD])
def test_bad_architecture(arch: str, said: str) -> None:
    path = list(sys.path)
    with pytest.raises(NormRewriteError, match=f"^--arch (?s:.*){said}") as refused:
        build(arch)
    assert refused.value.exit_code == 2
    assert sys.path == path


def test_factory_may_change_the_search_path() -> None:
    assert isinstance(build("nets/nets.py:cleans"), nn.Linear)


def test_broken_file_is_read_again_once_it_is_mended(folder: Path) -> None:
    for content, width in (("1 / 0", None), ("from torch import nn\ndef net(): return nn.Linear(1, 1)", 1)):
        (folder / "mended.py").write_text(content)
        if width is None:
            with pytest.raises(NormRewriteError, match="ZeroDivisionError"):
                build("mended.py:net")
            assert "normrewrite_arch_mended" not in sys.modules
        else:
            assert isinstance(build("mended.py:net"), nn.Linear)


def test_wrong_arguments() -> None:
    with pytest.raises(NormRewriteError, match=r"the factory raised TypeError: .*unexpected keyword argument 'wdith'"):
        build("nets/nets.py:net", {"wdith": 3})


def test_find_and_attribute() -> None:
    found: list[object] = [find("os.path:join"), attribute(os.path, "join", "here")]
    assert found == [os.path.join, os.path.join]
    with pytest.raises(NormRewriteError, match=r"^here: there is no 'jion' in posixpath\. Did you mean 'join'"):
        attribute(os.path, "jion", "here")


@pytest.mark.parametrize(
    ("pairs", "arguments"),
    [
        ([], {}),
        (["width=64", "act=gelu", "ratio=0.5"], {"width": 64, "act": "gelu", "ratio": 0.5}),
        (["bias=False", "norm=None"], {"bias": False, "norm": None}),
        (["blocks=[2, 2]", "size=(8, 8)", "kw={'a': 1}"], {"blocks": [2, 2], "size": (8, 8), "kw": {"a": 1}}),
        (["name='64'", "path=a=b", "empty="], {"name": "64", "path": "a=b", "empty": ""}),
        (["width=64", "width=32"], {"width": 32}),
        (["text=__import__('os')", "broken=[1,"], {"text": "__import__('os')", "broken": "[1,"}),  # never evaluated
        (["text={[]: 1}"], {"text": "{[]: 1}"}),
        (["text=" + "(" * 3000], {"text": "(" * 3000}),
    ],
)
def test_parse_arguments(pairs: list[str], arguments: dict[str, object]) -> None:
    assert parse_arguments(pairs) == arguments


@pytest.mark.parametrize("pair", ["width", "=3", "3=4", "a b=3", "a-b=3", "", "="])
def test_bad_arguments(pair: str) -> None:
    with pytest.raises(NormRewriteError, match="write name=value, as in --arch-args width=64"):
        parse_arguments([pair])
