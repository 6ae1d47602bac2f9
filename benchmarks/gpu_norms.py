"""The kernels of backends/triton on a GPU: right first, then against torch's batch norm and what torch.compile makes of it.

    python -m benchmarks.gpu_norms                 # under eight minutes; writes results/gpu_norms.json and .svg
    python -m benchmarks.gpu_norms --minutes 3     # what fits, the most telling first

Without a GPU it says so and exits with 2. In order: every metric, dtype, memory format and form against float64; the bandwidth
of a copy; norms of a ResNet-50, fp16 channels-last, forward and backward to inputs and parameters (native eager, native
compiled, ours); layer norms; a training step of ResNet-50. Times are medians of CUDA-graph replays (the step: of calls), the
variants in turns; beside each stands the floor that the bytes it moves allow at the bandwidth of a copy
(benchmarks/gpu_traffic.py). What was measured is written at once, so that nothing is lost where a later part fails.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from benchmarks.figure import save
from benchmarks.gpu_traffic import NATIVE, RESNET50, Norms, batch_launches, moved, row_launches
from benchmarks.networks import resnet50
from benchmarks.right import SPECS, correctness
from benchmarks.stamp import RESULTS, markdown, write

LAYERS = ((65536, 1024), (32768, 4096), (16384, 8192))
LARGE = 240e6  # bytes of a tensor from which on the share of a copy's bandwidth is a goal
ROUNDS = 25
COMPILING = 70  # seconds that torch.compile may take for a ResNet-50

# What is to be reached: (metric, form, against) -> how many times as fast.
GOALS = {
    ("l1", "relu", "native"): 1.35,
    ("linf", "relu", "native"): 1.5,
    ("range", "relu", "native"): 1.5,
    ("topk:10", "relu", "native"): 1.4,
    ("l1", "add", "native"): 1.3,
    ("linf", "add", "native"): 1.45,
    ("l1", "relu", "compiled"): 0.95,
    ("linf", "relu", "compiled"): 1.05,
}
LAYER_GOALS = {("l1", "native"): 1.0, ("l1", "compiled"): 1.0}
STEP_GOALS = {("l1", "native"): 1.05, ("l1 compiled", "native compiled"): 1.0}

Step = Callable[[], object]
Forwards = dict[str, tuple[Step, nn.Module]]  # and whose parameters want gradients


# --- the clock -------------------------------------------------------------------------------------------------------


def graphed(step: Step) -> Step:
    """The step as a CUDA graph, so that small tensors are not timed by how fast Python launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(steps: Mapping[str, Step], rounds: int = ROUNDS) -> dict[str, float]:
    """Median of each, in turns."""
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    torch.cuda.synchronize()
    for _ in range(rounds):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**29, dtype=torch.float16, device="cuda").normal_()
    target = torch.empty_like(source)
    times = milliseconds({"copy": lambda: target.copy_(source)}, rounds=50)
    return 2 * source.nbytes / (times["copy"] / 1e3)


def _native(norm: nn.Module, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = norm(x)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def batch_norm(norms: Norms, batch: int, compiled: bool) -> dict[str, float]:
    """Forward and backward in ms, by variant."""
    shape, relu_too = norms.shape(batch), norms.form != "plain"
    x, g, r = (torch.randn(shape, device="cuda").half().to(memory_format=torch.channels_last) for _ in range(3))
    x.requires_grad_()
    residual = r.requires_grad_() if norms.form == "add" else None
    torch._dynamo.reset()
    native = nn.BatchNorm2d(norms.channels).cuda()
    forwards: Forwards = {"native": (lambda: _native(native, x, residual, relu_too), native)}
    if compiled:
        made, other = torch.compile(_native, dynamic=False), copy.deepcopy(native)
        forwards["compiled"] = lambda: made(other, x, residual, relu_too), other
    for spec in SPECS:
        norm = nr.nn.BatchNorm2d(norms.channels, metric=spec).cuda()
        forwards[spec] = (lambda norm=norm: nr.nn.norm_relu(norm, x, residual) if relu_too else norm(x)), norm  # type: ignore[misc]
    return _timed(forwards, [leaf for leaf in (x, residual) if leaf is not None], g)


def layer_norm(rows: int, width: int) -> dict[str, float]:
    """Forward and backward in ms: torch's, torch's compiled, l1."""
    x, g = (torch.randn(rows, width, device="cuda").half() for _ in range(2))
    x.requires_grad_()
    torch._dynamo.reset()
    native, other = (nn.LayerNorm(width).cuda().half() for _ in range(2))
    made, norm = torch.compile(other, dynamic=False), nr.nn.LayerNorm(width, metric="l1").cuda().half()
    calls = {"native": (native, native), "compiled": (made, other), "l1": (norm, norm)}
    return _timed({name: (lambda call=call: call(x), of) for name, (call, of) in calls.items()}, [x], g)  # type: ignore[misc]


def _timed(forwards: Forwards, inputs: list[Tensor], g: Tensor) -> dict[str, float]:
    def step(forward: Step, norm: nn.Module) -> Step:
        leaves = [*inputs, *norm.parameters()]
        return graphed(lambda: torch.autograd.grad(forward(), leaves, g))  # type: ignore[arg-type]

    return milliseconds({name: step(*each) for name, each in forwards.items()})


def resnet_step(batch: int, deadline: float) -> dict[str, float]:
    """A training step in ms: autocast to fp16, SGD, channels-last; the norms native and l1, eager and, in time, compiled."""
    images = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device="cuda")
    native = resnet50().cuda().to(memory_format=torch.channels_last).train()
    ours = nr.passes.FuseActivation()(torch.fx.symbolic_trace(nr.convert(native, "l1"))).graph_module
    models = {"native": native, "l1": ours}
    models |= {f"{name} compiled": torch.compile(copy.deepcopy(model), dynamic=False) for name, model in models.items()}
    steps: dict[str, Step] = {}
    for name, model in models.items():
        if "compiled" not in name or time.monotonic() < deadline - COMPILING:
            steps[name] = _step(model, images, labels)
            for _ in range(3):  # the first of them compiles
                steps[name]()
            torch.cuda.synchronize()
    return milliseconds(steps, rounds=10)


def _step(model: Any, images: Tensor, labels: Tensor) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --- the report ------------------------------------------------------------------------------------------------------


def case(norms: Norms, batch: int, times: Mapping[str, float], bandwidth: float) -> dict[str, Any]:
    """One shape: times, and for each variant whose bytes are known the floor and the share of a copy's bandwidth."""
    shape = norms.shape(batch)
    size = 2 * torch.Size(shape).numel()
    counted = {"native": NATIVE[norms.form] * size}
    counted |= {spec: moved(batch_launches(spec, shape, norms.form)) for spec in SPECS if spec in times}
    floors = {name: 1e3 * count / bandwidth for name, count in counted.items()}
    return {
        "shape": shape,
        "form": norms.form,
        "count": norms.count,
        "bytes": size,
        "ms": dict(times),
        "floor ms": floors,
        "share of copy": {name: floors[name] / times[name] for name in floors},
    }


def lines(cases: Iterable[Mapping[str, Any]]) -> str:
    """The table of a run: how many times as fast as native, and in brackets the share of a copy's bandwidth."""
    names = ("compiled", *SPECS)
    head = ["shape", "form", "native ms", *names]
    return markdown(head, [_line(each, names) for each in cases])


def _line(case: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    times, share = case["ms"], case["share of copy"]

    def cell(name: str) -> str:
        if name not in times:
            return "–"
        return f"{times['native'] / times[name]:.2f}" + (f" ({share[name]:.0%})" if name in share else "")

    return ["×".join(map(str, case["shape"])), case["form"], f"{times['native']:.3f}", *map(cell, names)]


def goals(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal with what was reached: the smallest ratio over tensors that are large enough to be bound by memory."""
    large = [each for each in result["batch norm"] if each["bytes"] >= LARGE]
    judged = {
        f"{spec} {form} against {against}": _judged(
            goal, _ratios((c for c in large if c["form"] == form), spec, against)
        )
        for (spec, form, against), goal in GOALS.items()
    }
    for what, asked, cases in (
        ("layer norm", LAYER_GOALS, result["layer norm"]),
        ("ResNet-50 step", STEP_GOALS, [{"ms": result["step"]}]),
    ):
        for (name, against), goal in asked.items():
            judged[f"{what}, {name} against {against}"] = _judged(goal, _ratios(cases, name, against))
    shares = [share for c in large for name, share in c["share of copy"].items() if name != "native"]
    judged["share of copy bandwidth"] = _judged(0.85, shares)
    return judged


def _ratios(cases: Iterable[Mapping[str, Any]], name: str, against: str) -> list[float]:
    return [c["ms"][against] / c["ms"][name] for c in cases if {name, against} <= c["ms"].keys()]


def _judged(goal: float, ratios: list[float]) -> dict[str, Any]:
    """found and reached are None where nothing was measured."""
    reached = min(ratios, default=None)
    return {"wanted": goal, "found": reached, "reached": None if reached is None else reached >= goal}


def plot(result: Mapping[str, Any], path: Path) -> Path:
    """Times of all shapes over their bytes, as shares of native, with the counted floors as dashes."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, name in enumerate(("compiled", *SPECS)):
            seen = [c for c in result["batch norm"] if name in c["ms"]]
            times = [(c["bytes"] / 1e6, c["ms"]["native"] / c["ms"][name]) for c in seen]
            floors = [
                (c["bytes"] / 1e6, c["ms"]["native"] / c["floor ms"][name]) for c in seen if name in c["floor ms"]
            ]
            for points, style in ((times, {"label": name, "s": 18}), (floors, {"marker": "_", "s": 60})):
                if points:
                    axes.scatter(*zip(*points, strict=True), color=f"C{i}", **style)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="tensor, MB (fp16, channels-last)")
        axes.set(ylabel="times as fast as native BN (+ add) + ReLU")
        axes.legend(title="dashes: floors by bytes")

    return save(draw, path)


def measure(minutes: float) -> Iterator[dict[str, Any]]:
    """All of it, as far as the time goes: the result after each part. What was left out is named."""
    deadline = time.monotonic() + 60 * minutes - 30
    correct, bandwidth = correctness(), copy_bandwidth()
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "correct": correct, "copy bandwidth": bandwidth}
    result |= {"batch norm": [], "layer norm": [], "step": {}, "left out": []}
    for name, room, part in _parts(result, bandwidth, deadline):
        if time.monotonic() < deadline - room:
            part()
        else:
            result["left out"].append(name)
        yield result | {"goals": goals(result)}


def _parts(result: dict[str, Any], bandwidth: float, deadline: float) -> Iterator[tuple[str, float, Step]]:
    """Name, the seconds that must be left, and what to do: the most telling first."""
    by_size = sorted((norms for norms in RESNET50 if norms.form != "plain"), key=lambda n: -n.channels * n.side**2)

    def norm(norms: Norms, batch: int) -> None:
        times = batch_norm(norms, batch, compiled=batch == 256)
        result["batch norm"].append(case(norms, batch, times, bandwidth))

    def layers(rows: int, width: int) -> None:
        floor = 1e3 * moved(row_launches("l1", rows, width)) / bandwidth
        times = layer_norm(rows, width)
        result["layer norm"].append({"shape": (rows, width), "ms": times, "floor ms": {"l1": floor}})

    for norms in by_size:
        yield f"{norms} at batch 256", 200, partial(norm, norms, 256)
    for rows, width in LAYERS:
        yield f"layer norm of {rows}×{width}", 170, partial(layers, rows, width)
    yield "step of ResNet-50", 30, lambda: result["step"].update(resnet_step(256, deadline))
    for norms in by_size:
        yield f"{norms} at batch 64", 15, partial(norm, norms, 64)


def summary(result: Mapping[str, Any]) -> str:
    """What the terminal shows."""
    parts = [lines(result["batch norm"])]
    for each in result["layer norm"]:
        parts.append(
            f"layer norm {each['shape']}: {_milliseconds(each['ms'])}; floor of l1 {each['floor ms']['l1']:.3f}"
        )
    parts.append(f"step of ResNet-50: {_milliseconds(result['step'])}")
    for name, goal in result["goals"].items():
        state = {True: "reached", False: "missed", None: "not measured"}[goal["reached"]]
        reached = "" if goal["found"] is None else f"{goal['found']:.2f}, "
        parts.append(f"{state:<13}{name}: {reached}wanted {goal['wanted']}")
    return "\n".join([*parts, *(f"left out     {name}" for name in result["left out"])])


def _milliseconds(times: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items()) or "not measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    minutes = parser.parse_args().minutes
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured. Run this on a machine with CUDA.", file=sys.stderr)
        raise SystemExit(2)
    for result in measure(minutes):
        path = write("gpu_norms", result, "triton")
    print(summary(result), path, plot(result, RESULTS / "gpu_norms.svg"), sep="\n")


if __name__ == "__main__":
    main()
