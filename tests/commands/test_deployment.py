"""The commands of deployment as people meet them: export, build, verify, bench."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.diagnostics.layers import compare_layers
from tests.api.test_build import rtx
from tests.conftest import ROOT, Command

EXAMPLES = ROOT / "examples"
DIGITS = "digits.pt --arch digits.py:digits_resnet"
SMALL = """from torch import nn
def small(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network and ONNX files of it."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("digits.pt", "digits.npz", "digits.py"):
        shutil.copy(EXAMPLES / name, folder)
    np.savez(folder / "few.npz", images=np.load(folder / "digits.npz")["images"][:40])
    model = nr.load(folder / "digits.pt", arch=f"{folder / 'digits.py'}:digits_resnet")
    nr.export(model, torch.randn(2, 1, 8, 8), folder / "digits.onnx")
    (folder / "small.py").write_text(SMALL)
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).state_dict(), folder / "small.pt")
    (folder / "text.onnx").write_text("not a graph")
    (folder / "truncated.onnx").write_bytes((folder / "digits.onnx").read_bytes()[:5000])
    (folder / "model.engine").write_bytes(b"ptrt")
    return folder


@pytest.fixture
def folder(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    inside = tmp_path / "inside"
    shutil.copytree(shelf, inside)
    monkeypatch.chdir(inside)
    return inside


BAD = {
    "build, missing": ("build nosuch.onnx -o x.engine --gpu sm89", "there is no such file"),
    "build, text": ("build text.onnx -o x.engine --gpu sm89", "can't be read as ONNX"),
    "build, truncated": ("build truncated.onnx -o x.engine --gpu sm89", "truncated"),
    "build, no gpu": ("build digits.onnx -o x.engine", "give --gpu"),
    "build, exists": ("build digits.onnx -o digits.pt --gpu sm89", "exists already"),
    "build, shape": ("build digits.onnx -o x.engine --gpu sm89 --max 4,3,8,8", "--max 4,3,8,8"),
    "build, profile": ("build digits.onnx -o x.engine --gpu sm89 --min 8,1,8,8 --opt 4,1,8,8", "lies outside"),
    "build, no library": (
        "build digits.onnx -o x.engine --gpu sm89 --plugins nosuch.so",
        "nosuch.so: there is no such library of plugins. Give auto, off, or the path of one",
    ),
    "build, text as library": (
        "build digits.onnx -o x.engine --gpu sm89 --plugins text.onnx",
        "text.onnx: is no shared library",
    ),
    "export, opset": (f"export {DIGITS} -o x.onnx --input-shape 2,1,8,8 --opset 9", "--opset 9"),
    "export, int8": (f"export {DIGITS} -o x.onnx --input-shape 2,1,8,8 --precision int8", "--calibrate"),
    "verify, engine": (
        f"verify {DIGITS} model.engine --input-shape 2,1,8,8",
        "runs only on the GPU it was built for, and torch sees none here",
    ),
    "verify, text": (f"verify {DIGITS} text.onnx --input-shape 2,1,8,8", "text.onnx"),
    "bench, no input": (f"bench {DIGITS} digits.onnx", "timed on what"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_leaves_nothing(run: Command, case: str) -> None:
    line, said = BAD[case]
    before = _files()
    outcome = run(line)
    assert outcome.code == 2 and outcome.out == "", outcome
    assert said in " ".join(outcome.err.split()) and "Traceback" not in outcome.err
    assert _files() == before


def _files() -> list[Path]:
    """What lies here, but for the bytecode that Python keeps."""
    return sorted(path for path in Path().rglob("*") if "__pycache__" not in str(path))


def test_export_to_int8_and_verify_by_layers(run: Command) -> None:
    outcome = run(f"export {DIGITS} -o int8.onnx --precision int8 --calibrate digits.npz --ranges minmax --json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["precision"] == "int8"
    outcome = run(f"verify {DIGITS} int8.onnx --data few.npz --layers --json")
    assert outcome.code == 0, outcome
    found = outcome.json
    assert found["tolerance"] == 0.25 and {"stem.0.0", "head"} <= {layer["name"] for layer in found["layers"]}
    assert found["verdict"].startswith("within int8's tolerance: ")
    for floor in ("--min-snr 99", "--min-agreement 2"):
        assert run(f"verify {DIGITS} int8.onnx --data few.npz -q {floor}").code == (1 if "snr" in floor else 2)
    outcome = run(f"verify {DIGITS} int8.onnx --data few.npz --layers --tolerance 1e-6")
    assert outcome.code == 1 and "DIFFERENT" in outcome.out and outcome.out.startswith("layer ")


def test_layers_name_the_one_that_differs(run: Command) -> None:
    model = nr.load("digits.pt", arch="digits.py:digits_resnet")
    x = nr.data.Batch({"images": torch.randn(4, 1, 8, 8)})  # type: ignore[attr-defined]
    same = compare_layers(model, "digits.onnx", x).layers
    assert len(same) > 9 and all(layer.max_abs <= 1e-4 for layer in same)
    with torch.no_grad():
        model.get_submodule("blocks.2.body.0.0").weight *= 1.01  # type: ignore[operator]
    changed = [layer.name for layer in compare_layers(model, "digits.onnx", x).layers if layer.max_abs > 1e-4]
    assert changed[0] == "blocks.2.body.0.0"
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(nr.NormRewriteError, match="no layer has the same name"):
        compare_layers(other, "digits.onnx", x)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_bench(run: Command, runtime: str) -> None:
    line = f"bench {DIGITS} digits.onnx --runtime {runtime} --rounds 5"
    found = run(f"{line} --data few.npz --batch-size 10 --json").json
    assert (found["inputs"], found["rounds"], found["runtime"]) == (10, 5, runtime)
    assert found["ratio"] > 0 and set(found["seconds"]) == {"a", "b"}
    both = run(f"{line} --data few.npz --input-shape 3,1,8,8 --json").json
    assert both["inputs"] == 3  # the shape is the whole batch, data or not
    text = run(f"{line} --input-shape 3,1,8,8")
    assert text.code == 0 and "batches of 3, 5 rounds" in text.out and "B digits.onnx" in text.out


@rtx
def test_build(run: Command) -> None:
    outcome = run("build digits.onnx -o digits.engine --gpu sm86,sm89 --max 16,1,8,8 --json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found["gpus"] == ["sm86", "sm89"] and found["profile"]["images"][2] == [16, 1, 8, 8]
    assert found["honoured"] == 10 and not found["unchecked"] and Path("digits.engine").stat().st_size == found["size"]


@rtx
@pytest.mark.parametrize(("plugins", "path"), [("", "function"), ("--plugins auto", "plugin")])
def test_build_with_plugins(run: Command, plugins: str, path: str) -> None:
    arch = "--arch small.py:small"
    live = f"{arch} -o live.onnx --input-shape 2,1,8,8 --deploy op --live-stats"
    assert run(f"export small.pt {live}").code == 2  # torch's own norm
    assert run(f"convert small.pt {arch} --to topk:5 -o twin.pt").code == 0
    assert run(f"export twin.pt {live}").code == 0
    text = run(f"build live.onnx -o first.engine --gpu sm89 {plugins}")
    assert text.code == 0 and ("only where those plugins are registered" in text.out) == (path == "plugin"), text
    found = run(f"build live.onnx -o live.engine --gpu sm89 {plugins} --json").json
    assert set(found["norms"].values()) == {path} and all(name in text.out for name in found["norms"])
    assert {given["count"] for given in found["attributes"].values()} == ({5} if path == "plugin" else set())


def test_plugins_are_listed(run: Command) -> None:
    found = run("plugins list --json").json
    assert found["operators"]["NormRewriteTop"] == {
        "computes": "linf, topk",
        "count": "int, a whole number from 0",
        "percent": "float, 0 to 100",
        "reads": "floats, 5 finite numbers",
        "eps": "float, a finite number from 0",
        "centred": "int, 0 or 1",
    }
    text = run("plugins list")
    assert text.code == 0 and all(f"normrewrite::{name}" in text.out for name in found["operators"])
    assert "enqueue has not been run on a GPU" in text.out and run("plugins lst").code == 2
    assert "as IPluginV3 in C++: " in text.out
