"""Signals that end a command: it says so, leaves nothing, and gives 128 and the signal's number back."""

import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from normrewrite.cli import signals
from tests.conftest import ROOT
from tests.ranks import Started, start

ENDING = [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGINT]
LINE = "convert digits.pt --arch digits.py:digits_resnet --to l1 -o twin.pt"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("digits.pt", "digits.py", "digits.npz"):
        shutil.copy(ROOT / "examples" / name, inside)
    monkeypatch.chdir(inside)
    return inside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


def stays_in_a_write(ignored: signal.Signals | None = None) -> None:
    """From here on: half of the file is written, and nothing more comes for a minute."""

    def half(content: object, path: str, *_: object, **__: object) -> None:
        Path(path).write_bytes(b"half")
        Path("../writing").touch()
        for _ in range(6000):  # a signal just before one long sleep would be heard after it
            time.sleep(0.01)

    torch.save = half
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ignored is not None:  # as nohup does
        signal.signal(ignored, signal.SIG_IGN)


def in_a_write(line: str, folder: Path, before: Callable[[], object] = stays_in_a_write) -> Started:
    command = start(line, folder.parent / "log", before)
    patience = time.monotonic() + 60
    while not (folder.parent / "writing").exists() and command.process.is_alive() and time.monotonic() < patience:
        time.sleep(0.01)
    return command


@pytest.mark.parametrize("which", ENDING)
def test_a_signal_in_a_write_leaves_nothing(which: signal.Signals, folder: Path) -> None:
    before = names(folder)
    command = in_a_write(LINE, folder)
    assert names(folder) != before
    command.send(which)
    assert command.end(30) == 128 + which
    word = "interrupted" if which == signal.SIGINT else f"terminated by {which.name}"
    assert command.said.strip() == word
    assert names(folder) == before


def test_what_is_ignored_stays_ignored(folder: Path) -> None:
    command = in_a_write(LINE, folder, partial(stays_in_a_write, signal.SIGHUP))
    command.send(signal.SIGHUP)
    time.sleep(0.2)
    assert command.process.is_alive()
    command.send(signal.SIGTERM)
    assert command.end(30) == 128 + signal.SIGTERM


def test_a_training_says_how_to_go_on(folder: Path) -> None:
    words = f"{LINE.replace('l1 ', 'layer ')}; finetune twin.pt --arch digits.py:digits_resnet --data digits.npz"
    convert, tune = words.split("; ")
    assert start(convert, folder / "log").end(60) == 0
    command = start(f"{tune} --batch-size 8 --epochs 99 --save-every 2 -o tuned.pt", folder / "log")
    patience = time.monotonic() + 60
    while not list(folder.glob("tuned.checkpoints/step-*[0-9]")) and time.monotonic() < patience:
        time.sleep(0.01)
    command.send(signal.SIGTERM)
    assert command.end(30) == 143
    assert command.said.strip().startswith("terminated by SIGTERM: --resume goes on from tuned.checkpoints/step-0")
    assert not (folder / "tuned.pt").exists() and not list(folder.glob(".*"))


def test_handlers_are_only_the_command_line_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the main thread alone, given back afterwards, and never in place of another's."""

    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGQUIT, own)
    try:
        with pytest.raises(signals.Terminated), signals.as_exceptions():
            assert signal.getsignal(signal.SIGQUIT) is own
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGQUIT, before)
    with pytest.raises(signals.Terminated), signals.as_exceptions():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGHUP)  # a second one, while all is cleared away
            cleared = True
    assert cleared
    with pytest.raises(signals.Terminated), signals.as_exceptions():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # somebody's library, in the middle of an import
            raise AttributeError("partially initialised module") from None
    with pytest.raises(KeyError), signals.as_exceptions():
        raise KeyError("no signal, so an error of its own")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    seen: list[object] = []

    def elsewhere() -> None:
        with signals.as_exceptions():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    monkeypatch.setenv("RANK", "1")  # which ends at once, where it waits for a lost rank
    with signals.as_exceptions():
        seen.append(signal.getsignal(signal.SIGTERM))
    assert seen == [signal.SIG_DFL, signal.SIG_DFL]


class Deaf:
    """Its finaliser gets the signal, whose exception Python only prints there."""

    def __init__(self, which: signal.Signals) -> None:
        self.which = which

    def __del__(self) -> None:
        signal.raise_signal(self.which)
        [None for _ in range(100)]


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_finaliser_swallows_is_sent_again(
    which: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), signals.as_exceptions():
        Deaf(which)
        for _ in range(500):
            time.sleep(0.01)
    assert "Exception ignored" not in capsys.readouterr().err
