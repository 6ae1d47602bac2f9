"""A command that is broken off leaves the old file or the new one; the whole table is `python -m benchmarks.faults`."""

import shutil
from functools import partial
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults import EXAMPLES, Outcome, Trial

pytestmark = pytest.mark.slow


@pytest.fixture
def convert(tmp_path: Path) -> Trial:
    shutil.copy(EXAMPLES / "digits.pt", tmp_path)
    return Trial(tmp_path, "convert", partial(faults.is_whole, size=0), 0.0)


@pytest.mark.parametrize("fault", ["full disk", "files limited", "no permission"])
def test_the_old_file_stays_and_nothing_is_left(fault: str, convert: Trial) -> None:
    if fault == "full disk" and not faults.mounts():
        pytest.skip("no right to mount a tmpfs")
    outcome = faults.tried(convert, fault, existed=True)
    assert outcome.ok and outcome.file == "old", outcome


def test_damage_is_told(tmp_path: Path) -> None:
    whole, half = EXAMPLES / "digits.npz", tmp_path / "half.html"
    half.write_text("<html>")
    assert not faults.is_whole(half, 6) and faults.is_whole(whole, whole.stat().st_size)
    assert not Outcome("convert", "SIGKILL", True, -9, "damaged", [], "").ok
    assert not Outcome("convert", "full disk", True, 2, "old", [".twin.pt.x.tmp"], "error: no room").ok
    assert not Outcome("convert", "full disk", True, 2, "absent", [], "error: no room").ok
    traceback = 'Traceback (most recent call last):\n  File "cli.py", line 1, in main\nKeyboardInterrupt'
    assert not Outcome("convert", "SIGINT", True, 1, "old", [], traceback).ok
