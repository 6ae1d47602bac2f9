"""Training in half alone, from scratch: which norms learn, by which accumulators, and how often statistics overflow.

    python -m benchmarks.fp16_pure ../shared/data        # minutes a line of its table; writes results/fp16_pure.json

The folder holds load.py and cifar10/ (see tests/conftest.py). CIFAR-10 at 16 x 16 (means of 2 x 2 pixels), top-1 of 10,000 test
images. A ResNet of three blocks (8, 16, 32 channels, torchvision's initialisation), whose batch norms measure 32,768, 8,192
and 2,048 elements a channel: batches of 128. One recipe for all, sgd with flips and crops. Inputs come standardised, as people
feed them; and as pixels of 0 to 255, which is how squares overflow in practice. l2 is torch's own batch norm. A run that stops,
as loss or gradient were not finite 20 times in a row, has the accuracy of the weights that it got to.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from benchmarks.stamp import markdown, write
from benchmarks.targets import outputs, top1
from normrewrite.data import Batch, Data

IMAGES = 10_000
METRICS = ("l2", "l1", "linf", "topk:10", "range")
MODES = (("fp32", "fp32"), ("fp16-pure", "fp32"), ("fp16-pure", "half:64"))
# (inputs, precision, accumulator, metric)
RUNS = [
    *(("standardised", *mode, metric) for mode in MODES for metric in METRICS),
    *(("pixels", *mode, metric) for mode in MODES for metric in ("l2", "l1")),
]
RECIPE: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.1,
    "warmup": 20,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "crop": 2,
}


class Block(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        stride = width // width_in
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


def network(metric: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    stem = (nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    blocks = (Block(8, 8), Block(8, 16), Block(16, 32))
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model if metric == "l2" else nr.convert(model, metric)


def images(split: str, count: int, scale: str) -> tuple[Tensor, Tensor]:
    """(count, 3, 16, 16) fp32, standardised or 0 to 255, and labels."""
    from tests.conftest import REAL, _module

    pixels, labels = _module(REAL / "load.py").cifar10(split, (count + 4999) // 5000)
    x = F.avg_pool2d(torch.from_numpy(pixels[:count]).permute(0, 3, 1, 2).float(), 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)))
    return (x - mean) / std if scale == "standardised" else x, torch.from_numpy(labels[:count])


def measure(run: tuple[str, str, str, str], seed: int, recipe: dict[str, Any], data: Any) -> dict[str, Any]:
    scale, precision, accumulator, metric = run
    (x, labels), test = data[scale]
    model, started = network(metric, seed), time.perf_counter()
    options = RECIPE | recipe | {"precision": precision, "accumulator": accumulator, "seed": seed, "flip": True}
    record: dict[str, Any] = {
        "skipped_steps": None,
        "nonfinite_batches": None,
        "steps": None,
        "train_loss": None,
        "stopped": "",
    }
    try:
        model, result = nr.finetune_(model, Data(Batch({"input": x}, labels)), labels=True, **options)
        record |= {name: getattr(result, name) for name in ("skipped_steps", "nonfinite_batches", "steps")}
        record["train_loss"] = result.epochs[-1].loss
    except nr.NormRewriteError as error:
        if "not finite" not in str(error):
            raise
        record["stopped"] = str(error)
    with torch.no_grad():
        accuracy = top1(outputs(model.eval(), test[0]), test[1])
    settings = dict(zip(("inputs", "precision", "accumulator", "metric"), run, strict=True))
    return {**settings, "seed": seed, "accuracy": accuracy, **record, "seconds": time.perf_counter() - started}


def row(results: list[dict[str, Any]]) -> list[str]:
    """One line of the table: mean and range over seeds."""
    first, accuracies = results[0], [100 * result["accuracy"] for result in results]
    ended = [result for result in results if not result["stopped"]]

    def counts(name: str) -> str:
        return ", ".join(str(result[name]) for result in ended) or "–"

    return [
        first["inputs"],
        first["precision"] if first["precision"] == "fp32" else f"fp16-pure, {first['accumulator']}",
        f"`{first['metric']}`",
        f"{statistics.mean(accuracies):.2f}",
        f"{min(accuracies):.2f} to {max(accuracies):.2f}",
        counts("nonfinite_batches"),
        counts("skipped_steps"),
        f"{len(results) - len(ended)} of {len(results)}",
    ]


HEAD = ["inputs", "precision, sums", "norms", "top-1 (%)", "range", "batches not finite", "steps skipped", "stopped"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with load.py and cifar10/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=IMAGES, help="for training")
    parser.add_argument("--only", nargs="*", default=[], help="runs that hold these words, as in pixels l1")
    parser.add_argument("--metrics", nargs="*", default=METRICS, help="these metrics")
    parser.add_argument("--output", default="fp16_pure", help="name of the result")
    options = parser.parse_args()
    os.environ["NORMREWRITE_DATA"] = str(options.data.resolve())
    os.environ.setdefault("NORMREWRITE_TEST_THREADS", str(os.cpu_count()))

    scales = ("standardised", "pixels")
    data = {
        scale: (images("train", options.images, scale), images("test", min(10_000, options.images), scale))
        for scale in scales
    }
    chosen = [run for run in RUNS if all(word in run for word in options.only) and run[3] in options.metrics]
    results, rows = [], []
    for run in chosen:
        own = [measure(run, seed, {"epochs": options.epochs}, data) for seed in range(options.seeds)]
        results += own
        rows.append(row(own))
        print(" | ".join(rows[-1]), f"| {sum(result['seconds'] for result in own):.0f} s", flush=True)
    content = {"recipe": RECIPE | {"epochs": options.epochs, "images": options.images}, "runs": results}
    print(f"\n{markdown(HEAD, rows)}\n\nwrote {write(options.output, content, 'accelerate')}")


if __name__ == "__main__":
    main()
