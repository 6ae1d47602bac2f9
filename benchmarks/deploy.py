"""Trained networks deployed: fp32, fp16 and int8 in onnxruntime, engines of TensorRT-RTX, latency against folded BN.

    python -m benchmarks.deploy ../shared/data           # half an hour on two cores; writes results/deploy.json

The folder holds zoo.py, load.py and weights/ (see tests/conftest.py). Engines are built for three GPUs, none of which is
here: nothing of theirs was run. Int8 is calibrated on 512 inputs that are not among the test inputs: of ImageNet's 1000 images
the last 512 calibrate, and int8 is tested on the others.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

import normrewrite as nr
from benchmarks.networks import convnext, transformer_encoder
from benchmarks.stamp import markdown, write
from normrewrite.api.bench import bench
from normrewrite.api.build import build

GPUS = ("sm86", "sm89", "sm120")
PRECISIONS = ("fp32", "fp16", "int8")
TESTED = {"cifar10_resnet20": 10_000, "cifar10_resnet56": 10_000, "imagenet_mobilenet_v2": 1000, "crepe_tiny": 400}


def measure(network: Any, count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """One result a precision."""
    model: nn.Module = network.make()
    twin = nr.convert(model, to="l1")
    x, labels = network.inputs(min(count, TESTED[network.name]))
    calibration = _calibration(network, x)
    for precision in PRECISIONS:
        path = folder / f"{network.name}.{precision}.onnx"
        seen = calibration if precision == "int8" else None
        nr.export(twin, x[:2], path, precision=precision, calibrate=seen, keep_io_types=precision == "fp16")
        unseen = slice(0, len(x) - 512 if precision == "int8" and network.name.startswith("imagenet") else len(x))
        compared = nr.verify(path, model, x[unseen], None if labels is None else labels[unseen])
        (output,) = compared.outputs
        yield {
            "network": network.name,
            "precision": precision,
            "inputs": compared.inputs,
            "ok": compared.ok,
            "max_abs": compared.max_abs,
            "snr_db": compared.snr_db,
            "same_class": output.agreeing / compared.inputs,
            "top1": None if labels is None else [right / compared.inputs for right in output.right],
            "bytes": path.stat().st_size,
            "engines": _engines(path, folder),
        }


def _calibration(network: Any, x: Tensor) -> Tensor:
    from tests.conftest import real_images, tones

    if network.name == "crepe_tiny":
        return tones(513)[1:]
    return x[-512:] if network.name.startswith("imagenet") else real_images("train", 512)[0]


def _engines(path: Path, folder: Path) -> dict[str, Any]:
    """By GPU: how many products keep their precision, of how many, and the bytes of the engine."""
    by_gpu = {}
    for gpu in GPUS:
        try:
            built = build(path, folder / "model.engine", gpus=[gpu], force=True)
            products = built.honoured + len(built.unchecked)
            by_gpu[gpu] = {"honoured": built.honoured, "products": products, "bytes": built.size}
        except nr.NormRewriteError as error:
            by_gpu[gpu] = {"error": str(error)}
    return by_gpu


def latency(network: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """The folded l1 twin against the folded original, in turns, on one thread: two are at the mercy of the scheduler."""
    model = network.make()
    x, _ = network.inputs(1)
    paths = folder / "original.onnx", folder / "twin.onnx"
    for form, path in zip((model, nr.convert(model, to="l1")), paths, strict=True):
        nr.export(form, x, path, force=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # verify's sessions take as many
    timed = bench(*paths, x, runtime="onnxruntime", rounds=rounds)
    torch.set_num_threads(threads)
    original, twin = (
        [(node.op_type, *node.input, *node.output) for node in onnx.load(path).graph.node] for path in paths
    )
    return {"network": network.name, **timed.as_dict(), "same_graph": original == twin}


def op_forms(folder: Path) -> Iterator[dict[str, Any]]:
    """Untrained networks whose norms measure at inference, one node each."""
    for name, make, x in (
        ("transformer encoder", transformer_encoder, torch.randn(2, 16, 64)),
        ("ConvNeXt-like", convnext, torch.randn(2, 3, 32, 32)),
    ):
        for to in ("l1", "topk:10"):
            model = make(to)
            for precision in ("fp32", "fp16"):
                path = folder / "op.onnx"
                options = {"deploy": "op", "precision": precision, "keep_io_types": precision == "fp16", "force": True}
                written = nr.export(model, x, path, **options)
                compared = nr.verify(path, model, x)
                nodes = sum(count for op, count in written.nodes.items() if op.startswith("NormRewrite"))
                worst = max(output.max_rel for output in compared.outputs)
                yield {"network": name, "to": to, "precision": precision, "nodes": nodes, "max_rel": worst} | {
                    "engines": _engines(path, folder)
                }


def _op_row(op: dict[str, Any]) -> list[str]:
    return [
        op["network"],
        op["to"],
        op["precision"],
        str(op["nodes"]),
        f"{op['max_rel']:.1e}",
        _engines_line(op["engines"]),
    ]


def _engines_line(engines: dict[str, Any]) -> str:
    words = [
        f"{gpu}: no" if "error" in made else f"{gpu}: {made['honoured']} of {made['products']}"
        for gpu, made in engines.items()
    ]
    return ", ".join(words)


def _row(result: dict[str, Any]) -> list[str]:
    top1 = "–" if result["top1"] is None else " / ".join(f"{100 * value:.2f}" for value in reversed(result["top1"]))
    return [
        result["network"],
        result["precision"],
        f"{result['inputs']:,}",
        top1,
        f"{100 * result['same_class']:.2f} %",
        f"{result['snr_db']:.1f}",
        f"{result['bytes'] / 1e6:.2f}",
        _engines_line(result["engines"]),
    ]


HEAD = [
    "network",
    "precision",
    "inputs",
    "top-1: torch / ONNX (%)",
    "same class",
    "SNR (dB)",
    "MB",
    "products in that precision, by engine",
]
OP_HEAD = ["network", "norm", "precision", "nodes", "largest difference", "products in that precision, by engine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with zoo.py, load.py and weights/")
    parser.add_argument("--inputs", type=int, default=10_000, help="at most so many (default: all)")
    parser.add_argument("--networks", nargs="*", help="these alone (default: all)")
    parser.add_argument("--rounds", type=int, default=200, help="of the latency comparison")
    options = parser.parse_args()
    os.environ["NORMREWRITE_DATA"] = str(options.data.resolve())
    os.environ["NORMREWRITE_TEST_THREADS"] = str(os.cpu_count())
    from tests.conftest import NETWORKS

    torch.manual_seed(0)
    networks = [network for network in NETWORKS if network.name in (options.networks or network.name)]
    results: dict[str, Any] = {"gpus": GPUS, "networks": [], "latency": [], "op": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for network in networks:
            results["latency"].append(latency(network, folder, options.rounds))
            print(f"{network.name}: l1 twin / BN original {results['latency'][-1]['ratio']:.3f}", flush=True)
        for op in op_forms(folder):
            results["op"].append(op)
        print(markdown(OP_HEAD, [_op_row(op) for op in results["op"]]), flush=True)
        for network in networks:
            for result in measure(network, options.inputs, folder):
                results["networks"].append(result)
                print(" | ".join(_row(result)), flush=True)
            write("deploy", results, "onnxruntime", "onnx")
    print(f"\n{markdown(HEAD, [_row(result) for result in results['networks']])}")


if __name__ == "__main__":
    main()
