"""Two forms of a network against each other: latency and throughput, interleaved, medians.

>>> print(bench(model, twin, torch.randn(1, 3, 32, 32)))
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normrewrite.api.export import export
from normrewrite.api.verify import named
from normrewrite.data import Batch, argument_names
from normrewrite.execution import Network, runner
from normrewrite.options.bench import BenchOptions, Runtime
from normrewrite.options.fields import callback, options, quiet, takes
from normrewrite.results import Result, Summary, Table

_WARM = 3


@dataclass
class Bench(Result):
    """Seconds a batch, by form, in the order measured. `ratio`: the median of B's time over A's, run by run."""

    names: tuple[str, str]
    seconds: tuple[list[float], list[float]]
    inputs: int
    runtime: str

    @property
    def ratio(self) -> float:
        return statistics.median(b / a for a, b in zip(*self.seconds, strict=True))

    def as_dict(self) -> dict[str, Any]:
        medians = {name: statistics.median(values) for name, values in zip("ab", self.seconds, strict=True)}
        spread = {name: [min(values), max(values)] for name, values in zip("ab", self.seconds, strict=True)}
        rounds = len(self.seconds[0])
        return {
            "runtime": self.runtime,
            "inputs": self.inputs,
            "rounds": rounds,
            "seconds": medians,
            "range": spread,
            "ratio": self.ratio,
        }

    def summary(self) -> Summary:
        lines = []
        for name, values in zip(self.names, self.seconds, strict=True):
            middle = statistics.median(values)
            lines.append((name, f"{1000 * middle:.3f}", f"{1000 * min(values):.3f}", f"{self.inputs / middle:.1f}"))
        heads = ("form", "ms a batch (median)", "smallest", "inputs a second")
        rounds = len(self.seconds[0])
        ratio = f"B takes {self.ratio:.3f} times A's time: {self.runtime}, batches of {self.inputs}, {rounds} rounds"
        return [Table(heads, lines), ratio]


@options
class BenchCall(BenchOptions):
    """What `bench` takes in Python."""

    a: Network = field(kw_only=False)
    b: Network = field(kw_only=False)
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] = field(kw_only=False)
    progress: Callable[[int], object] = callback(default=quiet)


@takes(BenchCall)
def bench(options: BenchCall) -> Bench:
    """Time two networks on one batch, in turns, so that a busy machine slows both.

    inputs: forward's arguments, (N, ...) each. runtime: what runs torch modules; ONNX files always run in onnxruntime.
    progress: called with the number of inputs after every round.
    """
    a, b, runtime = options.a, options.b, options.runtime
    batch = Batch(named(options.inputs, a, b))
    with _runnable(a, batch, runtime) as first, _runnable(b, batch, runtime) as second:
        runs = runner(first), runner(second)
        for run in runs * _WARM:
            run(batch)
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(options.rounds):
            order = (0, 1) if turn % 2 else (1, 0)  # neither always comes second
            for i in order:
                seconds[i].append(_timed(runs[i], batch))
            options.progress(len(batch))
    return Bench(_names(a, b), seconds, len(batch), runtime)


def _timed(run: Callable[[Batch], object], batch: Batch) -> float:
    start = time.perf_counter()
    run(batch)
    return time.perf_counter() - start


def _names(a: Network, b: Network) -> tuple[str, str]:
    words = [type(form).__name__ if isinstance(form, nn.Module) else Path(form).name for form in (a, b)]
    return f"A {words[0]}", f"B {words[1]}"


@contextmanager
def _runnable(network: Network, batch: Batch, runtime: Runtime) -> Iterator[Network]:
    """The network itself, or the ONNX file that `runtime` asks for."""
    if not isinstance(network, nn.Module) or runtime == "torch":
        yield network
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(network, batch.positional(argument_names(network)), path)
        yield path
