"""Checkpoints of a training: a folder each, renamed into place once it is whole, and one at a time.

>>> checkpoints = Checkpoints(folder, machine); checkpoints.begin(run, resume=True); checkpoints.save(120)

    FOLDER/run.json          what is trained, as it was asked for: another run can't resume it
    FOLDER/step-00000120/    accelerate's state: model, optimiser, loss scale, schedule, progress, averaged weights
    FOLDER/finished.json     the result, once the output is written: no state is left then
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from normrewrite import files
from normrewrite.errors import NormRewriteError, first_line

_RUN, _FINISHED = "run.json", "finished.json"
_STEPS = f"step-{8 * '[0-9]'}*"


class Checkpoints:
    """The checkpoints in one folder, saved and loaded by an accelerator that knows all objects with a state."""

    def __init__(self, folder: Path, machine: Any) -> None:
        self.folder, self.machine = folder, machine

    def begin(self, run: Mapping[str, Any], resume: bool) -> None:
        """Go on from the newest checkpoint, where that is asked for and there is one; else start a new folder."""
        newest = newest_of(self.folder)
        self._check_shared(newest)
        if newest is not None and resume:
            _check_same(self.folder, run)
            self._load(newest)
            return
        if newest is not None:
            raise NormRewriteError(
                f"{self.folder} holds an unfinished run ({newest.name}). Go on with --resume, or overwrite it with --force."
            )
        if self.machine.is_main_process:
            discard(self.folder)
            make_folder(self.folder)
            write_json(self.folder / _RUN, run)
        self.machine.wait_for_everyone()

    def save(self, step: int) -> None:
        """Whole, under its name, before the one before it goes: at any moment one can be resumed from."""
        final = self.folder / f"step-{step:08d}"
        temporary = final.with_suffix(".tmp")
        if self.machine.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.machine.wait_for_everyone()
        try:
            self.machine.save_state(str(temporary), safe_serialization=False)  # aliased weights stay aliased
            self.machine.wait_for_everyone()
            if self.machine.is_main_process:
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                _remove_others(self.folder, final)
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            before = newest_of(self.folder)
            fallback = f"The checkpoint before it, {before.name}, is whole" if before else "There is none before it"
            raise NormRewriteError(f"{final}: {first_line(error)}. {fallback}.") from error
        finally:
            if self.machine.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)

    def _check_shared(self, newest: Path | None) -> None:
        """Raises on all processes where they would not begin at the same step."""
        from accelerate.utils import gather_object

        names = gather_object([newest.name if newest is not None else "nothing"])
        if len(set(names)) > 1:
            raise NormRewriteError(
                f"{self.folder}: process by process there is {', '.join(names)}. Put the output where all machines see the same "
                "files."
            )

    def _load(self, newest: Path) -> None:
        try:
            self.machine.load_state(str(newest))
        except Exception as error:  # a damaged or foreign folder: accelerate and torch raise what they come upon
            raise NormRewriteError(
                f"{newest}: can't be resumed from ({first_line(error)}). Start anew with --force in place of --resume."
            ) from error


def _check_same(folder: Path, asked: Mapping[str, Any]) -> None:
    before, now = read_json(folder / _RUN), json.loads(json.dumps(asked))
    differ = [f"{name} {before.get(name)} then, {now[name]} now" for name in now if before.get(name) != now[name]]
    if differ:
        raise NormRewriteError(
            f"{folder} holds another run: {'; '.join(differ)}. Resume with the same options, or start anew with --force "
            "in place of --resume."
        )


def newest_of(folder: Path) -> Path | None:
    """The newest checkpoint; what was being written when a run was killed has another name."""
    return max((path for path in folder.glob(_STEPS) if not path.suffix), default=None)


def _remove_others(folder: Path, keep: Path) -> None:
    for path in folder.glob(_STEPS):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)


def finish(folder: Path, result: Mapping[str, Any]) -> None:
    """The output is written: leave a note of the result in place of the state."""
    if folder.is_dir():
        write_json(folder / _FINISHED, result)
        _remove_others(folder, folder / _FINISHED)


def discard(folder: Path) -> None:
    """Another run takes this one's place. What else is in the folder is not ours."""
    for name in (_RUN, _FINISHED):
        (folder / name).unlink(missing_ok=True)
    _remove_others(folder, folder)


def finished(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result that a finished run left; raises where something else is asked for now."""
    if not (folder / _FINISHED).is_file():
        return None
    _check_same(folder, asked)
    return read_json(folder / _FINISHED)


@contextmanager
def claimed(folder: Path, output: Path) -> Iterator[None]:
    """The folder for this training alone: the claim is the system's lock, which ends with the process. An empty one goes again.

    Of several processes of one training the first one claims. Raises NormRewriteError where another training is at work.
    """
    if os.environ.get("RANK", "0") != "0" or os.name == "nt":  # Windows has no such locks
        yield
        return
    files.check_writable(output, force=True)
    handle = _locked(folder)
    if handle is None:
        raise NormRewriteError(
            f"output {output}: another finetune is at work on it, with its checkpoints in {folder}. Let it end, or choose "
            "another name with -o."
        )
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()
        os.close(handle)


def _locked(folder: Path) -> int | None:
    """A handle on the folder, made where it is not there, that holds its lock; None where another process holds it."""
    import fcntl

    while True:
        make_folder(folder)
        with suppress(FileNotFoundError):  # whoever made it has taken it away
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return None
            except OSError:  # a file system without locks
                return handle
            if folder.exists() and folder.stat().st_ino == os.fstat(handle).st_ino:
                return handle
            os.close(handle)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise NormRewriteError(f"checkpoints {folder}: {error.strerror}. Choose another place with -o.") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    files.write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(content)), force=True)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NormRewriteError(
            f"{path}: can't be read ({first_line(error)}). Start anew with --force in place of --resume."
        ) from error
    return content if isinstance(content, dict) else {}
