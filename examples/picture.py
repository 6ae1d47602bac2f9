"""Draws docs/demo.svg, the picture in the README, from what the commands really print on a terminal.

python examples/picture.py
"""

import io
import os
import shlex
import sys
import tempfile
from contextlib import chdir, redirect_stdout
from pathlib import Path

from rich.console import Console
from rich.text import Text

from normrewrite.cli import app

WIDTH = 118
HERE = Path(__file__).resolve().parent
COMMANDS = (
    "normrewrite convert digits.pt --arch digits.py:digits_resnet --to l1 --input-shape 8,1,8,8",
    "normrewrite verify digits.pt digits.l1.pt --arch digits.py:digits_resnet --data digits.npz",
    "normrewrite export digits.l1.pt --arch digits.py:digits_resnet --input-shape 1,1,8,8 -o digits.onnx",
    "normrewrite verify digits.pt digits.onnx --arch digits.py:digits_resnet --data digits.npz",
    "normrewrite revert digits.l1.pt --arch digits.py:digits_resnet",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def main() -> None:
    os.environ |= {"COLUMNS": str(WIDTH), "TERM": "xterm"}
    console = Console(record=True, width=WIDTH, file=sys.stdout)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for name in ("digits.pt", "digits.py", "digits.npz"):
            Path(name).write_bytes((HERE / name).read_bytes())
        for command in COMMANDS:
            console.print(Text(f"$ {command}", style="bold cyan"), soft_wrap=False)
            with redirect_stdout(Terminal()) as screen:
                app(shlex.split(command)[1:], standalone_mode=False)
            for line in screen.getvalue().splitlines():
                console.print(Text.from_ansi(line.rstrip()), soft_wrap=True)
            console.print()
    target = HERE.parent / "docs" / "demo.svg"
    target.parent.mkdir(exist_ok=True)
    console.save_svg(str(target), title="normrewrite")
    print(f"wrote {target.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
