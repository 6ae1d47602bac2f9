"""What stands behind an instruction of a pickle: names, texts and numbers, each with where the next instruction is.

>>> ARGUMENTS["int"](b"\\x05\\x00\\x00\\x00", 0)
(5, 4)
"""

from collections.abc import Callable
from struct import unpack
from typing import Any


class Global(str):
    """The dotted name of a global that the file asks for."""

    __slots__ = ()


def _global(content: Any, at: int) -> tuple[Global, int]:
    middle = content.find(b"\n", at)
    end = content.find(b"\n", middle + 1)
    if not at <= middle < end:
        raise EOFError("the pickle has no end")
    module = str(content[at:middle], "utf-8")
    if module == "__builtin__":  # as Python 2 called it, and pickles still do
        module = "builtins"
    return Global(f"{module}.{str(content[middle + 1 : end], 'utf-8')}"), end + 1


def _string(content: Any, at: int, width: int) -> tuple[bytes, int]:
    """Bytes behind their number."""
    start = at + width
    end = start + int.from_bytes(content[at:start], "little")
    return content[start:end], end


def _unicode(content: Any, at: int) -> tuple[str, int]:
    text, end = _string(content, at, 4)
    return str(text, "utf-8", "surrogatepass"), end


ARGUMENTS: dict[str, Callable[[Any, int], tuple[Any, int]]] = {
    "global": _global,
    "int": lambda content, at: (unpack("<i", content[at : at + 4])[0], at + 4),
    "short": lambda content, at: _string(content, at, 1),
    "text": _unicode,
}
