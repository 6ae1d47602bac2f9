"""Architectures: the code that a state_dict belongs to, named by the user.

>>> build("zoo.py:cifar10_resnet20")
>>> build("timm:resnet18", {"num_classes": 10})
"""

import ast
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from normrewrite.errors import NormRewriteError, nearest
from normrewrite.nn.parts import deepcopy

Factory = Callable[..., nn.Module]
_FORMS = "Write PATH.py:factory, module:factory, timm:NAME or torchvision:NAME."


def build(arch: str | Factory | nn.Module, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The module that `arch` names, freshly made; global random state is left alone.

    arch: `PATH.py:factory`, `module:factory`, `timm:NAME`, `torchvision:NAME`, a callable, or a module (copied).
    arguments: keyword arguments of the factory. Raises NormRewriteError where it can't be found or made.
    """
    if isinstance(arch, nn.Module):
        return deepcopy(arch)
    with search_path(arch):
        factory = find(arch) if isinstance(arch, str) else arch
        try:
            with torch.random.fork_rng(devices=[]):
                model = factory(**dict(arguments or {}))
        except NormRewriteError:  # ours, of a library that isn't there
            raise
        except (Exception, SystemExit) as error:  # the user's code runs here, and may raise anything
            raise NormRewriteError(f"--arch {arch}: the factory raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise NormRewriteError(f"--arch {arch}: the factory gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def find(arch: str, option: str = "--arch", forms: str = _FORMS) -> Factory:
    """The factory itself; `option` and `forms` are for messages, as data may come from code too."""
    source, colon, name = arch.rpartition(":")
    if not colon or not source or not name:
        raise NormRewriteError(f"{option} {arch!r}: no factory named. {forms}")
    where = f"{option} {arch}"
    if source == "timm":
        return lambda **arguments: _module(source, where, forms).create_model(name, pretrained=False, **arguments)
    if source == "torchvision":
        return lambda **arguments: _module("torchvision.models", where, forms).get_model(
            name, weights=None, **arguments
        )
    with search_path(arch):
        module = _file(source, where, forms) if source.endswith(".py") else _module(source, where, forms)
    return attribute(module, name, where)


def attribute(module: ModuleType, name: str, where: str) -> Factory:
    """A callable of a module, by name."""
    try:
        factory: Factory = getattr(module, name)
    except AttributeError:
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise NormRewriteError(f"{where}: there is no {name!r} in {module.__name__}.{nearest(name, own)}") from None
    if not callable(factory):
        raise NormRewriteError(f"{where}: {name!r} is a {type(factory).__name__}, not a function or class.")
    return factory


@contextlib.contextmanager
def search_path(arch: object = "") -> Iterator[None]:
    """Imports work as if python had been started in this folder, or on that file, while the user's code runs."""
    source = arch.rpartition(":")[0] if isinstance(arch, str) else ""
    extra = str(Path(source).resolve().parent if source.endswith(".py") else Path.cwd())
    sys.path.insert(0, extra)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            yield
    finally:
        if extra in sys.path:  # the user's code may change the path too
            sys.path.remove(extra)


def _module(name: str, where: str, forms: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # an import runs the user's code
        raise NormRewriteError(f"{where}: can't import {name}: {type(error).__name__}: {error}. {forms}") from error


def _file(source: str, where: str, forms: str) -> ModuleType:
    path = Path(source)
    if not path.is_file():
        raise NormRewriteError(f"{where}: there is no file {source}. {forms}")
    name = f"normrewrite_arch_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code runs here
        del sys.modules[name]
        raise NormRewriteError(f"{where}: {source} raised {type(error).__name__}: {error}") from error
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
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            arguments[key] = value
    return arguments
