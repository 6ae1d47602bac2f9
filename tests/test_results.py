"""Results have one form, their text is that form's, and a verdict's mood is what was judged."""

import importlib
import pkgutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normrewrite as nr
from normrewrite.commands.audit import Audit, Finding
from normrewrite.commands.diff import Difference, SiteDifference
from normrewrite.commands.results import Converted, Reverted
from normrewrite.diagnostics.comparison import Comparison, OutputDifference
from normrewrite.diagnostics.training_mode import TrainingDistance
from normrewrite.provenance.report import SiteResult
from normrewrite.reporting.printout import Printout
from normrewrite.results import Mood, Printable, Result, Table, Title, Verdict, Wrote, apart, text
from normrewrite.tolerances import LIMITS

ROOMS = ("provenance", "diagnostics", "training", "api", "reporting", "commands")


PARTS = {"Document", "Facts", "History", "LearnedRanges", "OutputDifference"}  # of results and records


def classes() -> Iterator[type]:
    """Those that the rooms define which make results."""
    for room in ROOMS:
        package = importlib.import_module(f"normrewrite.{room}")
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            yield from (
                kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == info.name
            )


# --- one form ---------------------------------------------------------------------------------------------------------


def test_what_has_a_dictionary_has_a_summary_and_no_words_of_its_own() -> None:
    """mypy holds that commands show results alone (normrewrite.cli.console.show)."""
    kinds = [kind for kind in classes() if "as_dict" in vars(kind)]
    assert {kind.__name__ for kind in kinds if not issubclass(kind, Result)} == PARTS
    assert {Converted, Comparison, Audit, Difference, Printout, nr.Report} <= set(kinds)
    own = [kind for kind in classes() if {"__str__", "__rich__", "__rich_console__", "rich"} & set(vars(kind))]
    assert not own


def test_what_has_no_summary_is_no_result() -> None:
    class Half(Result):
        def as_dict(self) -> dict[str, object]:
            return {}

    with pytest.raises(TypeError, match="summary"):
        Half()  # type: ignore[abstract]


# --- plain text -------------------------------------------------------------------------------------------------------

CELLS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9)


@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_columns_begin_below_each_other(cells: list[list[str]]) -> None:
    lines = text([Table(cells[0], cells[1:])]).split("\n")
    assert [line.split() for line in lines] == cells
    assert all(line == line.rstrip() for line in lines)
    for i in range(1, len(cells[0])):
        assert {_begin(line, i) for line in lines} == {
            2 * i + sum(max(len(line[j]) for line in cells) for j in range(i))
        }


def _begin(line: str, column: int) -> int:
    """Where a column of cells without blanks begins."""
    at = 0
    for cell in line.split()[:column]:
        at = line.index(cell, at) + len(cell)
    return at + len(line[at:]) - len(line[at:].lstrip())


def test_parts_stand_one_below_the_other() -> None:
    parts = [Title("net"), Verdict("fine", "good"), Table(("a", "b"), [("1", "")], ("", "ms")), Wrote("x.pt"), "note"]
    assert text(parts) == "net\nfine\na  b (ms)\n1\nwrote x.pt\nnote"
    assert text(apart([["a"], ["b", "c"]])) == "a\n\nb\nc" and text([]) == ""


# --- moods ------------------------------------------------------------------------------------------------------------


def compared(gap: float, precision: str = "fp32", given: bool = False) -> Comparison:
    output = OutputDifference("same function")
    values = torch.randn(20, 5)
    output.add(values + gap * torch.randn(20, 5), values)
    return Comparison([output], LIMITS[precision], precision, False, 20, given)


def site(difference: float | None, tolerance: float | None) -> SiteResult:
    return SiteResult(("bn",), "BatchNorm2d", 4, "l1", difference, tolerance, None)


EXACT, WRONG, INEXACT, LIVE = site(1e-7, 5e-6), site(1e-3, 5e-6), site(None, None), site(None, 5e-6)
LEFT = SiteResult(("bn",), "BatchNorm2d", 4, None, None, None, "can't be rewritten")
FAILED = Finding("tensor", "same function", False, "to the bit")

MOODS: dict[str, tuple[Printable, Mood]] = {
    "exact sites": (nr.Report([EXACT, LEFT]), "good"),
    "nothing rewritten": (nr.Report([LEFT]), "plain"),
    "some inexact": (nr.Report([EXACT, INEXACT]), "mixed"),
    "live statistics": (nr.Report([LIVE]), "mixed"),
    "beyond tolerance": (nr.Report([EXACT, INEXACT, WRONG]), "bad"),
    "same function": (compared(0.0), "good"),
    "within fp16": (compared(1e-4, "fp16"), "good"),
    "within what was asked": (compared(1e-4, "fp16", True), "plain"),
    "another function": (compared(1.0), "bad"),
    "another function, as asked": (compared(1.0, given=True), "bad"),
    "manifest": (Audit("twin.pt", [], []), "good"),
    "another manifest": (Audit("twin.pt", [FAILED], []), "bad"),
    "no difference": (Difference(("a", "b"), [], [], (1, 2)), "good"),
    "a difference": (Difference(("a", "b"), [SiteDifference("same", None, "l1")], [], (1, 2)), "bad"),
    "reverted": (Reverted(["bn"], [], "x.pt"), "good"),
    "reverted after training": (Reverted(["bn"], ["bn"], "x.pt"), "mixed"),
    "no nearer": (TrainingDistance(8, (0.1, 0.2), None, None), "mixed"),
}


@pytest.mark.parametrize(("result", "mood"), MOODS.values(), ids=MOODS)
def test_moods(result: Printable, mood: Mood) -> None:
    (verdict,) = (part for part in result.summary() if isinstance(part, Verdict))
    assert verdict.mood == mood and verdict.text in str(result)


def test_a_whole_network_has_its_own_verdict() -> None:
    verdicts = [
        p for p in Converted(nr.Report([EXACT]), "x.pt", "module", compared(1.0)).summary() if isinstance(p, Verdict)
    ]
    assert [verdict.mood for verdict in verdicts] == ["good", "bad"]
