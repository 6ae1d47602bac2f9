"""What a command says where nobody reads it, where a stream is closed, and where its encoding has not the characters."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normrewrite.cli import console
from tests.conftest import Command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), "net.pt")
    return tmp_path


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[bytes]:
    program = f"'{sys.executable}' -Bm normrewrite"
    return subprocess.run(["bash", "-c", line.replace("normrewrite", program)], cwd=folder, capture_output=True)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("normrewrite convert net.pt --to l1 --json | true; exit ${PIPESTATUS[0]}", 0),
        ("normrewrite convert net.pt --to l1 >&-", 0),
        ("normrewrite convert nosuch.pt --to l1 2>&-", 2),
        ("normrewrite convert net.pt --to l1 > /dev/full", 2),
    ],
)
def test_the_exit_code_is_the_command_s(folder: Path, line: str, code: int) -> None:
    outcome = shell(folder, line)
    assert outcome.returncode == code, outcome
    assert (folder / "net.l1.pt").is_file() == ("nosuch" not in line)


def test_a_pipe_without_a_reader_takes_everything() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        shown = console.Visible(stream)
        for _ in range(3):
            shown.write("x" * 100_000)
            shown.flush()


def test_what_an_encoding_has_not_is_written_out() -> None:
    below = io.BytesIO()
    shown = console.Visible(io.TextIOWrapper(below, "ascii"))
    shown.write("é\n")
    shown.flush()
    assert below.getvalue() == b"\\xe9\n"


def test_names_with_several_lines_stay_on_one(folder: Path, run: Command) -> None:
    Path("net.pt").rename("a\nsame.pt")
    done = run("convert 'a\nsame.pt' --to l1")
    assert done.code == 0 and done.out.splitlines()[-1] == r"wrote a\nsame.l1.pt"
    assert run("convert 'no\nsuch.pt' --to l1").err.startswith(r"error: no\nsuch.pt: there is no such file.")


def test_links_that_lead_nowhere(folder: Path, run: Command) -> None:
    Path("loop").symlink_to("loop")
    Path("gone.pt").symlink_to("nowhere.pt")
    assert "is a link that leads to itself" in run("convert loop --to l1").err
    assert "is a link that leads to nowhere.pt, which is not there" in run("convert gone.pt --to l1").err


def test_names_that_are_no_text_are_refused(folder: Path, run: Command) -> None:
    Path("net.pt").rename("net\udc80.pt")
    outcome = run("convert 'net\udc80.pt' --to l1")
    assert outcome.code == 2 and "its name is no UTF-8" in outcome.err
    Path("net\udc80.pt").rename("net.pt")
    outcome = run("convert net.pt --to l1 -o 'out\udc80.pt'")
    assert outcome.code == 2 and "its name is no UTF-8" in outcome.err


ARCH = "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))\n"


@pytest.mark.parametrize(
    "line",
    [
        "convert {} --to l1 -o q.pt --manifest weights",
        "convert {} --to l1 -o q.pt --manifest arch.py",
        "convert {} --to l1 -o arch.py",
        "convert {} --to l1 -o x.onnx",
        "convert {} --to l1 -o x.pt2",
        "convert {} --to l1 -o x.json",
        "revert {} -o arch.py",
        "calibrate {} --data nosuch.npz -o arch.py",
        "finetune {} --data nosuch.npz -o arch.py",
        "report {} -o arch.py",
        "report {} -o weights",
        "export {} --input-shape 2,3 -o arch.py",
        "export {} --input-shape 2,3 -o x.pt",
        "export {} --input-shape 2,3 -o weights",
    ],
)
def test_force_replaces_no_input_and_writes_no_name_of_another_kind(folder: Path, run: Command, line: str) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict(), "weights")
    Path("arch.py").write_text(ARCH)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    outcome = run(line.format("weights --arch arch.py:net") + " --force")
    assert outcome.code == 2 and ("is the same file" in outcome.err or "Call it ." in outcome.err), outcome
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_code_of_any_name_that_is_linked_is_no_output(folder: Path, run: Command) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict(), "weights.pt")
    Path("arch.py").write_text(ARCH)
    Path("out.pt").symlink_to("arch.py")
    outcome = run("convert weights.pt --arch arch.py:net --to l1 -o out.pt --force")
    assert outcome.code == 2 and "--arch is the same file" in outcome.err and Path("arch.py").read_text() == ARCH


def test_the_model_file_is_replaced_in_place_by_force(folder: Path, run: Command) -> None:
    assert run("convert net.pt --to l1 -o net.pt --force").code == 0


def test_a_manifest_that_can_t_be_written_leaves_no_twin(
    folder: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    outcome = run("convert net.pt --to l1 --manifest net.json")
    assert outcome.code == 2 and "Nothing was written." in outcome.err
    assert [path.name for path in folder.iterdir()] == ["net.pt"]


def test_notes_of_several_sets_are_told_wherever_a_file_is_read(folder: Path, run: Command) -> None:
    state = torch.load("net.pt", weights_only=False).state_dict()
    torch.save({"state_dict": state, "ema": state}, "two.pt")
    assert "note: two.pt: the weights under state_dict were taken" in run("diff two.pt two.pt").err
