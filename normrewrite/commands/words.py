"""A command in words, as a manifest keeps it: what it was asked beside its defaults, without folders.

>>> step(convert, source, {"to": "l1"})["command"]
['convert', 'model.pt', '--to', 'l1']
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from normrewrite.commands.source import Source
from normrewrite.provenance import digests, history
from normrewrite.provenance.history import History

# What says where to write, what to print and what to insist on, and not what is computed.
_SILENT = (
    *("source", "output", "manifest", "force", "each", "dry_run", "expect", "text"),
    *("resume", "log", "save_every", "timeout"),
)
_FILES = ("calibrate", "data", "replay", "original", "val", "teacher")


def begun(source: Source, record: Mapping[str, Any] | None) -> History:
    """The history of what a source read, before the command; that of an original begins with its digest."""
    rewritten = record is not None and bool(record["sites"])
    original = None if rewritten else digests.of_file(source.path)
    return history.begun(original, record, _without_folder(source.arch), _pairs(source))


def step(
    command: Callable[..., Any],
    source: Source,
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
    return history.step(words, files, options.get("seed", history.SEED))


def _source_words(source: Source) -> list[str]:
    words = ["--arch", str(_without_folder(source.arch))] if source.arch else []
    words += [word for pair in _pairs(source) for word in ("--arch-args", pair)]
    words += ["--key", source.key] if source.key else []
    words += [word for name in source.allow for word in ("--allow", name)]
    return [*words, "--trust"] if source.trust else words


def _pairs(source: Source) -> tuple[str, ...]:
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
