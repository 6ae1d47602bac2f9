"""Architectures: the code that a state_dict belongs to, named by the user.

>>> build("zoo.py:cifar10_resnet20")
>>> build("timm:resnet18", {"num_classes": 10})
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from normrewrite.errors import NormRewriteError, nearest

Factory = Callable[..., nn.Module]
_FORMS = "Write PATH.py:factory, module:factory, timm:NAME or torchvision:NAME."


def build(arch: str | Factory | nn.Module, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The module that `arch` names, freshly made; global random state is left alone.

    arch: `PATH.py:factory`, `module:factory`, `timm:NAME`, `torchvision:NAME`, a callable, or a module (taken as it is).
    arguments: keyword arguments of the factory. Raises NormRewriteError where it can't be found or made.
    """
    if isinstance(arch, nn.Module):
        return arch
    with _search_path(arch):
        factory = find(arch) if isinstance(arch, str) else arch
        try:
            with torch.random.fork_rng(devices=[]):
                model = factory(**dict(arguments or {}))
        except Exception as error:  # the user's code runs here, and may raise anything
            raise NormRewriteError(f"--arch {arch}: the factory raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise NormRewriteError(f"--arch {arch}: the factory gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def find(arch: str) -> Factory:
    """The factory itself."""
    source, colon, name = arch.rpartition(":")
    if not colon or not source or not name:
        raise NormRewriteError(f"--arch {arch!r}: no factory named. {_FORMS}")
    if source == "timm":
        return lambda **arguments: _module(source, arch).create_model(name, pretrained=False, **arguments)
    if source == "torchvision":
        return lambda **arguments: _module("torchvision.models", arch).get_model(name, weights=None, **arguments)
    factory: Factory = attribute(
        _file(source, arch) if source.endswith(".py") else _module(source, arch), name, f"--arch {arch}"
    )
    return factory


def attribute(module: ModuleType, name: str, where: str) -> Any:
    """A callable of a module, by name."""
    try:
        found = getattr(module, name)
    except AttributeError:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise NormRewriteError(f"{where}: there is no {name!r} in {module.__name__}.{nearest(name, public)}") from None
    if not callable(found):
        raise NormRewriteError(f"{where}: {name!r} is a {type(found).__name__}, not a function or class.")
    return found


@contextmanager
def _search_path(arch: object) -> Iterator[None]:
    """Imports work as if python had been started in this folder, or on that file, while the factory runs."""
    source = arch.rpartition(":")[0] if isinstance(arch, str) else ""
    extra = [str(Path(source).resolve().parent)] if source.endswith(".py") else [str(Path.cwd())]
    sys.path[:0] = extra
    try:
        yield
    finally:
        for entry in extra:
            sys.path.remove(entry)


def _module(name: str, arch: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # an import runs the user's code
        raise NormRewriteError(
            f"--arch {arch}: can't import {name}: {type(error).__name__}: {error}. {_FORMS}"
        ) from error


def _file(source: str, arch: str) -> ModuleType:
    path = Path(source)
    if not path.is_file():
        raise NormRewriteError(f"--arch {arch}: there is no file {source}. {_FORMS}")
    name = f"normrewrite_arch_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code runs here
        del sys.modules[name]
        raise NormRewriteError(f"--arch {arch}: {source} raised {type(error).__name__}: {error}") from error
    return module


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """`["width=64", "act=gelu"]` -> {"width": 64, "act": "gelu"}: Python literals, else text."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise NormRewriteError(f"--arch-args {pair!r}: write name=value, as in --arch-args width=64.")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    return arguments
