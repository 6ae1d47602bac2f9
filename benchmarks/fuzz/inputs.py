"""Kinds of bad input that people and disks make: each takes a random generator and a folder of sound files, spoils some, and
returns a command line. Everything follows from the generator.
"""

import json
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import Message
from torch import nn

from benchmarks.fuzz.material import DATA, MODELS

ARCH = ["--arch", "models.py:small"]
SHAPE = ["--input-shape", "2,3,8,8"]


# --- bytes ------------------------------------------------------------------------------------------------------------


def spoiled(random: Random, content: bytes) -> bytes:
    """A few bytes turned, cut out, repeated, put in, or the end gone."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5, 30))):
        at, length = random.randrange(len(data) + 1), random.choice((1, 1, 2, 8, 200))
        how = random.randrange(6)
        if how == 0:
            data[at : at + length] = random.randbytes(len(data[at : at + length]))
        elif how == 1:
            del data[at : at + length]
        elif how == 2:
            data[at:at] = data[at : at + length]
        elif how == 3:
            data[at:at] = random.randbytes(length)
        elif how == 4 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        else:
            del data[at:]
    return bytes(data)


def spoil(random: Random, path: Path) -> None:
    path.write_bytes(spoiled(random, path.read_bytes()))


def spoil_member(random: Random, path: Path) -> None:
    """One file inside a zip archive, whose check sums are right again afterwards."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    victim = random.choice([name for name in members if name.endswith(".pkl")] * 4 + list(members))
    members[victim] = spoiled(random, members[victim])
    if random.random() < 0.1:
        del members[random.choice(list(members))]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def model_bytes(random: Random, folder: Path) -> list[str]:
    name = random.choice(MODELS)
    inside = name.endswith(".pt") and random.random() < 0.6
    (spoil_member if inside else spoil)(random, folder / name)
    return reading(random, name)


def reading(random: Random, name: str) -> list[str]:
    """A command that reads a model file."""
    arch = ARCH if random.random() < 0.8 else []
    return random.choice(
        (
            ["inspect", name, *arch],
            [
                "convert",
                name,
                *arch,
                "--to",
                random.choice(("l1", "linf", "bwn", "none", "l2", "layer")),
                "-o",
                "out.pt",
            ],
            ["revert", name, *arch, "-o", "out.pt"],
            ["verify", "module.pt", name, *SHAPE, *arch],
            ["verify", "--manifest", name],
            ["diff", "module.pt", name],
            ["convert", "weights.pt", *ARCH, "--replay", name, "-o", "out.pt"],
            ["report", name, *arch, "-o", "out.html"],
            ["calibrate", name, *arch, "--data", "images.npz", "-o", "out.pt"],
        )
    )


# --- objects ----------------------------------------------------------------------------------------------------------


def odd_tensor(random: Random) -> Any:
    return random.choice(
        (
            lambda: torch.zeros(0),
            lambda: torch.tensor(float("nan")),
            lambda: torch.full((4,), float("inf")),
            lambda: torch.zeros(3, 4, dtype=torch.complex64),
            lambda: torch.zeros(4, dtype=torch.bool),
            lambda: torch.zeros(4, dtype=torch.int8),
            lambda: torch.zeros(4, dtype=torch.float8_e4m3fn),
            lambda: torch.eye(4).to_sparse(),
            lambda: torch.zeros(1).expand(10**6),
            lambda: torch.empty(10**6, 10**6, device="meta"),
            lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
            lambda: nn.Parameter(torch.full((4,), -1.0)),
            lambda: torch.zeros(2, 0, 3),
        )
    )()


def odd_object(random: Random, depth: int = 0) -> Any:
    leaf = depth > 3 or random.random() < 0.4
    if leaf:
        return random.choice(
            (
                lambda: odd_tensor(random),
                lambda: random.choice((None, True, 0, -1, 2**80, 1e308, float("nan"), "", "l1", "x" * 5000, b"\0")),
                lambda: random.choice((nn.ReLU(), nn.BatchNorm2d(4), nn.Sequential(), nn.Linear(4, 5))),
            )
        )()
    keys = (
        "state_dict",
        "model",
        "ema",
        "normrewrite",
        "sites",
        "weight",
        "0.weight",
        "1.running_var",
        "",
        0,
        None,
        ("a",),
    )
    if random.random() < 0.7:
        return {random.choice(keys): odd_object(random, depth + 1) for _ in range(random.randrange(4))}
    return [odd_object(random, depth + 1) for _ in range(random.randrange(3))]


def odd_state(random: Random) -> dict[Any, Any]:
    """A state_dict that nearly fits."""
    state: dict[Any, Any] = dict(torch.load("weights.pt", weights_only=True)["state_dict"])
    for _ in range(random.choice((1, 1, 3))):
        name = random.choice(list(state))
        how = random.randrange(5)
        if how == 0:
            state[name] = odd_tensor(random)
        elif how == 1:
            state.pop(name)
        elif how == 2:
            state[random.choice(("", "module." + str(name), "a.b.c", "\n", "0" * 300))] = state[name]
        elif how == 3 and isinstance(state[name], torch.Tensor) and state[name].is_floating_point():
            state[name] = state[name].to(random.choice((torch.float16, torch.bfloat16, torch.float64)))
        elif isinstance(state[name], torch.Tensor) and state[name].is_floating_point():
            state[name] = torch.full_like(state[name], random.choice((float("nan"), float("inf"), -1.0, 0.0, 6e4)))
        if not state:
            break
    return state


def odd_contents(random: Random, folder: Path) -> list[str]:
    content = odd_object(random) if random.random() < 0.4 else odd_state(random)
    torch.save(content, folder / "odd.pt")
    return reading(random, "odd.pt")


def odd_module(random: Random, folder: Path) -> list[str]:
    """A pickled network of allowed classes whose attributes are not what those classes set."""
    model = torch.load(folder / random.choice(("module.pt", "twin-module.pt")), weights_only=False)
    modules = list(model.modules())
    for _ in range(random.choice((1, 2, 6))):
        module = random.choice(modules)
        name = random.choice(
            [*vars(module), "_modules", "_buffers", "_parameters", "training", "eps", "forward", "__class__"]
        )
        if name == "__class__":
            classes = (nn.ReLU, nn.LSTM, nn.BatchNorm2d, nn.Linear, nn.Sequential, nn.Embedding)
            object.__setattr__(module, "__class__", random.choice(classes))
        else:
            module.__dict__[name] = odd_object(random, 2)
    try:
        torch.save(model, folder / "odd.pt")
    except Exception:  # can't even be written
        torch.save(odd_object(random), folder / "odd.pt")
    return reading(random, "odd.pt")


# --- manifests --------------------------------------------------------------------------------------------------------


def odd_json(random: Random) -> Any:
    texts = ("", "l1", "topk:0", "os:system", "trap:small", "trap.py:small", "\ud800", "x" * 3000)
    return random.choice((None, True, -1, 2**70, 1e400, [], {}, [[]], {"a": {}}, *texts))


def spoil_json(random: Random, node: Any) -> Any:
    """Some node of it replaced, doubled, renamed or gone."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(node)
    for _ in range(random.choice((1, 1, 2, 8))):
        holder, key = random.choice(places)
        if key not in (holder if isinstance(holder, dict) else range(len(holder))):
            continue
        how = random.randrange(4)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, list):
            holder.append(holder[key])
        elif how == 1:
            holder[random.choice(("format", "sites", "arch", "names", "int8", "steps", "zzz"))] = holder[key]
        else:
            holder[key] = odd_json(random)
    return node


def manifests(random: Random, folder: Path) -> list[str]:
    record = spoil_json(random, json.loads((folder / "twin.json").read_text()))
    if random.random() < 0.3:
        record["arch"] = random.choice(("trap.py:small", "trap:small", "os:getcwd", "timm:nothing", "models.py:small"))
    if random.random() < 0.4:
        text = json.dumps(record)
        (folder / "odd.json").write_text(
            text if random.random() < 0.7 else spoiled(random, text.encode()).decode("latin-1")
        )
        return random.choice(
            (
                ["convert", "weights.pt", *ARCH, "--replay", "odd.json", "-o", "out.pt"],
                ["verify", "--manifest", "odd.json"],
            )
        )
    twin = torch.load(folder / "twin.pt", weights_only=True)
    if random.random() < 0.3:
        from safetensors.torch import save_file

        save_file(twin["state_dict"], folder / "odd.safetensors", {"normrewrite": json.dumps(record)})
        return reading(random, "odd.safetensors")
    torch.save({**twin, "normrewrite": record}, folder / "odd.pt")
    return reading(random, "odd.pt")


# --- ONNX -------------------------------------------------------------------------------------------------------------


def spoil_message(random: Random, message: Message) -> None:
    """A field somewhere inside, cleared, doubled or changed."""
    for field, value in random.sample(message.ListFields(), len(message.ListFields())):
        many = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
        inner = list(value) if many else [value]
        if inner and isinstance(inner[0], Message) and random.random() < 0.7:
            spoil_message(random, random.choice(inner))
            return
        how = random.randrange(3)
        if how == 0:
            message.ClearField(field.name)
        elif many and how == 1 and isinstance(inner[0], Message):
            value.add().CopyFrom(random.choice(inner))
        elif many and isinstance(inner[0], int | float | str | bytes):
            number = isinstance(inner[0], int | float)
            value[random.randrange(len(value))] = type(inner[0])(
                random.choice((0, 1, 7, 100)) if number else inner[0][:1]
            )
        elif not many and isinstance(value, int):
            setattr(message, field.name, random.choice((0, 1, 7, 30)))
        elif not many and isinstance(value, str):
            setattr(message, field.name, random.choice(("", "Relu", "NormRewriteMean", "x", value + "_")))
        elif not many and isinstance(value, bytes):
            setattr(message, field.name, spoiled(random, value))
        return


def onnx_files(random: Random, folder: Path) -> list[str]:
    path = folder / "model.onnx"
    if random.random() < 0.4:
        spoil(random, path)
    else:
        model = onnx.load(path)
        for _ in range(random.choice((1, 1, 3))):
            spoil_message(random, model)
        path.write_bytes(model.SerializeToString())
    if random.random() < 0.03:
        return ["build", "model.onnx", "-o", "out.engine", "--gpu", "sm89"]
    return random.choice(
        (
            ["verify", "twin.pt", "model.onnx", *ARCH, *SHAPE],
            ["verify", "model.onnx", "model.onnx", *SHAPE],
            ["bench", "twin.pt", "model.onnx", *ARCH, *SHAPE, "--rounds", "1"],
            ["inspect", "model.onnx"],
        )
    )


# --- data -------------------------------------------------------------------------------------------------------------


def data_files(random: Random, folder: Path) -> list[str]:
    name = random.choice(DATA)
    if random.random() < 0.5:
        spoil(random, folder / name)
    else:
        shape = random.choice(((0, 3, 8, 8), (4, 3, 8), (4, 1, 8, 8), (2, 3, 0, 8), (), (4, 8, 8, 3), (1, 3, 8, 8)))
        dtype = random.choice(("float32", "float64", "uint8", "int64", "complex64", "bool", "U3", "O"))
        values = np.zeros(shape, dtype)
        if random.random() < 0.3 and dtype.startswith("float"):
            values += random.choice((np.nan, np.inf, 1e30))
        if name.endswith(".npy"):
            np.save(folder / name, values)
        else:
            arrays = {
                random.choice(("images", "x", "inputs", "0")): values,
                "labels": np.zeros(random.choice((0, 1, 4))),
            }
            np.savez(folder / name, **arrays)  # type: ignore[arg-type]
    pixels = random.choice(([], ["--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2"], ["--mean", "1"], ["--std", "0,0,0"]))
    return random.choice(
        (
            ["calibrate", "twin.pt", *ARCH, "--data", name, *pixels, "-o", "out.pt"],
            ["convert", "weights.pt", *ARCH, "--to", "layer", "--calibrate", name, *pixels, "-o", "out.pt"],
            ["verify", "weights.pt", "twin.pt", *ARCH, "--data", name, *pixels],
            ["inspect", "weights.pt", *ARCH, "--advise", name, *pixels],
        )
    )
