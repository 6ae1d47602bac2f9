"""What comes from outside, looked at before it is believed: names, texts for a terminal, nests of lists.

>>> visible("norm\\x1b[2J")
'norm\\\\x1b[2J'
"""

import re
from collections.abc import Iterator
from typing import Any

# Quotes, backslashes and control characters: torch.fx writes names into the source code that it makes, as they are.
_NO_NAME = re.compile("[\"'\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
LARGEST = 2**31 - 1
UNPACKED, RATIO = 1 << 29, 50  # bytes that anything may unpack to; what more than that may be, of its packed size
CODE = "names with quotes, backslashes or control characters could be read as code"
# What moves a cursor, ends a line, turns the direction of writing, or can't be written at all.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
NESTED, DEEPEST = 1_000_000, 100  # things in a nest of lists, counted at each place where they stand; levels


def is_name(text: object) -> bool:
    """Whether a text may name a module or a tensor: what would be code, or would act on a terminal, may not."""
    return isinstance(text, str) and not _NO_NAME.search(text)


def count(text: str) -> int | None:
    """A whole number from 1 that all of torch takes; None where the text is none."""
    try:
        number = int(text) if len(text) <= len(str(LARGEST)) else 0
    except ValueError:
        return None
    return number if 1 <= number <= LARGEST else None


def visible(text: str) -> str:
    """A text with every character that acts on a terminal written out; lines and tabs stay."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


def swells(packed: int, unpacked: int) -> bool:
    """Whether packed bytes make so much more that they are not data that somebody has packed."""
    return unpacked > UNPACKED and unpacked > RATIO * packed


def endless(nest: object, most: int = NESTED) -> bool:
    """Whether lists, tuples, sets and dicts are nested so that going through them would not end soon.

    A list that stands at two places counts twice, and what it holds twice as well: forty such lists hold a million million.
    """
    waiting: list[Iterator[Any]] = [iter([nest])]
    while waiting:
        inner = next(waiting[-1], waiting)
        if inner is waiting:
            waiting.pop()
            continue
        most -= 1
        if most < 0 or len(waiting) > DEEPEST:
            return True
        if isinstance(inner, dict):
            waiting.append(iter([*inner.keys(), *inner.values()]))
        elif isinstance(inner, list | tuple | set | frozenset):
            waiting.append(iter(inner))
    return False
