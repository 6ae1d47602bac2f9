"""What people see: Rich on a terminal, plain text in a pipe. Rich is imported only for a terminal.

Names and texts out of files go to a terminal with their control characters written out: a file can't clear the screen, or write a
verdict over another.
"""

import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from normrewrite.outside import visible
from normrewrite.results import Result


class Visible:
    """A text stream that writes out what would act on a terminal, or what its encoding has not.

    A reader that has gone is no fault of the command: what it would have read goes nowhere, and the exit code is the
    command's own.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        if stream is None:  # closed by whoever started the command
            stream = open(os.devnull, "w")  # noqa: PTH123, SIM115 (it stays open to the end)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        self.stream = stream

    def write(self, text: str) -> int:
        with _without_reader(self.stream):
            self.stream.write(visible(_on_one_line(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with _without_reader(self.stream):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _on_one_line(text: str) -> str:
    """A text with the ends of lines written out that are in names on the command line: a file's name is no line of a result."""
    for part in (part for given in sys.argv for part in _IN_NAMES.findall(given)):
        text = text.replace(part, part.replace("\n", "\\n"))
    return text


_IN_NAMES = re.compile(r"[^/.\n]+\n[^/.]*|\n[^/.]+")


@contextmanager
def _without_reader(stream: IO[str]) -> Iterator[None]:
    """Where nobody reads a pipe any more, it becomes the null device, which takes what is buffered, too."""
    try:
        yield
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextmanager
def visible_streams() -> Iterator[None]:
    """stdout and stderr, for the time, as streams that write out what would act on a terminal."""
    before = sys.stdout, sys.stderr
    during: Any = [Visible(stream) for stream in before]
    sys.stdout, sys.stderr = during
    try:
        yield
    finally:  # who has put another in its place meanwhile keeps that
        if sys.stdout is during[0]:
            sys.stdout = before[0]
        if sys.stderr is during[1]:
            sys.stderr = before[1]


def _console(*, stderr: bool = False) -> Any:
    """A console on the stream itself: Rich's own colours and movements are for the terminal."""
    from rich.console import Console

    stream: Any = sys.stderr if stderr else sys.stdout
    while isinstance(stream, Visible):
        stream = stream.stream
    return Console(file=stream, highlight=False)


def show(result: Result, *, as_json: bool = False, quiet: bool = False) -> None:
    """Print a result: one JSON object for machines, nothing, or its summary, drawn by Rich on a terminal."""
    if as_json:
        print(json.dumps(_finite(result.as_dict()), allow_nan=False))
    elif not quiet:
        if not sys.stdout.isatty():
            print(result)
        else:
            from normrewrite.reporting.terminal import drawn

            console = _console()
            console.print(drawn(result.summary(), console), crop=False)
    sys.stdout.flush()  # here, where a full disk behind it is told


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def busy(what: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A line on stderr, for people who wait: what is being done, for how long, and how far it is: inputs (or sites) that are
    through, or a text."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, **_: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    texts = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[count]}", markup=False))
    columns = (SpinnerColumn(), *texts, TimeElapsedColumn())
    with Progress(*columns, console=_console(stderr=True), transient=True) as progress, visible_streams():
        task = progress.add_task(visible(what), total=None, count="")
        through = 0

        def advance(done: int | str, of: int | None = None) -> None:
            nonlocal through
            if isinstance(done, str):
                progress.update(task, count=visible(done))
                return
            through = (0 if of and through >= of else through) + done
            progress.update(task, count=f"{through} of {of} sites" if of else f"{through} inputs")

        yield advance


@contextmanager
def training(*, quiet: bool = False) -> Iterator[Callable[[Any], None]]:
    """A bar on stderr over the steps of a training, with loss, accuracy and inputs a second; see training.loop.Step."""
    if quiet or not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn())
    with Progress(*columns, console=_console(stderr=True), transient=True) as progress, visible_streams():
        task = progress.add_task("training", total=None, words="")

        def advance(step: Any) -> None:
            progress.update(task, total=step.of, completed=step.step, words=in_words(step))

        yield advance


def in_words(step: Any) -> str:
    """One step in words: `loss 0.1234, 97.1 %, 512 inputs/s`."""
    loss = "" if step.loss is None else f"loss {step.loss:.4g}"
    accuracy = "" if step.accuracy is None else f"{100 * step.accuracy:.1f} %"
    return ", ".join(part for part in (loss, accuracy, f"{step.inputs_per_second:,.0f} inputs/s") if part)
