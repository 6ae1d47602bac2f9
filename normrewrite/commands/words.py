"""A command in words, as a manifest keeps it: what it was asked beside its defaults, without folders.

>>> step(source, Convert(model=source.path, to="l1"))["command"]
['convert', 'model.pt', '--to', 'l1']
"""

from collections.abc import Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from normrewrite.commands.source import Source
from normrewrite.options.fields import Mark, asked, flag_of
from normrewrite.provenance import digests, history
from normrewrite.provenance.history import History


def came(source: Source, record: Mapping[str, Any] | None, options: Any) -> History:
    """The history of what a command is to write, before it changes what it read; that of an original begins with its digest."""
    rewritten = record is not None and bool(record["sites"])
    original = None if rewritten else digests.of_file(source.path)
    begun = history.begun(original, record, _without_folder(source.arch), _pairs(source))
    return begun.then(step(source, options))


def step(source: Source, options: Any) -> dict[str, Any]:
    """One command that was run: its words, the seed of what it drew, the versions it ran in, and the files it read."""
    lines = [(field, mark, value) for field, mark, value in asked(options) if not mark.silent]
    words = [type(options).__name__.lower(), source.path.name, *_source_words(source)]
    words += [word for line in lines for word in _option(*line)]
    files = {field.name: _read(value) for field, mark, value in lines if mark.file}
    return history.step(words, files, getattr(options, "seed", history.SEED))


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


def _option(field: "Field[Any]", mark: Mark, value: Any) -> list[str]:
    flag = flag_of(field)
    if isinstance(value, bool):
        return [flag] if value else [f"--no-{flag[2:]}"]
    if mark.numbers:
        return [flag, ",".join(map(str, value))]
    if mark.file:
        return [flag, _name(value)]
    values = value if isinstance(value, list | tuple) else [value]
    return [word for item in values for word in (flag, str(item))]


def _name(value: Any) -> str:
    """How a file is called in a command: its own name; what is no file stays as it is."""
    return Path(value).name if Path(value).exists() else str(_without_folder(str(value)))


def _read(value: Any) -> dict[str, Any]:
    path = Path(value)
    return digests.of_file(path) if path.is_file() else {"file": _name(value)}
