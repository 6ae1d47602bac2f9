"""Int8: trained networks repaired on 8 bits and deployed, and a small one trained from scratch with 8-bit gradients.

    python -m benchmarks.int8 ../shared/data             # on two cores; writes results/int8_PART.json

The folder holds zoo.py, load.py and weights/ (see tests/conftest.py).

repaired: l1 twins on 8 bits (weights by channel, activations, residual adds) learn their fp32 original's logits, without labels
and with frozen statistics; top-1 in torch on 8 bits and of the exported file in onnxruntime, beside fp32 and beside int8 by
calibration alone. ResNet-20: 5,000 training images of CIFAR-10, all 10,000 test images. MobileNetV2: of ImageNet's 1000 images
512 train and 488 are measured; they are probably training images of its own, so the drop counts alone.

scratch: a ResNet-8 with range norms on CIFAR-10, fp32 against int8 with 8-bit gradients, same budget, three seeds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normrewrite as nr
from benchmarks.networks import resnet8
from benchmarks.stamp import markdown, write
from benchmarks.targets import outputs, top1
from normrewrite.data import Batch, Data
from normrewrite.execution import runner

Labelled = tuple[Tensor, Tensor]
PARTS = ("cifar10_resnet20", "imagenet_mobilenet_v2", "scratch")
ALLOWED = {"cifar10_resnet20": 0.5, "imagenet_mobilenet_v2": 1.0, "scratch": 1.0}  # points below fp32
REPAIR: dict[str, dict[str, Any]] = {
    "cifar10_resnet20": {"epochs": 2, "lr": 1e-4, "flip": True, "crop": 4},
    "imagenet_mobilenet_v2": {"epochs": 2, "lr": 1e-5, "flip": True, "batch_size": 16, "int8_ranges": "gradient"},
}
SEEDS = (0, 1, 2)
SCRATCH: dict[str, Any] = {"epochs": 6, "lr": 2e-3, "warmup": 100, "batch_size": 64, "flip": True, "crop": 4}
SCRATCH_IMAGES = 10_000


# --- repaired and deployed --------------------------------------------------------------------------------------------


def repaired(network: Any, few: int | None) -> dict[str, Any]:
    """top-1 of each form. few: at most so many images for each purpose, for a trial."""
    model, (images, (x, labels)) = network.make(), _images(network, few)
    twin, calibration = nr.convert(model), images[:512]
    started = time.perf_counter()
    recipe = REPAIR[network.name]
    trained, result = nr.finetune(twin, images, precision="int8", freeze_statistics=True, **recipe)
    seconds = time.perf_counter() - started
    with nr.int8(trained, ranges=result.ranges):
        in_torch = top1(outputs(trained.eval(), x), labels)
    return {
        "network": network.name,
        "trained_on": len(images),
        "tested_on": len(x),
        "recipe": recipe,
        "original": top1(outputs(model, x), labels),
        "calibrated_onnx": _deployed(twin, x, labels, calibrate=calibration),
        "in_torch": in_torch,
        "onnx": _deployed(trained, x, labels, learned=result.ranges),
        "seconds": seconds,
        **result.as_dict(),
    }


def _images(network: Any, few: int | None) -> tuple[Tensor, Labelled]:
    """To train on, and to test with."""
    from tests.conftest import real_images

    if network.name.startswith("imagenet"):
        x, labels = real_images("imagenet", 1000)  # one of each class, in order
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        seen, unseen = drawn[:512][:few], drawn[512:][:few]
        return x[seen], (x[unseen], labels[unseen])
    return real_images("train", few or 5000)[0], real_images("test", few or 10_000)


def _deployed(model: nn.Module, x: Tensor, labels: Tensor, **ranges: Any) -> float:
    """top-1 of the int8 file in onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        nr.export(model, x[:2], path, precision="int8", **ranges)
        run = runner(path)
        logits = [next(iter(run(Batch({"x": batch})).values())) for batch in x.split(50)]
    return top1(torch.cat(logits), labels)


def row(result: dict[str, Any]) -> list[str]:
    original = result["original"]
    forms = [original, *(result[form] for form in ("calibrated_onnx", "in_torch", "onnx"))]
    drop = 100 * (original - min(result["in_torch"], result["onnx"]))
    return [
        result["network"],
        f"{result['tested_on']:,}",
        *(f"{100 * form:.2f}" for form in forms),
        f"{drop:.2f}",
        str(ALLOWED[result["network"]]),
        f"{result['seconds']:.0f}",
    ]


HEAD = ["network", "test inputs", "fp32 (%)", "calibrated (%)", "repaired, torch (%)", "repaired, onnxruntime (%)"]
HEAD += ["points below fp32", "allowed", "seconds"]


# --- from scratch -----------------------------------------------------------------------------------------------------


def scratch(few: int | None, progress: Callable[[str], object]) -> Iterator[dict[str, Any]]:
    """One result a seed and precision."""
    from tests.conftest import real_images

    images, labels = real_images("train", few or SCRATCH_IMAGES)
    x, expected = real_images("test", few or 10_000)
    for seed in SEEDS:
        for precision in ("fp32", "int8"):
            torch.manual_seed(seed)
            model = resnet8("range")
            options = {"precision": precision, "int8_gradients": precision == "int8", "seed": seed, **SCRATCH}
            trained, result = nr.finetune(model, Data(Batch({"x": images}, labels)), labels=True, **options)
            if result.ranges is None:
                right = top1(outputs(trained.eval(), x), expected)
            else:
                with nr.int8(trained, ranges=result.ranges):
                    right = top1(outputs(trained.eval(), x), expected)
            progress(f"seed {seed}, {precision}: {100 * right:.2f} % in {result.seconds:.0f} s")
            yield {"seed": seed, "precision": precision, "top1": right, "seconds": result.seconds} | {
                "skipped_steps": result.skipped_steps,
                "steps": result.steps,
            }


def summary(runs: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for precision in ("fp32", "int8"):
        accuracies = [100 * run["top1"] for run in runs if run["precision"] == precision]
        rows.append(
            [precision, f"{statistics.mean(accuracies):.2f}", f"{min(accuracies):.2f} to {max(accuracies):.2f}"]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with zoo.py, load.py and weights/")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="these parts (default: all)")
    parser.add_argument("--few", type=int, help="at most so many images for each purpose: a trial, nothing is written")
    options = parser.parse_args()
    os.environ["NORMREWRITE_DATA"] = str(options.data.resolve())
    os.environ.setdefault("NORMREWRITE_TEST_THREADS", os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())))
    from tests.conftest import NETWORKS

    networks = {network.name: network for network in NETWORKS}
    for part in options.only:
        if part == "scratch":
            runs = list(scratch(options.few, lambda text: print(text, flush=True)))
            result = {"recipe": SCRATCH | {"images": options.few or SCRATCH_IMAGES}, "runs": runs}
            table = markdown(["ResNet-8, range", "mean top-1 (%)", "range"], summary(runs))
        else:
            result = repaired(networks[part], options.few)
            table = markdown(HEAD, [row(result)])
        print("\n" + table, flush=True)
        if not options.few:
            result = {"threads": torch.get_num_threads(), **result}
            print(f"\nwrote {write(f'int8_{part}', result, 'accelerate', 'onnxruntime')}", flush=True)


if __name__ == "__main__":
    main()
