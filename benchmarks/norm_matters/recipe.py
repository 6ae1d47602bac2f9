"""A study from a TOML file, for data that this project can't hold: a task, a recipe, arms. imagenet.toml is one.

>>> arms = read(Path("benchmarks/norm_matters/imagenet.toml")); arms["ResNet-18, L1"][0].norm
Norm(to='l1', gain='exact', times=1.0, initialise=False, scope='batch')
"""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.norm_matters.networks import NETWORKS
from benchmarks.norm_matters.run import Arms, Norm, Run, Study, Task
from normrewrite.errors import NormRewriteError, first_line, nearest

Row = TypeVar("Row")
_ARM = ("network", "norm", "recipe", "seeds")


def read(path: Path) -> Arms:
    """Raises NormRewriteError with the place where the file doesn't say what is needed."""
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise NormRewriteError(f"--recipe {path}: {first_line(error)}. Give a file like imagenet.toml.") from error
    for part in ("task", "recipe", "arms"):
        if not isinstance(content.get(part), dict):
            raise NormRewriteError(f"--recipe {path}: [{part}] is missing. Needed: [task], [recipe], [arms.NAME].")
    task = _row(Task, content["task"], f"{path} [task]")
    return {name: _arm(arm, task, content["recipe"], f"{path} [arms.{name}]") for name, arm in content["arms"].items()}


def _arm(arm: dict[str, Any], task: Task, recipe: dict[str, Any], where: str) -> list[Run]:
    for name in arm:
        if name not in _ARM:
            raise NormRewriteError(f"{where}: there is no {name!r}.{nearest(name, _ARM)} Known: {', '.join(_ARM)}.")
    network = arm.get("network", "")
    if network not in NETWORKS:
        raise NormRewriteError(
            f"{where}: network {network!r} is not known.{nearest(network, NETWORKS)} Known: {', '.join(NETWORKS)}."
        )
    study = Study(network, task, recipe | arm.get("recipe", {}), arm.get("seeds", 1))
    return study.arm(_row(Norm, arm.get("norm", {}), f"{where} norm"))


def _row(make: Callable[..., Row], values: dict[str, Any], where: str) -> Row:
    try:
        return make(**values)
    except TypeError as error:
        raise NormRewriteError(f"{where}: {first_line(error)}.") from error
