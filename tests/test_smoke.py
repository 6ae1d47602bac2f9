"""`make check` runs the tests named in tests/smoke.txt: quick ones, of every room."""

import re
from pathlib import Path

from tests.conftest import ROOT

LISTED = [line.partition("::") for line in (ROOT / "tests" / "smoke.txt").read_text().split()]


def _rooms() -> set[Path]:
    """Every package of the tree; the links inside normrewrite/ are not followed."""
    package = ROOT / "normrewrite"
    inside = {path.parent.relative_to(package) for path in package.rglob("__init__.py")}
    return {*inside, Path("passes"), Path("plugins")}


def test_every_room_has_a_smoke_test() -> None:
    assert _rooms() > {Path("nn"), Path("backends/triton")}
    assert not (missing := _rooms() - {Path(file).parent.relative_to("tests") for file, _, _ in LISTED}), missing


def test_what_is_listed_is_there() -> None:
    for file, _, name in LISTED:
        assert re.search(rf"^def {name or 'test_'}", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
