"""Bombs: small files that ask for hours, or for more memory than there is."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks.fuzz.attacks import write_pickle
from benchmarks.fuzz.inputs import ARCH, SHAPE, reading


def knot(times: int = 40) -> Any:
    """Lists of two of the list before: few in memory, without end for who goes through them."""
    knotted: Any = []
    for _ in range(times):
        knotted = [knotted, knotted]
    return knotted


def deep(times: int = 2_000) -> Any:
    nested: Any = []
    for _ in range(times):
        nested = [nested]
    return nested


def shared_modules(times: int = 40) -> nn.Module:
    module: nn.Module = nn.BatchNorm2d(4)
    for _ in range(times):
        module = nn.Sequential(module, module)
    return module


def _pickled(content: Callable[[Path], Any]) -> Callable[[Random, Path], list[str]]:
    def make(random: Random, folder: Path) -> list[str]:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(10**6)
        torch.save(content(folder), folder / "odd.pt", **random.choice(({}, {"_use_new_zipfile_serialization": False})))
        sys.setrecursionlimit(limit)
        return reading(random, "odd.pt")

    return make


def _twin(folder: Path, **more: Any) -> Any:
    twin = torch.load(folder / "twin.pt", weights_only=True)
    return {**twin, "normrewrite": {**twin["normrewrite"], **more}}


def _raw(content: bytes) -> Callable[[Random, Path], list[str]]:
    def make(random: Random, folder: Path) -> list[str]:
        write_pickle(folder / "odd.pt", b"\x80\x02" + content)
        return reading(random, "odd.pt")

    return make


def _json(text: Callable[[str], str]) -> Callable[[Random, Path], list[str]]:
    def make(random: Random, folder: Path) -> list[str]:
        (folder / "odd.json").write_text(text((folder / "twin.json").read_text()))
        return random.choice(
            (
                ["verify", "--manifest", "odd.json"],
                ["convert", "weights.pt", *ARCH, "--replay", "odd.json", "-o", "out.pt"],
            )
        )

    return make


def _claims(random: Random, folder: Path) -> list[str]:
    """A storage that claims more than there is, in the format before torch 1.6."""
    torch.save({"0.weight": torch.ones(1000)}, folder / "odd.pt", _use_new_zipfile_serialization=False)
    data = (folder / "odd.pt").read_bytes()
    (folder / "odd.pt").write_bytes(data.replace((1000).to_bytes(2, "little"), (60_000).to_bytes(2, "little")))
    return reading(random, "odd.pt")


def _loop(trips: int | None) -> bytes:
    scalar = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("v", "w")]
    going = helper.make_tensor_value_info("d", TensorProto.BOOL, [])
    inner = [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Relu", ["v"], ["w"])]
    body = helper.make_graph(inner, "body", [*scalar, value[0]], [going, value[1]])
    node = helper.make_node("Loop", ["" if trips is None else "n", "t", "x"], ["y"], body=body)
    numbers = [numpy_helper.from_array(np.array(trips or 0), "n"), numpy_helper.from_array(np.array(True), "t")]
    return _onnx([node], numbers)


def _onnx(nodes: list[Any], constants: list[Any], functions: tuple[Any, ...] = ()) -> bytes:
    ends = (
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    graph = helper.make_graph(nodes, "graph", *ends, initializer=constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9)
    return bytes(model.SerializeToString())


def _filled(operator: str) -> bytes:
    sizes = numpy_helper.from_array(np.array([50_000, 50_000]), "s")
    one = numpy_helper.from_array(np.ones((1, 1), np.float32), "one")
    inputs = {"ConstantOfShape": ["s"], "Tile": ["one", "s"], "Expand": ["one", "s"]}[operator]
    nodes = [
        helper.make_node(operator, inputs, ["z"]),
        helper.make_node("ReduceSum", ["z"], ["r"], keepdims=0),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    return _onnx(nodes, [sizes, one])


def _functions(depth: int, first: str) -> bytes:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]

    def function(name: str, called: str) -> Any:
        twice = helper.make_node(called, ["a"], ["m"], domain="f"), helper.make_node(called, ["m"], ["b"], domain="f")
        return helper.make_function("f", name, ["a"], ["b"], list(twice), opsets)

    last = helper.make_function("f", "f0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)
    made = (last, *(function(f"f{i}", f"f{i - 1}") for i in range(1, depth)), function("self", "self"))
    return _onnx([helper.make_node(first, ["x"], ["y"], domain="f")], [], made)


def _graph(content: Callable[[], bytes]) -> Callable[[Random, Path], list[str]]:
    def make(random: Random, folder: Path) -> list[str]:
        (folder / "odd.onnx").write_bytes(content())
        compared = ["twin.pt", "odd.onnx", *ARCH, *SHAPE]
        return random.choice((["verify", *compared], ["bench", *compared, "--rounds", "1"]))

    return make


def _data(name: str) -> Callable[[Random, Path], list[str]]:
    def make(random: Random, folder: Path) -> list[str]:
        (folder / "pipes").mkdir()
        os.mkfifo(folder / "pipe.npz")
        os.mkfifo(folder / "pipes" / "a.png")
        pixels = ["--mean", "0.5", "--std", "0.2"]
        return random.choice(
            (
                ["calibrate", "twin.pt", *ARCH, "--data", name, *pixels, "-o", "out.pt"],
                ["verify", "weights.pt", "twin.pt", *ARCH, "--data", name, *pixels],
                ["inspect", "weights.pt", *ARCH, "--advise", name, *pixels],
            )
        )

    return make


def _pipe(random: Random, folder: Path) -> list[str]:
    """A pipe or a device where a file is read or written."""
    os.mkfifo(folder / "pipe.pt")
    place = random.choice(("pipe.pt", "/dev/zero", "/dev/null", "/dev/stdin"))
    if random.random() < 0.5:
        return ["convert", "weights.pt", *ARCH, "--to", "l1", "-o", place, "--force"]
    return reading(random, place)


_KNOT = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # a tuple of two of the tuple before, and so on
_LONG = b"\x8a\x0c%bNs"  # a number of twelve bytes as a key: those here all have one hash
BOMBS: tuple[Callable[[Random, Path], list[str]], ...] = (
    _pickled(lambda folder: _twin(folder, further=knot())),
    _pickled(lambda folder: _twin(folder, sites=knot())),
    _pickled(lambda folder: _twin(folder, report={"sites": deep()})),
    _raw(b"}" + _KNOT + b"Ns."),
    _raw(b"}X\x05\0\0\0model" + _KNOT + b"s."),
    _raw(b"c__builtin__\nset\n]" + _KNOT + b"a\x85R."),
    _raw(b"}X\x05\0\0\0model" + b"]" * 100_000 + b"a" * 99_999 + b"s."),
    _pickled(lambda folder: {"0.weight": torch.ones(1).expand(1 << 31)}),
    _pickled(lambda folder: {f"{i}.weight": torch.ones(1 << 20).expand(64, -1) for i in range(100)}),
    _raw(b"}" + b"".join(_LONG % (i * ((1 << 61) - 1)).to_bytes(12, "little") for i in range(30_000)) + b"."),
    _pickled(lambda folder: shared_modules()),
    _pickled(lambda folder: _with_attribute(folder, knot())),
    _pickled(lambda folder: _with_attribute(folder, deep())),
    _json(lambda text: "[" * 10**6),
    _json(lambda text: text.replace('"format": 1', f'"format": {"9" * 5000}')),
    _json(lambda text: text.replace('"format": 1', '"format": 1, "steps": ' + "[" * 900 + "]" * 900)),
    _claims,
    lambda random, folder: reading(random, "deflated.pt"),
    _data("bomb.npz"),
    _data("bomb"),
    _data("pipe.npz"),
    _data("pipes"),
    _pipe,
    _graph(lambda: _loop(10**12)),
    _graph(lambda: _loop(None)),
    _graph(lambda: _filled("ConstantOfShape")),
    _graph(lambda: _filled("Tile")),
    _graph(lambda: _filled("Expand")),
    _graph(lambda: _functions(40, "f39")),
    _graph(lambda: _functions(2, "self")),
)


def _with_attribute(folder: Path, value: Any) -> nn.Module:
    model: nn.Module = torch.load(folder / "module.pt", weights_only=False)
    model.extra = value
    return model


def bombs(random: Random, folder: Path) -> list[str]:
    """A small file that asks for hours, or for more memory than there is."""
    return random.choice(BOMBS)(random, folder)
