"""Training step of a norm on a CPU against torch's own batch norm: forward + backward on ResNet-50's shapes, in one run.

    python -m benchmarks.cpu_norms       # about five minutes on two cores; writes results/cpu_norms.json, docs/cpu_norms.svg

Each norm is compared with float64 first. Then the variants take turns, after a round that warms the allocator, which keeps its
memory from then on (glibc's would give tensors of this size back and have them zeroed again at every step); a figure is the
median of the turns' ratios, as machines slow down for seconds. `naive` is the same norm in plain torch operations with
autograd's own backward. In tensors of x's size, held: what is kept for the backward; peak: the most that is allocated at one
moment beside x and g, results y and dx included.
"""

import argparse
import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.figure import save
from benchmarks.right import ALLOWED, errors
from benchmarks.stamp import markdown, write
from normrewrite.backends.dispatch import kernels
from normrewrite.nn.functional import batch_norm
from normrewrite.norms import metric

SHAPES = ((32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7))
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
METRICS = ("l1", "linf", "topk:10", "range")
PICTURE = Path(__file__).parent.parent / "docs" / "cpu_norms.svg"


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
    milliseconds = {name: 1e3 * statistics.median(spent) for name, spent in times.items()}

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


def right(run: Run) -> None:
    """Raises where the norm or a gradient of it is off, of a tensor large enough to be cut in pieces."""
    with kernels(run.kernels):
        differences = errors(run.metric, run.dtype, (32, 48, 28, 28), run.layout == "channels_last", "plain")
    if not max(differences.values()) <= ALLOWED[run.dtype]:
        raise AssertionError(f"{run}: off by {differences}, {ALLOWED[run.dtype]} allowed")


def form(run: Run) -> str:
    dtype = "" if run.dtype is torch.float32 else f", {str(run.dtype).removeprefix('torch.')}"
    return f"{run.layout}{dtype}" + ("" if run.kernels == "auto" else f", {run.kernels}")


def row(run: Run, measured: list[dict[str, Any]]) -> list[str]:
    ratios = [result["to_native"] for result in measured]
    return [
        f"`{run.metric}`",
        form(run),
        f"{statistics.geometric_mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "–" if run.goal is None else f"{run.goal}",
        f"{max(result['to_naive'] for result in measured):.2f}",
        f"{max(result['held'] for result in measured):.2f}",
        f"{max(result['peak'] for result in measured):.2f}",
    ]


def of(run: Run, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A run's results, by shape."""
    key = (run.metric, run.layout, str(run.dtype).removeprefix("torch."), run.kernels)
    return [each for each in results if (each["metric"], each["layout"], each["dtype"], each["kernels"]) == key]


def plot(results: list[dict[str, Any]], path: Path = PICTURE) -> Path:
    """The ratio of each run by shape, small tensors small; its geometric mean as a bar, its goal as a stroke."""
    runs = [run for run in RUNS[::-1] if of(run, results)]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, run in enumerate(runs):
            measured = of(run, results)
            ratios = [each["to_native"] for each in measured]
            axes.barh(
                place, statistics.geometric_mean(ratios), color="C0" if run.kernels == "auto" else "C2", alpha=0.5
            )
            axes.scatter(
                ratios, [place] * len(measured), s=[math.prod(each["shape"]) / 4e5 for each in measured], color="C0"
            )
            if run.goal is not None:
                axes.plot([run.goal] * 2, [place - 0.4, place + 0.4], color="C3", linewidth=2)
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set_yticks(range(len(runs)), [f"{run.metric} {form(run)}" for run in runs])
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="time / torch's batch norm (dots: shapes, larger ones larger; red: goals; green: compiled)")

    return save(draw, path, height=4.4)


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
            right(run)
            measured = [measure(run, shape, options.rounds) for shape in SHAPES]
            results += measured
            lines.append(row(run, measured))
            print(" ".join(lines[-1]), flush=True)
    head = ["metric", "layout", "ours / torch's batch norm", "goal", "ours / naive, worst", "held", "peak"]
    path = write("cpu_norms", {"threads": torch.get_num_threads(), "rounds": options.rounds, "results": results})
    print(f"\n{markdown(head, lines)}\n\nwrote {path} and {plot(results)}")


if __name__ == "__main__":
    main()
