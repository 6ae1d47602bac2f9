"""Plugins for TensorRT, registered once and on request: nothing registers itself when it is imported.

>>> creators = register("python", "rtx")                   # before an engine is built or loaded, in that process
>>> register("library", "tensorrt", Path("libplugins.so"))

TensorRT keeps one registry a process. A plugin is known there by name, version and namespace, and a second of the same is an
error here, whichever kind it is.
"""

import importlib
from pathlib import Path
from typing import Any, Literal

from normrewrite.errors import NormRewriteError, nearest
from normrewrite.plugins.runtimes import RUNTIMES
from normrewrite.plugins.spec import NAMESPACE, OPS, VERSION

Kind = Literal["python", "ahead", "library"]
KINDS: tuple[Kind, ...] = ("python", "ahead", "library")
_ELF = b"\x7fELF"
_kept: list[Any] = []  # the registry holds creators by address alone


def register(kind: str = "python", runtime: str = "rtx", library: str | Path | None = None) -> list[Any]:
    """Make the norm operators' plugins known to `rtx` or `tensorrt` in this process; the creators of kind `python`.

    kind: `python`; `ahead`: kernels inside the engine, for the GPU of this machine, by full TensorRT alone; or `library`: a
    shared library of plugins for these operators, at that path. Raises NormRewriteError where one is registered already, where
    the runtime isn't installed, too old or can't have the kind, and for a file that is no such library.
    """
    if kind not in KINDS:
        raise NormRewriteError(
            f"plugins of kind {kind!r} are unknown.{nearest(kind, KINDS)} Known: {', '.join(KINDS)}."
        )
    if (kind == "library") != (library is not None):
        raise NormRewriteError("a path goes with plugins of kind library, and with no other.")
    trt = _module(runtime)
    registry = trt.get_plugin_registry()
    if library is not None:
        _load(registry, check_library(Path(library)))
        return []
    _refuse_second(registry)
    if kind == "ahead":
        _define_ahead(trt, RUNTIMES[runtime].title)
        return []
    from normrewrite.plugins.v3 import creator

    made = [creator(trt, op) for op in OPS.values()]
    for each in made:
        if not registry.register_creator(each, NAMESPACE):
            raise NormRewriteError(f"TensorRT refused the plugin {NAMESPACE}::{each.name}, version {VERSION}.")
    _kept.extend(made)
    return made


def _module(runtime: str) -> Any:
    if runtime not in RUNTIMES:
        raise NormRewriteError(f"runtime {runtime!r} is unknown. Known: {', '.join(RUNTIMES)}.")
    RUNTIMES[runtime].require()
    trt = importlib.import_module(RUNTIMES[runtime].module)
    if not hasattr(trt, "IPluginCreatorV3One"):
        raise NormRewriteError(f"{RUNTIMES[runtime].title} {trt.__version__} has no IPluginV3 in Python; 10.6 has it.")
    return trt


def _define_ahead(trt: Any, title: str) -> None:
    import torch

    from normrewrite.plugins.quick import define

    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise NormRewriteError(
            f"{title} {trt.__version__} has no plugins ahead of time; TensorRT has them. Use kind python."
        )
    if not torch.cuda.is_available():
        raise NormRewriteError(
            "plugins ahead of time are compiled for the GPU that the engine is built on; torch sees none."
        )
    major, minor = torch.cuda.get_device_capability()
    define(importlib.import_module(f"{trt.__name__}.plugin"), 10 * major + minor)


def known(registry: Any) -> list[str]:
    """The operators of ours that a registry has a plugin for."""
    return [name for name in OPS if registry.get_creator(name, VERSION, NAMESPACE) is not None]


def _refuse_second(registry: Any) -> None:
    already = known(registry)
    if already:
        raise NormRewriteError(
            f"plugins for {', '.join(already)} (namespace {NAMESPACE}, version {VERSION}) are registered already in this "
            "process. Register one kind, once."
        )


def check_library(path: Path) -> Path:
    """The path of a shared library. Raises NormRewriteError for what is none."""
    if not path.is_file():
        raise NormRewriteError(f"{path}: there is no such library of plugins. Give auto, off, or the path of one.")
    with path.open("rb") as file:
        if file.read(4) != _ELF:
            raise NormRewriteError(
                f"{path}: is no shared library. Give auto, off, or the path of a library of plugins."
            )
    return path.resolve()


def _load(registry: Any, path: Path) -> None:
    _refuse_second(registry)
    if registry.load_library(str(path)) is None:
        raise NormRewriteError(
            f"{path}: TensorRT finds no plugins in it (no getCreators, or a library that it needs is missing)."
        )
    if not known(registry):
        raise NormRewriteError(
            f"{path}: has no plugin for {', '.join(OPS)} in namespace {NAMESPACE}, version {VERSION}."
        )
