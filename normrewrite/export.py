"""To ONNX: norms folded, one plain file, dynamic batch.

>>> export(twin, example_inputs, "model.onnx")
"""

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite import graph, sites
from normrewrite.bake import bake_
from normrewrite.data import Batch, argument_names
from normrewrite.errors import NormRewriteError, first_line
from normrewrite.files import check_writable, write_atomically
from normrewrite.nn.parts import deepcopy
from normrewrite.nn.weights import weight_norm_of
from normrewrite.passes import FoldAffine
from normrewrite.passes.fold_affine import Outcome
from normrewrite.verify import runner

OPSET = 20
_OPSETS = range(18, 24)
_NORM_OPS = {"BatchNormalization", "InstanceNormalization"}


@dataclass
class Exported:
    """What was written: where each norm went, and what nodes the file holds."""

    path: str
    opset: int
    into_neighbour: list[str]
    to_affine: list[str]
    notes: list[str] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)

    @property
    def norms_left(self) -> int:
        return sum(count for op, count in self.nodes.items() if op in _NORM_OPS)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "norms_left": self.norms_left}

    def __str__(self) -> str:
        text = (
            f"{self.path}: opset {self.opset}, {sum(self.nodes.values())} nodes; {len(self.into_neighbour)} norms folded into "
            f"a neighbour, {len(self.to_affine)} became Mul and Add, {self.norms_left} norm nodes left"
        )
        return "\n".join([text, *self.notes])


def export(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    opset: int = OPSET,
    dynamic_batch: bool = True,
    force: bool = False,
) -> Exported:
    """Write `model` in eval as one plain ONNX file with its norms folded away; the model itself is not touched.

    example_inputs: forward's arguments, (N, ...) each; sizes other than the batch become fixed. Raises NormRewriteError
    where torch can't export the model, or the file can't be written.
    """
    check_writable(path, force)
    if opset not in _OPSETS:
        raise NormRewriteError(f"--opset {opset}: the exporter gives {_OPSETS.start} to {_OPSETS.stop - 1}.")
    inputs = tuple(
        value.detach().cpu() for value in ([example_inputs] if isinstance(example_inputs, Tensor) else example_inputs)
    )
    names = argument_names(model)[: len(inputs)]
    keys = names if len(names) == len(inputs) else [f"input_{i}" for i in range(len(inputs))]  # forward(*inputs)
    runner(model)(Batch(dict(zip(keys, inputs, strict=True))))  # input that doesn't fit is told in plain words
    folded, outcome, notes = fold(model, inputs)
    _refuse_live(folded)
    proto = _to_onnx(folded, inputs, names, opset, dynamic_batch)
    _write(proto, Path(path), force)
    written = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if written != opset:
        raise NormRewriteError(f"--opset {opset}: torch's exporter gave opset {written} instead. Ask for that one.")
    nodes = dict(Counter(node.op_type for node in proto.graph.node))
    return Exported(str(path), opset, outcome.into_neighbour, outcome.to_affine, notes, nodes)


def _refuse_live(model: nn.Module) -> None:
    live = [site.label for site in sites.find(model) if getattr(site.module, "running_mean", None) is None]
    if live:
        raise NormRewriteError(
            f"{len(live)} norms keep no running statistics ({', '.join(live[:4])}): plain ONNX has no batch norm that "
            "measures at inference. Train them with track_running_stats=True, or leave them out of the exported part."
        )


def fold(model: nn.Module, example_inputs: Sequence[Tensor] | None = None) -> tuple[nn.Module, Outcome, list[str]]:
    """A copy of the model in eval with its norms folded away, where each went, and notes on what could not be done.

    A model that torch.fx can't trace keeps an affine by channel in the place of each norm.
    """
    copied = deepcopy(model).cpu().eval()
    if any(weight_norm_of(module) is not None for module in copied.modules()):
        bake_(copied)
    rewrite = FoldAffine(example_inputs)
    try:
        return rewrite(graph.trace(copied)).graph_module, rewrite.outcome, []
    except graph.Untraceable as error:
        whole, _ = rewrite.apply(copied)
        return whole, rewrite.outcome, [f"norms are not folded into their neighbours: {error}"]


def _to_onnx(model: nn.Module, inputs: tuple[Tensor, ...], names: list[str], opset: int, dynamic_batch: bool) -> Any:
    """An onnx.ModelProto."""
    if dynamic_batch:  # a batch of one would be taken for a constant
        inputs = tuple(value.expand(2, *value.shape[1:]) if value.shape[0] == 1 else value for value in inputs)
    shapes: Any = [{0: torch.export.Dim("batch")} for _ in inputs] if dynamic_batch else None
    if shapes and not names:  # forward(*inputs) has one argument, a tuple
        shapes = [tuple(shapes)]
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever it meets
        cause = _innermost(error)
        hint = " If the model fixes its batch size, export with a static one (--static-batch)." if dynamic_batch else ""
        raise NormRewriteError(f"torch can't export {type(model).__name__} to ONNX: {cause}.{hint}") from error
    assert program is not None
    return program.model_proto


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about its own internals; its errors still come through."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write(proto: Any, path: Path, force: bool) -> None:
    import onnx

    onnx.checker.check_model(proto, full_check=True)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(proto.SerializeToString()), force)
