"""Bytes that a norm moves on a GPU, forward and backward: counted from what would be launched, without a GPU.

    python -m benchmarks.gpu_traffic          # a second; writes the table of docs/kernels.md

A kernel reads and writes each tensor that it is given once; `select` alone reads x in part, the parts that lead. Native
batch norm, addition and ReLU are counted from torch's operators, one by one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.stamp import markdown
from normrewrite.backends.triton import launch
from normrewrite.backends.triton.ahead import Launch, recorded
from normrewrite.norms import metric

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
METRICS = ("l1", "linf", "range", "topk:10", "l2")
FORMS = ("plain", "relu", "add")  # the norm alone, relu(norm), relu(norm + residual)


class Norms(NamedTuple):
    """Norms of one shape in a ResNet-50 at 224 × 224."""

    channels: int
    side: int
    form: str
    count: int

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        return batch, self.channels, self.side, self.side


RESNET50 = (
    Norms(64, 112, "relu", 1),
    Norms(64, 56, "relu", 6),
    Norms(256, 56, "add", 3),
    Norms(256, 56, "plain", 1),
    Norms(128, 56, "relu", 1),
    Norms(128, 28, "relu", 7),
    Norms(512, 28, "add", 4),
    Norms(512, 28, "plain", 1),
    Norms(256, 28, "relu", 1),
    Norms(256, 14, "relu", 11),
    Norms(1024, 14, "add", 6),
    Norms(1024, 14, "plain", 1),
    Norms(512, 14, "relu", 1),
    Norms(512, 7, "relu", 5),
    Norms(2048, 7, "add", 3),
    Norms(2048, 7, "plain", 1),
)

# Reads and writes of whole tensors. BN: x twice and y; back g and x twice and dx. ReLU: 2 and 3. An addition: 3 and none.
NATIVE = {"plain": 8, "relu": 13, "add": 16}
# What the goals of the project were set by.
FLOORS = {("l1", "relu"): 1.58, ("linf", "relu"): 1.81, ("range", "relu"): 1.81}


def batch_launches(spec: str, shape: Sequence[int], form: str, dtype: torch.dtype = torch.float16) -> list[Launch]:
    """What a batch norm would launch on channels-last tensors, forward and backward."""
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    weight, relu = torch.empty(shape[1], device="meta"), form != "plain"
    norm, added = (metric(spec), "exact", 1e-5), torch.empty_like(x) if form == "add" else None
    with recorded() as launched:
        _, *saved = launch.forward(x, added, weight, weight, *norm, relu=relu)
        launch.backward(x, x, weight, weight, *saved, *norm, relu=relu, residual=added is not None)
    return launched


def row_launches(spec: str, rows: int, width: int, dtype: torch.dtype = torch.float16) -> list[Launch]:
    """What a layer norm would launch, forward and backward."""
    x, weight = torch.empty(rows, 1, width, 1, dtype=dtype, device="meta"), torch.empty(1, width, device="meta")
    norm = (metric(spec), "exact", 1e-5)
    with recorded() as launched:
        _, *saved = launch.forward(x, None, weight, weight, *norm, sample=True)
        launch.backward(x, x, weight, weight, *saved, *norm, sample=True)
    return launched


def moved(launches: Sequence[Launch]) -> int:
    """Bytes read and written by launches."""
    return sum(_moved(each.kernel.__name__, each.arguments) for each in launches)


def _moved(kernel: str, arguments: dict[str, Any]) -> int:
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    if kernel == "correct":  # a sector of 32 bytes an element
        sparse = arguments["indices_ptr"]
        return 2 * 32 * sparse.numel() + sparse.nbytes + arguments["signs_ptr"].nbytes
    read_again = 0
    if kernel == "select":
        x = tensors.pop("x_ptr")
        element = 32 if arguments["COLUMNS"] else x.element_size()  # an element of a column is a sector of its own
        read_again = 2 * arguments["k"] * arguments["PART"] * arguments["mean_ptr"].numel() * element
    return read_again + sum(tensor.nbytes for tensor in tensors.values())


def passes(spec: str, form: str, shape: Sequence[int] = (256, 256, 56, 56)) -> float:
    """Bytes moved in units of x's size."""
    size = 2 * torch.Size(shape).numel()
    return moved(batch_launches(spec, shape, form)) / size


def table() -> str:
    """Reads and writes of whole tensors by metric and form, and how much less that is than native."""
    head = [
        "metric",
        *(f"{_NAMES[form]}: passes" for form in FORMS),
        *(f"{_NAMES[form]}: native / ours" for form in FORMS),
    ]
    lines = [["native", *(str(NATIVE[form]) for form in FORMS), "1", "1", "1"]]
    for spec in METRICS:
        counted = [passes(spec, form) for form in FORMS]
        ratios = [NATIVE[form] / count for form, count in zip(FORMS, counted, strict=True)]
        lines.append([f"`{spec}`", *(f"{count:.2f}" for count in counted), *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown(head, lines)


_NAMES = {"plain": "norm", "relu": "norm + ReLU", "add": "norm + add + ReLU"}


def main() -> None:
    before, begin, rest = PAGE.read_text().partition("<!-- traffic -->\n")
    _, end, after = rest.partition("<!-- /traffic -->")
    PAGE.write_text(f"{before}{begin}{table()}\n{end}{after}")
    print(table())


if __name__ == "__main__":
    main()
