"""Twins that can't be exact, calibrated and then repaired without labels: ResNet-20 on CIFAR-10.

    python -m benchmarks.repair ../shared/data       # some minutes a target on two cores; writes results/repair.json

The folder holds zoo.py, load.py and weights/ (see tests/conftest.py). Calibrated on 512 training images, repaired on 5,000
(the original's logits teach, mean square error), top-1 of the 10,000 test images; the time is that of the repair alone.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normrewrite as nr
from benchmarks.stamp import markdown, write
from benchmarks.targets import outputs, top1

TARGETS = ("l1", "linf", "topk:10", "bwn", "layer", "group:4", "group:8")
ALLOWED = {"layer": 1.5, "group:4": 1.5, "group:8": 2.0}  # points below the original
CALIBRATION, TRAINING = 512, 5000


def measure(model: nn.Module, to: str, images: Tensor, test: tuple[Tensor, Tensor], recipe: dict[str, Any]) -> Any:
    """One target. images: for training; test: images and labels."""
    twin = nr.convert(model, to)
    if not to.startswith("bwn"):
        twin, _ = nr.calibrate(twin, images[:CALIBRATION], batch_size=64)
    calibrated = top1(outputs(twin.eval(), test[0]), test[1])
    started = time.perf_counter()
    repaired, result = nr.finetune(twin, images, **recipe)
    seconds = time.perf_counter() - started
    return {
        "target": to,
        "calibrated": calibrated,
        "repaired": top1(outputs(repaired.eval(), test[0]), test[1]),
        "seconds": seconds,
        **result.as_dict(),
    }


def row(result: Any, original: float) -> list[str]:
    drop = 100 * (original - result["repaired"])
    return [
        f"`{result['target']}`",
        f"{100 * result['calibrated']:.2f}",
        f"{100 * result['repaired']:.2f}",
        f"{drop:.2f}",
        str(ALLOWED.get(result["target"], "–")),
        f"{result['seconds']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with zoo.py, load.py and weights/")
    parser.add_argument("--only", nargs="*", default=TARGETS, help="these targets")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    os.environ["NORMREWRITE_DATA"] = str(options.data.resolve())
    os.environ.setdefault("NORMREWRITE_TEST_THREADS", str(os.cpu_count()))
    from tests.conftest import NETWORKS, real_images

    recipe = {"epochs": options.epochs, "lr": options.lr, "flip": True, "crop": 2}
    model, test = NETWORKS[0].make(), real_images("test", 10_000)
    images = real_images("train", TRAINING)[0]
    with torch.no_grad():
        original = top1(outputs(model, test[0]), test[1])
    results, rows = [], []
    for to in options.only:
        results.append(measure(model, to, images, test, recipe))
        rows.append(row(results[-1], original))
        print(" ".join(rows[-1]), flush=True)
    head = ["target", "calibrated (%)", "repaired (%)", "points below the original", "allowed", "seconds"]
    content = {"original": original, "recipe": recipe, "targets": results}
    print(
        f"\noriginal {100 * original:.2f} %\n\n{markdown(head, rows)}\n\nwrote {write('repair', content, 'accelerate')}"
    )


if __name__ == "__main__":
    main()
