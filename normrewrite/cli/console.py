"""What people see: Rich on a terminal, plain text in a pipe. Rich is imported only for a terminal."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Result(Protocol):
    """What a command returns."""

    def as_dict(self) -> dict[str, Any]: ...


def show(result: Result, *, as_json: bool = False, quiet: bool = False) -> None:
    """Print a result: one JSON object for machines, nothing, or its text with tables in colour."""
    if as_json:
        print(json.dumps(_finite(result.as_dict()), allow_nan=False))
    elif not quiet:
        if not sys.stdout.isatty():
            print(result)
        elif hasattr(result, "rich"):  # it draws its own tables
            _console().print(result.rich())
        else:
            _coloured(str(result))


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _coloured(text: str) -> None:
    from rich.text import Text

    console = _console()
    for line in text.splitlines():
        console.print(Text(line, style=style_of(line)), soft_wrap=True)


# First words of tables.
_HEADS = ("site ", "output ", "layer ", "tensor ", "form ", "changed ", "engine ")


def style_of(line: str) -> str:
    """Heads of tables stand out, good verdicts are green, and what needs a look is red or yellow."""
    if line.startswith(_HEADS) and "  " in line:
        return "bold"
    if "DIFFERENT" in line or "can't be" in line:
        return "red"
    if "same function" in line or "'s tolerance: " in line or " sites rewritten" in line or "to the bit" in line:
        return "green"
    return "dim" if line.startswith("wrote ") else ""


@contextmanager
def busy(what: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """A line on stderr, for people who wait: what is being done, for how long, and how far it is: inputs (or sites) that are
    through, or a text."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, **_: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn(what), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None, count="")
        through = 0

        def advance(done: int | str, of: int | None = None) -> None:
            nonlocal through
            if isinstance(done, str):
                progress.update(task, count=done)
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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=None, told="")

        def advance(step: Any) -> None:
            progress.update(task, total=step.of, completed=step.step, told=told(step))

        yield advance


def told(step: Any) -> str:
    """One step in words: `loss 0.1234, 97.1 %, 512 inputs/s`."""
    loss = "" if step.loss is None else f"loss {step.loss:.4g}"
    accuracy = "" if step.accuracy is None else f"{100 * step.accuracy:.1f} %"
    return ", ".join(part for part in (loss, accuracy, f"{step.inputs_per_second:,.0f} inputs/s") if part)
