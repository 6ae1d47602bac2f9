"""Training step of a norm on a CPU against torch's own batch norm: forward + backward on ResNet-50's shapes, in one run.

    python -m benchmarks.cpu_norms            # about three minutes on two cores; writes results/cpu_norms.json

Both variants take turns, after a round that warms the allocator; a figure is the ratio of the medians. `naive` is the same
norm in plain torch operations with autograd's own backward. In tensors of x's size, held: what is kept for the backward;
peak: the most that is allocated at one moment beside x and g, results y and dx included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.stamp import markdown, write
from normrewrite.nn.functional import batch_norm
from normrewrite.norms import metric

SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
METRICS = ("l1", "linf", "topk:10", "range")
GOALS = {  # ratio to torch's own batch norm, fp32
    ("l1", "NCHW"): 1.3,
    ("l1", "channels_last"): 2.5,
    ("linf", "NCHW"): 0.8,
    ("linf", "channels_last"): 1.8,
    ("topk:10", "NCHW"): 1.0,
}
Variant = Callable[[Tensor, Tensor, Tensor], Tensor]


def native(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def ours(spec: str) -> Variant:
    return lambda x, weight, bias: batch_norm(x, None, None, weight, bias, training=True, metric=spec)


def naive(spec: str) -> Variant:
    """As one would write it down, with autograd's backward."""
    row = metric(spec)

    def variant(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.transpose(0, 1).flatten(1)
        d = rows - rows.mean(1, keepdim=True)
        if row.family == "mean":
            spread = d.abs().mean(1)
        elif row.family == "span":
            spread = rows.amax(1) - rows.amin(1)
        else:
            spread = d.abs().topk(row.k(d.shape[1]), 1).values.mean(1)
        y = d * (weight / (row.gain(d.shape[1]) * spread + 1e-5))[:, None] + bias[:, None]
        return y.unflatten(1, (x.shape[0], *x.shape[2:])).transpose(0, 1)

    return variant


def step(variant: Variant, x: Tensor, g: Tensor, parameters: tuple[Tensor, Tensor]) -> float:
    """Seconds of one forward and backward."""
    started = time.perf_counter()
    torch.autograd.grad(variant(x, *parameters), (x, *parameters), g)
    return time.perf_counter() - started


def memory(variant: Variant, x: Tensor, g: Tensor, parameters: tuple[Tensor, Tensor]) -> dict[str, float]:
    """held and peak, in tensors of x's size."""
    held: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            y = variant(x, *parameters)
        torch.autograd.grad(y, (x, *parameters), g)
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    size = x.numel() * x.element_size()
    return {"held": sum(held.values()) / size, "peak": peak / size}


def measure(spec: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, g = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2)
    )
    x.requires_grad_()
    parameters = (torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True))
    variants = {"native": native, "ours": ours(spec), "naive": naive(spec)}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            seconds = step(variant, x, g, parameters)
            times[name] += [seconds] * bool(turn)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "metric": spec,
        "shape": shape,
        "layout": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: 1e3 * seconds for name, seconds in medians.items()},
        "to_native": medians["ours"] / medians["native"],
        "to_naive": medians["ours"] / medians["naive"],
        **memory(variants["ours"], x, g, parameters),
    }


def row(spec: str, layout: str, results: list[dict[str, Any]]) -> list[str]:
    found = [result for result in results if (result["metric"], result["layout"]) == (spec, layout)]
    ratios = [result["to_native"] for result in found]
    goal = GOALS.get((spec, layout))
    return [
        f"`{spec}`",
        layout,
        f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "–" if goal is None else f"{goal}",
        f"{max(result['to_naive'] for result in found):.2f}",
        f"{max(result['held'] for result in found):.2f}",
        f"{max(result['peak'] for result in found):.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=METRICS, help="these metrics")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    lines = []
    for spec in options.only:
        for layout in LAYOUTS:
            results += [measure(spec, shape, layout, torch.float32, options.rounds) for shape in SHAPES]
            lines.append(row(spec, layout, results))
            print(" ".join(lines[-1]), flush=True)
    head = ["metric", "layout", "ours / torch's batch norm", "goal", "ours / naive, worst", "held", "peak"]
    path = write("cpu_norms", {"threads": torch.get_num_threads(), "rounds": options.rounds, "results": results})
    print(f"\n{markdown(head, lines)}\n\nwrote {path}")


if __name__ == "__main__":
    main()
