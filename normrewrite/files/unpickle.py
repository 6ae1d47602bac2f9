"""Reading torch files without running what is in them.

Everything goes through torch's weights_only unpickler, which builds nothing but tensors and plain containers. A pickled
module also names classes; one is let through only if it is what it claims to be: a class, a subclass of nn.Module, defined
in exactly the module and under exactly the name that the file asks for (or where that module's classes have moved), in a package
of this list (of transformers, a model's configuration too).

None of them is ever called: what a pickle would do is read off it before (normrewrite.files.pickled), and a module is made
as torch.save writes it, an empty object that is given its attributes. A class that does more than nn.Module when it is made or
given them is not on the list.
"""

import importlib
import pickle
import re
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normrewrite.errors import NormRewriteError, first_line
from normrewrite.files import pickled, scalars
from normrewrite.files.arch import search_path
from normrewrite.files.layout import USUAL
from normrewrite.files.pickled import PACKAGES

_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch's magic number, pickled
_PROTOCOL = re.compile(r"pickle protocol (\d)")
_MOVED = {"normrewrite.nn.rows": "normrewrite.nn.sample"}  # where classes are that older files know by another module
# Plain functions that layers of torch.nn keep as attributes; a file may name them, and not call them.
FUNCTIONS = {
    "torch.nn.functional.relu": torch.nn.functional.relu,
    "torch.nn.functional.silu": torch.nn.functional.silu,
    "torch.nn.functional.leaky_relu": torch.nn.functional.leaky_relu,
    "torch._C._nn.gelu": torch.nn.functional.gelu,
}


def load(path: Path, allow: Sequence[str] = (), trust: bool = False) -> Any:
    """What the file holds, on the CPU. `allow`: further classes, `module:Class`; `trust`: unpickle freely, running its code."""
    try:
        # Only what the user vouched for may come from the current folder: an import runs code.
        with search_path() if allow or trust else nullcontext():
            if trust:
                return torch.load(path, map_location="cpu", weights_only=False)
            return _load_safely(path, allow)
    except NormRewriteError:
        raise
    except (Exception, SystemExit) as error:  # whatever a damaged or hostile file makes the reader raise
        raise NormRewriteError(f"{path}: {_why_unreadable(path, error)}") from error


def _load_safely(path: Path, allow: Sequence[str]) -> Any:
    try:
        wrong = pickled.fault(path, {name.replace(":", ".") for name in allow})
    except pickled.Wrong as error:
        raise _never_written(path, str(error)) from error
    except pickled.Unknown:
        return _read(path)  # torch knows no more of it, and says what it is
    wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path) if pickled.is_archive(path) else []
    allowed = [(_allowed(name, allow), name) for name in wanted]
    refused = [name for obj, name in allowed if obj is None]
    if refused:
        raise NormRewriteError(_refusal(path, refused))
    if wrong is not None:
        raise _never_written(path, wrong)
    numbers = [(obj, name) for name, obj in scalars.GLOBALS.items()]
    with torch.serialization.safe_globals([*numbers, *allowed]):
        return _read(path)


def _never_written(path: Path, what: str) -> NormRewriteError:
    return NormRewriteError(
        f"{path}: {what}, which torch.save never writes; nothing of it was run. Save a state_dict, and name its code with --arch."
    )


def _read(path: Path) -> Any:
    """Mapped into memory where the file is of torch's present zip format."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=pickled.is_archive(path))
        except Exception as error:
            for warning in caught:  # of a pickle protocol that torch does not read in full
                error.add_note(str(warning.message))
            raise


def _allowed(name: str, allow: Sequence[str]) -> Any:
    """The object that a global of this name stands for, if it may be built; else None."""
    if name in FUNCTIONS | scalars.GLOBALS:
        return (FUNCTIONS | scalars.GLOBALS)[name]
    module_name, _, class_name = name.rpartition(".")
    by_user = f"{module_name}:{class_name}" in allow
    if not by_user and not name.startswith(PACKAGES):
        return None
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        if by_user:
            raise NormRewriteError(f"--allow {module_name}:{class_name}: {error}") from error
        return None
    home = _MOVED.get(module_name, module_name)
    genuine = isinstance(cls, type) and (cls.__module__, cls.__qualname__) == (home, class_name)
    return cls if genuine and (by_user or _is_made_plainly(cls)) else None


def _is_made_plainly(cls: type) -> bool:
    """A layer, or a record of settings, that runs no code but torch's and ours when it is made empty and given its attributes."""
    known = all(map(partial(_is_known, cls), ("__new__", "__setstate__")))
    return known and (issubclass(cls, nn.Module) or _is_config(cls))


def _is_known(cls: type, step: str) -> bool:
    """torch.compile, once it was used, puts a `__setstate__` of its own into nn.Module."""
    method = getattr(cls, step, None)
    module = getattr(method, "__module__", None) or "torch.nn."
    return method is getattr(nn.Module, step, None) or module.startswith(("torch.nn.", "normrewrite.nn."))


def _is_config(cls: type) -> bool:
    """The plain record of settings that a model of transformers keeps."""
    return any(
        base.__name__ == "PreTrainedConfig" and base.__module__.startswith("transformers.") for base in cls.__mro__
    )


def _refusal(path: Path, names: Iterable[str]) -> str:
    names = sorted(names)
    flags = " ".join(f"--allow {shlex.quote(':'.join(name.rsplit('.', 1)))}" for name in names if _is_class(name))
    allow = f"For classes that you know: {flags}. " if flags else ""
    return (
        f"{path} asks for {len(names)} class(es) or function(s) that are not on the allow-list, and nothing of it was run: "
        f"{', '.join(names)}. {_best(path, names)} {allow}"
        "With --trust the file may run any code that it contains, with your rights; only for files that you made yourself."
    )


def _best(path: Path, names: list[str]) -> str:
    """Where the weights have an entry of their own, it is the others that are to be left out."""
    entries, dicts = pickled.entries(path)
    places = sorted({entries[name] for name in names if name in entries})
    if places and all(name in entries for name in names) and dicts.intersection(USUAL) - set(places):
        where = ", ".join(map(repr, places))
        return f"They are in its entry {where}. Best: save the checkpoint without that, or with plain values in it."
    return "Best: save a state_dict and name its code with --arch."


def _is_class(name: str) -> bool:
    """As far as it can be told without an import."""
    module, _, last = name.rpartition(".")
    return last[:1].isupper() or isinstance(getattr(sys.modules.get(module), last, None), type)


def _why_unreadable(path: Path, error: BaseException) -> str:
    protocol = _PROTOCOL.search(" ".join(getattr(error, "__notes__", ())))
    if protocol:
        reason, remedy = f"pickle protocol {protocol[1]}", "; if you made it yourself, it loads with --trust"
    elif not isinstance(error, pickle.UnpicklingError):
        reason, remedy = first_line(error)[:200], ""
    elif _starts_as_old(path):
        return (
            "is a module in the format before torch 1.6, which is only read freely. Save it again with a newer torch, or, if "
            "you made it yourself, use --trust."
        )
    else:
        reason, remedy = "its pickle is damaged", ""
    return (
        f"can't be read as a torch file ({reason}). It may be truncated, or no checkpoint at all. Give a file written by "
        f"torch.save (a state_dict or a module) or a .safetensors file{remedy}."
    )


def _starts_as_old(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_OLD)) == _OLD
