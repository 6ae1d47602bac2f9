"""Trained networks converted: is the function kept, on every test image, in torch and in onnxruntime?

    python -m benchmarks.convert ../shared/data          # about a quarter of an hour on two cores; writes results/convert.json

The folder holds zoo.py, load.py and weights/ (see tests/conftest.py). Eval does not depend on the metric (its bits are
compared), so all images go through the original and one twin; a batch goes through each of the others.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normrewrite as nr
from benchmarks.stamp import markdown, write

TARGETS = ("l1", "linf", "topk:10", "topk:1%", "range")


def measure(network: Any, count: int) -> dict[str, Any]:
    model: nn.Module = network.make()
    x, labels = network.inputs(count)
    twins, sites = {}, 0
    for to in TARGETS:
        plan = nr.plan(model, to)
        twins[to], report = plan.apply()
        sites = len(report.rewritten)
        assert not report.kept
    with torch.inference_mode():
        few = [twin(x[:16]) for twin in twins.values()]
    assert all(torch.equal(outputs, few[0]) for outputs in few)
    compared = nr.verify(model, twins["l1"], x, labels)
    return {
        "network": network.name,
        "sites": sites,
        "inputs": len(x),
        "max_abs": compared.max_abs,
        "snr_db": compared.snr_db,
        "same_class": compared.outputs[0].agreeing / len(x),
        "top1": [right / len(x) for right in compared.outputs[0].right] if labels is not None else None,
        "revert_bits": all(_same_bits(nr.revert(twin), model) for twin in twins.values()),
        **_onnx(model, twins["l1"], x[:200]),
    }


def _same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def _onnx(model: nn.Module, twin: nn.Module, x: Tensor) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        written = nr.export(twin, x[:1], Path(folder) / "twin.onnx")
        compared = nr.verify(model, Path(folder) / "twin.onnx", x)
    return {
        "onnx_max_abs": compared.max_abs,
        "onnx_norm_nodes": written.norms_left,
        "folded": len(written.into_neighbour),
        "mul_add": len(written.to_affine),
    }


def _row(result: dict[str, Any]) -> list[str]:
    top1 = "–" if result["top1"] is None else " → ".join(f"{100 * value:.2f}" for value in result["top1"])
    return [
        result["network"],
        str(result["sites"]),
        f"{result['inputs']:,}",
        f"{result['max_abs']:.1e}",
        top1,
        f"{100 * result['same_class']:.2f} %",
        "yes" if result["revert_bits"] else "NO",
        f"{result['onnx_max_abs']:.1e}",
        f"{result['folded']} + {result['mul_add']}",
    ]


HEAD = [
    "network",
    "sites",
    "inputs",
    "max difference",
    "top-1 (%)",
    "same class",
    "revert: same bits",
    "ONNX max",
    "folded + Mul/Add",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with zoo.py, load.py and weights/")
    parser.add_argument("--inputs", type=int, default=10_000, help="at most so many (default: all)")
    options = parser.parse_args()
    os.environ["NORMREWRITE_DATA"] = str(options.data.resolve())
    os.environ["NORMREWRITE_TEST_THREADS"] = str(os.cpu_count())
    from tests.conftest import NETWORKS

    limits = {"imagenet_mobilenet_v2": 1000, "crepe_tiny": 400}
    results = []
    for network in NETWORKS:
        results.append(measure(network, min(options.inputs, limits.get(network.name, 10_000))))
        print(" ".join(_row(results[-1])), flush=True)
    table = markdown(HEAD, [_row(result) for result in results])
    print(f"\n{table}\n\nwrote {write('convert', {'targets': TARGETS, 'networks': results}, 'onnxruntime')}")


if __name__ == "__main__":
    main()
