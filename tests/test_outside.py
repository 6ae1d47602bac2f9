"""Names, texts and nests from outside: what may pass, and what a terminal gets to see."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normrewrite.cli import console
from normrewrite.outside import DEEPEST, LARGEST, count, endless, is_name, swells, visible

ACTING = ["\x1b[2J", "\r", "\x07", "\x9b2J", "\u2028", "\u202e", "\ud800", "\x00", "\x85"]


@pytest.mark.parametrize("text", ["conv1", "class", "1 + 1", "Größe", "層", "a b", "", "x[0]", "a.b-c/d"])
def test_names_of_networks_pass(text: str) -> None:
    assert is_name(text) and visible(text) == text


@pytest.mark.parametrize("text", ['"', "'", "\\", "\n", *ACTING[:7]])
def test_what_could_be_code_is_no_name(text: str) -> None:
    assert is_name("\u202e") and is_name(f"a{text}b") == (text == "\u202e")


@given(st.text())
def test_a_name_stays_itself_in_source_code(text: str) -> None:
    """As torch.fx writes it: between quotes, unescaped, on one line."""
    if is_name(text):
        assert eval(f'"{text}"') == eval(f"'{text}'") == text
        assert len(f"a{text}b".splitlines()) == 1


def test_only_texts_are_names() -> None:
    assert not is_name(3) and not is_name(None) and not is_name(b"a")


@given(st.text() | st.sampled_from(ACTING))
def test_nothing_that_acts_on_a_terminal_is_left(text: str) -> None:
    shown = visible(text)
    assert all(char in "\n\t" or char.isprintable() or ord(char) > 0x9F for char in shown)
    assert shown.encode().decode() == shown == visible(shown)
    assert not any(acting in shown for acting in ACTING)


def test_what_is_shown_tells_what_it_was() -> None:
    assert visible("a\x1b[2Jb\n\u202e\t\ud800") == "a\\x1b[2Jb\n\\u202e\t\\ud800"


def knot(times: int) -> list[object]:
    found: list[object] = []
    for _ in range(times):
        found = [found, found]
    return found


def test_nests() -> None:
    deep: object = {}
    for _ in range(DEEPEST + 1):
        deep = {"a": (deep,)}
    ring: list[object] = []
    ring.append(ring)
    assert endless(knot(40)) and endless(deep) and endless(ring)
    assert not endless(knot(10)) and not endless({"a": [1, {2}, (3, {"b": None})]}) and not endless("text")
    assert endless([0] * 11, most=11) and not endless([0] * 10, most=11)


@pytest.mark.parametrize("text", ["0", "-1", "", "x", "1.5", "1e3", "9" * 5000, str(LARGEST + 1)])
def test_no_counts(text: str) -> None:
    assert count(text) is None


def test_counts() -> None:
    assert (count("1"), count(" 12"), count(str(LARGEST))) == (1, 12, LARGEST)


def test_what_swells() -> None:
    assert swells(1 << 20, 1 << 30) and not swells(1 << 26, 1 << 30) and not swells(1, 1 << 20)


# --- streams ----------------------------------------------------------------------------------------------------------


def test_streams_show_and_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with console.visible_streams():
        print("a\x1b[2J")
        sys.stderr.writelines(["b\r", "c\n"])
        assert not sys.stdout.isatty()
    assert (out.getvalue(), err.getvalue()) == ("a\\x1b[2J\n", "b\\rc\n")
    assert (sys.stdout, sys.stderr) == (out, err)


def test_who_puts_another_stream_in_place_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    other = io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with console.visible_streams():
        sys.stdout = other
    assert sys.stdout is other
