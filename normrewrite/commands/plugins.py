"""The command `plugins list`."""

from importlib.util import find_spec

from normrewrite.commands.results import Listed
from normrewrite.plugins import OPS
from normrewrite.plugins.built import place
from normrewrite.plugins.runtimes import RUNTIMES


def plugins_list() -> Listed:
    """The operators that there are plugins for."""
    operators = {
        op.name: {"computes": ", ".join(op.metrics)} | {a.name: f"{a.kind}, {a.range.words}" for a in op.attributes}
        for op in OPS.values()
    }
    here = {name: find_spec(runtime.module) is not None for name, runtime in RUNTIMES.items()}
    return Listed(operators, here, str(place()) if place().is_file() else None)
