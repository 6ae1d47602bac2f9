"""Every target on trained networks: sites rewritten and refused, eval difference, accuracy as copied and calibrated.

    python -m benchmarks.targets ../shared/data          # about twenty minutes on two cores; writes results/targets.json

The folder holds zoo.py, load.py and weights/ (see tests/conftest.py). Metrics differ in training alone (benchmarks.convert
compares their bits), so l1 stands for them. Calibrated on unlabelled images that no accuracy is measured on. Accuracy:
top-1; of the pitch tracker, how many tones get the class that the original gives them; on all inputs for calibrated layer
and group:4, on the first 2,000 (ImageNet: 250) else. `repaired` is what benchmarks.repair measured on ResNet-20, on all
10,000. Networks and targets that are run alone take their rows' places in the result, and leave the others.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normrewrite as nr
from benchmarks.stamp import RESULTS, markdown, write

EXACT = ("l1", "renorm", "frozen", "none", "bwn", "bwn:mean-bn", "wn", "wn:mean-bn")
TARGETS = (*EXACT, "bwn:strict", "layer", "group:4", "group", "rms", "instance")
REPAIRED = "cifar10_resnet20"
ORDER = ("l1", "linf", "topk:10", *TARGETS[1:], "group:8")  # those that are repaired among them
CALIBRATION = {"imagenet_mobilenet_v2": 256}
WHOLE = ("layer", "group:4")  # measured on every input once calibrated; all else on the first few


@dataclass(frozen=True)
class Inputs:
    """calibration, x: (N, ...) each; labels: (N,), the original's own classes where the data has none; few: how many of x."""

    calibration: Tensor
    x: Tensor
    labels: Tensor
    few: int = 2000


def inputs_of(network: Any, model: nn.Module) -> Inputs:
    from tests.conftest import real_images, tones

    if network.name == "crepe_tiny":
        x = tones(400)
        return Inputs(tones(257), x, outputs(model, x).argmax(1))
    if network.name.startswith("imagenet"):
        x, labels = real_images("imagenet", 1000)  # one of each class, in order
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        seen, unseen = drawn[: CALIBRATION[network.name]], drawn[CALIBRATION[network.name] :]
        return Inputs(x[seen], x[unseen], labels[unseen], few=250)
    return Inputs(real_images("train", 512)[0], *real_images("test", 10_000))


@torch.inference_mode()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in x.split(125)])


def top1(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels[: len(logits)]).double().mean())


def measure(model: nn.Module, to: str, data: Inputs, before: Tensor) -> dict[str, Any]:
    """One target on one network. before: the original's outputs on all inputs."""
    started = time.perf_counter()
    twin, report = nr.plan(model, to).apply()
    seconds = time.perf_counter() - started
    copied = outputs(twin, data.x[: data.few])
    result = {
        "target": to,
        "rewritten": len(report.rewritten),
        "refused": len(report.kept),
        "exact": not report.inexact,
        "difference": float((copied - before[: data.few]).abs().max()),
        "inputs": len(copied),
        "before": top1(before[: data.few], data.labels),
        "copied": top1(copied, data.labels),
        "seconds": seconds,
    }
    if report.inexact and ":strict" not in to:
        result |= _calibrated(twin, data, before, len(before) if to in WHOLE else data.few)
    return result


def _calibrated(twin: nn.Module, data: Inputs, before: Tensor, count: int) -> dict[str, Any]:
    started = time.perf_counter()
    twin, calibration = nr.calibrate(twin, data.calibration, batch_size=64)
    seconds = time.perf_counter() - started
    logits = outputs(twin, data.x[:count])
    return {
        "inputs": len(logits),
        "before": top1(before[:count], data.labels),
        "calibrated": top1(logits, data.labels),
        "calibration_seconds": seconds,
        "explained": {fit.name: fit.explained for fit in calibration.fits},
    }


HEAD = [
    "network",
    "target",
    "rewritten",
    "refused",
    "max eval difference",
    "inputs",
    "before (%)",
    "as copied (%)",
    "calibrated (%)",
    "repaired (%)",
]


def repaired() -> dict[str, float]:
    """Accuracy by target after a repair without labels, where benchmarks.repair has measured it."""
    path = RESULTS / "repair.json"
    return {row["target"]: row["repaired"] for row in read(path)["targets"]} if path.is_file() else {}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def row(network: str, result: dict[str, Any]) -> list[str]:
    calibrated = result.get("calibrated")
    after = repaired().get(result["target"]) if network == REPAIRED else None
    return [
        network,
        f"`{result['target']}`",
        str(result["rewritten"]),
        str(result["refused"]),
        f"{result['difference']:.1e}" if result["exact"] else f"{result['difference']:.3g} (not exact)",
        f"{result['inputs']:,}",
        f"{100 * result['before']:.2f}",
        f"{100 * result['copied']:.2f}",
        *("–" if share is None else f"{100 * share:.2f}" for share in (calibrated, after)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with zoo.py, load.py and weights/")
    parser.add_argument("--only", nargs="*", help="these targets (default: all)")
    parser.add_argument("--networks", nargs="*", help="these networks (default: all)")
    options = parser.parse_args()
    os.environ["NORMREWRITE_DATA"] = str(options.data.resolve())
    os.environ.setdefault("NORMREWRITE_TEST_THREADS", str(os.cpu_count()))
    from tests.conftest import NETWORKS

    path = RESULTS / "targets.json"
    results: dict[str, list[dict[str, Any]]] = read(path)["networks"] if path.is_file() else {}
    for network in NETWORKS:
        if network.name not in (options.networks or network.name):
            continue
        model = network.make()
        data = inputs_of(network, model)
        before = outputs(model, data.x)
        for to in options.only or (ORDER if network.name == REPAIRED else TARGETS):
            result = measure(model, to, data, before)
            rows = [other for other in results.get(network.name, []) if other["target"] != to]
            results[network.name] = sorted([*rows, result], key=lambda other: ORDER.index(other["target"]))
            print(" ".join(row(network.name, result)), flush=True)
            write("targets", {"networks": results})
    lines = [row(network.name, result) for network in NETWORKS for result in results.get(network.name, [])]
    print(f"\n{markdown(HEAD, lines)}\n\nwrote {path}")


if __name__ == "__main__":
    main()
