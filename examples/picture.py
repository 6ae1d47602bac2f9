"""Draws docs/demo.svg, the picture in the README, from what the commands really print.

python examples/picture.py
"""

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from normrewrite.cli.console import style_of

HERE = Path(__file__).resolve().parent
COMMANDS = (
    "normrewrite convert digits.pt --arch digits.py:digits_resnet --to l1 --input-shape 8,1,8,8",
    "normrewrite verify digits.pt digits.l1.pt --arch digits.py:digits_resnet --data digits.npz",
    "normrewrite export digits.l1.pt --arch digits.py:digits_resnet --input-shape 1,1,8,8 -o digits.onnx",
    "normrewrite verify digits.pt digits.onnx --arch digits.py:digits_resnet --data digits.npz",
    "normrewrite revert digits.l1.pt --arch digits.py:digits_resnet",
)


def main() -> None:
    console = Console(record=True, width=118, file=sys.stdout)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("digits.pt", "digits.py", "digits.npz"):
            (Path(folder) / name).write_bytes((HERE / name).read_bytes())
        for command in COMMANDS:
            console.print(Text(f"$ {command}", style="bold cyan"), soft_wrap=False)
            program, *arguments = shlex.split(command)
            run = [str(Path(sys.executable).with_name(program)), *arguments]
            done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                console.print(Text(line, style=style_of(line)), soft_wrap=True)
            console.print()
    target = HERE.parent / "docs" / "demo.svg"
    target.parent.mkdir(exist_ok=True)
    console.save_svg(str(target), title="normrewrite")
    print(f"wrote {target.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
