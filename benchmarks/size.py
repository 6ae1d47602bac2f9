"""What converting a large checkpoint costs: time and peak memory at 1, 10 and 100 times the size, by form of file.

    python -m benchmarks.size                 # about two minutes, 5 GB of disk; writes results/size.json and docs/size.svg

Each conversion is a process of its own, `normrewrite convert ... --to l1`. Peak: the most of its memory that was resident,
mapped pages of the file included, as the kernel counts it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.figure import save
from benchmarks.stamp import RESULTS, markdown, write

FORMS = {"module": "pt", "state_dict": "pt", "safetensors": "safetensors"}
BLOCKS = 14  # of convolution and batch norm; their width makes the size
WIDTHS = (204, 648, 2048)  # about 21 MB, 212 MB and 2.1 GB
GOAL = 1.3
# The command, and what the kernel says of its memory; ru_maxrss would count the parent's before exec, too.
_CHILD = """
import re, sys
from normrewrite.cli import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def network(width: int) -> nn.Sequential:
    """`--arch benchmarks/size.py:network --arch-args width=648`"""
    blocks = [
        layer
        for i in range(BLOCKS)
        for layer in (nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    ]
    return nn.Sequential(*blocks).eval()


def write_checkpoint(width: int, form: str, folder: Path) -> Path:
    path = folder / f"network.{FORMS[form]}"
    model = network(width)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    if form == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model if form == "module" else model.state_dict(), path)
    return path


def converted(path: Path, width: int, form: str) -> tuple[float, int]:
    """Seconds and peak bytes of one conversion."""
    arch = [] if form == "module" else ["--arch", f"{__file__}:network", "--arch-args", f"width={width}"]
    output = path.with_name(f"twin{path.suffix}")
    words = ["convert", str(path), "--to", "l1", "-o", str(output), "--force", "--quiet", *arch]
    started = time.perf_counter()
    child = subprocess.run([sys.executable, "-c", _CHILD, *words], stdout=subprocess.PIPE, text=True)
    if child.returncode:
        raise SystemExit(f"convert failed on {path}")
    return time.perf_counter() - started, int(child.stdout) * 1024


def measure(widths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for width in widths:
        for form in FORMS:
            with tempfile.TemporaryDirectory(dir=".") as folder:
                path = write_checkpoint(width, form, Path(folder))
                size = path.stat().st_size
                seconds, peak = converted(path, width, form)
            yield {"form": form, "bytes": size, "seconds": seconds, "peak": peak, "peak_to_file": peak / size}


def plot(results: list[dict[str, Any]], idle: int) -> Path:
    def draw(figure: Any) -> None:
        memory, seconds = figure.subplots(1, 2)
        for form in FORMS:
            of_form = [each for each in results if each["form"] == form]
            sizes = [each["bytes"] / 1e6 for each in of_form]
            memory.plot(sizes, [each["peak"] / 1e6 for each in of_form], "o-", label=form)
            seconds.plot(sizes, [each["seconds"] for each in of_form], "o-", label=form)
        least = [idle / 1e6 + size for size in sizes]
        memory.plot(sizes, least, "--", color="grey", label="the file, and Python with torch")
        for axes, says in ((memory, "peak memory, MB"), (seconds, "seconds, whole process")):
            axes.set(xscale="log", yscale="log", xlabel="file, MB", ylabel=says)
        memory.legend()

    return save(draw, RESULTS.parent.parent / "docs" / "size.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        _, idle = converted(write_checkpoint(4, "module", Path(folder)), 4, "module")
    results = []
    for result in measure(tuple(options.widths)):
        results.append(result)
        print(result, flush=True)
    rows = [
        [
            each["form"],
            f"{each['bytes'] / 1e6:,.0f}",
            f"{each['seconds']:.1f}",
            f"{each['peak'] / 1e6:,.0f}",
            f"{each['peak_to_file']:.2f}",
        ]
        for each in results
    ]
    path = write("size", {"idle": idle, "goal": GOAL, "results": results})
    print(markdown(["form", "file, MB", "seconds", "peak, MB", "peak / file"], rows))
    print(f"wrote {path} and {plot(results, idle)}")


if __name__ == "__main__":
    main()
