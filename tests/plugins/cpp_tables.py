"""Tables for the C++ library without a compiler: a kernel's code is the list of its arguments, its entry is its key.

python -m tests.plugins.cpp_tables FOLDER       in a process that interprets no kernels
"""

import sys
from pathlib import Path

from normrewrite.plugins import embedded
from normrewrite.plugins.spec import OPS


def main() -> None:
    made = [
        embedded.Kernel(name, name, 32 * launch.warps, 16, told, {80: told.encode() + b"\0"})
        for name, launch in embedded.recorded_kernels(embedded.EVERY, tuple(OPS)).items()
        for told in [embedded.arguments(launch)]
    ]
    embedded.write(made, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
