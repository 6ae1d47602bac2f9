"""The sound files that bad ones are made from: a small network, its twins, a manifest, an ONNX file, data."""

import io
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import normrewrite as nr
from normrewrite.files import with_manifest
from normrewrite.provenance.history import History

CODE = """
from torch import nn

def small(width=4):
    body = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)).eval()
"""
# Imported by nobody unless a command trusts what a file names.
TRAP = "from pathlib import Path\nPath('pwned').touch()\n\ndef small():\n    return None\n"
MODELS = (
    "module.pt",
    "weights.pt",
    "weights.safetensors",
    "twin.pt",
    "twin.safetensors",
    "bounded.pt",
    "twin-module.pt",
)
DATA = ("images.npz", "images.npy")


def write_bombs(folder: Path) -> None:
    """Archives that are small, and unpack to hundreds of megabytes."""
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": (600, 1000, 1000)})
    _deflated(folder / "bomb.npz", "images.npy", array.getvalue(), 600)
    _deflated(folder / "deflated.pt", "deflated/data.pkl", b"\x80\x02X" + (1 << 30).to_bytes(4, "little"), 1100)
    (folder / "bomb").mkdir()
    Image.new("L", (9000, 9000)).save(folder / "bomb" / "wide.png")


def _deflated(path: Path, name: str, head: bytes, megabytes: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as entry:
        entry.write(head)
        for _ in range(megabytes):
            entry.write(bytes(1_000_000))


def write(folder: Path) -> None:
    """All of it, into an empty folder."""
    (folder / "models.py").write_text(CODE)
    (folder / "trap.py").write_text(TRAP)
    scope: dict[str, object] = {}
    exec(CODE, scope)
    torch.manual_seed(0)
    model: nn.Module = scope["small"]()  # type: ignore[operator]
    nr.verify(model.train(), model, torch.randn(8, 3, 8, 8))  # running statistics of its own
    model.eval()
    plan = nr.plan(model, to="topk:10")
    twin, report = plan.apply()
    torch.save(model, folder / "module.pt")
    torch.save(twin, folder / "twin-module.pt")
    nr.save(model, folder / "weights.pt")
    nr.save(model, folder / "weights.safetensors")
    with with_manifest(twin, folder / "twin.json", report, History(), force=False):
        nr.save(twin, folder / "twin.pt")
    nr.save(twin, folder / "twin.safetensors")
    nr.save(nr.convert(model, to="bwn"), folder / "bounded.pt")
    write_bombs(folder)
    images = np.random.default_rng(0).standard_normal((12, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "images.npz", images=images, labels=np.arange(12) % 5)
    np.save(folder / "images.npy", images)
    with redirect_stdout(io.StringIO()):  # the exporter's own progress
        nr.export(twin, torch.randn(2, 3, 8, 8), folder / "model.onnx")
