"""Where a twin comes from: its original's file, the code it belongs to, and the commands that made it.

>>> came = begun(digests.of_file(path)).then(step(["convert", "model.pt", "--to", "l1"]))
>>> came.as_dict()["steps"][0]["command"]
['convert', 'model.pt', '--to', 'l1']

It travels in the manifest. Files go by their names alone, without folders, and by their digests. What a manifest says is not
believed: `checked` makes sure of its form, and nothing that it names is imported (normrewrite.files asks for --trust).
"""

import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from normrewrite._version import __version__
from normrewrite.errors import NormRewriteError

_BIT_EXACT = {"convert", "calibrate", "revert"}  # commands after which the original can be had back to the bit,
_BUT_FOR = {"--statistics", "--biases"}  # unless one of these is in them
SEED = 0  # of every random input that a command draws itself


@dataclass(frozen=True)
class History:
    """original: digests.of_file of the network before any rewrite; arch, arch_args: as on the command line; steps: see `step`;
    report: of the rewrite, as normrewrite.provenance.report.Report.as_dict gives it."""

    original: dict[str, Any] | None = None
    arch: str | None = None
    arch_args: tuple[str, ...] = ()
    steps: tuple[dict[str, Any], ...] = ()
    report: dict[str, Any] | None = None

    def then(self, done: dict[str, Any]) -> "History":
        return replace(self, steps=(*self.steps, done))

    def as_dict(self) -> dict[str, Any]:
        known = {
            "original": self.original,
            "arch": self.arch,
            "arch_args": list(self.arch_args),
            "steps": list(self.steps),
            "report": self.report,
        }
        return {key: value for key, value in known.items() if value}


def begun(
    original: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    arch: str | None = None,
    arch_args: tuple[str, ...] = (),
) -> History:
    """The history that a file brings along in its manifest; that of an original begins with the file itself.

    original: normrewrite.provenance.digests.of_file of the file, where it is one. arch, arch_args: what made the network, where
    that was named.
    """
    brought = History() if record is None else of(record)
    named = replace(brought, arch=arch, arch_args=arch_args) if arch else brought
    return named if original is None else replace(named, original=dict(original))


def of(record: Mapping[str, Any]) -> History:
    """The history in a manifest that normrewrite.provenance.manifest.check has seen."""
    texts, steps = tuple(record.get("arch_args", ())), tuple(record.get("steps", ()))
    return History(record.get("original"), record.get("arch"), texts, steps, record.get("report"))


def step(
    command: Sequence[str], files: Mapping[str, Mapping[str, Any]] | None = None, seed: int = SEED
) -> dict[str, Any]:
    """One command that was run: its words, the seed of what it drew, the versions it ran in, and the files it read, as
    normrewrite.provenance.digests.of_file gives them, by the option that named them."""
    done = {"command": list(command), "seed": seed, "versions": versions()}
    return done | ({"files": dict(files)} if files else {})


def is_changed(record: Mapping[str, Any]) -> bool:
    """Whether a command has changed what the network computes, so that the original can't be had back to the bit."""
    commands = [done["command"] for done in record.get("steps", ()) if done["command"]]
    return any(command[0] not in _BIT_EXACT or not _BUT_FOR.isdisjoint(command) for command in commands)


def versions() -> dict[str, str]:
    """What computes: the versions that a figure may depend on."""
    return {
        "normrewrite": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def as_shell(words: Sequence[str]) -> str:
    """A step's command for a shell; it can be no other program's."""
    return shlex.join(["normrewrite", *words])


def checked(record: Mapping[str, Any], where: str) -> None:
    """Raises where what a manifest says of its history has not the form that `History.as_dict` gives it."""
    wrong = [name for name, fits in _FORMS.items() if name in record and not fits(record[name])]
    if wrong:
        raise NormRewriteError(f"{where}: {wrong[0]!r} of its manifest is not what normrewrite writes. It is damaged.")


def _text(value: object) -> bool:
    return isinstance(value, str)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _by_name(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(_text(key) and fits(item) for key, item in value.items())


def _digest(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _text(value.get("file"))
        and _text(value.get("sha256", ""))
        and isinstance(value.get("bytes", 0), int)
    )


def _step(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _texts(value.get("command"))
        and isinstance(value.get("seed", 0), int)
        and _by_name(value.get("versions", {}), _text)
        and _by_name(value.get("files", {}), _digest)
    )


def _report(value: object) -> bool:
    """What normrewrite.provenance.report.Report.as_dict gives; its names are a tuple or, out of JSON, a list."""
    lines = value.get("sites") if isinstance(value, dict) else None
    return isinstance(lines, list) and all(map(_line, lines))


def _line(value: object) -> bool:
    names = value.get("names") if isinstance(value, dict) else None
    return isinstance(names, list | tuple) and bool(names) and all(map(_text, names))


def _layout(value: object) -> bool:
    """What normrewrite.files.layout.Layout.told gives."""
    return (
        isinstance(value, dict)
        and _texts(value.get("key", []))
        and _text(value.get("prefix", ""))
        and _texts(value.get("compiled", []))
    )


_FORMS: dict[str, Callable[[Any], bool]] = {
    "layout": _layout,
    "original": _digest,
    "arch": _text,
    "arch_args": _texts,
    "steps": lambda value: isinstance(value, list) and all(map(_step, value)),
    "versions": lambda value: _by_name(value, _text),
    "tensors": lambda value: _by_name(value, _text),
    "report": _report,
    "sha256": _text,
}
