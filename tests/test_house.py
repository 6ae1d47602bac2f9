"""The contract of docs/house.md: rooms import downwards alone, and no file imports itself by way of others."""

import ast
import graphlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("passes", "plugins")  # stand at the top of the tree; normrewrite/ has links to them
Imports = dict[str, set[str]]


def floors(page: str) -> list[list[str]]:
    """The rooms floor by floor, from the ground up."""
    block = re.search(r"```text floors\n(.*?)```", page, re.DOTALL)
    assert block is not None, "docs/house.md has no block of floors"
    return [line.split() for line in reversed(block[1].splitlines())]


def files() -> dict[str, Path]:
    """The package's files by the name that they are imported by."""
    stems = [("normrewrite", ROOT / "normrewrite"), *((f"normrewrite.{name}", ROOT / name) for name in LINKED)]
    return {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for package, folder in stems
        for path in folder.rglob("*.py")
        if package != "normrewrite" or path.relative_to(folder).parts[0] not in LINKED
    }


def imported(source: str, known: Iterable[str]) -> Iterator[str]:
    """The files of the package that a source imports, anywhere in it: within functions, and for types alone, too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the whole name of what is imported"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else str(node.module) for name in whole if str(node.module) in known)


def imports() -> Imports:
    known = files()
    return {name: set(imported(path.read_text("utf-8"), known)) for name, path in known.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward(graph: Imports, house: list[list[str]]) -> list[str]:
    """Imports of another room that stands no lower."""
    level = {name: floor for floor, names in enumerate(house) for name in names}
    pairs = [(name, other) for name, others in graph.items() for other in others if room(name) != room(other)]
    return sorted(
        f"{name} imports {other}" for name, other in pairs if room(other) and level[room(other)] >= level[room(name)]
    )


def circle(graph: Imports) -> list[str]:
    """One circle of a graph, or nothing."""
    try:
        graphlib.TopologicalSorter({name: others - {name} for name, others in graph.items()}).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


HOUSE = floors((ROOT / "docs/house.md").read_text("utf-8"))
GRAPH = imports()


def test_every_room_has_a_floor() -> None:
    named = [name for names in HOUSE for name in names]
    assert sorted(named) == sorted({room(name) for name in GRAPH} - {""}), "name each room once in docs/house.md"


def test_imports_run_downwards() -> None:
    assert upward(GRAPH, HOUSE) == []


def test_no_circle_of_files() -> None:
    assert circle(GRAPH) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("normrewrite.backends.torch_batch", "from normrewrite.nn import BatchNorm"),
        ("normrewrite.passes.bake", "from normrewrite.api.export import export"),
        ("normrewrite.sites.graph", "def late():\n    import normrewrite.cli.console"),
        ("normrewrite.rules", "from normrewrite import optimizers"),
    ],
)
def test_a_planted_import_is_seen(file: str, line: str) -> None:
    planted = GRAPH | {file: GRAPH[file] | set(imported(line, GRAPH))}
    assert len(upward(planted, HOUSE)) == 1


def test_a_planted_circle_is_seen() -> None:
    planted = GRAPH | {"normrewrite.sites.graph": {"normrewrite.sites.neighbours"}}
    assert circle(planted)
