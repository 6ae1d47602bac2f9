"""Kinds of bad input that somebody makes on purpose: files that would run code, take the machine, or write on the terminal."""

import copy
import json
import os
import pickle
import signal
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import onnx
import torch
from torch import nn

from benchmarks.fuzz.inputs import ARCH, SHAPE, reading, spoil_member

# --- hostile pickles --------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks() -> list[Any]:
    import builtins
    import functools
    import operator
    import os
    import runpy
    import subprocess
    import webbrowser

    touch = "open('pwned','w')"
    return [
        Call(os.system, "touch pwned"),
        Call(subprocess.Popen, ["touch", "pwned"]),
        Call(builtins.eval, touch),
        Call(builtins.exec, touch),
        Call(builtins.open, "pwned", "w"),
        Call(runpy.run_path, "trap.py"),
        Call(builtins.__import__, "trap"),
        Call(torch.save, 1, "pwned"),
        Call(functools.partial, os.system, "touch pwned"),
        Call(operator.methodcaller, "touch"),
        Call(torch.hub.load_state_dict_from_url, "file:///dev/null"),
        Call(webbrowser.open, "about:blank"),
        Call(Path.touch, Path("pwned")),
        Call(torch.jit.load, "module.pt"),
        Call(torch.nn.utils.parametrize.register_parametrization, nn.ReLU(), "weight", nn.ReLU()),
    ]


def hostile(random: Random, folder: Path) -> list[str]:
    attack = random.choice(attacks())
    holder = random.randrange(5)
    model = torch.load(folder / "module.pt", weights_only=False)
    content: Any = attack
    if holder == 1:
        content = {"state_dict": {"0.weight": attack}}
    elif holder > 1:
        victim: Any = random.choice(list(model.modules()))
        slot = random.choice(
            ("forward", "_forward_hooks", "_forward_pre_hooks", "_modules", "_state_dict_hooks", "extra")
        )
        value = {0: attack} if slot.startswith("_") else attack
        victim.__dict__[slot] = value
        content = model if holder < 4 else {"model": model, "normrewrite": attack}
    write_pickle(folder / "odd.pt", content)
    if random.random() < 0.3:
        (folder / "odd.pt").write_bytes(pickle.dumps(content, protocol=random.randrange(6)))
    elif random.random() < 0.3:
        spoil_member(random, folder / "odd.pt")
    return reading(random, "odd.pt")


def write_pickle(path: Path, content: Any) -> None:
    """As torch.save, of any object; of bytes, as the pickle itself."""
    with torch.serialization._open_zipfile_writer(str(path)) as archive:
        data = content if isinstance(content, bytes) else pickle.dumps(content, protocol=2)
        archive.write_record("data.pkl", data, len(data))


# --- names ------------------------------------------------------------------------------------------------------------

CODE = "open('pwned','w')"
NAMES = (
    f'c"); {CODE} #',
    f"c'); {CODE} #",
    f'c"); pass\r{CODE}\rdef f(self, x):\r    ("',
    f"c\n{CODE}\n",
    "c\\",
    "c\x1b[2Jsame function",
    "c\x9b2J",
    "c\u2028d",
    "c\u202ed",
    "c\ud800",
    "c[red]d",
    "class",
    "1 + 1",
    "type",
    "forward",
    "__class__",
    "",
)


def names(random: Random, folder: Path) -> list[str]:
    """A name that is code, or acts on a terminal, of a part, a tensor, an attribute, a site or a node."""
    name, how = random.choice(NAMES), random.randrange(5)
    if how == 0:
        return _named_state(random, folder, name)
    if how == 1:
        return _named_nodes(random, folder, name)
    if how == 2:
        record = json.loads((folder / "twin.json").read_text())
        record["sites"][0][random.choice(("names", "to", "gain", "was", "layer"))] = random.choice((name, [name]))
        (folder / "odd.json").write_text(json.dumps(record))
        return ["convert", "weights.pt", *ARCH, "--replay", "odd.json", "-o", "out.pt"]
    model = torch.load(folder / random.choice(("module.pt", "twin-module.pt")), weights_only=False)
    module = random.choice(list(model.modules()))
    table = random.choice((module._modules, module._parameters, module._buffers, vars(module)))
    table[name] = copy.copy(random.choice((nn.ReLU(), nn.Identity()))) if table is module._modules else torch.ones(4)
    torch.save(model, folder / "odd.pt")
    if random.random() < 0.4:
        return ["export", "odd.pt", *SHAPE, "-o", "out.onnx"]
    return reading(random, "odd.pt")


def _named_state(random: Random, folder: Path, name: str) -> list[str]:
    state = torch.load(folder / "weights.pt", weights_only=True)["state_dict"]
    old = random.choice(list(state))
    torch.save({f"{name}.{key}" if key == old else key: value for key, value in state.items()}, folder / "odd.pt")
    return reading(random, "odd.pt")


def _named_nodes(random: Random, folder: Path, name: str) -> list[str]:
    model = onnx.load(folder / "model.onnx")
    old = random.choice([output for node in model.graph.node for output in node.output] + ["input"])
    text = name.encode("utf-8", "ignore").decode()
    for node in model.graph.node:
        node.name = text
        for ends in (node.input, node.output):
            ends[:] = [text if end == old else end for end in ends]
    for value in (*model.graph.input, *model.graph.output):
        value.name = text if value.name == old else value.name
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return random.choice(
        (
            ["verify", "twin.pt", "model.onnx", *ARCH, *SHAPE],
            ["bench", "twin.pt", "model.onnx", *ARCH, *SHAPE, "--rounds", "1"],
        )
    )


# --- constructors -----------------------------------------------------------------------------------------------------


class Made:
    """Pickles as an object of a class that is made with arguments, or given attributes of its own."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


def constructions() -> list[Any]:
    """Calls of what is on an allow-list, torch's own or ours, as torch.save never writes them."""
    from torch.nn.modules.rnn import RNNBase

    tensor = torch.ones(3)
    return [
        Call(nn.Transformer, 8, 8, 400, 400),
        Call(nn.Linear, 100_000, 100_000),
        Call(nn.LSTM, 10, 10, 10**8),
        Call(nn.ReLU),
        b"\x80\x02ctorch.nn.modules.linear\nLinear\n(K\x03K\x04t\x81.",
        Call(torch._tensor._rebuild_from_type_v2, nn.Linear, torch.Tensor, (100_000, 100_000), {}),
        Call(torch._tensor._rebuild_from_type_v2, bytearray, torch.Tensor, (1 << 34,), {}),
        Call(torch.Tensor, 1 << 33),
        Call(torch.FloatTensor, 1 << 33),
        Call(torch.UntypedStorage, 1 << 34),
        Call(bytearray, 1 << 34),
        Call(torch.nn.Parameter, tensor),
        Call(torch.nn.functional.gelu, tensor.expand(1 << 20, 3)),
        Made(nn.ReLU, (), {"inplace": True}),
        Made(nn.Linear.__new__, (nn.Linear,), {"in_features": 3}),
        Made(RNNBase.__new__, (nn.LSTM,), {"_all_weights": [[0]], "num_layers": 10**12, "bidirectional": False}),
        _doubled(24),
    ]


def _doubled(times: int) -> Any:
    import _codecs

    text: Any = "x" * 1000
    for _ in range(times):
        text = Call(_codecs.encode, text, "hex")
    return text


def constructors(random: Random, folder: Path) -> list[str]:
    attack: Any = random.choice(constructions())
    model = torch.load(folder / "module.pt", weights_only=False)
    for part in model.modules():  # tensors need torch's own writer
        part._parameters, part._buffers = dict.fromkeys(part._parameters), dict.fromkeys(part._buffers)
    content: Any = attack
    holder = 0 if isinstance(attack, bytes) else random.randrange(4)
    if holder == 1:
        content = {"state_dict": {"0.weight": attack}, "normrewrite": None}
    elif holder > 1:
        victim = random.choice(list(model.modules()))
        vars(victim)[random.choice(("extra", "_modules", "activation"))] = {"a": attack} if holder == 2 else attack
        content = model
    try:
        write_pickle(folder / "odd.pt", content)
    except Exception:  # a tensor in it, which plain pickle writes in another way
        torch.save(content, folder / "odd.pt")
    return reading(random, "odd.pt")


# --- signals ----------------------------------------------------------------------------------------------------------


def signals(random: Random, folder: Path) -> list[str]:
    """SIGTERM or Ctrl-C, half of the time while the output is being written."""
    writing, wait = random.random() < 0.5, random.random() * 0.5
    number = random.choice((signal.SIGTERM, signal.SIGINT))

    def send() -> None:
        end = time.monotonic() + 5
        while writing and time.monotonic() < end and not list(folder.glob(".*.tmp")):
            time.sleep(0.0005)
        time.sleep(0 if writing else wait)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    return random.choice(
        (
            ["convert", "weights.pt", *ARCH, "--to", "l1", "-o", "out.pt"],
            ["revert", "twin.pt", *ARCH, "-o", "out.pt"],
            ["calibrate", "twin.pt", *ARCH, "--data", "images.npz", "-o", "out.pt"],
            ["export", "twin.pt", *ARCH, *SHAPE, "-o", "out.onnx"],
            ["report", "twin.pt", *ARCH, "-o", "out.html"],
        )
    )
