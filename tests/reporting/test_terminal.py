"""Summaries on a terminal: what pipes get, with colours that follow verdicts alone."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from normrewrite.cli import console as cli
from normrewrite.reporting.terminal import drawn
from normrewrite.results import Mood, Summary, Table, Title, Verdict, Wrote, text
from tests.test_results import MOODS, compared

CODES: dict[Mood, str] = {"good": "\x1b[32m", "mixed": "\x1b[33m", "bad": "\x1b[31m", "plain": ""}
TEMPTING = [
    "same function",
    "DIFFERENT",
    "can't be",
    "within fp16's tolerance: ",
    "3 sites rewritten",
    "to the bit",
    "wrote x",
]


def shown(summary: Summary, width: int = 200) -> str:
    """What a terminal of sixteen colours gets."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=width, highlight=False)
    console.print(drawn(summary, console), crop=False)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def plain(summary: Summary, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(drawn(summary, console), crop=False)
    lines = console.file.getvalue().split("\n")  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).removesuffix("\n")


def colours(output: str) -> set[str]:
    return {code for code in ("\x1b[31m", "\x1b[32m", "\x1b[33m") if code in output}


@pytest.mark.parametrize("mood", CODES)
@pytest.mark.parametrize("words", TEMPTING)
def test_colours_follow_the_mood_and_not_the_words(mood: Mood, words: str) -> None:
    for summary in ([Verdict(words, mood)], [Table(("site", "note"), [(words, words)], moods=[mood])]):
        assert colours(shown(summary)) == {CODES[mood]} - {""}
    assert not colours(shown([Title(words), Table((words,), [(words,)]), words, Wrote(words)]))


@pytest.mark.parametrize(("result", "mood"), MOODS.values(), ids=MOODS)
def test_pipes_and_terminals_tell_the_same(result: object, mood: Mood) -> None:
    summary = result.summary()  # type: ignore[attr-defined]
    assert plain(summary) == str(result)
    assert CODES[mood] in shown(summary)


CELLS = st.lists(st.text("ab.,-(%", max_size=6), min_size=3, max_size=3)


@given(st.lists(CELLS, min_size=1, max_size=4), st.integers(1, 60))
def test_tables_that_fit_are_those_of_pipes(cells: list[list[str]], width: int) -> None:
    summary = [Table(("site", "figure", "last"), cells)]
    assert plain(summary, width) == text(summary)  # too wide, the terminal wraps it


def test_the_last_column_is_wrapped_and_nothing_else() -> None:
    note = "a note of several words that is longer than what the terminal has left"
    lines = plain([Table(("site", "figure", "note"), [("layer1.0.bn1", "1.0 (0.9, 1.1)", note)])], 60).split("\n")
    assert (
        len(lines) > 2
        and all(len(line) <= 60 for line in lines)
        and lines[1].startswith("layer1.0.bn1  1.0 (0.9, 1.1)  ")
    )
    assert " ".join(" ".join(line[30:] for line in lines[1:]).split()) == note
    narrow = [Table(("site", "figure", "note"), [("layer1.0.bn1", "1.0 (0.9, 1.1)", note)])]
    assert plain(narrow, 40) == text(narrow)  # no room for words


def test_units_stand_below_their_heads() -> None:
    lines = plain([Table(("site", "time"), [("bn", "1.0")], ("", "ms"))]).split("\n")
    assert lines == ["      time", "site  ms", "bn    1.0"]


def test_control_characters_are_written_out_and_colours_stay() -> None:
    evil = "norm\x1b[2J\r\x07"
    table = Table((evil, "note"), [(evil, evil)], (evil, ""), ["bad"])
    for summary in ([Title(evil)], [Verdict(evil, "bad")], [table], [evil], [Wrote(evil)]):
        output = shown(summary)
        assert "\x1b[2J" not in output and "\r" not in output and "\x07" not in output
        assert "norm\\x1b[2J\\r\\x07" in output
    assert colours(shown([Verdict(evil, "bad")])) == colours(shown([table])) == {CODES["bad"]}


def test_a_command_shows_it_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    different = compared(1.0)  # its output is called `same function`
    with cli.visible_streams():
        cli.show(different)
    output = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert colours(output) == {CODES["bad"]} and "\x1b[31mDIFFERENT: " in output and "same function" in output
