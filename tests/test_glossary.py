"""The glossary: each word once and in order, each place that it names is there, and no room is left out."""

import ast
import re
from itertools import chain
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "normrewrite"
PAGE = (ROOT / "docs/glossary.md").read_text("utf-8")
LINES = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")][2:]
WORDS = [word for word, _, _ in LINES]
PLACES = [place for *_, cell in LINES for place in re.findall(r"`([^`]+)`", cell)]
ROOMS = {path.stem for path in PACKAGE.iterdir() if re.fullmatch(r"[a-z]\w*(\.py)?", path.name) and path.stem[0] != "_"}


def file_of(module: Path) -> Path | None:
    """A module's file, by its path without an ending."""
    return next((path for path in (module / "__init__.py", module.with_suffix(".py")) if path.is_file()), None)


def defined(file: Path) -> set[str]:
    """What stands in a file by name: definitions, and constants."""
    body = ast.parse(file.read_text("utf-8")).body
    targets = chain.from_iterable(
        [n.target] if isinstance(n, ast.AnnAssign) else n.targets
        for n in body
        if isinstance(n, ast.AnnAssign | ast.Assign)
    )
    return {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)} | {ast.unparse(n) for n in targets}


def is_there(place: str) -> bool:
    parent, _, name = place.rpartition(".")
    file = file_of(PACKAGE / parent.replace(".", "/")) if parent else None
    return file_of(PACKAGE / place.replace(".", "/")) is not None or (file is not None and name in defined(file))


def test_each_word_once_and_in_order() -> None:
    words = [word.lower() for cell in WORDS for word in cell.split(", ")]
    assert len(set(words)) == len(words)
    assert sorted(WORDS, key=str.lower) == WORDS


def test_each_place_is_there() -> None:
    assert [place for place in PLACES if not is_there(place)] == []


@pytest.mark.parametrize("place", ["norms.Metrics", "lower", "passes.base.Sites", "api.plan.Choice.site"])
def test_others_are_not(place: str) -> None:
    assert not is_there(place)


def test_no_room_is_left_out() -> None:
    assert ROOMS - {place.partition(".")[0] for place in PLACES} == set()


def test_each_word_has_a_place() -> None:
    assert [word for word, _, cell in LINES if "`" not in cell] == []
