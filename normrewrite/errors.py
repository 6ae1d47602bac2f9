"""The one exception: it says where, what was found, what was needed and what to do, and carries an exit code."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class NormRewriteError(ValueError):
    """Raised for bad input and for failed checks.

    >>> raise NormRewriteError("model.pt: empty file. Give a checkpoint written by torch.save.")

    `exit_code` is what the command line returns: 1 a check failed, 2 the input or the request is at fault.
    """

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(found: str, known: Iterable[str]) -> str:
    """` Did you mean 'l1'?` for a near miss, else an empty string; to be put behind an error's first sentence."""
    close = difflib.get_close_matches(found, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """An error on one line, for a message that quotes it."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def some(names: Sequence[str], most: int) -> str:
    """The first of many names on one line: `bn1, bn2, ...`."""
    return f"{', '.join(names[:most])}{', ...' if len(names) > most else ''}"


def possible(path: Path, what: str = "") -> None:
    """Raises where the system can't have a file of this name (it is too long, say), or has none that can be read from its
    beginning: a pipe or a device may give nothing for ever. `what` stands before the name in the message."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise NormRewriteError(
            f"{what}{path}: its name is no UTF-8, which readers and writers of torch files need. Rename it."
        ) from error
    try:
        found = path.exists() and not path.is_file() and not path.is_dir()
    except OSError as error:
        raise NormRewriteError(f"{what}{path}: {error.strerror}.") from error
    if found:
        raise NormRewriteError(f"{what}{path} is a pipe, a socket or a device. Give a file.")
