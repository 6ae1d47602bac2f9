"""Numbers of numpy in a checkpoint, as a best accuracy often is: read as plain numbers, without numpy's own constructors.

>>> number(Dtype("f8"), b"\\x00\\x00\\x00\\x00\\x00\\x00\\xe0?")
0.5
"""

import re
from typing import Any

import numpy as np

KIND = re.compile(r"[biufc]\d{1,2}|[US]\d{1,4}")  # numpy's codes of numbers and words


class Dtype:
    """What stands in a pickle for numpy's dtype of a number or a word."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def number(dtype: Dtype, content: bytes) -> Any:
    """The Python number, or text, that these bytes are."""
    return np.frombuffer(content, np.dtype(dtype.order + dtype.code)).item()


# By the names that pickles of numpy 1 and 2 have for them.
DTYPE = "numpy.dtype"
NUMBERS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
GLOBALS: dict[str, Any] = {DTYPE: Dtype, **dict.fromkeys(NUMBERS, number)}
