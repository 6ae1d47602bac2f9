"""Fine-tuning with differential privacy, by Opacus: ResNet-20, trained on CIFAR-10, on inverted images, from four starts.

    pip install opacus --no-deps
    python -m benchmarks.private ../shared/data       # about a minute a training on a busy core; writes results/private.json

The network and the 512 images that fit the norms are taken for public, the inverted images for private. Every start has the same
images, seeds, clipping, epsilon and list of learning rates; each takes the rate that does best on 500 held-out inverted images
(mean over seeds), and is told by its top-1 on others. Epsilon is of one training: choosing among rates costs more, alike for all.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import normrewrite as nr
from benchmarks.stamp import markdown, write
from benchmarks.targets import outputs, top1

PUBLIC, HELD_OUT = 512, 500
DELTA, CLIP = 1e-4, 1.0
Labelled = tuple[Tensor, Tensor]


def starts(model: nn.Module, public: Tensor) -> dict[str, Callable[[], nn.Module]]:
    """Each network before its private training."""
    from opacus.validators import ModuleValidator

    def fitted(to: str) -> nn.Module:
        return nr.calibrate(nr.convert(model, to), public, batch_size=64)[0]

    return {
        "Opacus fix": lambda: ModuleValidator.fix(model),
        "frozen": lambda: nr.convert(model, "frozen"),
        "group:4": lambda: fitted("group:4"),
        "layer": lambda: fitted("layer"),
    }


def trained(start: nn.Module, data: Labelled, lr: float, seed: int, options: Any) -> nn.Module:
    """A copy of the start, after its private epochs."""
    from opacus import PrivacyEngine

    torch.manual_seed(seed)
    network = deepcopy(start).train()
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    private, optimizer, loader = PrivacyEngine().make_private_with_epsilon(
        module=network,
        optimizer=torch.optim.SGD(learned, lr, momentum=0.9),
        data_loader=DataLoader(TensorDataset(*data), options.batch_size),
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        epochs=options.epochs,
        max_grad_norm=CLIP,
    )
    for _ in range(options.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            if len(labels):  # Poisson sampling may draw none
                cross_entropy(private(images), labels).backward()
                optimizer.step()
    plain: nn.Module = private.to_standard_module()
    return plain.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Labelled) -> float:
    return float(top1(outputs(model.eval(), data[0]), data[1]))


def measure(make: Callable[[], nn.Module], data: Labelled, held_out: Labelled, test: Labelled, options: Any) -> Any:
    """One start: by learning rate, the accuracies of each seed."""
    start = make()
    began, rates = time.perf_counter(), {}
    for lr in options.lr:
        networks = [trained(start, data, lr, seed, options) for seed in range(options.seeds)]
        rates[str(lr)] = {
            "held_out": [accuracy(n, held_out) for n in networks],
            "test": [accuracy(n, test) for n in networks],
        }
    best = max(rates, key=lambda lr: mean(rates[lr]["held_out"]))
    seconds = time.perf_counter() - began
    return {
        "before": accuracy(start, test),
        "rates": rates,
        "lr": best,
        "test": rates[best]["test"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with zoo.py, load.py and weights/")
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    options = parser.parse_args()
    os.environ["NORMREWRITE_DATA"] = str(options.data.resolve())
    warnings.simplefilter("ignore")  # Opacus's, of hooks and of randomness that is no cryptographer's
    from tests.conftest import NETWORKS, real_images

    model = NETWORKS[0].make().eval()
    images, labels = real_images("train", PUBLIC + HELD_OUT + options.images)
    public, held, private = (slice(0, PUBLIC), slice(PUBLIC, PUBLIC + HELD_OUT), slice(PUBLIC + HELD_OUT, None))
    test_images, test_labels = real_images("test", options.test)
    test = -test_images, test_labels
    results, lines = {}, []
    for name, make in starts(model, images[public]).items():
        results[name] = measure(make, (-images[private], labels[private]), (-images[held], labels[held]), test, options)
        found = results[name]
        spread = " ".join(f"{100 * value:.1f}" for value in found["test"])
        lines.append(
            [
                name,
                f"{100 * found['before']:.1f}",
                f"{100 * mean(found['test']):.1f}",
                spread,
                found["lr"],
                f"{found['seconds']:.0f}",
            ]
        )
        print(" ".join(lines[-1]), flush=True)
    asked = {name: value for name, value in vars(options).items() if name != "data"}
    content = {"delta": DELTA, "clip": CLIP, "original": accuracy(model, test), **asked, "starts": results}
    print(markdown(["start", "before (%)", "after (%)", "each seed", "lr", "seconds"], lines))
    print(write("private", content, "opacus"))


if __name__ == "__main__":
    main()
