"""Files that go out: looked at before any work, written beside their place, and put there whole.

>>> check_outputs({"-o": output, "--manifest": manifest}, force, {"--data": data})
>>> write_atomically(output, lambda temporary: torch.save(state, temporary), force)
"""

import os
import pickle
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from normrewrite.errors import NormRewriteError, first_line, possible

_LONGEST = 40  # characters of a name that a temporary file's begins with, so that its own is never too long


# What files are called, by what they hold; a name of another kind's is refused, as nothing would read the file by it.
_SUFFIXES = {
    "a torch file": (".pt", ".pth", ".ckpt", ".bin", ".safetensors"),
    "an ONNX file": (".onnx",),
    "an engine": (".engine",),
    "a page": (".html",),
    "a manifest": (".json",),
    "code": (".py",),
    "a torch.export archive": (".pt2",),
    "data": (".npz", ".npy"),
}


def check_outputs(
    outputs: Mapping[str, Path | None], force: bool, inputs: Mapping[str, object] | None = None, kind: str = ""
) -> None:
    """Raises early, before any work, where an output can't be written, or is another of the outputs, or one of the inputs, or
    is called as a file of another kind.

    Both by the option that names them. None, and an input that is no file (`module:factory`), is left out. kind: of `-o`, a key
    of _SUFFIXES.
    """
    taken = {option: Path(str(path)) for option, path in (inputs or {}).items() if path is not None}
    for option, path in outputs.items():
        if path is None:
            continue
        _check_suffix(path, "a manifest" if option == "--manifest" else kind if option == "-o" else "")
        check_writable(path, force)
        clash = next((other for other, file in taken.items() if _same_file(path, file)), None)
        if clash is not None:
            raise NormRewriteError(f"output {path}: {clash} is the same file. Choose another name.")
        taken[option] = path


def _check_suffix(path: Path, kind: str) -> None:
    named = next((other for other, suffixes in _SUFFIXES.items() if path.suffix.lower() in suffixes), kind)
    if kind and named != kind:
        raise NormRewriteError(
            f"output {path}: {path.suffix} is the name of {named}, and this is {kind}. Call it {' or '.join(_SUFFIXES[kind])}."
        )


def check_writable(path: str | Path, force: bool) -> None:
    """Raises early, before any work, where the output can't be written. A link stands for the file that it leads to."""
    path = Path(path)
    kind = _kind(path)
    if kind == "folder":
        raise NormRewriteError(f"output {path} is a folder. Name a file with -o.")
    if kind not in ("", "file"):
        raise NormRewriteError(f"output {path} is a {kind}, which is never replaced. Name a file with -o.")
    possible(path, "output ")
    if kind and not force:
        raise _exists(path)
    parent = _place(path).parent if path.is_symlink() else path.parent
    if not parent.is_dir():
        raise NormRewriteError(f"output {path}: there is no folder {parent}. Make it first.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise NormRewriteError(f"output {path}: the folder {parent} is not writable. Choose another place with -o.")


def write_atomically(path: Path, write: Callable[[str], object], force: bool) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place: a reader sees the old file or the new one.

    Of several processes that write one new name without `force` one succeeds. With it, the new file has the old one's mode
    and, where the system lets it, owner.
    """
    with written_first(path, write, force) as put:
        put()


@contextmanager
def written_first(path: Path, write: Callable[[str], object], force: bool) -> Iterator[Callable[[], None]]:
    """As write_atomically, in two steps: the temporary file is whole inside, where another may be written, and what this gives
    puts it in place. Of two files that belong together both then are written, or none."""
    check_writable(path, force)
    place = _place(path)
    temporary = str(place.with_name(f".{place.name[:_LONGEST]}.{secrets.token_hex(4)}.tmp"))

    def put() -> None:
        with _told(path):
            _put(temporary, place, force)

    try:
        with _told(path):
            like = _made(temporary, place)
            write(temporary)
            _take_after(temporary, like)
        yield put
    finally:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108 (the shortest way, as a further signal may come)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What goes wrong with an output, in words."""
    try:
        yield
    except FileExistsError as error:
        raise _exists(path) from error
    except (pickle.PicklingError, AttributeError, TypeError, MemoryError, NormRewriteError):
        raise
    except Exception as error:  # a full disk is OSError, RuntimeError of torch's writer, or safetensors' own
        raise NormRewriteError(f"output {path}: {first_line(error)}. Nothing was written.") from error


def _exists(path: Path) -> NormRewriteError:
    return NormRewriteError(f"output {path} exists already. Choose another name with -o, or overwrite it with --force.")


def _kind(path: Path) -> str:
    """What stands at a path: `file`, `folder`, `device`, `pipe`, `socket`, or nothing."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return ""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _same_file(a: Path, b: Path) -> bool:
    with suppress(OSError):
        return a.samefile(b)
    return os.path.realpath(a) == os.path.realpath(b)


def _place(path: Path) -> Path:
    """Where a file of this name is, behind links."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _made(temporary: str, place: Path) -> os.stat_result:
    """Make the temporary file; whose mode and owner it is to have: those of the file that it replaces, or its own."""
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # by the umask
    try:
        with suppress(FileNotFoundError):
            replaced = place.stat()
            os.fchmod(handle, 0o600)  # nobody reads before the end what they could not read before
            return replaced
        return os.fstat(handle)
    finally:
        os.close(handle)


def _take_after(temporary: str, like: os.stat_result) -> None:
    with suppress(OSError):  # only root gives files away
        os.chown(temporary, like.st_uid, like.st_gid)
    Path(temporary).chmod(stat.S_IMODE(like.st_mode) & 0o777)  # by safetensors it may be another file by now


def _put(temporary: str, place: Path, force: bool) -> None:
    """Raises FileExistsError where there is one by now, unless by `force`."""
    if not force:
        try:
            os.link(temporary, place)
        except FileExistsError:
            raise
        except OSError:  # a file system without links: the name is claimed by an empty file
            os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        else:
            return
    os.replace(temporary, place)  # noqa: PTH105
