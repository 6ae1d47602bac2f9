"""Where a twin comes from: its original's file, the code it belongs to, and the commands that made it.

>>> came = begun(source).then(step(convert, source, {"to": "l1"}))
>>> came.as_dict()["steps"][0]["command"]
['convert', 'model.pt', '--to', 'l1']

It travels in the manifest. Files go by their names alone, without folders, and by their digests. What a manifest says is not
believed: `checked` makes sure of its form, and nothing that it names is imported (normrewrite.files asks for --trust).
"""

import inspect
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from normrewrite._version import __version__
from normrewrite.errors import NormRewriteError
from normrewrite.records import digests

if TYPE_CHECKING:
    from normrewrite.commands.source import Source

BIT_EXACT = {"convert", "calibrate", "revert"}  # commands after which the original can be had back to the bit
SEED = 0  # of every random input that a command draws itself
# What says where to write, what to print and what to insist on, and not what is computed.
_SILENT = (
    *("source", "output", "manifest", "force", "each", "dry_run", "expect", "text"),
    *("resume", "log", "save_every", "timeout"),
)
_FILES = ("calibrate", "data", "replay", "original", "val", "teacher")


@dataclass(frozen=True)
class History:
    """original: digests.of_file of the network before any rewrite; arch, arch_args: as on the command line; steps: see `step`;
    report: of the rewrite, as normrewrite.records.report.Report.as_dict gives it."""

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


def begun(source: "Source", record: Mapping[str, Any] | None = None) -> History:
    """The history that a file brings along in its manifest; that of an original begins with the file itself."""
    brought = History() if record is None else of(record)
    named = replace(brought, arch=_without_folder(source.arch), arch_args=_pairs(source)) if source.arch else brought
    rewritten = record is not None and bool(record["sites"])
    return named if rewritten else replace(named, original=digests.of_file(source.path))


def of(record: Mapping[str, Any]) -> History:
    """The history in a manifest that normrewrite.records.manifest.check has seen."""
    texts, steps = tuple(record.get("arch_args", ())), tuple(record.get("steps", ()))
    return History(record.get("original"), record.get("arch"), texts, steps, record.get("report"))


def step(
    command: Callable[..., Any],
    source: "Source",
    options: Mapping[str, Any],
    verb: str = "",
    further: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One command that was run: its words, the seed of what it drew, the versions it ran in, and the files it read.

    options: the arguments of `command` by name; those at their defaults are left out. verb: the command's name for people,
    where it is not the function's. further: defaults of what `command` takes as **options.
    """
    parameters = inspect.signature(command).parameters.items()
    defaults = {name: each.default for name, each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD}
    defaults |= further or {}
    given = {
        name: value
        for name, value in options.items()
        if name in defaults and name not in _SILENT and value != defaults[name] and value not in ([], ())
    }
    words = [verb or command.__name__, source.path.name, *_source_words(source)]
    words += [word for name, value in given.items() for word in _option(name, value)]
    files = {name: _read(value) for name, value in given.items() if name in _FILES}
    return {
        "command": words,
        "seed": options.get("seed", SEED),
        "versions": versions(),
        **({"files": files} if files else {}),
    }


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


def _source_words(source: "Source") -> list[str]:
    words = ["--arch", str(_without_folder(source.arch))] if source.arch else []
    words += [word for pair in _pairs(source) for word in ("--arch-args", pair)]
    words += ["--key", source.key] if source.key else []
    words += [word for name in source.allow for word in ("--allow", name)]
    return [*words, "--trust"] if source.trust else words


def _pairs(source: "Source") -> tuple[str, ...]:
    return tuple(f"{key}={value!r}" for key, value in source.arch_args.items())


def _without_folder(arch: str | None) -> str | None:
    """`models/zoo.py:resnet20` -> `zoo.py:resnet20`: folders are their owner's business."""
    if arch is None:
        return None
    where, colon, name = arch.rpartition(":")
    return f"{Path(where).name}{colon}{name}" if where.endswith(".py") else arch


def _option(name: str, value: Any) -> list[str]:
    option = "--rule" if name == "rules" else f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option] if value else [f"--no-{option[2:]}"]
    if name in ("mean", "std"):
        return [option, ",".join(map(str, value))]
    if name in _FILES:
        return [option, _name(value)]
    if name == "rules":
        return [word for pattern, target in value for word in (option, f"{pattern}={target}")]
    values = value if isinstance(value, list | tuple) else [value]
    return [word for each in values for word in (option, str(each))]


def _name(value: Any) -> str:
    """How a file is called in a command: its own name; what is no file stays as it is."""
    return Path(value).name if Path(value).exists() else str(_without_folder(str(value)))


def _read(value: Any) -> dict[str, Any]:
    path = Path(value)
    return digests.of_file(path) if path.is_file() else {"file": _name(value)}


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
    """What normrewrite.records.report.Report.as_dict gives; its names are a tuple or, out of JSON, a list."""
    rows = value.get("sites") if isinstance(value, dict) else None
    return isinstance(rows, list) and all(map(_row, rows))


def _row(value: object) -> bool:
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
