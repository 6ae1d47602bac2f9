"""What is left when a command is broken off: full disk, no permission, a signal, at any moment.

    python -m benchmarks.faults                   # about a quarter of an hour on two cores; writes results/faults.json

Every command writes over a file that was there before. Afterwards that file is whole, the old or the new one; of a file that was
not there before, nothing or all of it. A full disk is a tmpfs of a few kilobytes (needs the right to mount one; a limit on the
size of files stands in for it elsewhere), no permission is a folder that may not be written in, by a process that has lost root's
right to do so anyway. Signals come at random moments of a run, half of them in its last fifth: those of Ctrl-C, docker, a lost
terminal, Ctrl-\\ and a limit on time, and the one that nobody can handle.
"""

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.stamp import markdown, write

EXAMPLES = Path(__file__).parent.parent / "examples"
ARCH = ["--arch", str(EXAMPLES / "digits.py:digits_resnet")]
DATA = str(EXAMPLES / "digits.npz")
SHAPE = ["--input-shape", "1,1,8,8"]
_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1
_SMALL = 16 << 10  # bytes of a full disk
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGXCPU", "SIGKILL")
HEAD = ["command", "fault", "runs", "the file afterwards", "temporary files left", "not as it should be"]


@dataclass(frozen=True)
class Command:
    """A command that writes one file; beside: what else it may leave, which people know of."""

    words: tuple[str, ...]
    name: str  # of the file
    beside: tuple[str, ...] = ()


COMMANDS = {
    "convert": Command(("convert", "digits.pt", *ARCH, "--to", "l1"), "twin.pt"),
    "calibrate": Command(("calibrate", "digits.l1.pt", *ARCH, "--data", DATA), "twin.pt"),
    "export": Command(("export", "digits.l1.pt", *ARCH, *SHAPE), "model.onnx"),
    "build": Command(("build", "digits.onnx", "--gpu", "sm89"), "model.engine"),
    "finetune": Command(
        ("finetune", "digits.l1.pt", *ARCH, "--data", DATA, "--steps", "6", "--save-every", "2", "--deterministic"),
        "tuned.pt",
        ("tuned.checkpoints",),
    ),
    "report": Command(("report", "digits.l1.pt", *ARCH), "page.html"),
}


@dataclass
class Outcome:
    """What was left of one run. file: old, new, absent or damaged."""

    command: str
    fault: str
    existed: bool
    code: int
    file: str
    left: list[str]
    said: str
    after: float | None = None  # seconds, of a signal

    @property
    def ok(self) -> bool:
        """A killed process can't clear its temporary file away; one that ends by itself has to."""
        whole = self.file in (("old", "new") if self.existed else ("absent", "new"))
        as_expected = self.ended if self.fault in SIGNALS else self.code == 2 and self.said.startswith("error: ")
        clean = not self.left or self.fault == "SIGKILL"
        # Python's own words for Ctrl-C while it still imports torch
        early = self.fault == "SIGINT" and "import" in self.said
        return whole and as_expected and clean and (early or "Traceback" not in self.said)

    @property
    def ended(self) -> bool:
        """By the signal: in words, with its exit code, or before there was anything to handle it; or it came too late."""
        number = int(getattr(signal, self.fault))
        word = "interrupted" if self.fault == "SIGINT" else f"terminated by {self.fault}"
        early = (-number, 1) if self.fault == "SIGINT" else (-number,)
        return self.code in (0, *early) or (self.code == 128 + number and word in self.said)


def run(command: Command, output: Path, at: Path, before: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "normrewrite", *command.words, "-o", str(output), "--force", "--quiet"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, cwd=at, stdout=pipe, stderr=pipe, text=True, preexec_fn=before or as_started, start_new_session=True
    )


def lose_rights() -> None:
    """Root may write everywhere; a process that drops that right may not."""
    ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0)


def as_started() -> None:
    """By a person: a shell's background and nohup ignore some signals, which their children would too. No core dumps, which
    SIGQUIT and SIGXCPU leave where nothing handles them yet."""
    for name in set(SIGNALS) - {"SIGKILL"}:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_SMALL, _SMALL))


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """The folder, on a disk of its own that has no room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SMALL}", "tmpfs", folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def mounts() -> bool:
    with tempfile.TemporaryDirectory() as place:
        try:
            with full_disk(Path(place)):
                return True
        except (subprocess.CalledProcessError, FileNotFoundError):
            return False


@dataclass
class Trial:
    """A place with the inputs of all commands, and for one command what its output is like when nothing goes wrong."""

    at: Path
    name: str
    whole: Callable[[Path], bool]
    seconds: float

    @property
    def command(self) -> Command:
        return COMMANDS[self.name]


def prepared(at: Path) -> None:
    """The files that the commands read."""
    shutil.copy(EXAMPLES / "digits.pt", at)
    words: list[list[str]] = [
        ["convert", "digits.pt", *ARCH, "--to", "l1"],
        ["export", "digits.l1.pt", *ARCH, *SHAPE, "-o", "digits.onnx"],
    ]
    for command in words:
        subprocess.run([sys.executable, "-m", "normrewrite", *command, "--quiet"], cwd=at, check=True)


def undisturbed(name: str, at: Path) -> Trial:
    """Runs without a fault: how long one takes at least, and what a whole file is."""
    folder = at / "undisturbed"
    folder.mkdir(exist_ok=True)
    output = folder / COMMANDS[name].name
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        process = run(COMMANDS[name], output, at)
        _, said = process.communicate()
        seconds.append(time.monotonic() - started)
        if process.returncode:
            raise SystemExit(f"{name} fails without any fault: {said}")
    size = output.stat().st_size
    shutil.rmtree(folder)
    return Trial(at, name, partial(is_whole, size=size), min(seconds))


def is_whole(path: Path, size: int) -> bool:
    """By the reader of its kind; an engine, which only a GPU reads, by its size."""
    if path.suffix == ".pt":
        command = [sys.executable, "-m", "normrewrite", "verify", "--manifest", str(path), "--quiet"]
        return subprocess.run(command, capture_output=True).returncode == 0
    if path.suffix == ".onnx":
        import onnx

        onnx.checker.check_model(str(path), full_check=True)
        return True
    if path.suffix == ".html":
        return path.read_text().rstrip().endswith("</html>")
    return abs(path.stat().st_size - size) < 0.01 * size


def tried(trial: Trial, fault: str, existed: bool, after: float = 0.0) -> Outcome:
    """One run with one fault."""
    folder = trial.at / "out"
    folder.mkdir()
    output, old = folder / trial.command.name, b"old" * 100
    with ExitStack() as stack:
        if fault == "full disk":
            stack.enter_context(full_disk(folder))
        if existed:
            output.write_bytes(old)
        before = {"no permission": lose_rights, "files limited": limit_files}.get(fault)
        if fault == "no permission":
            folder.chmod(0o555)
        process = run(trial.command, output, trial.at, before)
        if fault in SIGNALS:
            time.sleep(after)
            os.killpg(process.pid, getattr(signal, fault))
        _, said = process.communicate(timeout=120)
        folder.chmod(0o755)
        state = "absent"
        if output.exists():
            content = output.read_bytes()
            state = "old" if content == old else "new" if trial.whole(output) else "damaged"
        known = (output.name, *trial.command.beside)
        left = [path.name for path in folder.iterdir() if path.name not in known]
    shutil.rmtree(folder)
    moment = after if fault in SIGNALS else None
    return Outcome(trial.name, fault, existed, process.returncode, state, left, said, moment)


def all_of(trial: Trial, signals: int, faults: list[str]) -> Iterator[Outcome]:
    for existed in (True, False):
        for fault in faults:
            yield tried(trial, fault, existed)
    draw = random.Random(0)
    for number in range(signals):
        for i, fault in enumerate(SIGNALS):
            late = number % 2 == 1  # when it may be writing
            yield tried(
                trial, fault, (number // 2 + i) % 2 == 0, trial.seconds * draw.uniform(0.8 if late else 0.1, 1.02)
            )


def rows(outcomes: list[dict[str, Any]]) -> Iterator[list[str]]:
    """A line a command and fault, in the order of their first outcome."""
    for pair in dict.fromkeys((each["command"], each["fault"]) for each in outcomes):
        same = [each for each in outcomes if (each["command"], each["fault"]) == pair]
        files = Counter(each["file"] for each in same)
        states = ", ".join(f"{state} {count}" for state, count in sorted(files.items()))
        left, wrong = sum(bool(each["left"]) for each in same), sum(not each["ok"] for each in same)
        yield [f"`{pair[0]}`", pair[1], str(len(same)), states, str(left), str(wrong)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--signals", type=int, default=2, help="of each kind, to each command")
    options = parser.parse_args()
    faults = [*(["full disk"] if mounts() else []), "files limited", "no permission"]
    ran: list[Outcome] = []
    with tempfile.TemporaryDirectory() as place:
        prepared(Path(place))
        for name in options.only:
            for outcome in all_of(undisturbed(name, Path(place)), options.signals, faults):
                ran.append(outcome)
                print("." if outcome.ok else json.dumps(asdict(outcome)), end="" if outcome.ok else "\n", flush=True)
    outcomes = [asdict(each) | {"ok": each.ok, "said": each.said.strip().rpartition("\n")[2]} for each in ran]
    print(f"\n{markdown(HEAD, list(rows(outcomes)))}")
    print(f"wrote {write('faults', {'runs': len(ran), 'outcomes': outcomes})}")
    sys.exit(not all(each.ok for each in ran))


if __name__ == "__main__":
    main()
