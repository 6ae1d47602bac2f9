"""The command line as people meet it: files in a folder, a command, what it says, its exit code, what it leaves behind."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import normrewrite as nr
from normrewrite import cli, targets
from normrewrite.commands.convert import _made_ready
from normrewrite.data import Batch, Data
from normrewrite.provenance.report import Report
from tests.conftest import ROOT, TARGETS, Command, Outcome, randomise

EXAMPLES = ROOT / "examples"
DIGITS = "--arch digits.py:digits_resnet"
SCRIPT = Path(sysconfig.get_path("scripts")) / "normrewrite"

ZOO = """
import sys, time
from pathlib import Path
import numpy as np, torch
from torch import nn

answer = 42

def no_norm(): return nn.Sequential(nn.Linear(4, 4))
def text(): return "a network"
def raises(): raise KeyError("no such width")
def exits(): sys.exit(0)
def slow(): Path("started").touch(); [time.sleep(0.01) for _ in range(6000)]
def arrays(): yield {"images": np.zeros((2, 1, 8, 8), np.float32)}
def listed(): yield torch.zeros(2, 1, 8, 8), [1, 2]
def wrong_rows(): yield torch.zeros(2, 1, 8, 8), torch.tensor([1, 2, 3])
def strings(): yield "images"
def nothing(): return []

def checking(check):
    class Checking(nn.Sequential):
        def forward(self, *inputs):
            if inputs[0].shape[1] != 1: check()
            return super().forward(inputs[0])
    return Checking(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
def fail(error): raise error
def asserting(): return checking(lambda: fail(AssertionError("one channel only")))
def looking_up(): return checking(lambda: fail(KeyError(3)))
def wordless(): return checking(lambda: fail(ValueError()))
def talking(): print("building"); return checking(print)
"""
USERLAND = """
from torch import nn

class UserNet(nn.Sequential): pass
class Unrelated(nn.Sequential): pass
"""


# --- the folder that commands run in ----------------------------------------------------------------------------------


def _import(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convolutional() -> Any:
    layers = (nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    return randomise(nn.Sequential(*layers)).eval()


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    return randomise(nn.Sequential(layer, nn.BatchNorm1d(5))).eval()


def _archive(path: Path, pickled: bytes) -> None:
    """A torch file of today's zip format around a pickle made by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"{path.stem}/{name}", content)


def calling(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls `module.name(argument)` when it is read."""
    text = argument.encode()
    return b"\x80\x02c%b\n%b\nX%b%b\x85R." % (module.encode(), name.encode(), struct.pack("<I", len(text)), text)


CALLS = {
    "posix": ("posix", "system", "touch marker"),
    "os": ("os", "system", "touch marker"),
    "eval": ("builtins", "eval", "open('marker', 'w')"),
    "exec": ("builtins", "exec", "open('marker', 'w')"),
    "walked": ("torch.nn.modules.linear.torch.os", "system", "touch marker"),
    "dotted": ("torch.nn.modules.linear", "torch.os.system", "touch marker"),
    "distributed": ("torch.nn.parallel.distributed", "os.system", "touch marker"),
    "ours": ("normrewrite.nn.origin", "torch.os.system", "touch marker"),
    "functional": ("torch.nn.functional", "torch.os.system", "touch marker"),
    "reexported": ("torch.nn.modules.batchnorm", "Module", "touch marker"),
    "factory": ("torch.nn.modules.utils", "_ntuple", "touch marker"),
}


def _hostile(folder: Path) -> None:
    for name, call in CALLS.items():
        _archive(folder / f"{name}.pt", calling(*call))
    (folder / "bare.pt").write_bytes(calling(*CALLS["posix"]))  # a pickle alone, as of torch before 1.6
    _archive(folder / "cyclic.pt", b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.")  # {"model": itself}
    _archive(folder / "hollow.pt", b"\x80\x02ctorch.nn.modules.container\nSequential\n)\x81.")  # never initialised
    impostor = nn.Sequential(nn.BatchNorm1d(2))
    impostor._modules["1"] = 5  # type: ignore[assignment]
    torch.save(impostor, folder / "impostor.pt")
    torch.save({0: torch.zeros(2), 1: torch.ones(2)}, folder / "numbered.pt")
    torch.save([torch.zeros(2)], folder / "list.pt")
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, folder / "no_weights.pt")


def _damaged(folder: Path, digits: dict[str, Tensor]) -> None:
    whole = (folder / "digits.pt").read_bytes()
    (folder / "empty.pt").touch()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("weights: see the other folder\n")
    (folder / "net.onnx").write_text("not opened at all")
    save_file(digits, folder / "digits.safetensors")
    (folder / "truncated.safetensors").write_bytes((folder / "digits.safetensors").read_bytes()[:1000])
    (folder / "text.safetensors").write_text("weights: see the other folder\n")
    (folder / "empty.safetensors").touch()
    deep = "[" * 100_000  # a manifest that no parser should have to follow
    save_file(digits, folder / "deep.safetensors", {"normrewrite": deep})
    torch.save({name: value for name, value in digits.items() if name != "head.bias"}, folder / "missing.pt")
    torch.save({**digits, "tail.bias": torch.zeros(2)}, folder / "unexpected.pt")
    torch.save({"state_dict": digits, "normrewrite": {"format": 1, "sites": "all"}}, folder / "no_manifest.pt")


def _networks(folder: Path, digits: dict[str, Tensor]) -> None:
    torch.save(convolutional(), folder / "conv.pt")
    torch.save(transformer(), folder / "transformer.pt")
    torch.save(convolutional().state_dict(), folder / "checking.pt")
    torch.save(nn.Sequential(nn.Linear(4, 4)), folder / "no_norm.pt")
    torch.save(nn.DataParallel(convolutional()), folder / "data_parallel.pt")
    user = _import(folder / "userland.py", "userland")
    torch.save(user.UserNet(*convolutional()), folder / "user.pt")
    del sys.modules["userland"]
    torch.save({"state_dict": digits}, folder / "nested.pt")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    torch.save(nn.parallel.DistributedDataParallel(convolutional()), folder / "ddp.pt")
    torch.distributed.destroy_process_group()
    with warnings.catch_warnings():  # TorchScript is deprecated; people still have its files
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(convolutional()), folder / "script.pt")
        exported = torch.export.export(nn.ReLU(), (torch.zeros(1),))
    torch.export.save(exported, folder / "exported.pt2")
    shutil.copy(folder / "exported.pt2", folder / "exported.pt")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file that a command below is given, made once."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("digits.pt", "digits.npz", "digits.py"):
        shutil.copy(EXAMPLES / name, folder)
    digits = torch.load(folder / "digits.pt", weights_only=True)
    (folder / "zoo.py").write_text(ZOO)
    (folder / "userland.py").write_text(USERLAND)
    (folder / "broken.py").write_text("raise RuntimeError('half-edited')")
    (folder / "syntax.py").write_text("def net(:")
    (folder / "script.py").write_text("import sys; sys.exit(0)")
    (folder / "needs.py").write_text("import nosuchmodule")
    (folder / "folder.pt").mkdir()
    (folder / "text.npz").write_text("not an archive")
    np.savez(folder / "few.npz", images=images()[:20])
    np.savez(folder / "colour.npz", images=np.zeros((4, 3, 8, 8), np.float32))
    np.savez(folder / "nan.npz", images=np.full((4, 1, 8, 8), np.nan, np.float32))
    _networks(folder, digits)
    _damaged(folder, digits)
    _hostile(folder)
    return folder


@pytest.fixture
def folder(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the shelf's files, linked, so that each test has its own names and none its own bytes."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    inside = tmp_path / "inside"  # a file that is written beside the folder would show, too
    shutil.copytree(shelf, inside, copy_function=os.link, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(inside)
    return inside


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.parent.rglob("*")) if path.is_file()}


# --- bad input --------------------------------------------------------------------------------------------------------

TO = "--to l1"
CONVERT = f"convert digits.pt {DIGITS}"
VERIFY = f"verify digits.pt digits.pt {DIGITS}"

# Command, and what the message must say: where, what was found, what to do.
BAD: dict[str, tuple[str, str]] = {
    # files
    "missing": (f"convert digit.pt {TO}", "digit.pt: there is no such file. Did you mean 'digits.pt'"),
    "missing folder": (f"convert nosuch/digits.pt {TO}", "nosuch/digits.pt: there is no such file"),
    "missing, inspect": ("inspect nosuch.pt", "there is no such file"),
    "missing, revert": ("revert nosuch.pt", "there is no such file"),
    "missing, verify": (f"verify digits.pt nosuch.pt {DIGITS} --data digits.npz", "there is no such file"),
    "missing, export": (f"export nosuch.pt -o x.onnx {DIGITS}", "there is no such file"),
    "folder": (f"convert folder.pt {TO}", "is a folder. Give the model file"),
    "long name": (f"convert {'x' * 300}.pt {TO}", "there is no such file|name too long"),
    "empty": (f"convert empty.pt {TO}", "is empty"),
    "truncated": (f"convert truncated.pt {TO} {DIGITS}", "truncated.*Give a file written by torch.save"),
    "text": (f"convert text.pt {TO} {DIGITS}", "can't be read as a torch file.*Give a file"),
    "safetensors truncated": (f"convert truncated.safetensors {TO} {DIGITS}", "safetensors file .*truncated"),
    "safetensors text": (f"convert text.safetensors {TO} {DIGITS}", "can't be read as a safetensors file"),
    "safetensors empty": (f"convert empty.safetensors {TO} {DIGITS}", "is empty"),
    "safetensors deep": (f"convert deep.safetensors {TO} {DIGITS}", "deep.safetensors"),
    "torchscript": (f"convert script.pt {TO}", "TorchScript archive.*state_dict"),
    "pt2": (f"convert exported.pt2 {TO}", r"torch.export archive \(.pt2\).*state_dict"),
    "pt2 named pt": (f"convert exported.pt {TO}", "torch.export archive"),
    "onnx": (f"convert net.onnx {TO}", "is an ONNX file. Convert the PyTorch model"),
    "no weights": (f"convert no_weights.pt {TO}", "no state_dict under .*--key; keys: epoch, optimizer"),
    "list": (f"convert list.pt {TO}", "holds a list, neither"),
    "numbered": (f"convert numbered.pt {TO} {DIGITS}", "numbered.pt"),
    "manifest": (f"convert no_manifest.pt {TO} {DIGITS}", "manifest is no record of sites"),
    # pickles
    "user class": (
        f"convert user.pt {TO}",
        "nothing of it was run: userland.UserNet.*state_dict.*--allow userland:UserNet",
    ),
    "another class allowed": (f"convert user.pt {TO} --allow userland:Unrelated", "userland.UserNet"),
    "allowed, not there": (f"convert user.pt {TO} --allow nosuch:UserNet", "userland.UserNet"),
    "data parallel": (f"convert data_parallel.pt {TO}", "data_parallel.DataParallel"),
    "data parallel, allowed": (
        f"convert data_parallel.pt {TO} --allow torch.nn.parallel.data_parallel:DataParallel",
        "wrapped in DataParallel. Convert model.module",
    ),
    "ddp": (f"convert ddp.pt {TO}", "distributed.DistributedDataParallel"),
    "ddp, trusted": (f"convert ddp.pt {TO} --trust", "process group"),
    "bare pickle": (f"convert bare.pt {TO}", "bare.pt"),
    "cyclic": (f"convert cyclic.pt {TO}", "cyclic.pt"),
    "hollow": (f"convert hollow.pt {TO}", "hollow.pt"),
    "impostor": (f"convert impostor.pt {TO}", "impostor.pt"),
    **{f"calls {name}": (f"convert {name}.pt {TO}", "nothing of it was run") for name in CALLS},
    "calls posix, another allowed": (f"convert posix.pt {TO} --allow userland:UserNet", "posix.system"),
    "calls posix, allowed": (f"convert posix.pt {TO} --allow posix:system", "posix.system"),  # no class: never
    "calls eval, allowed": (f"convert eval.pt {TO} --allow builtins:eval", "eval"),
    # architectures
    "no arch": (f"convert digits.pt {TO}", "holds a state_dict.*--arch PATH.py:factory"),
    "no arch, inspect": ("inspect digits.pt", "holds a state_dict.*--arch PATH.py:factory"),
    "no arch, safetensors": (f"convert digits.safetensors {TO}", "holds a state_dict.*--arch"),
    "no factory": (f"convert digits.pt {TO} --arch digits.py", "no factory named. Write PATH.py:factory"),
    "empty factory": (f"convert digits.pt {TO} --arch digits.py:", "no factory named"),
    "no such file": (f"convert digits.pt {TO} --arch digit.py:digits_resnet", "there is no file digit.py"),
    "no such module": (f"convert digits.pt {TO} --arch nosuch:net", "can't import nosuch: ModuleNotFoundError"),
    "no such name": (
        f"convert digits.pt {TO} --arch digits.py:digits_resent",
        "there is no 'digits_resent' in .*Did you mean 'digits_resnet'",
    ),
    "no callable": (f"convert digits.pt {TO} --arch zoo.py:answer", "'answer' is a int, not a function or class"),
    "no module": (f"convert digits.pt {TO} --arch zoo.py:text", "gave a str, not a torch.nn.Module"),
    "raises": (f"convert digits.pt {TO} --arch zoo.py:raises", "factory raised KeyError: 'no such width'"),
    "exits": (f"convert digits.pt {TO} --arch zoo.py:exits", "SystemExit"),
    "file raises": (f"convert digits.pt {TO} --arch broken.py:net", "broken.py raised RuntimeError: half-edited"),
    "file exits": (f"convert digits.pt {TO} --arch script.py:net", "SystemExit"),
    "file doesn't parse": (f"convert digits.pt {TO} --arch syntax.py:net", "syntax.py raised SyntaxError"),
    "file can't import": (f"convert digits.pt {TO} --arch needs.py:net", "No module named 'nosuchmodule'"),
    "file is a folder": (f"convert digits.pt {TO} --arch nosuch/:net", "can't import|there is no file"),
    "arch args": (f"{CONVERT} {TO} --arch-args width", "'width': write name=value"),
    "arch args, name": (f"{CONVERT} {TO} --arch-args 3=4", "'3=4': write name=value"),
    "arch args, unknown": (f"{CONVERT} {TO} --arch-args wdith=8", "factory raised TypeError.*wdith"),
    "arch args, wrong type": (f"{CONVERT} {TO} --arch-args width=wide", "factory raised TypeError"),
    "sizes": (f"{CONVERT} {TO} --arch-args width=8", "doesn't fit --arch .*size mismatch for stem.0.0.weight"),
    "missing keys": (f"convert missing.pt {TO} {DIGITS}", "doesn't fit --arch .*missing head.bias"),
    "unexpected keys": (f"convert unexpected.pt {TO} {DIGITS}", "doesn't fit --arch .*unexpected tail.bias"),
    "another network": (f"convert digits.pt {TO} --arch zoo.py:no_norm", "doesn't fit --arch .*and 54 more"),
    "key": (f"convert nested.pt {TO} {DIGITS} --key state_dcit", "no 'state_dcit'. Did you mean 'state_dict'"),
    "key, deeper": (
        f"convert nested.pt {TO} {DIGITS} --key state_dict.model",
        "--key state_dict.model: there is no 'm",
    ),
    "key of a tensor": (f"convert nested.pt {TO} {DIGITS} --key state_dict.head.bias", "--key state_dict.head.bias"),
    # requests
    "no target": (CONVERT, "--to"),
    "target": (f"{CONVERT} --to l3", "--to 'l3': there is no such target. Did you mean 'l[12]'.*Known: l1, linf"),
    "target, near": (f"{CONVERT} --to lnf", "Did you mean 'linf'"),
    "weights, wrong shape": (f"{CONVERT} --to bwn --input-shape 1,3,9", r"can't run on inputs of shapes \(1, 3, 9\)"),
    "folded, wrong shape": (f"{CONVERT} --to none --input-shape 1,3,9", "can't run on inputs of shapes"),
    "target, misspelled": (f"{CONVERT} --to gruop", "no such target. Did you mean 'group'"),
    "group, no count": (f"{CONVERT} --to group:x", "'x' is no count"),
    "form, misspelled": (f"{CONVERT} --to bwn:strickt", "'strickt' is no form. Did you mean 'strict'"),
    "argument": (f"{CONVERT} --to layer:3", "layer takes no argument"),
    "scope": (f"{CONVERT} {TO} --scope lyer", "unknown scope 'lyer'. Did you mean 'layer'"),
    "scope, of no metric": (f"{CONVERT} --to wn --scope layer", "--scope is for metrics"),
    "scope, nothing there": (f"{CONVERT} {TO} --scope layer", "holds no norm of scope layer"),
    "target, empty": (f"{CONVERT} --to ''", "--to ''"),
    "topk:0": (f"{CONVERT} --to topk:0", "'0' is no count. Give a whole number"),
    "topk:x": (f"{CONVERT} --to topk:x", "'x' is no count"),
    "topk:-5%": (f"{CONVERT} --to topk:-5%", "'-5%' is no count.*or a percentage above 0 up to 100"),
    "topk:101%": (f"{CONVERT} --to topk:101%", "is no count"),
    "topk:nan%": (f"{CONVERT} --to topk:nan%", "is no count"),
    "topk:": (f"{CONVERT} --to topk:", "is no count"),
    "l1:3": (f"{CONVERT} --to l1:3", "l1 takes no argument. Write 'l1'"),
    "back, native": (f"{CONVERT} --to l2", "none of 9 sites can be rewritten"),
    "gain": (f"{CONVERT} {TO} --gain guess", "'guess' is not one of"),
    "no norm": (f"convert no_norm.pt {TO}", "holds no batch norm"),
    "expect": (f"{CONVERT} {TO} --expect 8", "expected 8 sites to be rewritten, found 9"),
    "expect, excluded": (f"{CONVERT} {TO} --expect 9 --exclude stem.0.1", "found 8. Left: stem.0.1: in --exclude"),
    "expect, no number": (f"{CONVERT} {TO} --expect all", "'all' is not a valid integer"),
    "include nothing": (f"{CONVERT} {TO} --include 'layer1.*'", "--include 'layer1.*' matches none of 9 sites"),
    "exclude nothing": (f"{CONVERT} {TO} --exclude 'layer1.*'", "--exclude 'layer1.*' matches none of 9 sites"),
    "exclude all": (f"{CONVERT} {TO} --exclude '*'", "none of 9 sites can be rewritten"),
    "rule for nothing": (f"{CONVERT} {TO} --rule 'layer1.*=linf'", "--rule 'layer1.*' matches none of 9 sites"),
    "rule, regex": (f"{CONVERT} {TO} --rule 're:(=linf'", "pattern 're:\\(': .*Python regular expression"),
    "include, regex": (f"{CONVERT} {TO} --include 're:['", "pattern 're:\\['"),
    "rule, no target": (f"{CONVERT} {TO} --rule 'stem.*'", "rule 'stem.\\*': write PATTERN=TARGET"),
    "rule, empty target": (f"{CONVERT} {TO} --rule 'stem.*='", "write PATTERN=TARGET"),
    "rule, empty pattern": (f"{CONVERT} {TO} --rule '=l1'", "write PATTERN=TARGET"),
    "rule, unknown target": (f"{CONVERT} {TO} --rule 'stem.*=l3'", "no such target"),
    "nothing of ours": (f"revert digits.pt {DIGITS}", "holds no norm of normrewrite's"),
    "nothing of ours, pickled": ("revert conv.pt", "holds no norm of normrewrite's"),
    "calibrate, native": (
        f"calibrate digits.pt {DIGITS} --data digits.npz",
        "no norm of normrewrite's. Convert it first",
    ),
    "calibrate, no data": (f"calibrate digits.pt {DIGITS}", "--data"),
    "calibrate, missing data": (f"{CONVERT} {TO} --calibrate nosuch.npz", "nosuch.npz: can't be read as .npz"),
    "advise, missing data": (f"inspect digits.pt {DIGITS} --advise nosuch.npz", "nosuch.npz: can't be read as .npz"),
    "advise, no batch": (f"inspect digits.pt {DIGITS} --advise zoo.py:nothing", "held no batch"),
    "advise, text": (f"inspect digits.pt {DIGITS} --advise zoo.py:strings", "gave a str; a batch is a tensor"),
    "advise, channels": (f"inspect digits.pt {DIGITS} --advise colour.npz", r"can't run on images \(4, 3, 8, 8\)"),
    "advise, not finite": (f"inspect digits.pt {DIGITS} --advise nan.npz", "1 batches were not finite"),
    "advise, no norm": ("inspect no_norm.pt --advise digits.npz", "holds no batch norm"),
    "advise, batch size": (f"inspect digits.pt {DIGITS} --advise digits.npz --batch-size 0", "0 is not in the range"),
    "advise, mean": (f"inspect digits.pt {DIGITS} --advise digits.npz --mean a,b", "--mean 'a,b': write numbers"),
    "calibrate, both": (
        f"calibrate digits.pt {DIGITS} --data digits.npz --statistics --biases digits.pt",
        "--statistics or --biases: one at a time",
    ),
    "statistics, not finite": (
        f"calibrate digits.pt {DIGITS} --data nan.npz --statistics",
        "1 batches were not finite",
    ),
    "biases, missing original": (f"calibrate digits.pt {DIGITS} --data digits.npz --biases nosuch.pt", "nosuch.pt"),
    "biases, not finite": (f"calibrate digits.pt {DIGITS} --data nan.npz --biases digits.pt", "NaN or infinity"),
    "calibrate, no batch": (f"{CONVERT} {TO} --calibrate zoo.py:nothing", "held no batch"),
    "unknown option": (f"{CONVERT} {TO} --ouput x.pt", "--ouput"),
    "unknown command": ("covnert digits.pt", "covnert"),
    "no command": ("", "Usage"),
    # where to
    "exists": (f"{CONVERT} {TO} -o text.pt", "text.pt exists already.*--force"),
    "the input": (f"{CONVERT} {TO} -o digits.pt", "digits.pt exists already.*--force"),
    "no folder": (f"{CONVERT} {TO} -o nosuch/x.pt", "there is no folder nosuch. Make it"),
    "onto a folder": (f"{CONVERT} {TO} -o folder.pt", "folder.pt is a folder. Name a file with -o"),
    "onto a folder, forced": (f"{CONVERT} {TO} -o folder.pt --force", "folder.pt is a folder"),
    "in a file": (f"{CONVERT} {TO} -o text.pt/x.pt", "there is no folder text.pt"),
    "to a long name": (f"{CONVERT} {TO} -o {'x' * 300}.pt", "(?i)name too long"),
    "export exists": (
        f"export digits.pt {DIGITS} -o text.pt --input-shape 2,1,8,8",
        "and this is an ONNX file. Call it .onnx",
    ),
    "revert exists": (f"revert digits.pt {DIGITS} -o text.pt", "text.pt exists already"),
    # devices and inputs
    "device": (f"{CONVERT} {TO} --device gpu", "--device gpu: "),
    "device, number": (f"{CONVERT} {TO} --device cuda:x", "--device cuda:x: Invalid device string"),
    "device, no backend": (f"{CONVERT} {TO} --device xla", "--device xla: "),
    "device, no module": (f"{CONVERT} {TO} --device hpu", "--device hpu: "),
    "device, no values": (f"{CONVERT} {TO} --device meta", "--device meta: "),
    **{
        f"shape {text!r}": (f"{CONVERT} {TO} --input-shape '{text}'", "--input-shape .*: write whole numbers")
        for text in ("1,1,8,x", "", "0,1,8,8", "-1,1,8,8", "1,1,8,8.5", "1;1;8;8")
    },
    "shape, channels": (f"{CONVERT} {TO} --input-shape 1,3,8,8", r"can't run on images \(1, 3, 8, 8\)"),
    "shape, rank": (f"{CONVERT} {TO} --input-shape 8", r"can't run on images \(8,\)"),
    "shape, too large": (f"{CONVERT} {TO} --input-shape 1000000000000,1,8,8", "--input-shape"),
    "shape, far too large": (f"{CONVERT} {TO} --input-shape {10**30}", "--input-shape"),
    "shape, an assertion of torch's": (f"convert transformer.pt {TO} --input-shape 2,5,7", "can't run on"),
    **{
        f"shape, model {name}": (
            f"convert checking.pt {TO} --arch zoo.py:{name} --input-shape 2,3,8,8",
            rf"can't run on .*\(2, 3, 8, 8\): .*{said}",
        )
        for name, said in (
            ("asserting", "one channel only"),
            ("looking_up", "3"),
            ("wordless", "ValueError"),
        )
    },
    "shape, export": (f"export digits.pt {DIGITS} -o x.onnx --input-shape 1,3,8,8", "torch can't export|can't run"),
    "no input, export": (f"export digits.pt {DIGITS} -o x.onnx", "what goes in\\? Give --input-shape"),
    "no input, verify": (VERIFY, "compared on what\\? Give --data FILE"),
    "onnx, missing": (f"verify digits.pt nosuch.onnx {DIGITS} --data digits.npz", "nosuch.onnx: there is no such file"),
    "onnx, text": (f"verify digits.pt net.onnx {DIGITS} --data digits.npz", "net.onnx: can't be read as ONNX"),
    "data, missing": (f"{VERIFY} --data nosuch.npz", "--data nosuch.npz: "),
    "data, text": (f"{VERIFY} --data text.npz", "--data text.npz: can't be read as .npz"),
    "data, model": (f"{VERIFY} --data digits.pt", "--data digits.pt: not such data. Give a .npz"),
    "data, module": (f"{VERIFY} --data nosuch:batches", "--data nosuch:batches: can't import nosuch"),
    "data, name": (f"{VERIFY} --data zoo.py:batches", "--data zoo.py:batches: there is no 'batches'"),
    "data, arrays": (f"{VERIFY} --data zoo.py:arrays", "--data zoo.py:arrays: "),
    "data, listed labels": (f"{VERIFY} --data zoo.py:listed", "--data zoo.py:listed: "),
    "data, rows": (f"{VERIFY} --data zoo.py:wrong_rows", "--data zoo.py:wrong_rows: "),
    "data, text batches": (f"{VERIFY} --data zoo.py:strings", "gave a str; a batch is a tensor"),
    "data, none": (f"{VERIFY} --data zoo.py:nothing", "held no batch"),
    "data, exits": (f"{VERIFY} --data zoo.py:exits", "SystemExit"),
    "mean": (f"{VERIFY} --data digits.npz --mean a,b,c", "--mean 'a,b,c': write numbers with commas"),
    "std": (f"{VERIFY} --data digits.npz --std 1;1;1", "--std '1;1;1': write numbers with commas"),
    "batch size": (f"{VERIFY} --data digits.npz --batch-size 0", "0 is not in the range"),
    "tolerance": (f"{VERIFY} --data digits.npz --tolerance tight", "'tight' is not a valid float"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_leaves_nothing(run: Command, folder: Path, case: str) -> None:
    line, said = BAD[case]
    before = contents(folder)
    outcome = run(line)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith(("error: ", "Usage: ")) and "Traceback" not in outcome.err
    assert re.search(said, " ".join(outcome.err.split())), outcome.err
    assert contents(folder) == before


@pytest.mark.parametrize(
    "case", ["missing", "truncated", "user class", "target", "sizes", "expect", "data, text", "gain"]
)
def test_json_reports_errors_as_json(run: Command, case: str) -> None:
    outcome = run(f"{BAD[case][0]} --json")
    assert outcome.code == 2
    assert re.search(BAD[case][1], " ".join(outcome.json["error"].split()))
    assert outcome.json["exit_code"] == 2
    assert outcome.err  # people still read it


# --- convert ----------------------------------------------------------------------------------------------------------


def as_saved(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of normrewrite's, read without it."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    tensors: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return tensors


def bits(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (t.dtype, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in state.items()}


def images() -> Tensor:
    return torch.from_numpy(np.load(EXAMPLES / "digits.npz")["images"])


def digits_resnet(folder: Path, weights: str = "digits.pt") -> nn.Module:
    """The network itself with its trained weights, without normrewrite."""
    net: nn.Module = _import(folder / "digits.py", "digits_example").digits_resnet()
    net.load_state_dict(torch.load(folder / weights, weights_only=True))
    return net.eval()


def test_convert_as_json(run: Command, folder: Path) -> None:
    outcome = run(f"{CONVERT} {TO} --input-shape 4,1,8,8 --json")
    assert (outcome.code, outcome.err) == (0, "")
    result = outcome.json
    assert (result["rewritten"], result["kept"], len(result["sites"])) == (9, 0, 9)
    assert (result["output"], result["form"]) == ("digits.l1.pt", "state_dict")
    assert result["network"]["ok"] and result["network"]["inputs"] == 4
    assert all(site["target"] == "l1" and site["difference"] <= site["tolerance"] for site in result["sites"])
    assert (folder / "digits.l1.pt").is_file()


def test_convert_as_text(run: Command) -> None:
    outcome = run(f"{CONVERT} {TO} --expect 9 --input-shape 1,1,8,8")
    assert (outcome.code, outcome.err) == (0, "")
    for said in ("9 sites rewritten, 0 left", "stem.0.1", "same function", "wrote digits.l1.pt"):
        assert said in outcome.out


@pytest.mark.parametrize(
    ("model", "options", "output"),
    [
        ("digits.pt", "--to l1", "digits.l1.pt"),
        ("digits.pt", "--to L1", "digits.l1.pt"),
        ("digits.pt", "--to topk", "digits.topk-10.pt"),
        ("digits.pt", "--to topk:1%", "digits.topk-1pct.pt"),
        ("digits.pt", "--to topk:0.5%", "digits.topk-0.5pct.pt"),
        ("digits.pt", "--to l1 --folded", "digits.l1.folded.pt"),
        ("digits.pt", "--to l1 -o other.bin", "other.bin"),
        ("digits.pt", "--to l1 -o other.safetensors", "other.safetensors"),
        ("model.pth", "--to linf", "model.linf.pth"),
        ("model", "--to linf", "model.linf"),
        ("model.v2.ckpt", "--to range", "model.v2.range.ckpt"),
        ("digits.safetensors", "--to range", "digits.range.safetensors"),
        ("digits.safetensors", "--to range -o range.pt", "range.pt"),
        ("folder/digits.pt", "--to l1", "folder/digits.l1.pt"),
    ],
)
def test_output_has_a_name_of_its_own_and_can_be_read(
    run: Command, folder: Path, model: str, options: str, output: str
) -> None:
    if not (folder / model).exists():
        (folder / model).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "digits.pt", folder / model)
    before = contents(folder)
    outcome = run(f"convert {model} {options} {DIGITS}")
    assert (outcome.code, outcome.err) == (0, "")
    assert set(contents(folder)) - set(before) == {str(folder / output)}
    assert f"wrote {output}" in outcome.out and "can't be pickled" not in outcome.out
    if "--folded" not in options:
        twin = nr.load(folder / output, arch=f"{folder / 'digits.py'}:digits_resnet")
        assert sum(isinstance(module, nr.nn.BatchNorm) for module in twin.modules()) == 9


def test_stdout_is_for_the_result_alone(run: Command) -> None:
    """What the user's own code prints must not get into the JSON."""
    outcome = run(f"convert checking.pt {TO} --arch zoo.py:talking --json")
    assert outcome.code == 0 and outcome.json["rewritten"] == 1


def test_forward_may_take_any_number_of_inputs(run: Command, folder: Path) -> None:
    """Its arguments have no names then."""
    line = "--arch zoo.py:asserting --input-shape 2,1,8,8"
    assert run(f"convert checking.pt {TO} {line}").code == 0
    assert run(f"verify checking.pt checking.l1.pt {line}").code == 0
    outcome = run(f"export checking.l1.pt -o checking.onnx {line}")
    assert outcome.code == 0, outcome.err
    assert run(f"verify checking.pt checking.onnx {line}").code == 0


def test_convert_to_l2_is_the_way_back_too(run: Command, folder: Path) -> None:
    assert run(f"{CONVERT} --to linf").code == 0
    assert run(f"convert digits.linf.pt {DIGITS} --to l1").code == 0
    again = run(f"convert digits.linf.l1.pt {DIGITS} --to l1")
    assert again.code == 2 and "is l1 already" in again.err
    assert run(f"convert digits.linf.l1.pt {DIGITS} --to l2 -o back.pt").code == 0
    assert bits(as_saved(folder / "back.pt")) == bits(torch.load(folder / "digits.pt", weights_only=True))


def test_dry_run_writes_nothing(run: Command, folder: Path) -> None:
    before = contents(folder)
    outcome = run(f"{CONVERT} {TO} --dry-run --exclude 'stem.*' -o text.pt")
    assert outcome.code == 0 and contents(folder) == before
    assert "8 of 9 sites to be rewritten" in outcome.out and "in --exclude" in outcome.out
    result = run(f"{CONVERT} {TO} --dry-run --exclude 'stem.*' --json").json
    assert (result["dry_run"], result["rewritten"], result["kept"]) == (True, 8, 1)


@pytest.mark.parametrize("command", [f"{CONVERT} {TO}", "convert conv.pt --to linf", f"{VERIFY} --data digits.npz"])
def test_quiet_prints_nothing(run: Command, command: str) -> None:
    outcome = run(f"{command} --quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "becomes"),
    [
        ("--rule 'stem.*=keep' --rule 'blocks.0.*=linf'", {"stem.0.1": None, "blocks.0.body.0.1": "linf"}),
        ("--rule 're:blocks\\.[01]\\..*=topk:1%'", {"stem.0.1": "l1", "blocks.1.shortcut.1": "topk:1%"}),
        ("--rule '*.body.*=range' --rule '*=keep'", {"stem.0.1": None, "blocks.2.body.2.1": "range"}),
        ("--include 'blocks.0.*' --include stem.0.1", {"stem.0.1": "l1", "blocks.1.shortcut.1": None}),
        ("--exclude 'stem.*'", {"stem.0.1": None, "blocks.0.body.0.1": "l1"}),
    ],
)
def test_rules_choose_the_target_of_each_site(run: Command, options: str, becomes: dict[str, str | None]) -> None:
    sites = run(f"{CONVERT} {TO} --json {options}").json["sites"]
    targets = {site["names"][0]: site["target"] for site in sites}
    assert {name: targets[name] for name in becomes} == becomes
    inspected = run(f"inspect digits.l1.pt {DIGITS} --json").json["sites"]  # and so they are in the file
    assert {site["names"][0]: None if site["metric"] == "l2" else site["metric"] for site in inspected} == targets


@pytest.mark.parametrize("output", ["digits.pt", "digits.safetensors"])
def test_force_overwrites_even_the_input(run: Command, folder: Path, output: str) -> None:
    outcome = run(f"convert {output} {DIGITS} {TO} -o {output} --force")
    assert outcome.code == 0, outcome.err
    assert run(f"revert {output} {DIGITS} -o back.safetensors").code == 0
    assert bits(as_saved(folder / "back.safetensors")) == bits(torch.load(EXAMPLES / "digits.pt", weights_only=True))


@pytest.mark.parametrize("name", ["conv.pt", "transformer.pt"])
def test_pickled_module_needs_no_arch(run: Command, folder: Path, name: str) -> None:
    outcome = run(f"convert {name} {TO} --json")
    assert (outcome.code, outcome.json["form"], outcome.json["rewritten"]) == (0, "module", 1)
    twin, net = nr.load(folder / outcome.json["output"]), nr.load(folder / name)
    x = torch.randn(3, 5, 8) if name == "transformer.pt" else torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(twin.eval()(x), net.eval()(x), rtol=1e-5, atol=1e-5)
    assert any(isinstance(module, nr.nn.BatchNorm) for module in twin.modules())
    assert run(f"revert {outcome.json['output']} -o back.pt").code == 0
    assert bits(nr.load(folder / "back.pt").state_dict()) == bits(net.state_dict())


@pytest.mark.parametrize("option", ["--allow userland:UserNet", "--trust"])
def test_user_classes_come_from_the_current_folder(run: Command, folder: Path, option: str) -> None:
    try:
        outcome = run(f"convert user.pt {TO} {option} --json")
        assert outcome.code == 0, outcome.err
        assert outcome.json["rewritten"] == 1
    finally:
        sys.modules.pop("userland", None)


WRAPPED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "module.": (lambda state: {f"module.{name}": value for name, value in state.items()}, ""),
    "_orig_mod.": (lambda state: {f"_orig_mod.{name}": value for name, value in state.items()}, ""),
    "DDP(compile)": (lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()}, ""),
    "compile(DDP)": (lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()}, ""),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 7, "optimizer": {"state": {}}}, ""),
    "model": (lambda state: {"model": state, "step": torch.tensor(7)}, ""),
    "model_state_dict": (lambda state: {"epoch": 7, "model_state_dict": state}, ""),
    "ema": (lambda state: {"ema": state, "args": {"lr": 0.1}}, ""),
    "nested": (lambda state: {"state_dict": {"model": state}}, ""),
    "with numbers": (lambda state: {**state, "epoch": 7}, ""),
    "net": (lambda state: {"net": {f"module.{n}": v for n, v in state.items()}, "acc": 91.2, "args": {"lr": 0.1}}, ""),
    "AveragedModel": (lambda state: {f"module.{n}": v for n, v in state.items()} | {"n_averaged": torch.tensor(7)}, ""),
    "key": (lambda state: {"nets": {"teacher": state, "student": {}}, "model": {}}, "--key nets.teacher"),
    "key, prefixed": (lambda state: {"ema": {f"module.{name}": value for name, value in state.items()}}, "--key ema"),
    "parameters": (lambda state: {n: nn.Parameter(v) if v.is_floating_point() else v for n, v in state.items()}, ""),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_state_dict_is_found_in_a_checkpoint(run: Command, folder: Path, how: str) -> None:
    wrap, options = WRAPPED[how]
    digits = torch.load(folder / "digits.pt", weights_only=True)
    torch.save(wrap(digits), folder / "checkpoint.pt")
    outcome = run(f"convert checkpoint.pt {TO} {DIGITS} {options} --expect 9")
    assert (outcome.code, outcome.err) == (0, "")
    assert run(f"calibrate checkpoint.l1.pt {DIGITS} --data digits.npz -o calibrated.pt").code == 0
    assert run(f"revert calibrated.pt {DIGITS} -o back.pt").code == 0
    back, content = torch.load(folder / "back.pt", weights_only=True), wrap(digits)
    assert isinstance(content, dict) and back.pop("normrewrite")["sites"] == []
    bare = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if len(bare) > 1:  # without a key there is no room for a manifest
        content = {"state_dict": bare} | {name: value for name, value in content.items() if name not in bare}
    assert flat(back) == flat(content)


def flat(content: object) -> object:
    """Nested dicts as they are, tensors as types and bytes; parameters are tensors too."""
    if isinstance(content, dict):
        return {name: flat(value) for name, value in content.items()}
    return bits({"": content})[""] if isinstance(content, Tensor) else content


def test_what_is_large_stays_behind_and_is_told(run: Command, folder: Path) -> None:
    digits = torch.load(folder / "digits.pt", weights_only=True)
    moments = {
        "state": {i: {"exp_avg": value.double()} for i, value in enumerate(digits.values()) if value.dim() > 3},
        "param_groups": [],
    }
    torch.save({"state_dict": digits, "optimizer": moments, "epoch": 7}, folder / "c.pt")
    outcome = run(f"convert c.pt {TO} {DIGITS}")
    assert outcome.code == 0
    assert outcome.err == "note: left out of c.l1.pt: optimizer (only small, plain data is carried along)\n"
    assert torch.load(folder / "c.l1.pt", weights_only=True).keys() == {"state_dict", "epoch", "normrewrite"}
    assert run(f"convert c.pt {TO} {DIGITS} --force --quiet").err == ""


def test_a_prefix_is_left_out_where_all_names_fit_then(run: Command, folder: Path) -> None:
    digits = torch.load(folder / "digits.pt", weights_only=True)
    torch.save({f"student.net.{name}": value for name, value in digits.items()}, folder / "c.pt")
    outcome = run(f"convert c.pt {TO} {DIGITS}")
    assert outcome.code == 0 and outcome.err.startswith("note: c.pt: every name begins with 'student.net.'")
    assert all(name.startswith("student.net.") for name in as_saved(folder / "c.l1.pt"))
    reverted = run(f"revert c.l1.pt {DIGITS} -o back.pt")
    assert (reverted.code, reverted.err) == (0, "")
    assert bits(as_saved(folder / "back.pt")) == bits(torch.load(folder / "c.pt", weights_only=True))


def test_other_weights_in_the_file_are_named(run: Command, folder: Path) -> None:
    digits = torch.load(folder / "digits.pt", weights_only=True)
    averaged = {name: value * 1 for name, value in digits.items()}
    torch.save({"state_dict": digits, "state_dict_ema": averaged, "optimizer": {"state": {}}}, folder / "c.pt")
    outcome = run(f"inspect c.pt {DIGITS}")
    assert outcome.code == 0 and outcome.err.startswith("note: c.pt: the weights under state_dict were taken; --key")
    assert outcome.err.endswith(": state_dict_ema\n")
    assert run(f"inspect c.pt {DIGITS} --key state_dict_ema").err == ""


def test_key_is_of_the_file_that_has_it(run: Command, folder: Path) -> None:
    digits = torch.load(folder / "digits.pt", weights_only=True)
    torch.save({"nets": {"a": digits, "b": {}}}, folder / "k.pt")
    assert run(f"convert digits.pt {TO} {DIGITS} -o t.pt").code == 0
    for line in (
        "verify k.pt t.pt --data digits.npz",
        "verify t.pt k.pt --data digits.npz",
        "report t.pt --original k.pt",
    ):
        outcome = run(f"{line} {DIGITS} --key nets.a")
        assert outcome.code == 0, outcome.err
    assert "DIFFERENT" not in run("diff digits.pt k.pt --key nets.a").out
    wrong = run(f"verify k.pt t.pt --data digits.npz {DIGITS} --key nets.c")
    assert wrong.code == 2 and "--key nets.c: there is no 'c'" in wrong.err


# --- revert -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("target", TARGETS)
def test_revert_gives_the_bits_back(run: Command, folder: Path, target: str, suffix: str) -> None:
    digits = torch.load(folder / "digits.pt", weights_only=True)
    assert run(f"convert digits{suffix} {DIGITS} --to {target} -o twin{suffix} -q").code == 0
    outcome = run(f"revert twin{suffix} {DIGITS}")
    assert (outcome.code, outcome.err) == (0, "")
    assert "9 norms are torch's again, 9 of them to the bit" in outcome.out
    assert f"wrote twin.reverted{suffix}" in outcome.out
    assert bits(as_saved(folder / f"twin.reverted{suffix}")) == bits(digits)


def test_safetensors_carry_the_manifest(run: Command, folder: Path) -> None:
    assert run(f"convert digits.safetensors {TO} {DIGITS}").code == 0
    with safe_open(folder / "digits.l1.safetensors", framework="pt") as file:
        manifest = json.loads(file.metadata()["normrewrite"])
    assert len(manifest["sites"]) == 9 and {site["to"] for site in manifest["sites"]} == {"l1"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoint_keeps_its_dtype(run: Command, folder: Path, dtype: torch.dtype, suffix: str) -> None:
    digits = torch.load(folder / "digits.pt", weights_only=True)
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in digits.items()}
    torch.save(cast, folder / "cast.pt") if suffix == ".pt" else save_file(cast, folder / "cast.safetensors")
    outcome = run(f"convert cast{suffix} {TO} {DIGITS}")
    assert (outcome.code, outcome.err) == (0, "")
    twin = as_saved(folder / f"cast.l1{suffix}")
    assert {name: value.dtype for name, value in twin.items() if name in cast and "running_mean" not in name} == {
        name: value.dtype for name, value in cast.items() if name in twin and "running_mean" not in name
    }
    wide = torch.float64 if dtype is torch.float64 else torch.float32  # statistics are never kept in half
    assert {value.dtype for name, value in twin.items() if name.endswith(("running_mean", "scale"))} == {wide}
    assert run(f"revert cast.l1{suffix} {DIGITS} -o back{suffix}").code == 0
    assert bits(as_saved(folder / f"back{suffix}")) == bits(cast)


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_advice_stands_below_the_inspection(run: Command) -> None:
    outcome = run(f"inspect digits.pt {DIGITS} --advise digits.npz --batch-size 100")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(run(f"inspect digits.pt {DIGITS}").out)
    for said in (
        "advice for training in batches of 100, from 500 inputs",
        "noise: l1",
        "convert --to l1",
        "9 of 9 norms",
    ):
        assert said in outcome.out


def test_advice_as_json(run: Command, folder: Path) -> None:
    np.savez(folder / "zeros.npz", images=np.zeros((100, 1, 8, 8), np.float32))
    for data in ("digits.npz", "zeros.npz", "few.npz"):  # dead channels have no kappa, few batches no noise
        outcome = run(f"inspect digits.pt {DIGITS} --advise {data} --json")
        assert (outcome.code, outcome.err) == (0, "")
        assert len(outcome.json["sites"]) == len(outcome.json["advice"]["sites"]) == 9
        assert outcome.json["advice"]["options"] == "--to l1"
    assert "advice" not in run(f"inspect digits.pt {DIGITS} --json").json


# --- calibrate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("alone", [True, False])
def test_calibrated_file_verifies_and_reverts(run: Command, folder: Path, suffix: str, alone: bool) -> None:
    data = "--batch-size 100"
    if alone:
        assert run(f"convert digits{suffix} {DIGITS} --to linf -o twin{suffix}").code == 0
        outcome = run(f"calibrate twin{suffix} {DIGITS} --data digits.npz {data} -o calibrated{suffix}")
    else:
        outcome = run(f"convert digits{suffix} {DIGITS} --to linf --calibrate digits.npz {data} -o calibrated{suffix}")
    assert (outcome.code, outcome.err) == (0, "") and "9 sites calibrated on 500 inputs" in outcome.out
    assert run(f"verify digits{suffix} calibrated{suffix} {DIGITS} --data digits.npz").code == 0
    assert run(f"revert calibrated{suffix} {DIGITS} -o back{suffix}").code == 0
    assert bits(as_saved(folder / f"back{suffix}")) == bits(torch.load(folder / "digits.pt", weights_only=True))


def test_calibration_on_nothing_but_zeros_is_still_json(run: Command, folder: Path) -> None:
    np.savez(folder / "zeros.npz", images=np.zeros((100, 1, 8, 8), np.float32))
    outcome = run(f"{CONVERT} {TO} --calibrate zeros.npz --json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["rewritten"] == 9


def _right(path: Path, folder: Path, shift: Any) -> float:
    labels = np.load(folder / "digits.npz")["labels"]
    model = nr.load(path, arch=f"{folder / 'digits.py'}:digits_resnet").eval()
    with torch.inference_mode():
        return float((model(shift(images())).argmax(1).numpy() == labels).mean())


@pytest.mark.parametrize("twin", [False, True])
def test_statistics_measured_anew_through_a_file(run: Command, folder: Path, twin: bool) -> None:
    """On inputs of another brightness: labels tell that it helps; the file says what was done, and what revert gives back."""
    shift = lambda x: 0.25 * x  # noqa: E731
    np.savez(folder / "shifted.npz", images=shift(images()).numpy())
    source = "digits.pt"
    if twin:
        source = "twin.pt"
        assert run(f"{CONVERT} --to l1 --calibrate digits.npz -o twin.pt").code == 0
    command = f"calibrate {source} {DIGITS} --data shifted.npz --statistics --batch-size 100 -o anew.pt"
    outcome = run(f"{command} --json")
    assert (outcome.code, outcome.err) == (0, "")
    report = outcome.json
    assert len(report["sites"]) == 9 and report["inputs"] == 500 and report["sites"][0]["scale"][0] < 0.5
    assert _right(folder / "anew.pt", folder, shift) > _right(folder / source, folder, shift) + 0.1
    steps = torch.load(folder / "anew.pt", weights_only=True)["normrewrite"]["steps"]
    assert "--statistics" in steps[-1]["command"]
    audit = run(f"verify --manifest anew.pt --original digits.pt {DIGITS}")
    assert audit.code == 0 and "nothing that the manifest covers has changed" in audit.out
    if twin:
        outcome = run(f"revert anew.pt {DIGITS} -o back.pt")
        assert outcome.code == 0 and "0 of them to the bit" in outcome.out and "the nearest was taken" in outcome.out
        assert run(f"verify anew.pt back.pt {DIGITS} --data shifted.npz").code == 0
        assert run(f"verify digits.pt back.pt {DIGITS} --data shifted.npz").code == 1


@pytest.mark.parametrize("twin", [False, True])
def test_biases_corrected_through_a_file(run: Command, folder: Path, twin: bool) -> None:
    """Weights in 3 bits: the outputs come nearer to the original's, and a twin says that it is no longer the original's."""
    state = torch.load(folder / "digits.pt", weights_only=True)
    coarse = {name: _coarse(value) if value.dim() > 1 else value for name, value in state.items()}
    torch.save(coarse, folder / "coarse.pt")
    source = "coarse.pt"
    if twin:
        source = "twin.pt"
        assert run(f"convert coarse.pt {DIGITS} --to none -o twin.pt").code == 0
    outcome = run(f"calibrate {source} {DIGITS} --data digits.npz --biases digits.pt -o better.pt --json")
    assert (outcome.code, outcome.err) == (0, "")
    before, after = outcome.json["outputs"]
    assert after < 0.8 * before and max(each["after"] for each in outcome.json["corrected"]) < 1e-5
    step = torch.load(folder / "better.pt", weights_only=True)["normrewrite"]["steps"][-1]
    assert "--biases" in step["command"] and step["files"]["biases"]["file"] == "digits.pt"
    assert run(f"verify --manifest better.pt --original coarse.pt {DIGITS}").code == 0
    text = run(f"calibrate {source} {DIGITS} --data digits.npz --biases digits.pt -o again.pt").out
    assert "10 biases corrected on 250 inputs" in text and "outputs, relative difference" in text


def _coarse(weight: Tensor) -> Tensor:
    step = weight.abs().max() / 3
    return (weight / step).round() * step


# --- folded -----------------------------------------------------------------------------------------------------------


def without_norms(net: nn.Module) -> nn.Module:
    """Its norms replaced by nn.Identity, its convolutions given a bias: what a folded state_dict is for."""
    for module in net.modules():
        if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.BatchNorm2d):
            module[1] = nn.Identity()
            conv: Any = module[0]
            conv.bias = nn.Parameter(torch.zeros(conv.out_channels))
    return net


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("target", TARGETS)
def test_folded_weights_load_without_normrewrite(run: Command, folder: Path, target: str, suffix: str) -> None:
    outcome = run(f"convert digits{suffix} {DIGITS} --to {target} --folded -o folded{suffix}")
    assert (outcome.code, outcome.err) == (0, "") and "9 norms folded into a neighbour" in outcome.out
    path = folder / f"folded{suffix}"
    state = torch.load(path, weights_only=True) if suffix == ".pt" else as_saved(path)
    net = digits_resnet(folder)
    x = images()[:50]
    wanted = net(x)
    without_norms(net).load_state_dict(state)
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(net(1.01 * x), wanted, rtol=0, atol=1e-4)  # the comparison can fail


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_prints_both_accuracies(run: Command) -> None:
    assert run(f"{CONVERT} --to topk:10 -o twin.pt -q").code == 0
    outcome = run(f"verify digits.pt twin.pt {DIGITS} --data digits.npz")
    assert (outcome.code, outcome.err) == (0, "")
    assert "top-1 of A" in outcome.out and "same function" in outcome.out
    assert outcome.out.count("99.40 %") == 2  # examples/README.md
    result = run(f"verify digits.pt twin.pt {DIGITS} --data digits.npz --batch-size 7 --json").json
    assert result["ok"] and result["inputs"] == 500
    assert result["outputs"][0]["top1"] == [0.994, 0.994] and result["outputs"][0]["agreement"] == 1


def test_verify_on_random_input(run: Command) -> None:
    result = run(f"{VERIFY} --input-shape 5,1,8,8 --json").json
    assert result["ok"] and result["inputs"] == 5 and "top1" not in result["outputs"][0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("head.bias", lambda values: values + 0.01),
        ("stem.0.1.running_var", lambda values: values * 1.01),
        ("blocks.2.body.0.1.weight", lambda values: values * 1.01),
        ("head.weight", lambda values: values * float("nan")),
        ("head.bias", lambda values: values / 0),
    ],
)
def test_verify_fails_on_other_weights(
    run: Command, folder: Path, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    digits = torch.load(folder / "digits.pt", weights_only=True)
    torch.save({**digits, name: change(digits[name])}, folder / "perturbed.pt")
    line = f"{DIGITS} --data few.npz"
    for pair in ("digits.pt perturbed.pt", "perturbed.pt digits.pt"):
        outcome = run(f"verify {pair} {line} --json")
        assert outcome.code == 1 and not outcome.json["ok"]
    assert run(f"verify digits.pt perturbed.pt {line} --quiet") == Outcome(1, "", "")
    outcome = run(f"verify digits.pt perturbed.pt {line}")
    assert outcome.code == 1 and "DIFFERENT" in outcome.out


def test_verify_tolerance(run: Command, folder: Path) -> None:
    digits = torch.load(folder / "digits.pt", weights_only=True)
    torch.save({**digits, "head.bias": digits["head.bias"] + 0.01}, folder / "perturbed.pt")
    line = f"verify digits.pt perturbed.pt {DIGITS} --data few.npz --tolerance"
    assert [run(f"{line} {limit}").code for limit in ("1", "1e-7")] == [0, 1]


# --- the program itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["--help", "--version", *(f"{name} --help" for name in cli.app.commands)])
def test_help_and_version(run: Command, line: str) -> None:
    outcome = run(line)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(("Usage: ", f"normrewrite {nr.__version__}"))


def started(folder: Path, *arguments: str, program: tuple[str, ...] = (str(SCRIPT),)) -> subprocess.Popen[str]:
    """With Ctrl-C as in a terminal: what runs in a shell's background inherits that it is ignored."""
    return subprocess.Popen(
        [*program, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def test_script_converts(folder: Path) -> None:
    process = started(folder, *shlex.split(f"{CONVERT} {TO} --json"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["rewritten"] == 9 and (folder / "digits.l1.pt").is_file()


def test_module_refuses(folder: Path) -> None:
    before = contents(folder)
    process = started(folder, *shlex.split("convert posix.pt --to l1"), program=(sys.executable, "-Bm", "normrewrite"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert "posix.system" in err and len(err.splitlines()) == 1
    assert contents(folder) == before


@pytest.fixture
def interrupted(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A conversion, stopped by Ctrl-C while the user's factory runs."""
    process = started(folder, *shlex.split(f"convert digits.pt {TO} --arch zoo.py:slow"))
    try:
        deadline = time.monotonic() + 60
        while not (folder / "started").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_interrupt(folder: Path, interrupted: subprocess.Popen[str]) -> None:
    out, err = interrupted.communicate(timeout=60)
    assert (interrupted.returncode, out, err.strip()) == (130, "", "interrupted")
    assert not list(folder.glob("digits.l1*")) and not list(folder.glob(".*"))


# --- targets beside metrics -------------------------------------------------------------------------------------------


def test_help_names_every_target(run: Command) -> None:
    """Written out there, as the table would import torch."""
    words = set(re.findall(r"[\w:]+", run("convert --help").out))
    assert set(targets.TARGETS) <= {word.partition(":")[0] for word in words}


@pytest.mark.parametrize("to", ["renorm", "frozen", "wn", "bwn", "wn:mean-bn", "none"])
def test_exact_targets_there_and_back(run: Command, to: str) -> None:
    assert run(f"{CONVERT} --to {to} -o twin.pt --expect 9").code == 0
    assert run(f"verify digits.pt twin.pt {DIGITS} --data digits.npz").code == 0
    if to == "none":
        assert "no norm of normrewrite's" in run(f"revert twin.pt {DIGITS}").err
        return
    assert run(f"revert twin.pt {DIGITS} -o back.pt").code == 0
    back, was = (torch.load(name, weights_only=True) for name in ("back.pt", "digits.pt"))
    assert all(torch.equal(back["state_dict"][name], value) for name, value in was.items())


def test_an_inexact_target_is_fitted_in_the_same_command(run: Command) -> None:
    copied = run(f"{CONVERT} --to layer --offset 0 -o copied.pt")
    assert copied.code == 0 and "9 sites can't be exact: --calibrate DATA" in copied.out
    result = run(f"{CONVERT} --to layer --offset 0 --calibrate digits.npz -o twin.pt --json").json
    fits = result["calibration"]["fits"]
    assert len(fits) == 9 and all(fit["explained"] > max(0.5, fit["copied"]) for fit in fits)
    found = {
        name: run(f"verify digits.pt {name} {DIGITS} --data digits.npz --json").json
        for name in ("copied.pt", "twin.pt")
    }
    right = {name: outcome["outputs"][0]["top1"][1] for name, outcome in found.items()}
    assert right["twin.pt"] > 0.9 > right["copied.pt"]
    assert run(f"revert twin.pt {DIGITS} -o back.pt").code == 0
    assert run(f"verify digits.pt back.pt {DIGITS} --data digits.npz").code == 0


@pytest.mark.parametrize(("to", "least"), [("layer", 0.97), ("rms", 0.97), ("group:4", 0.9)])
def test_an_offset_keeps_what_the_network_knows_without_any_data(run: Command, to: str, least: float) -> None:
    assert (
        run(f"{CONVERT} --to {to} -o twin.pt").code == 0
        and run(f"{CONVERT} --to {to} --offset 0 -o plain.pt").code == 0
    )
    right = {}
    for name in ("twin.pt", "plain.pt"):
        outcome = run(f"verify digits.pt {name} {DIGITS} --data digits.npz --json").json
        right[name] = outcome["outputs"][0]["top1"][1]
    assert right["twin.pt"] > least > 0.8 > right["plain.pt"]
    wrong = run(f"{CONVERT} --to {to} --offset much")
    assert wrong.code == 2 and "--offset 'much' is no size. Give a number from 0" in wrong.err


def test_fresh_weight_norms_are_initialised_by_data(run: Command, folder: Path) -> None:
    network = _import(folder / "digits.py", "fresh_digits").digits_resnet()
    torch.save(network.state_dict(), folder / "fresh.pt")
    result = run(f"convert fresh.pt {DIGITS} --to wn --calibrate digits.npz --json")
    assert result.code == 0 and len(result.json["calibration"]["initialised"]) == 9
    nothing = run(f"convert fresh.pt {DIGITS} --to wn --calibrate zoo.py:nothing -o nothing.pt")
    assert nothing.code == 2 and "held no batch" in nothing.err and not (folder / "nothing.pt").exists()
    trained = run(f"{CONVERT} --to wn --calibrate digits.npz")
    assert trained.code == 0 and "there is nothing to calibrate" in trained.out


class _AnyInputs(nn.Sequential):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(inputs[0])  # type: ignore[no-any-return]


def test_a_fresh_twin_is_initialised_where_it_is_and_as_its_forward_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("normrewrite.commands.convert.initialise_", lambda twin, batch: seen.append(batch))
    data = Data(Batch({"input": torch.zeros(4, 1, 3, 3)}))
    for model in (nn.Sequential(nn.Conv2d(1, 2, 3)), _AnyInputs(nn.Conv2d(1, 2, 3))):
        twin = nr.convert(model, "wn").to("meta")
        _made_ready(twin, Report([]), True, data, 2, print)
    named, unnamed = seen
    assert named["input"].is_meta and isinstance(unnamed, tuple) and unnamed[0].is_meta


# --- folded files -----------------------------------------------------------------------------------------------------


class OfChannels(nn.Module):
    """What a norm that runs on fixed statistics is, in plain torch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class RootMeanSquare(OfChannels):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / (x.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt())


def behind(norm: Any) -> nn.Module:
    """A norm with what no layer in front could take in, under its own name."""

    class Behind(type(norm)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.scale[:, None, None] + self.offset[:, None, None])  # type: ignore[no-any-return]

    norm.__class__ = Behind
    norm.scale, norm.offset = nn.Parameter(torch.empty(8)), nn.Parameter(torch.empty(8))
    return norm  # type: ignore[no-any-return]


Plain = Callable[[int], nn.Module]
BESIDE: dict[str, Plain] = {  # what each norm that no layer took in is in the plain network
    **dict.fromkeys(("l1", "linf", "topk:3", "range", "renorm", "frozen", "none"), OfChannels),
    **dict.fromkeys(("bwn", "bwn:strict", "bwn:mean-bn", "wn", "wn:mean-bn"), OfChannels),
    "group:4": lambda channels: nn.GroupNorm(4, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.GroupNorm(channels, channels),
    "rms": RootMeanSquare,
}


@pytest.mark.parametrize("to", BESIDE)
def test_folded_file_of_every_target_is_a_plain_networks(run: Command, folder: Path, to: str) -> None:
    """Keys and function: two norms behind convolutions, and one that no layer can take in."""
    (folder / "plain.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), "
        "nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))\n"
    )
    net = _import(folder / "plain.py", "plain").net
    model = randomise(net()).eval()
    x = torch.randn(4, 1, 8, 8)
    torch.save(model.state_dict(), folder / "w.pt")
    outcome = run(f"convert w.pt --arch plain.py:net --to {to} --folded -o folded.pt")
    assert outcome.code == 0, outcome.err
    measuring = to.partition(":")[0] in ("group", "layer", "instance", "rms")
    folded: Any = net()
    for place in ("1", "4", "6"):
        folded[int(place)] = BESIDE[to](8) if measuring or place == "6" else nn.Identity()
    if measuring and to != "instance":
        folded[6] = behind(folded[6])
    folded.load_state_dict(torch.load(folder / "folded.pt", weights_only=True))
    wanted = nr.convert(model, to)(x)
    torch.testing.assert_close(folded.eval()(x), wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(folded(1.01 * x), wanted, rtol=0, atol=1e-4) or measuring


# --- from outside -----------------------------------------------------------------------------------------------------


def test_control_characters_of_a_file_are_not_printed(run: Command, folder: Path) -> None:
    model = torch.nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    model.add_module("norm\x1b[2Jsame function", nn.ReLU())
    torch.save(model, "named.pt")
    torch.save({"norm\r\x9b2J.weight": torch.ones(1)}, "state.pt")
    torch.save({"a\x1b[2J": {"b": torch.ones(1)}, "c": {"d": torch.ones(1)}}, "key.pt")
    for name in ("named.pt", "state.pt", "key.pt"):
        outcome = run(f"inspect {name}")
        assert outcome.code == 2 and re.search(r"\\x1b|\\\\x1b|\\r", outcome.err), outcome
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", outcome.out + outcome.err)


@pytest.mark.parametrize("options", ["--expect", "--to topk:", "--to group:", "--to l1 --input-shape 1,1,"])
@pytest.mark.parametrize("digits", [30, 5000])
def test_numbers_without_bound_are_faults_of_the_request(run: Command, folder: Path, options: str, digits: int) -> None:
    target = "" if "--to" in options else "--to l1"
    space = " " if options == "--expect" else ""
    outcome = run(f"convert digits.pt {DIGITS} {target} -o out.pt {options}{space}{'9' * digits}")
    assert outcome.code == 2 and "there is no" not in outcome.err and not Path("out.pt").exists(), outcome


def test_numbers_that_are_none_are_faults_of_the_request(run: Command, folder: Path) -> None:
    for options in ("--tolerance inf", "--tolerance nan", "--mean 1e999 --std 1"):
        outcome = run(f"verify digits.pt digits.pt {DIGITS} --input-shape 2,1,8,8 {options}")
        assert outcome.code == 2 and re.search("finite number|write numbers", outcome.err), outcome


@pytest.mark.parametrize("place", ["/dev/null", "pipe.pt"])
def test_pipes_and_devices_are_refused(run: Command, folder: Path, place: str) -> None:
    os.mkfifo("pipe.pt")
    for line in (
        f"inspect {place}",
        f"convert digits.pt {DIGITS} --to l1 -o {place} --force",
        f"diff digits.pt {place}",
    ):
        outcome = run(line)
        assert outcome.code == 2 and re.search("is a (pipe|device)", outcome.err), outcome
    assert not Path("/dev/null").is_file() and Path("pipe.pt").is_fifo()


def test_suggested_options_are_quoted(run: Command, folder: Path) -> None:
    with zipfile.ZipFile("odd.pt", "w") as archive:
        archive.writestr("odd/data.pkl", b"\x80\x02cmodels\nNet;touch x\n.")
        archive.writestr("odd/version", "3\n")
    assert "--allow 'models:Net;touch x'" in run("inspect odd.pt").err
