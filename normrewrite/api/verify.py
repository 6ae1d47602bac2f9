"""The same inputs through two forms of a network, and how far their outputs are apart.

>>> verify(model, twin, example_inputs).snr_db
118.2
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normrewrite.backends.onnx import is_fitted
from normrewrite.data import NO_BATCH, Batch, Data, argument_names, as_data, check_finite
from normrewrite.deploy import onnx_file, precision
from normrewrite.diagnostics.comparison import Comparison, OutputDifference
from normrewrite.diagnostics.outputs import check_labels, matched
from normrewrite.errors import NormRewriteError
from normrewrite.execution import Network, leaves, require_network, runner
from normrewrite.options.fields import callback, options, quiet, takes
from normrewrite.options.verify import VerifyOptions
from normrewrite.tolerances import FITTED, LIMITS, Limit


@options
class VerifyCall(VerifyOptions):
    """What `verify` takes in Python."""

    a: Network = field(kw_only=False)
    b: Network = field(kw_only=False)
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Data | Iterable[Any] = field(kw_only=False)
    labels: Tensor | None = field(default=None, kw_only=False)
    progress: Callable[[int], object] = callback(default=quiet)


@takes(VerifyCall)
def verify(options: VerifyCall) -> Comparison:
    """Compare two networks in eval on the same inputs: torch modules, ONNX files run in onnxruntime, or engines
    where their GPU is.

    >>> verify(model, "twin.onnx", images, labels).ok
    True

    inputs: forward's arguments as a tensor, a sequence or a mapping, (N, ...) each or of several lengths; or Data, or batches.
    labels: (N,), for top-1. tolerance: of an output's largest number; min_snr: dB of signal, which is how an output varies from
    input to input, to noise; min_agreement: share of inputs that get the same class, where there are classes. By default all
    three are those of the coarser precision (normrewrite.tolerances.LIMITS), 1e-4, 20 dB and 0 for fp32. Whole numbers are
    compared exactly. Floats are cast to the one dtype of a model's layers of torch's kinds. progress: called with the number
    of inputs after every batch. Raises NormRewriteError where outputs can't be compared.
    """
    a, b = options.a, options.b
    for network in (a, b):
        require_network(network)
    data = _data(options.inputs, options.labels, a, b)
    kind, usual = max(map(own_limit, (a, b)), key=lambda own: own[1].tolerance)  # of the coarser one
    limit = _asked(usual, options.tolerance, options.min_snr, options.min_agreement)
    run_a, run_b = runner(a, leaves), runner(b, leaves)
    files = not (isinstance(a, nn.Module) and isinstance(b, nn.Module))
    differences: dict[str, OutputDifference] = {}
    left: dict[str, str] = {}
    count, labelled = 0, False
    for batch in data.batches(options.batch_size):
        check_finite(batch, "the data")  # of such, two networks give NaN, however different they are
        pairs, others = matched(run_a(batch), run_b(batch), files)
        if batch.labels is not None:
            check_labels(batch.labels, [values for _, values, _ in pairs])
        for name, one, other in pairs:
            differences.setdefault(name, OutputDifference(name)).add(one, other, batch.labels)
        left |= others
        count, labelled = count + len(batch), labelled or batch.labels is not None
        options.progress(len(batch))
    if not count:
        raise NormRewriteError(NO_BATCH)
    outputs = _compared(differences, left)
    wider = (
        limit.tolerance > usual.tolerance or limit.min_snr < usual.min_snr or limit.min_agreement < usual.min_agreement
    )
    not_compared = [f"{name} ({kind})" for name, kind in left.items()]
    return Comparison(outputs, limit, kind, labelled, count, wider, not_compared)


def _compared(differences: Mapping[str, OutputDifference], left: dict[str, str]) -> list[OutputDifference]:
    """The outputs that there was something to compare of; what there was not is added to `left`."""
    for output in differences.values():
        if output.numbers and not output.finite:
            raise NormRewriteError(
                f"{output.name}: both networks gave NaN or infinity alone, so there is nothing to compare. Look at their weights."
            )
        if output.nan or not output.numbers:
            left[output.name] = f"{output.nan} of {output.numbers} numbers, NaN in both" if output.nan else "empty"
    outputs = [output for output in differences.values() if output.numbers]
    if not outputs:
        kinds = f" It gives {', '.join(f'{name} ({kind})' for name, kind in left.items())}." if left else ""
        raise NormRewriteError(
            f"forward returns no tensor (alone, in a list or in a dict), so there is nothing to compare.{kinds}"
        )
    return outputs


def _data(inputs: Any, labels: Tensor | None, a: Network, b: Network) -> Data:
    names = _names(a, b)
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    if isinstance(inputs, Tensor) and not inputs.dim():
        raise NormRewriteError("inputs is a tensor without axes; needed is one row an input: (N, ...).")
    values = [inputs] if isinstance(inputs, Tensor) else values  # it may be long, or sparse
    if isinstance(inputs, Tensor | Mapping | Sequence) and all(isinstance(value, Tensor) for value in values):
        return as_data(Data(whole=Batch(named(inputs, a, b), labels)), names)
    if isinstance(inputs, str | Mapping | np.ndarray) or not isinstance(inputs, Data | Iterable):
        raise NormRewriteError(
            f"inputs is a {type(inputs).__name__}; needed are forward's arguments as tensors: one, a sequence or a mapping of "
            "them, or batches of such."
        )
    if labels is not None:
        raise NormRewriteError("labels beside batches: each batch has its own, as in (inputs, labels).")
    return as_data(inputs, names)


def _names(*networks: Network) -> list[str]:
    return next((argument_names(network) for network in networks if isinstance(network, nn.Module)), [])


def named(inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor], *networks: Network) -> dict[str, Tensor]:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    values = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    names = _names(*networks)
    if len(names) < len(values):
        names = [f"input_{i}" for i in range(len(values))]
    return dict(zip(names, values, strict=False))


# --- what the two are held to -----------------------------------------------------------------------------------------

_DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def own_limit(network: Network) -> tuple[str, Limit]:
    if isinstance(network, nn.Module):
        kinds = {_DTYPES[p.dtype] for p in network.parameters() if p.dtype in _DTYPES} or {"fp32"}
        kind = max(kinds, key=lambda kind: LIMITS[kind].tolerance)
    elif Path(network).suffix == ".engine":
        kind = "fp16"  # it doesn't say its precision; fp32 ones may use TF32
    else:
        proto = onnx_file.read(network)
        kind = precision.shown(proto)
        if is_fitted(proto) and LIMITS[kind].tolerance < FITTED:
            return "a fitted C(n)", replace(LIMITS[kind], tolerance=FITTED)
    return kind, LIMITS[kind]


def _asked(usual: Limit, tolerance: float | None, min_snr: float | None, min_agreement: float | None) -> Limit:
    asked = {"tolerance": tolerance, "min_snr": min_snr, "min_agreement": min_agreement}
    wrong = [name for name, value in asked.items() if value is not None and not math.isfinite(value)]
    if wrong or (tolerance or 0) < 0 or not 0 <= (min_agreement or 0) <= 1:
        raise NormRewriteError(
            f"tolerance {tolerance}, min_snr {min_snr}, min_agreement {min_agreement}: needed are a tolerance from 0, decibels, "
            "and a share from 0 to 1."
        )
    small = usual.small if tolerance is None else 1.0  # what is asked is of the whole output's largest
    return replace(usual, small=small, **{name: value for name, value in asked.items() if value is not None})
