"""Training brought nearer to eval without labels: how far train mode is from the original's eval, before and after calibration.

    python -m benchmarks.calibrate ../shared/data          # two minutes on two cores; writes results/calibrate.json

ResNet-20 on 2000 test images in batches of 250, calibrated on 512 training images. The relative norm of the difference
of logits; the original batch norm's own train mode is the yardstick.
"""

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normrewrite as nr
from benchmarks.stamp import markdown, write

TARGETS = ("l1", "topk:10", "linf", "range", "topk:1%")


@torch.no_grad()
def in_training(model: nn.Module, x: Tensor) -> Tensor:
    """Logits with the norms alone in training."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, _BatchNorm | nr.nn.BatchNorm):
            module.training = True
    return torch.cat([model(batch) for batch in x.split(250)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with zoo.py, load.py and weights/")
    os.environ["NORMREWRITE_DATA"] = str(parser.parse_args().data.resolve())
    os.environ["NORMREWRITE_TEST_THREADS"] = str(os.cpu_count())
    from tests.conftest import NETWORKS, real_images

    model = NETWORKS[0].make()
    unlabelled = real_images("train", 512)[0]
    x, labels = real_images("test", 2000)
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in x.split(250)])

    def measure(network: nn.Module) -> dict[str, float]:
        logits = in_training(network, x)
        far = float((logits - expected).norm() / expected.norm())
        return {"difference": far, "top1": float((logits.argmax(1) == labels).double().mean())}

    rows: list[dict[str, Any]] = [{"norm": "BatchNorm2d", "as_converted": measure(model)}]
    for to in TARGETS:
        twin = nr.convert(model, to)
        calibrated, _ = nr.calibrate(twin, unlabelled, batch_size=250)
        rows.append({"norm": to, "as_converted": measure(twin), "calibrated": measure(calibrated)})
    own = rows[0]["as_converted"]["difference"]
    print(markdown(["norm", "as converted", "calibrated", "in units of BN's own"], [_row(row, own) for row in rows]))
    print(f"\nwrote {write('calibrate', {'rows': rows})}")


def _row(row: dict[str, Any], own: float) -> list[str]:
    after = row.get("calibrated")
    cells = [
        "–" if m is None else f"{m['difference']:.3f} ({100 * m['top1']:.1f} %)" for m in (row["as_converted"], after)
    ]
    return [row["norm"], *cells, "1" if after is None else f"{after['difference'] / own:.2f}"]


if __name__ == "__main__":
    main()
