"""Where the library of plugins in C++ is, and how it comes there.

>>> built()                                                # once cmake --install has put it there
PosixPath('/home/me/.local/share/normrewrite/libnormrewrite_plugins.so')
"""

import os
from pathlib import Path

from normrewrite.errors import NormRewriteError

SOURCES = Path(__file__).resolve().with_name("cpp")
COMMANDS = (
    'cmake -S "$(normrewrite plugins cmake)" -B build -DTENSORRT_INCLUDE=/path/to/TensorRT/include',
    "cmake --build build",
    "cmake --install build",
)


def place() -> Path:
    """Where cmake --install puts it: $XDG_DATA_HOME, or ~/.local/share."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "normrewrite" / "libnormrewrite_plugins.so"


def built() -> Path:
    """The library. Raises NormRewriteError, with the commands that build it, where there is none."""
    if not place().is_file():
        raise NormRewriteError(
            f"{place()}: the library has not been built. Run:\n  " + "\n  ".join(COMMANDS), exit_code=1
        )
    return place()
