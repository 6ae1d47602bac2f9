"""The kernels of lower/triton on a GPU: right first, then against torch's batch norm and what torch.compile makes of it.

    python -m benchmarks.gpu_norms                 # under eight minutes; writes results/gpu_norms.json and .svg
    python -m benchmarks.gpu_norms --minutes 3     # what fits, the most telling first

Without a GPU it says so and exits with 2. In order: every metric, dtype, memory format and form against float64; the bandwidth
of a copy; norms of a ResNet-50, fp16 channels-last, forward and backward (native eager, native compiled, ours); layer norms;
a training step of ResNet-50. Times are medians of CUDA-graph replays (the step: of calls), the variants in turns; beside each
stands the floor that the bytes it moves allow at the bandwidth of a copy (benchmarks/gpu_traffic.py).
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from benchmarks.gpu_traffic import NATIVE, RESNET50, Norms, batch_launches, moved, row_launches
from benchmarks.networks import resnet50
from benchmarks.stamp import RESULTS, markdown, write
from normrewrite.lower import eager, relu, rows
from normrewrite.lower.kernels import kernels

SPECS = ("l1", "linf", "range", "topk:10")
LAYERS = ((65536, 1024), (32768, 4096), (16384, 8192))
LARGE = 240e6  # bytes of a tensor from which on the share of a copy's bandwidth is a goal
ROUNDS = 25
DEVICE = "cuda"  # of what is compared with float64: tests run that part on a CPU, by the interpreter

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

Step = Callable[[], object]


# --- right first -----------------------------------------------------------------------------------------------------


def distinct(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values of which no two in a channel are equal, nor equally far from the mean: else two extremes are both right."""
    n = torch.Size(shape).numel() // shape[1]
    values = torch.arange(n, dtype=torch.float64)
    values[-1], values[-2] = values[-1] + n // 2, values[-2] + n // 3
    rows = torch.stack([values[torch.randperm(n)] for _ in range(shape[1])])
    return rows.unflatten(1, (shape[0], *shape[2:])).transpose(0, 1).contiguous().to(DEVICE, dtype)


def errors(spec: str, dtype: torch.dtype, shape: tuple[int, ...], last: bool, form: str) -> dict[str, float]:
    """Largest difference of y and all gradients from float64, in units of the largest wanted value."""
    memory_format = torch.channels_last if last else torch.contiguous_format
    x = distinct(shape, dtype).to(memory_format=memory_format)
    g = torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=memory_format)
    residual = torch.randn(shape, device=DEVICE).to(dtype) if form == "add" else None
    weight, bias = torch.randn(2, shape[1], device=DEVICE) + 2
    found = _gradients(spec, form, g, x, residual, weight, bias)
    with kernels("torch"):
        wanted = _gradients(spec, form, g, *(None if t is None else t.double() for t in (x, residual, weight, bias)))
    names = [
        name
        for name, value in zip(("y", "x", "residual", "weight", "bias"), (1, x, residual, 1, 1), strict=True)
        if value is not None
    ]
    return _off(names, found, wanted)


def _off(names: Iterable[str], found: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """Largest difference of each, in units of its largest wanted value."""
    pairs = zip(names, found, wanted, strict=True)
    return {name: float((a.double() - b).abs().max() / b.abs().max()) for name, a, b in pairs}


def _gradients(spec: str, form: str, g: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    x, residual, weight, bias = (None if value is None else value.detach().requires_grad_() for value in inputs)
    assert x is not None
    if form == "plain":
        y = eager.normalise(x, weight, bias, spec, "exact", 1e-5)[0]
    else:
        y = relu.normalise(x, residual, weight, bias, spec, "exact", 1e-5)[0]
    leaves = [leaf for leaf in (x, residual, weight, bias) if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))]


def row_errors(spec: str, dtype: torch.dtype, width: int) -> dict[str, float]:
    """The same of a layer norm."""
    x = distinct((width, 64), dtype).T.contiguous().view(64, 1, width, 1)
    weight, bias = torch.randn(2, 1, width, device=DEVICE) + 2
    g = torch.randn_like(x)

    def run(g: Tensor, *inputs: Tensor) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in inputs]
        y = rows.normalise(*leaves, spec, "exact", 1e-5)[0]  # type: ignore[misc, arg-type]
        return [y.detach(), *torch.autograd.grad(y, leaves, g)]

    found = run(g, x, weight, bias)
    with kernels("torch"):
        wanted = run(g.double(), x.double(), weight.double(), bias.double())
    return _off(("y", "x", "weight", "bias"), found, wanted)


ALLOWED = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def correctness() -> dict[str, Any]:
    """Every case, the largest error by dtype; raises where one is beyond what its dtype allows, or runs differ in a bit."""
    cases: dict[str, float] = {}
    for dtype, allowed in ALLOWED.items():
        for spec in ("l2", *SPECS):
            found = {f"layer {spec}": row_errors(spec, dtype, 200)}
            for last in (False, True):
                for form in ("plain", "relu", "add"):
                    shape = (2, 24, 9, 11) if dtype is not torch.bfloat16 else (2, 24, 7, 9)
                    found[f"{'last' if last else 'first'} {form} {spec}"] = errors(spec, dtype, shape, last, form)
            for name, each in found.items():
                worst = max(each.values())
                cases[f"{name} {dtype}"] = worst
                if not worst <= allowed:
                    raise AssertionError(f"{name} {dtype}: off by {each}, {allowed} allowed")
    return {
        "cases": len(cases),
        "largest error": {str(d): max(v for k, v in cases.items() if k.endswith(str(d))) for d in ALLOWED},
        "same bits": same_bits(),
    }


def same_bits() -> bool:
    """Two runs on a tensor of many programs."""
    x, g = (torch.randn(64, 256, 28, 28, device="cuda").half().to(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(2, 256, device="cuda")
    once, again = (_gradients("l1", "relu", g, x, None, weight, bias) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(once, again, strict=True)):
        raise AssertionError("two runs on the same input differ")
    return True


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
    forwards: dict[str, Step] = {"native": lambda: _native(native, x, residual, relu_too)}
    if compiled:
        made, other = torch.compile(_native, dynamic=False), copy.deepcopy(native)
        forwards["compiled"] = lambda: made(other, x, residual, relu_too)
    for spec in SPECS:
        norm = nr.nn.BatchNorm2d(norms.channels, metric=spec).cuda()
        forwards[spec] = lambda norm=norm: nr.nn.norm_relu(norm, x, residual) if relu_too else norm(x)  # type: ignore[misc]
    wanted = [leaf for leaf in (x, residual) if leaf is not None]
    return _timed(forwards, wanted, g)


def layer_norm(rows_: int, width: int) -> dict[str, float]:
    """Forward and backward in ms: torch's, torch's compiled, l1."""
    x, g = (torch.randn(rows_, width, device="cuda").half() for _ in range(2))
    x.requires_grad_()
    torch._dynamo.reset()
    native, other = (nn.LayerNorm(width).cuda().half() for _ in range(2))
    made, norm = torch.compile(other, dynamic=False), nr.nn.LayerNorm(width, metric="l1").cuda().half()
    return _timed({"native": lambda: native(x), "compiled": lambda: made(x), "l1": lambda: norm(x)}, [x], g)


def _timed(forwards: Mapping[str, Step], inputs: list[Tensor], g: Tensor) -> dict[str, float]:
    def step(forward: Step) -> Step:
        return graphed(lambda: torch.autograd.grad(forward(), inputs, g))  # type: ignore[arg-type]

    return milliseconds({name: step(forward) for name, forward in forwards.items()})


def resnet_step(batch: int, deadline: float) -> dict[str, float]:
    """A training step in ms: autocast to fp16, SGD, channels-last; the norms native and l1, eager and compiled."""
    images = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device="cuda")
    native = resnet50().cuda().to(memory_format=torch.channels_last).train()
    ours = nr.passes.FuseActivation()(torch.fx.symbolic_trace(nr.convert(native, "l1"))).graph_module
    steps = {"native": _step(native, images, labels), "l1": _step(ours, images, labels)}
    for name, model in (("native compiled", native), ("l1 compiled", ours)):
        if time.monotonic() < deadline - 100:  # what compiling one of them may take
            steps[name] = _step(torch.compile(copy.deepcopy(model), dynamic=False), images, labels)
    for step in steps.values():
        for _ in range(3):
            step()
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
    rows_ = []
    for each in cases:
        times, share = each["ms"], each["share of copy"]
        cells = [
            "–"
            if name not in times
            else f"{times['native'] / times[name]:.2f}" + (f" ({share[name]:.0%})" if name in share else "")
            for name in names
        ]
        rows_.append(["×".join(map(str, each["shape"])), each["form"], f"{times['native']:.3f}", *cells])
    return markdown(head, rows_)


def goals(cases: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each goal with what was reached: the smallest ratio over tensors that are large enough to be bound by memory."""
    large = [each for each in cases if each["bytes"] >= LARGE]
    found: dict[str, dict[str, Any]] = {}
    for (spec, form, against), wanted in GOALS.items():
        ratios = [c["ms"][against] / c["ms"][spec] for c in large if c["form"] == form and against in c["ms"]]
        if ratios:
            told = {"wanted": wanted, "found": min(ratios), "reached": min(ratios) >= wanted}
            found[f"{spec} {form} against {against}"] = told
    shares = [share for c in large for name, share in c["share of copy"].items() if name != "native"]
    if shares:
        found["share of copy bandwidth"] = {"wanted": 0.85, "found": min(shares), "reached": min(shares) >= 0.85}
    return found


def plot(result: Mapping[str, Any], path: Path) -> Path:
    """Times of all shapes over their bytes, as shares of native, with the counted floors as dashes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = result["batch norm"]
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for i, name in enumerate(("compiled", *SPECS)):
        seen = [c for c in cases if name in c["ms"]]
        sizes = [c["bytes"] / 1e6 for c in seen]
        axes.scatter(sizes, [c["ms"]["native"] / c["ms"][name] for c in seen], label=name, color=f"C{i}", s=18)
        floors = [(c["bytes"] / 1e6, c["ms"]["native"] / c["floor ms"][name]) for c in seen if name in c["floor ms"]]
        if floors:
            axes.scatter(*zip(*floors, strict=True), marker="_", color=f"C{i}", s=60)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        xscale="log", xlabel="tensor, MB (fp16, channels-last)", ylabel="times as fast as native BN (+ add) + ReLU"
    )
    axes.legend(title="dashes: floors by bytes")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def measure(minutes: float) -> dict[str, Any]:
    """All of it, as far as the time goes; what was left out is named."""
    deadline = time.monotonic() + 60 * minutes - 30
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "correct": correctness()}
    bandwidth = result["copy bandwidth"] = copy_bandwidth()
    cases, left = [], []
    result |= {"batch norm": cases, "layer norm": [], "step": {}, "left out": left}
    for batch in (256, 64):
        for norms in sorted(RESNET50, key=lambda n: -n.channels * n.side**2):
            if norms.form == "plain" or time.monotonic() > deadline - (180 if batch == 256 else 0):
                left.append(f"{norms} at batch {batch}")
                continue
            compiled = batch == 256
            cases.append(case(norms, batch, batch_norm(norms, batch, compiled), bandwidth))
        if batch == 256:
            for rows_, width in LAYERS:
                times = layer_norm(rows_, width)
                floor = 1e3 * moved(row_launches("l1", rows_, width)) / bandwidth
                result["layer norm"].append({"shape": (rows_, width), "ms": times, "floor ms": {"l1": floor}})
            result["step"] = resnet_step(256, deadline)
    return result | {"goals": goals(cases)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    minutes = parser.parse_args().minutes
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured. Run this on a machine with CUDA.", file=sys.stderr)
        raise SystemExit(2)
    result = measure(minutes)
    print(lines(result["batch norm"]))
    for name, told in result["goals"].items():
        print(f"{'reached' if told['reached'] else 'missed '}  {name}: {told['found']:.2f}, wanted {told['wanted']}")
    print(write("gpu_norms", result, "triton"), plot(result, RESULTS / "gpu_norms.svg"))


if __name__ == "__main__":
    main()
