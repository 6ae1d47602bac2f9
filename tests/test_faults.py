"""A command that is broken off leaves the old file or the new one; the whole table is `python -m benchmarks.faults`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.faults import Outcome, Trial

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    at = tmp_path_factory.mktemp("faults")
    faults.prepared(at)
    yield faults.undisturbed("convert", at)


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("fault", ["full disk", "files limited", "no permission"])
def test_nothing_is_lost_and_nothing_is_left(fault: str, existed: bool, convert: Trial) -> None:
    if fault == "full disk" and not faults.mounts():
        pytest.skip("no right to mount a tmpfs")
    outcome = faults.tried(convert, fault, existed)
    assert outcome.ok, outcome
    assert outcome.file == ("old" if existed else "absent")


def test_killed_while_it_writes(convert: Trial) -> None:
    outcome = faults.tried(convert, "SIGKILL", True, 0.9 * convert.seconds)
    assert outcome.ok, outcome


def test_damage_is_told(tmp_path: Path, convert: Trial) -> None:
    half = tmp_path / "twin.pt"
    half.write_bytes((convert.at / "digits.l1.pt").read_bytes()[:-100])
    assert not convert.whole(half) and convert.whole(convert.at / "digits.l1.pt")
    assert not Outcome("convert", "SIGKILL", True, -9, "damaged", [], "").ok
    assert not Outcome("convert", "full disk", True, 2, "old", [".twin.pt.x.tmp"], "error: no room").ok
