"""Files that go out: where they may not be, one process of several, and what is kept of the file that is replaced."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import normrewrite as nr
from normrewrite import files


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def writing(content: bytes) -> Callable[[str], object]:
    return lambda temporary: Path(temporary).write_bytes(content)


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "pipe"), (_socket, "socket"), (lambda path: Path(path).symlink_to("/dev/null"), "device")],
)
def test_what_is_no_file_is_never_replaced(make: Callable[[str], None], kind: str) -> None:
    make("out.pt")
    before = os.lstat("out.pt")
    with pytest.raises(nr.NormRewriteError, match=f"output out.pt is a {kind}, which is never replaced"):
        files.write_atomically(Path("out.pt"), writing(b"new"), force=True)
    assert os.path.samestat(before, os.lstat("out.pt")) and names() == ["out.pt"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
@pytest.mark.parametrize("name", ["out.bin", "out.safetensors"])
def test_force_keeps_the_mode(mode: int, name: str) -> None:
    path = Path(name)
    path.write_bytes(b"old")
    path.chmod(mode)
    if name == "out.bin":
        files.write_atomically(path, writing(b"new"), force=True)
    else:  # whose writer makes a file of its own
        files.write_tensors({}, path, force=True)
    assert path.read_bytes() != b"old" and path.stat().st_mode & 0o777 == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_force_keeps_the_owner() -> None:
    Path("out.pt").write_bytes(b"old")
    os.chown("out.pt", 1234, 1235)
    files.write_atomically(Path("out.pt"), writing(b"new"), force=True)
    now = Path("out.pt").stat()
    assert (now.st_uid, now.st_gid) == (1234, 1235)


def test_nobody_reads_early_what_is_hidden() -> None:
    Path("out.pt").write_bytes(b"old")
    Path("out.pt").chmod(0o600)

    def write(temporary: str) -> None:
        assert Path(temporary).stat().st_mode & 0o077 == 0

    files.write_atomically(Path("out.pt"), write, force=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_leads_to_the_new_file(folder: Path, there: bool) -> None:
    (folder / "elsewhere").mkdir()
    target = folder / "elsewhere" / "real.pt"
    if there:
        target.write_bytes(b"old")
    Path("out.pt").symlink_to(target)
    if there:
        with pytest.raises(nr.NormRewriteError, match="exists already"):
            files.write_atomically(Path("out.pt"), writing(b"new"), force=False)
    files.write_atomically(Path("out.pt"), writing(b"new"), force=there)
    assert Path("out.pt").is_symlink() and target.read_bytes() == b"new" and len(names("elsewhere")) == 1


def _no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_write_one_new_name_one_succeeds(monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Each has looked, found nothing there, and comes to the end of its work with the others."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    ready = threading.Barrier(8)
    done: list[int] = []
    told: list[str] = []

    def work(number: int) -> None:
        def write(temporary: str) -> None:
            Path(temporary).write_bytes(bytes([number]) * 100)
            ready.wait(20)

        try:
            files.write_atomically(Path("out.pt"), write, force=False)
            done.append(number)
        except nr.NormRewriteError as error:
            told.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1 and len(told) == 7 and all("exists already" in each for each in told)
    assert Path("out.pt").read_bytes() == bytes(done) * 100 and names() == ["out.pt"]


def test_the_longest_name_that_the_system_has_is_written() -> None:
    name = "ü" * 126 + ".pt"  # 255 bytes
    files.write_atomically(Path(name), writing(b"new"), force=False)
    assert names() == [name]


@pytest.mark.parametrize(
    ("other", "prepare"),
    [
        ("out.pt", None),
        ("./out.pt", None),
        ("link.pt", lambda: Path("link.pt").symlink_to("out.pt")),
        ("folder/out.pt", lambda: Path("folder").symlink_to(".")),
        ("hard.pt", lambda: (Path("out.pt").touch(), os.link("out.pt", "hard.pt"))),
    ],
)
@pytest.mark.parametrize("role", ["output", "input"])
def test_two_files_of_a_command_are_two(other: str, prepare: Callable[[], object] | None, role: str) -> None:
    if prepare is not None:
        prepare()
    outputs, inputs = {"-o": Path("out.pt")}, {"--timing-cache": Path(other)}
    both = {**outputs, **inputs}
    with pytest.raises(nr.NormRewriteError, match=r"is the same file\. Choose another name"):
        files.check_outputs(both, True) if role == "output" else files.check_outputs(outputs, True, inputs)
    files.check_outputs({"-o": Path("out.pt"), "--manifest": None}, True, {"--data": "module:factory", "--val": None})
