"""Code that is known to ask nothing of norms: torch's, numpy's, the standard library's and normrewrite's, told by its folder.

>>> is_known(nn.Module.train), is_known(Block.forward)
(True, False)

A module's name proves nothing: a user's may be called `code`, and what comes from `exec` calls itself `builtins`.
"""

import importlib.util
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import FunctionType

_FOLDERS = tuple(
    f"{Path(origin).parent}/"
    for name in ("torch", "numpy", "normrewrite")
    for origin in [getattr(importlib.util.find_spec(name), "origin", None)]
    if origin
)
_LIBRARY = tuple(f"{Path(sysconfig.get_path(name))}/" for name in ("stdlib", "platstdlib"))


@lru_cache(maxsize=16384)
def is_known_file(path: str) -> bool:
    path = str(Path(path)) if path else path
    if path.startswith(_FOLDERS):
        return True
    return path.startswith(_LIBRARY) and not {"site-packages", "dist-packages"}.intersection(Path(path).parts)


def is_known(call: FunctionType) -> bool:
    """By where its code was written; code that was generated, by the file of the module that it works in."""
    path = call.__code__.co_filename
    if path.startswith("<frozen "):
        return True
    return is_known_file(str(call.__globals__.get("__file__") or "") if path.startswith("<") else path)


def is_known_class(cls: type) -> bool:
    """By the file of its module; one that says it is a built-in and is none, as of `exec`, is not known."""
    module = sys.modules.get(str(cls.__module__))
    path = str(getattr(module, "__file__", None) or "")
    return is_known_file(path) if path else vars(module or cls).get(cls.__name__) is cls
