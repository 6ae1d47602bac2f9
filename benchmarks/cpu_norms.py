"""Training step of a norm on a CPU against torch's own batch norm: forward + backward on ResNet-50's shapes, in one run.

    python -m benchmarks.cpu_norms            # about five minutes on two cores; writes results/cpu_norms.json

The variants take turns, after a round that warms the allocator, which then keeps its memory (glibc's would give tensors of
this size back and have them zeroed again at every step); a figure is the median of the turns' ratios, as machines slow down for
seconds. `naive` is the same norm in plain torch operations with autograd's own backward. In tensors of x's size, held: what is
kept for the backward; peak: the most that is allocated at one moment beside x and g, results y and dx included.
"""

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.stamp import markdown, write
from normrewrite.lower.kernels import kernels
from normrewrite.nn.functional import batch_norm
from normrewrite.norms import metric

SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
METRICS = ("l1", "linf", "topk:10", "range")


class Run(NamedTuple):
    """goal: ratio to torch's own batch norm, at most."""

    metric: str
    layout: str
    goal: float | None = None
    dtype: torch.dtype = torch.float32
    kernels: str = "auto"


RUNS = (
    Run("l1", "NCHW", 1.3),
    Run("l1", "channels_last", 2.5),
    Run("linf", "NCHW", 0.8),
    Run("linf", "channels_last", 1.8),
    Run("topk:10", "NCHW", 1.0),
    Run("topk:10", "channels_last"),
    Run("range", "NCHW"),
    Run("range", "channels_last"),
    Run("l1", "NCHW", 0.9, kernels="compiled"),
    Run("l1", "channels_last", 1.6, kernels="compiled"),
    Run("l1", "NCHW", 1.5, torch.bfloat16, kernels="compiled"),
    Run("l1", "channels_last", 1.5, torch.bfloat16, kernels="compiled"),
)
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of malloc.h
Variant = Callable[[Tensor, Tensor, Tensor], Tensor]


def keep_memory() -> None:
    """glibc's malloc, told not to map large tensors by themselves and not to give anything back; no other allocator minds."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


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


def measure(run: Run, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, g = (
        torch.randn(shape, generator=generator).to(run.dtype).contiguous(memory_format=LAYOUTS[run.layout])
        for _ in range(2)
    )
    x.requires_grad_()
    parameters = (torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True))
    variants = {"native": native, "ours": ours(run.metric), "naive": naive(run.metric)}
    times: dict[str, list[float]] = {name: [] for name in variants}
    with kernels(run.kernels):
        for turn in range(rounds + 1):
            for name, variant in variants.items():
                seconds = step(variant, x, g, parameters)
                times[name] += [seconds] * bool(turn)
        used = memory(variants["ours"], x, g, parameters)
    milliseconds = {name: 1e3 * statistics.median(found) for name, found in times.items()}

    def ratio_to(name: str) -> float:
        return statistics.median(own / other for own, other in zip(times["ours"], times[name], strict=True))

    return {
        **run._asdict(),
        "dtype": str(run.dtype).removeprefix("torch."),
        "shape": shape,
        "milliseconds": milliseconds,
        "to_native": ratio_to("native"),
        "to_naive": ratio_to("naive"),
        **used,
    }


def row(run: Run, found: list[dict[str, Any]]) -> list[str]:
    ratios = [result["to_native"] for result in found]
    form = f"{run.layout}{'' if run.dtype is torch.float32 else ', ' + found[0]['dtype']}"
    return [
        f"`{run.metric}`",
        form if run.kernels == "auto" else f"{form}, {run.kernels}",
        f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "–" if run.goal is None else f"{run.goal}",
        f"{max(result['to_naive'] for result in found):.2f}",
        f"{max(result['held'] for result in found):.2f}",
        f"{max(result['peak'] for result in found):.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=METRICS, help="these metrics")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    keep_memory()
    results: list[dict[str, Any]] = []
    lines = []
    for run in RUNS:
        if run.metric in options.only:
            found = [measure(run, shape, options.rounds) for shape in SHAPES]
            results += found
            lines.append(row(run, found))
            print(" ".join(lines[-1]), flush=True)
    head = ["metric", "layout", "ours / torch's batch norm", "goal", "ours / naive, worst", "held", "peak"]
    path = write("cpu_norms", {"threads": torch.get_num_threads(), "rounds": options.rounds, "results": results})
    print(f"\n{markdown(head, lines)}\n\nwrote {path}")


if __name__ == "__main__":
    main()
