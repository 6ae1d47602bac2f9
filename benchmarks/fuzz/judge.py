"""One input in a process of its own, and what is asked of it.

It ends within LIMIT seconds by itself, with an exit code of the documented ones; never with a traceback or a signal. An error
is one message on stderr; UNFORESEEN is the code of one that no check knew better. Files that were there are as they were; after
an error nothing new is left, and after a signal no temporary file. No code out of a file was run, none of its control characters
were printed, and memory stayed within MEMORY beside what the interpreter holds.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SIGNALS = "signals"
LIMIT = 10.0  # seconds
MEMORY = 1 << 30  # bytes
CODES = (0, 1, 2)
STOPPED = (130, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGINT)  # ways to end by a signal
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # on a terminal
UNFORESEEN = 70


@dataclass
class Verdict:
    """What came of one input; faults: what should not have been, in words."""

    seed: int
    kind: str
    words: list[str]
    code: int
    seconds: float
    memory: int
    output: str
    faults: list[str] = field(default_factory=list)

    @property
    def message(self) -> str:
        return self.output.strip().splitlines()[-1] if self.output.strip() else ""


def judge(seed: int, material: Path, scratch: Path) -> Verdict:
    """Run one input in a child of this process. material: a folder with the sound files; scratch: a place for the child's."""
    folder = scratch / str(seed)
    shutil.copytree(material, folder)
    log = scratch / f"{seed}.log"
    started = time.monotonic()
    child = os.fork()
    if not child:
        try:
            _run(seed, folder, log)
        finally:  # a signal while it ends: the child must never go on as a second parent
            os._exit(130)
    code = _wait(child, started + LIMIT)
    seconds = time.monotonic() - started
    return _judged(seed, folder, log, code, seconds)


def _run(seed: int, folder: Path, log: Path) -> None:
    """In the child: make the input, note what is there, run the command line. Does not return."""
    code = 71  # of an input that could not be made
    try:
        os.setsid()
        os.chdir(folder)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from benchmarks.fuzz.kinds import make

        kind, words = make(seed, folder)
        asked = {"kind": kind, "words": words, "before": _listing(folder), "held": _memory("VmRSS")}
        Path(f"{log}.asked").write_text(json.dumps(asked))
        from normrewrite.cli import main

        sys.argv = ["normrewrite", *words]
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException as error:
        frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
        outside = not any(file.endswith("/cli/__init__.py") and name == "main" for file, name in frames)
        if isinstance(error, KeyboardInterrupt) and outside:  # before the command line began, or when it was through
            code = 130
        else:
            traceback.print_exc()
    finally:
        for late in (signal.SIGTERM, signal.SIGINT):
            signal.signal(late, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
        Path(f"{log}.peak").write_text(str(_memory("VmHWM")))
        os._exit(code)


def _wait(child: int, until: float) -> int:
    """The exit code; minus the signal that ended it, -9 where it took too long."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL
        time.sleep(0.005)


def _listing(folder: Path) -> list[str]:
    """Every file with its digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]


def _memory(name: str) -> int:
    """Bytes of this process, by the kernel's own name for them."""
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) * 1024


def _judged(seed: int, folder: Path, log: Path, code: int, seconds: float) -> Verdict:
    output = log.read_text(errors="replace") if log.is_file() else ""
    request, peak = Path(f"{log}.asked"), Path(f"{log}.peak")
    asked = (
        json.loads(request.read_text())
        if request.is_file()
        else {"kind": "(not made)", "words": [], "before": [], "held": 0}
    )
    used = int(peak.read_text() or 0) - asked["held"] if peak.is_file() else 0
    verdict = Verdict(seed, asked["kind"], asked["words"], code, seconds, used, output)
    stopped = asked["kind"] == SIGNALS and code in STOPPED
    verdict.faults += _faults(0 if stopped else code, output, set(asked["before"]), set(_listing(folder)))
    verdict.faults += [f"{used >> 20} MB of memory"] if used > MEMORY else []
    shutil.rmtree(folder)
    for path in log.parent.glob(f"{log.name}*"):
        path.unlink()
    return verdict


def _faults(code: int, output: str, before: set[str], after: set[str]) -> Iterator[str]:
    names = {line.split(" ")[0] for line in before}
    if code == -signal.SIGKILL:
        yield f"still running after {LIMIT:g} s"
    elif code not in (*CODES, UNFORESEEN):
        yield f"exit code {code}"
    if "Traceback (most recent call last)" in output:
        yield "a traceback"
    elif code in (2, UNFORESEEN) and not re.search("^(error|Error|Usage): ", output, re.MULTILINE):
        yield "no message"
    if acting := _ACTING.search(output):
        yield f"{acting[0]!r} reached the terminal"
    if any(line.startswith("pwned ") for line in after):
        yield "code out of a file was run"
    if code in (2, UNFORESEEN) and (left := [line for line in after - before if line.split(" ")[0] not in names]):
        yield f"left behind: {', '.join(line.split(' ')[0] for line in left)}"
    if any(".tmp " in line for line in after):
        yield "a temporary file was left"
    if gone := before - after:
        changed = [line.split(" ")[0] for line in gone]
        if code:
            yield f"changed: {', '.join(changed)}"
