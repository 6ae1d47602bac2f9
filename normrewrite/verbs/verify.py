"""The same inputs through two forms of a network, and how far their outputs are apart.

>>> verify(model, twin, example_inputs).snr_db
118.2
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normrewrite.data import Batch, Data, argument_names, check_finite
from normrewrite.deployment import onnx_bounds, onnx_file
from normrewrite.errors import NormRewriteError, first_line
from normrewrite.records.report import table
from normrewrite.sites.modes import evaluating
from normrewrite.tolerances import SAME_NETWORK

Network = nn.Module | str | Path
Outputs = dict[str, Tensor]


@dataclass
class OutputDifference:
    """One output of A against B. Signal and noise are sums of squares; B is the signal."""

    name: str
    max_abs: float = 0.0
    largest: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    rows: int = 0
    agreeing: int = 0
    finite: int = 0  # numbers that at least one of the two gave
    right: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def max_rel(self) -> float:
        """Largest difference in units of the largest output."""
        return self.max_abs / self.largest if self.largest else self.max_abs

    @property
    def snr_db(self) -> float:
        if not self.noise:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if 0 < ratio < math.inf else -math.inf

    def add(self, a: Tensor, b: Tensor, labels: Tensor | None) -> None:
        if a.shape != b.shape:
            raise NormRewriteError(
                f"output {self.name}: shapes {tuple(a.shape)} and {tuple(b.shape)}, so there is nothing to compare."
            )
        a, b = a.double().cpu(), b.double().cpu()
        gap = torch.where(a.isnan() & b.isnan() | (a == b), 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
        self.finite += int((a.isfinite() | b.isfinite()).sum())
        self.max_abs = max(self.max_abs, float(gap.max()) if gap.numel() else 0.0)
        self.largest = max(self.largest, float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0)
        self.signal += float((b * b).nansum())
        self.noise += float((gap * gap).sum())
        if a.dim() == 2 and a.shape[1] > 1:
            self._classes(a.argmax(1), b.argmax(1), labels)

    def _classes(self, a: Tensor, b: Tensor, labels: Tensor | None) -> None:
        self.rows += len(a)
        self.agreeing += int((a == b).sum())
        if labels is not None:
            self.right = [self.right[0] + int((a == labels).sum()), self.right[1] + int((b == labels).sum())]


@dataclass
class Comparison:
    """What `verify` found. `ok`: every output within `tolerance` times max(1, largest output)."""

    outputs: list[OutputDifference]
    tolerance: float
    labelled: bool
    inputs: int

    @property
    def max_abs(self) -> float:
        return max(output.max_abs for output in self.outputs)

    @property
    def snr_db(self) -> float:
        return min(output.snr_db for output in self.outputs)

    @property
    def ok(self) -> bool:
        return all(output.max_abs <= self.tolerance * max(1.0, output.largest) for output in self.outputs)

    def as_dict(self) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        for output in self.outputs:
            snr = output.snr_db if math.isfinite(output.snr_db) else None
            row = {"name": output.name, "max_abs": output.max_abs, "max_rel": output.max_rel, "snr_db": snr}
            if output.rows:
                row["agreement"] = output.agreeing / output.rows
            if output.rows and self.labelled:
                row["top1"] = [right / output.rows for right in output.right]
            rows.append(row)
        return {"ok": self.ok, "tolerance": self.tolerance, "inputs": self.inputs, "outputs": rows}

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                output.name,
                f"{output.max_abs:.2e}",
                f"{output.max_rel:.2e}",
                f"{output.snr_db:.1f}",
                f"{100 * output.agreeing / output.rows:.2f} %" if output.rows else "",
                *(
                    (f"{100 * right / output.rows:.2f} %" if output.rows else "")
                    for right in output.right
                    if self.labelled
                ),
            )
            for output in self.outputs
        ]

    @property
    def head(self) -> tuple[str, ...]:
        labelled = ("top-1 of A", "top-1 of B") if self.labelled else ()
        return ("output", "max difference", "relative", "SNR (dB)", "same class", *labelled)

    @property
    def verdict(self) -> str:
        word = "same function" if self.ok else "DIFFERENT"
        limit = f"tolerance {self.tolerance:g} of max(1, largest output)"
        return f"{word}: largest difference {self.max_abs:.2e} over {self.inputs} inputs, {limit}"

    def __str__(self) -> str:
        return f"{table(self.head, self.rows())}\n{self.verdict}"


def verify(
    a: Network,
    b: Network,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Data,
    labels: Tensor | None = None,
    *,
    tolerance: float | None = None,
    batch_size: int = 250,
    each: Callable[[int], object] = lambda done: None,
) -> Comparison:
    """Compare two networks in eval on the same inputs: torch modules, ONNX files run in onnxruntime, or engines
    where their GPU is.

    >>> verify(model, "twin.onnx", images, labels).ok
    True

    inputs: forward's arguments as a tensor, a sequence or a mapping, (N, ...) each; or Data, gone through in batches.
    labels: (N,), for top-1. tolerance: of max(1, largest output); by default that of the precision, 1e-4 for fp32.
    each: called with the number of inputs after every batch. Raises NormRewriteError where outputs can't be compared.
    """
    data = _data(inputs, labels, a, b)
    run_a, run_b = runner(a), runner(b)
    differences: dict[str, OutputDifference] = {}
    count, labelled = 0, False
    for batch in data.batches(batch_size):
        check_finite(batch, "the data")  # of such, two networks give NaN, however different they are
        out_a, out_b = run_a(batch), run_b(batch)
        if len(out_a) != len(out_b):
            raise NormRewriteError(f"A has {len(out_a)} outputs and B {len(out_b)}, so they can't be compared.")
        for (name, left), right in zip(out_a.items(), out_b.values(), strict=True):
            differences.setdefault(name, OutputDifference(name)).add(left, right, batch.labels)
        count, labelled = count + len(batch), labelled or batch.labels is not None
        each(len(batch))
    if not count:
        raise NormRewriteError("the data held no batch. Give at least one input.")
    if not differences:
        raise NormRewriteError(
            "forward returns no tensor (alone, in a list or in a dict), so there is nothing to compare."
        )
    if not any(output.finite for output in differences.values()):
        raise NormRewriteError(
            "both networks gave NaN or infinity alone, so there is nothing to compare. Look at their weights."
        )
    limit = tolerance if tolerance is not None else max(_tolerance(a), _tolerance(b))
    return Comparison(list(differences.values()), limit, labelled, count)


def _data(inputs: Any, labels: Tensor | None, a: Network, b: Network) -> Data:
    if isinstance(inputs, Data):
        return inputs
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    if not isinstance(inputs, Tensor | Mapping | Sequence) or not all(isinstance(value, Tensor) for value in values):
        raise NormRewriteError(
            f"inputs is a {type(inputs).__name__}; needed are forward's arguments as tensors: one, a sequence or a mapping of "
            "them, or normrewrite.data.Data for batches."
        )
    return Data(whole=Batch(named(inputs, a, b), labels))


def named(inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor], *networks: Network) -> dict[str, Tensor]:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    values = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    names = next((argument_names(network) for network in networks if isinstance(network, nn.Module)), [])
    if len(names) < len(values):
        names = [f"input_{i}" for i in range(len(values))]
    return dict(zip(names, values, strict=False))


def _tolerance(network: Network) -> float:
    if not isinstance(network, nn.Module):
        is_engine = Path(network).suffix == ".engine"  # it doesn't say its precision; fp32 ones may use TF32
        return SAME_NETWORK[torch.float16] if is_engine else onnx_file.tolerance(onnx_file.read(network))
    dtypes = [parameter.dtype for parameter in network.parameters()]
    return max(
        (SAME_NETWORK[dtype] for dtype in set(dtypes) if dtype in SAME_NETWORK), default=SAME_NETWORK[torch.float32]
    )


def runner(network: Network) -> Callable[[Batch], Outputs]:
    """What runs a batch: a module in eval, an ONNX file in onnxruntime, or an engine on its GPU."""
    if isinstance(network, nn.Module):
        return _torch_runner(network)
    if Path(network).suffix == ".engine":
        from normrewrite.deployment import engine

        return engine.runner(Path(network))
    return _onnx_runner(Path(network))


def _torch_runner(model: nn.Module) -> Callable[[Batch], Outputs]:
    names, device = argument_names(model), device_of(model)

    def run(batch: Batch) -> Outputs:
        with evaluating(model), torch.inference_mode():
            return flat(call(model, batch.to(device), names))

    return run


def call(model: nn.Module, batch: Batch, names: Sequence[str]) -> Any:
    """What forward returns, its arguments given by name where they are called `names`; a failure is told in plain words."""
    try:
        return model(**batch.inputs) if set(batch.inputs) <= set(names) else model(*batch.inputs.values())
    except NormRewriteError:
        raise
    except Exception as error:  # the model's code runs here, and may raise anything
        shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in batch.inputs.items())
        raise NormRewriteError(f"the model can't run on {shapes}: {first_line(error)}") from error


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: the device of its first tensor."""
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


def flat(outputs: object, name: str = "output") -> Outputs:
    """Every tensor in what forward returns, by name."""
    if isinstance(outputs, Tensor):
        return {name: outputs}
    if isinstance(outputs, Mapping):
        items: Iterable[tuple[str, object]] = ((str(key), value) for key, value in outputs.items())
    elif isinstance(outputs, Sequence) and not isinstance(outputs, str):
        items = ((f"{name}_{i}", value) for i, value in enumerate(outputs))
    else:
        return {}
    return {key: tensor for sub, value in items for key, tensor in flat(value, sub).items()}


def _onnx_runner(path: Path) -> Callable[[Batch], Outputs]:
    if not path.is_file():
        raise NormRewriteError(f"{path}: there is no such file.")
    import onnxruntime

    open_ended = onnx_file.has_open_loops(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, too
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class of its own for every fault of a file
        raise NormRewriteError(f"{path}: onnxruntime can't load it: {_cause(error)}") from error
    wanted = {node.name: node.type for node in session.get_inputs()}
    outputs = [node.name for node in session.get_outputs()]

    def run(batch: Batch) -> Outputs:
        arrays = onnx_file.feed(batch, list(wanted), path)
        arrays = {
            name: value.astype(np.float16) if wanted[name] == "tensor(float16)" else value
            for name, value in arrays.items()
        }
        try:
            with onnx_bounds.limited(path, open_ended) as how:
                results = session.run(outputs, arrays, how)
        except NormRewriteError:
            raise
        except Exception as error:  # as above
            raise NormRewriteError(f"{path}: onnxruntime can't run it: {_cause(error)}") from error
        return {name: torch.from_numpy(value) for name, value in zip(outputs, results, strict=True)}

    return run


def _cause(error: Exception) -> str:
    text = str(error).splitlines()[0]
    bf16 = " Its CPU kernels have no bf16: run such a file on a GPU." if "bfloat16" in text else ""
    return f"{text}{bf16}"
