"""Bad input in number: a sample of benchmarks/fuzz, and what its judge must not let pass."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.fuzz import judge, kinds
from normrewrite import cli

INPUTS = 40


@pytest.mark.slow
def test_bad_input_gives_one_message_and_leaves_nothing() -> None:
    """In a process of its own: it forks, which a process with threads can't do safely."""
    seeds = [str(seed) for seed in range(100_000, 100_000 + INPUTS)]
    done = subprocess.run([sys.executable, "-m", "benchmarks.fuzz", "--only", *seeds], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def sleeps() -> None:
    time.sleep(60)


def raises() -> None:
    raise ValueError("not caught")


def leaves_something() -> None:
    Path("left.pt").touch()
    print("error: x", file=sys.stderr)
    sys.exit(2)


def changes_something() -> None:
    Path("sound.txt").write_text("changed")
    print("error: x", file=sys.stderr)
    sys.exit(2)


def says_nothing() -> None:
    sys.exit(2)


def prints_an_escape() -> None:
    os.write(2, b"error: norm\x1b[2J\n")
    sys.exit(2)


def leaves_a_temporary_file() -> None:
    Path(".out.pt.x.tmp").touch()
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def runs_code() -> None:
    Path("pwned").touch()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (sleeps, "still running"),
        (raises, "exit code 71"),
        (leaves_something, "left behind: left.pt"),
        (changes_something, "changed: sound.txt"),
        (says_nothing, "no message"),
        (prints_an_escape, r"'\x1b' reached the terminal"),
        (leaves_a_temporary_file, "a temporary file was left"),
        (runs_code, "code out of a file was run"),
    ],
)
def test_the_judge_tells(
    command: Callable[[], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material, scratch = tmp_path / "material", tmp_path / "scratch"
    material.mkdir()
    scratch.mkdir()
    (material / "sound.txt").write_text("sound")
    monkeypatch.setattr(kinds, "make", lambda seed, folder: ("control", []))
    monkeypatch.setattr(cli, "main", command)
    monkeypatch.setattr(judge, "LIMIT", 1.0)
    verdict = judge.judge(0, material, scratch)
    assert any(fault.startswith(told) for fault in verdict.faults), verdict
    assert not list(scratch.iterdir())
