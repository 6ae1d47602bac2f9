"""To ONNX: norms folded or as nodes of their own, in one file, at the precision that is to be deployed.

>>> export(twin, example_inputs, "model.onnx")
"""

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite import sites
from normrewrite.api.passage import Passage, limit, passage, why_apart
from normrewrite.backends.onnx import add_bodies, attribute, fitted, inlined
from normrewrite.data import Data, argument_names, as_data
from normrewrite.deploy import onnx_file
from normrewrite.deploy.onnx_nodes import as_nodes
from normrewrite.deploy.onnx_ranges import tensors
from normrewrite.deploy.precision import cast_model
from normrewrite.deploy.precision import keep_io_types as cast_io
from normrewrite.deploy.quantise import activations, quantise, unkept
from normrewrite.errors import NormRewriteError, first_line, nearest, some
from normrewrite.execution import device_of, dtype_of, fitted_to
from normrewrite.files import check_writable
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.parts import deepcopy
from normrewrite.options.export import Deploy, ExportOptions, Precision, Ranges
from normrewrite.options.fields import choices, options, takes
from normrewrite.passes.folding import fold
from normrewrite.provenance.ranges import LearnedRanges
from normrewrite.results import Result, Summary
from normrewrite.sites import graph
from normrewrite.sites.neighbours import has_hooks

_OPSETS = range(18, 24)
_BF16_OPSET = 22  # Conv, pooling and others have it from there
_NORM_OPS = {"BatchNormalization", "InstanceNormalization"}


@dataclass
class Exported(Result):
    """What was written: where each norm went, and what nodes the file holds."""

    path: str
    opset: int
    into_neighbour: list[str]
    to_affine: list[str]
    notes: list[str] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)
    live: list[str] = field(default_factory=list)
    precision: Precision = "fp32"
    deploy: Deploy = "fold"

    @property
    def norms_left(self) -> int:
        return sum(count for op, count in self.nodes.items() if op in _NORM_OPS)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "norms_left": self.norms_left}

    def summary(self) -> Summary:
        counts = (
            f"{self.path}: {self.precision}, opset {self.opset}, {sum(self.nodes.values())} nodes; {len(self.into_neighbour)} "
            f"norms folded into a neighbour, {len(self.to_affine)} became Mul and Add, {self.norms_left} norm nodes left"
        )
        form = "one node each" if self.deploy == "op" else "standard operators"
        measured = [f"{len(self.live)} norms measure at inference, as {form}"] if self.live else []
        return [counts, *measured, *self.notes]


@options
class ExportCall(ExportOptions):
    """What `export` takes in Python."""

    model: nn.Module = field(kw_only=False)
    example_inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor] = field(kw_only=False)
    path: str | Path = field(kw_only=False)
    calibrate: Tensor | Data | None = None
    learned: LearnedRanges | None = None


@takes(ExportCall)
def export(options: ExportCall) -> Exported:
    """Write `model` in eval as one ONNX file with its norms folded away; the model itself is not touched.

    >>> export(twin, example_inputs, "model.onnx", precision="int8", calibrate=images)

    example_inputs: forward's arguments, in order or by name; of their sizes the first stays open and the others become fixed,
    unless `dynamic_size`. Arguments of several first sizes, as a graph's nodes and edges, have one of their own each.
    deploy: `fold` (standard operators alone) or `op`: a norm that measures at inference is one node of domain normrewrite,
    with its body as a local function unless `bodies` is False. live_stats: batch norms measure their batch, too.
    precision: `fp16` and `bf16` cast the network, `keep_io_types` leaves its inputs and outputs fp32; `int8` quantises by the
    ranges `learned` in int8 training, those that `calibrate` shows by `ranges`, or both, learned ones first. Raises
    NormRewriteError where torch can't export the model, or the file can't be written.
    """
    model, path, live_stats = options.model, Path(options.path), options.live_stats
    precision, opset, learned = options.precision, options.opset, options.learned
    check_writable(path, options.force)
    _check_request(options)
    _check_dtype(model, opset, precision)
    if has_hooks(model):
        raise NormRewriteError(
            f"hooks on the whole {type(model).__name__}: torch's exporter leaves them out. Remove them, or export a module whose "
            "forward calls this one."
        )
    graph.check_names(model)  # torch's exporter makes code of them, too
    dtype = dtype_of(model)
    inputs = tuple(fitted_to(dtype, value) for value in _examples(options.example_inputs, argument_names(model)))
    names = argument_names(model)[: len(inputs)]
    keys = names if len(names) == len(inputs) else [f"input_{i}" for i in range(len(inputs))]  # forward(*inputs)
    before = passage(model, (), inputs)  # input that doesn't fit is told in plain words
    if live_stats and not any(isinstance(module, BatchNorm) for module in model.modules()):
        raise NormRewriteError("--live-stats: the model holds no batch norm of normrewrite's. Convert it first.")
    whole = deepcopy(model).cpu().eval()
    if dtype not in (None, torch.float32):  # what the file is to compute in, `precision` says
        whole, inputs = whole.float(), tuple(fitted_to(torch.float32, value) for value in inputs)
    as_graph, live = as_nodes(deepcopy(whole), live_stats)
    folded, outcome, notes = fold(as_graph, inputs, forwards=learned is None)
    _refuse_live(folded, live_stats)
    plain = fold(whole, inputs, forwards=learned is None)[0] if live else folded  # a node of its own has no numbers yet
    _compare(before, model, plain, inputs)
    inputs = cast_model(folded, inputs, precision)
    _check_weights(folded, path)
    proto = _to_onnx(folded, inputs, names, options)
    if options.keep_io_types:
        cast_io(proto)
    formulas = len(fitted(proto))
    if formulas:
        notes.append(f"{formulas} norms measure as many elements as come: C(n) is a fitted formula there")
    add_bodies(proto)
    if precision == "int8":  # the adds inside a body are none of its business
        data = None if options.calibrate is None else as_data(options.calibrate, keys)
        proto, more = _quantised(proto, model, data, options.ranges, learned)
        notes += more
    if options.deploy == "fold" and proto.functions:
        proto = inlined(proto)
    if not options.bodies:
        del proto.functions[:]
        notes.append("no bodies: only a runtime with normrewrite's plugins can run this file")
    _describe(proto, precision=precision, deploy=options.deploy, fitted=str(formulas))
    written = onnx_file.opset_of(proto)
    if written != opset:
        raise NormRewriteError(f"--opset {opset}: torch's exporter gave opset {written} instead. Ask for that one.")
    onnx_file.write(proto, path, options.force)
    nodes = dict(Counter(node.op_type for node in proto.graph.node))
    where = (outcome.into_neighbour, outcome.to_affine)
    return Exported(str(path), opset, *where, notes, nodes, live, precision, options.deploy)


def _compare(before: Passage, model: nn.Module, folded: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raises where folding made another function of it; the model's own device tells, as it may have no half elsewhere."""
    after = passage(folded.to(device_of(model)), (), inputs)
    apart = why_apart(before, after, max(limit(model), limit(folded)))
    folded.cpu()
    if apart is not None:
        raise NormRewriteError(
            f"folded, {type(model).__name__} computes another function on the example inputs: {apart}. No file was written. Its "
            "forward may do what a trace can't tell: export a module that does one thing.",
            exit_code=1,
        )


def _examples(inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor], names: list[str]) -> tuple[Tensor, ...]:
    """Forward's arguments in order, copied: the model may work in place."""
    if isinstance(inputs, Mapping):
        if set(inputs) != set(names[: len(inputs)]):
            raise NormRewriteError(
                f"example_inputs: {', '.join(map(str, inputs))}; forward takes {', '.join(names)}, and needed are the first of "
                "them without a gap."
            )
        inputs = [inputs[name] for name in names[: len(inputs)]]
    examples = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not all(isinstance(value, Tensor) for value in examples):
        raise NormRewriteError(
            "example_inputs: needed are forward's arguments as tensors, as in torch.zeros(1, 3, 32, 32)."
        )
    return tuple(value.detach().cpu().clone() for value in examples)


def _quantised(
    proto: Any, model: nn.Module, data: Data | None, ranges: Ranges, learned: LearnedRanges | None
) -> tuple[Any, list[str]]:
    """The file with 8-bit layers, and what is to be said of their ranges."""
    if learned is None:
        return quantise(proto, data, ranges), []
    known, notes = tensors(proto, learned, model)
    nodes = unkept(proto, learned.kept)
    missing = [node.name for node in nodes if any(name not in known for name in activations(node))]
    if missing:
        instead = "are computed in fp32" if data is None else "are calibrated"
        notes.append(
            f"{len(missing)} of {len(nodes)} products and adds have no learned range, and {instead}: {some(missing, 4)}"
        )
    coarse = [node.name for node in nodes if node.op_type == "ConvTranspose" and attribute(node, "group", 1) > 1]
    if coarse:
        notes.append(
            f"in ONNX the groups of a transposed convolution share their weights' steps, not in training: {some(coarse, 4)}"
        )
    return quantise(proto, data, ranges, learned=known, kept=learned.kept), notes


def _check_request(options: ExportCall) -> None:
    if options.opset not in _OPSETS:
        raise NormRewriteError(f"--opset {options.opset}: the exporter gives {_OPSETS.start} to {_OPSETS.stop - 1}.")
    for name, known in choices(ExportOptions).items():
        value = getattr(options, name)
        if value not in known:
            raise NormRewriteError(f"unknown {name} {value!r}.{nearest(value, known)} Known: {', '.join(known)}.")
    if options.precision == "int8" and options.calibrate is None and options.learned is None:
        raise NormRewriteError(
            "int8 needs unlabelled inputs to see how far activations reach: give --calibrate DATA, or a network that finetune "
            "--precision int8 has written, whose file knows."
        )
    if options.precision != "int8" and options.calibrate is not None:
        raise NormRewriteError(f"--calibrate goes with --precision int8: {options.precision} needs no data.")
    if options.deploy == "fold" and not options.bodies:
        raise NormRewriteError("--no-bodies goes with --deploy op: a folded file holds no functions.")


def _check_dtype(model: nn.Module, opset: int, precision: Precision) -> None:
    mixed = dtype_of(model) is None  # one dtype throughout becomes fp32, and what `precision` asks for then
    keeps_bf16 = precision != "fp16" and mixed and any(p.dtype == torch.bfloat16 for p in model.parameters())
    if (precision == "bf16" or keeps_bf16) and opset < _BF16_OPSET:
        what = "" if precision == "bf16" else f" The {type(model).__name__} is in bf16."
        raise NormRewriteError(
            f"--opset {opset}: many operators take bf16 only from opset {_BF16_OPSET}. Ask for that.{what}"
        )


def _check_weights(model: nn.Module, path: Path) -> None:
    """Before minutes of export: a file can't be smaller than its weights."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    onnx_file.check_size(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), str(path))


def _describe(proto: Any, **facts: str) -> None:
    """What the file is, for verify and build."""
    for key, value in facts.items():
        proto.metadata_props.add(key=f"normrewrite.{key}", value=value)


def _refuse_live(model: nn.Module, live_stats: bool) -> None:
    live = [site.label for site in sites.find(model) if getattr(site.module, "running_mean", None) is None]
    if live:
        what = (
            "torch's batch norm has no such form: convert them first" if live_stats else "ask for that by --live-stats"
        )
        raise NormRewriteError(
            f"{len(live)} norms keep no running statistics ({', '.join(live[:4])}) and would measure each batch; {what}, or "
            "train with track_running_stats=True."
        )


def _to_onnx(model: nn.Module, inputs: tuple[Tensor, ...], names: list[str], options: ExportOptions) -> Any:
    """An onnx.ModelProto."""
    dynamic_batch, dynamic_size = options.dynamic_batch, options.dynamic_size
    if dynamic_batch:  # a size of one would be taken for a constant
        inputs = tuple(
            value.repeat(2, *[1] * (value.dim() - 1)) if value.shape[:1] == (1,) else value for value in inputs
        )
    shapes: Any = _open_shapes(inputs, dynamic_batch, dynamic_size)
    if not names:  # forward(*inputs) has one argument, a tuple
        shapes = [tuple(shapes)]
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=options.opset,
                input_names=names,
                dynamic_shapes=shapes if dynamic_batch or dynamic_size else None,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever it meets
        cause = _innermost(error)
        hint = " If the model fixes its sizes, export with --static-batch and --static-size." if dynamic_batch else ""
        raise NormRewriteError(f"torch can't export {type(model).__name__} to ONNX: {cause}.{hint}") from error
    assert program is not None
    proto = program.model_proto
    if dynamic_batch and any(
        d.HasField("dim_value") for value in proto.graph.input for d in value.type.tensor_type.shape.dim[:1]
    ):
        raise NormRewriteError(
            f"{type(model).__name__} fixes its batch size while it runs (by len(x) or int(x.shape[0]), say). Export it "
            "with --static-batch."
        )
    return proto


def _open_shapes(inputs: Sequence[Tensor], dynamic_batch: bool, dynamic_size: bool) -> list[dict[int, Any]]:
    """What each input leaves open, by axis: the batch, or a first size of its own, and the sizes behind the channels."""
    stacked = len({tuple(value.shape[:1]) for value in inputs}) == 1
    batch = {0: torch.export.Dim("batch") if stacked else torch.export.Dim.DYNAMIC} if dynamic_batch else {}
    sizes = [range(2, value.dim()) if dynamic_size else () for value in inputs]
    open_axes = [batch | dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in sizes]
    return [axes if value.dim() else {} for axes, value in zip(open_axes, inputs, strict=True)]


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
