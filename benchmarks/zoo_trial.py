"""One architecture put to the test: built, given random weights, converted, and compared with what it computed before.

The reference is the ORIGINAL network in float64. Its own fp32 run tells what rounding alone does to it (e0); the twin
(e1) is "same" if no output is off by more than four times that, or than 1e-4 of its largest value. Compared are all
outputs, and that of the last norm, as a random detection head may hardly look at the image. Where the original itself
is off by more than a thousandth, or the twin fails, the network and its conversion are compared in float64, where
rounding can neither hide an error nor feign one.
"""

import copy
import hashlib
import math
import re
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import normrewrite as nr
from benchmarks.zoo_weights import fitted_norms, flat, keeps_statistics, no_random_init, randomise
from normrewrite.sites import is_norm

SAME = 1e-4  # of the largest output
TIMES = 4  # or so many times what rounding does to the original
SAME64 = 1e-7  # in float64, where rounding starts at 1e-16 and what is ill-conditioned enough may make 1e-8 of it
ILL_CONDITIONED = 1e-3  # an original whose own rounding is above tells little in fp32
MUTATION = 1.1  # the control: one site's scale is that much off, and the comparison must see it

Inputs = tuple[Any, ...] | dict[str, Any]
Row = dict[str, Any]


@dataclass
class Architecture:
    """A network with the inputs to try on it, most wanted first."""

    model: nn.Module
    inputs: Sequence[Inputs]


@dataclass(frozen=True)
class Options:
    to: str = "l1"
    max_parameters: float = 60e6
    export: bool = False
    control: bool = False
    export_parameters: float = 10e6  # torch's exporter takes minutes for more, or for more sites
    export_sites: int = 100


class CouldNotRun(Exception):
    """The original can't be built or run here: nothing was learned about conversion."""


def trial(build: Callable[[], Architecture], options: Options, tell: Callable[[str, Row], None]) -> Row:
    """The row of one architecture. `tell(stage, row so far)` is called before every stage."""
    row: Row = {"to": options.to}
    start = time.perf_counter()
    stage = "build"

    def at(name: str) -> None:
        nonlocal stage
        stage = name
        tell(name, row)

    try:
        _stages(build, options, row, at)
    except CouldNotRun as error:
        row |= {"outcome": "could_not_run", "stage": stage, "reason": str(error)}
    except Exception as error:
        ours = stage not in ("build", "run")
        row |= {"outcome": "failed" if ours else "could_not_run", "stage": stage, "reason": last_line(error)}
        if ours:
            row["traceback"] = traceback.format_exc()[-1500:]
    return row | {"seconds": round(time.perf_counter() - start, 2)}


def _stages(build: Callable[[], Architecture], options: Options, row: Row, at: Callable[[str], None]) -> None:
    at("build")
    with no_random_init():
        architecture = build()
    model = architecture.model.eval().requires_grad_(False)
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "fingerprint": fingerprint(model)}
    if not any(keeps_statistics(module) or is_norm(module) for module in model.modules()):
        row["outcome"] = "no_norm"
        return
    if row["parameters"] > options.max_parameters:
        row["outcome"] = "too_large"
        return
    at("run")
    randomise(model)
    subject = _first_run(model, architecture.inputs)
    row["input"] = _shapes(subject.inputs)
    subject.reference(row)
    _converted(subject, options, row, at)


def _sites(plan: nr.Plan) -> Row:
    """What the plan says, and batch norms that it does not see: a running mean and variance, told without the product."""
    refused = Counter(plain(choice.reason or "", choice.site.name) for choice in plan.kept)
    seen = {id(choice.site.module) for choice in plan.choices}
    unseen = Counter(type(m).__name__ for m in plan.model.modules() if id(m) not in seen and keeps_statistics(m))
    row = {"sites": len(plan.choices), "rewritten": len(plan.rewritten), "refused": dict(refused)}
    row["kinds"] = dict(Counter(choice.site.kind for choice in plan.choices))
    return row | ({"unseen": dict(unseen)} if unseen else {})


def _converted(subject: "Subject", options: Options, row: Row, at: Callable[[str], None]) -> None:
    at("convert")
    copied = copy.deepcopy(subject.model)
    start = time.perf_counter()
    plan = nr.plan(copied, options.to)
    planned = time.perf_counter() - start
    row |= _sites(plan)
    if not plan.rewritten:
        row["outcome"] = "refused"
        return
    start = time.perf_counter()
    twin, report = plan.apply_()
    row["convert_s"] = round(planned + time.perf_counter() - start, 4)
    row |= {"site_difference": report.max_difference, "live": len(report.live)}
    report.require_exact()
    at("run twin")
    row |= _verdict(subject, twin, bool(report.live), options.to)
    row["revert"] = _same_tensors(nr.revert(twin), subject.model)
    row["outcome"] = "partly" if report.kept else "converted"
    if options.control and row["verdict"] == "same":
        at("control")
        row["control"] = _control(subject, twin)
    small = row["parameters"] <= options.export_parameters and row["sites"] <= options.export_sites
    if options.export and small and row["verdict"].startswith("same"):
        at("export")
        row["export"] = _export(subject, twin)


def _verdict(subject: "Subject", twin: nn.Module, live: bool, to: str) -> Row:
    got = subject.run(twin)
    e0s, e1s = subject.noise(), errors(got, subject.expected)
    row: Row = {"reference": subject.kind, "e0": _worst(e0s), "e1": _worst(e1s)}
    if live:  # eval computes statistics of its own there, so there is no function to keep
        return row | {"verdict": "live"}
    same = within(e1s, e0s)
    if same and _worst(e0s) <= ILL_CONDITIONED:
        return row | {"verdict": "same"}
    return row | _in_float64(subject, to, "same" if same else "CHANGED")


def within(got: list[float], noise: list[float]) -> bool:
    return len(got) == len(noise) and all(e1 <= max(SAME, TIMES * e0) for e1, e0 in zip(got, noise, strict=True))


def _worst(values: list[float]) -> float:
    return max(values, default=math.inf)


def _in_float64(subject: "Subject", to: str, otherwise: str) -> Row:
    """Roundings that flip a top-k or an argmax look like another function; in float64 they do not."""
    if subject.kind != "float64":
        return {"verdict": otherwise}
    with float64_by_default():
        twin = nr.convert_(copy.deepcopy(subject.model).double(), to)
        e64 = _worst(errors(subject.run(twin, torch.float64), subject.expected))
    return {"e64": e64, "verdict": "same in float64" if e64 <= SAME64 else "CHANGED"}


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    pairs = ((left[key], right[key]) for key in right if key in left and isinstance(right[key], Tensor))
    return list(left) == list(right) and all(torch.equal(x, y) for x, y in pairs)


@torch.no_grad()
def _control(subject: "Subject", twin: nn.Module) -> bool:
    """Whether an error in one site alone would have been seen: that in the middle of those which the input reaches."""
    called: list[Any] = []
    norms = [module for module in twin.modules() if getattr(module, "running_scale", None) is not None]
    handles = [module.register_forward_hook(lambda module, *_: called.append(module)) for module in norms]
    subject.run(twin)
    for handle in handles:
        handle.remove()
    if not called:
        return False
    site = called[len(called) // 2]
    scale = site.running_scale.clone()
    site.running_scale.mul_(MUTATION)
    seen = not within(errors(subject.run(twin), subject.expected), subject.noise())
    site.running_scale.copy_(scale)
    return seen


def _export(subject: "Subject", twin: nn.Module) -> Row:
    """Through nr.export into onnxruntime, compared by this file's own rule."""
    inputs = subject.inputs
    if isinstance(inputs, dict) or not all(isinstance(value, Tensor) for value in inputs):
        return {"outcome": "skipped: inputs by keyword"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "twin.onnx"
        try:
            written = nr.export(twin, [value.clone() for value in inputs], path)
        except Exception as error:
            return {
                "outcome": "failed",
                "reason": last_line(error),
                "torch_alone": _torch_exports(subject.model, inputs),
            }
        got = _onnxruntime(path, inputs)
    filled = [i for i, tensor in enumerate(subject.expected[: subject.outputs]) if tensor.numel()]
    wanted, noise = [subject.expected[i] for i in filled], [subject.noise()[i] for i in filled]
    row: Row = {"seconds": round(time.perf_counter() - start, 1), "norms_left": written.norms_left}
    row |= {"folded": len(written.into_neighbour), "mul_add": len(written.to_affine), "notes": written.notes}
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in wanted]:
        return row | {"outcome": "other outputs", "reason": f"{_shapes(got)} for {_shapes(wanted)}"}
    differences = errors(got, wanted)
    return row | {"outcome": "same" if within(differences, noise) else "CHANGED", "error": _worst(differences)}


def _torch_exports(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether torch exports the original, which tells whose fault a failed export is."""
    try:
        torch.export.export(model, inputs, strict=False)
    except Exception:
        return False
    return True


def _onnxruntime(path: Path, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    feed = {node.name: value.numpy() for node, value in zip(session.get_inputs(), inputs, strict=True)}
    return list(flat([torch.from_numpy(np.asarray(value)) for value in session.run(None, feed)]))


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """The original with its inputs and outputs: `out32` in fp32, `expected` in float64 where it runs in that."""

    model: nn.Module
    inputs: Inputs
    out32: list[Tensor]
    last_norm: str | None
    outputs: int  # so many are the network's own; one more is that of the last norm
    expected: list[Tensor] = field(default_factory=list)
    kind: str = "fp32"

    def run(self, model: nn.Module, dtype: torch.dtype | None = None) -> list[Tensor]:
        return run(model, _cast(self.inputs, dtype), self.last_norm)

    def reference(self, row: Row) -> None:
        self.expected = self.out32
        try:
            with float64_by_default():
                wide = self.run(copy.deepcopy(self.model).double(), torch.float64)
        except Exception as error:
            row["no_float64"] = last_line(error)
            return
        if _comparable(self.out32, wide) and all(tensor.isfinite().all() for tensor in wide):
            self.expected, self.kind = wide, "float64"
        else:
            row["no_float64"] = "its outputs differ in shape or are not finite"

    def noise(self) -> list[float]:
        """e0: of the original in fp32 against float64, or against itself by other convolution kernels."""
        if self.kind == "float64":
            return errors(self.out32, self.expected)
        with torch.backends.mkldnn.flags(enabled=False):
            return errors(self.run(self.model), self.out32)


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Tensors that a forward makes of nothing are to follow the network."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def run(model: nn.Module, inputs: Inputs, last_norm: str | None = None) -> list[Tensor]:
    """Every floating-point tensor that the network returns in eval, and what the module named `last_norm` returned last.

    Inputs are copied, as some networks write on them.
    """
    torch.manual_seed(0)
    inputs = _cast(inputs, None)
    watched: list[Tensor] = []

    def watch(_: nn.Module, __: object, output: object) -> None:
        watched[:] = [tensor.clone() for tensor in flat(output)]

    handle = None if last_norm is None else model.get_submodule(last_norm).register_forward_hook(watch)
    try:
        with torch.inference_mode():
            outputs = list(flat(model(**inputs) if isinstance(inputs, dict) else model(*inputs)))
    finally:
        if handle is not None:
            handle.remove()
    return outputs + watched


def errors(got: list[Tensor], reference: list[Tensor]) -> list[float]:
    """For every output the largest difference, in units of its largest value (or a thousandth of the largest of all)."""
    if not _comparable(got, reference):
        return [math.inf]
    floor = 1e-3 * max((float(tensor.abs().max()) for tensor in reference if tensor.numel()), default=0.0)
    return [_error(x, y, floor) if y.numel() else 0.0 for x, y in zip(got, reference, strict=True)]


def _comparable(got: list[Tensor], reference: list[Tensor]) -> bool:
    return [tensor.shape for tensor in got] == [tensor.shape for tensor in reference]


def _error(got: Tensor, reference: Tensor, floor: float) -> float:
    gap = float((got.double() - reference.double()).abs().max())
    return gap / max(float(reference.abs().max()), floor, 1e-30) if gap == gap else math.inf


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A copy of all tensors, floating-point ones in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if dtype is not None and value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return type(value)(_cast(item, dtype) for item in value) if isinstance(value, list | tuple) else value


def _first_run(model: nn.Module, candidates: Sequence[Inputs]) -> Subject:
    """The first inputs that the network takes, with its outputs. Its norms get their statistics on the way."""
    reasons = []
    for inputs in candidates:
        try:
            with fitted_norms(model) as norms:
                outputs = run(model, inputs)
        except Exception as error:
            reasons.append(last_line(error))
            continue
        if not any(tensor.numel() for tensor in outputs):
            reasons.append("no output")
        elif not all(tensor.isfinite().all() for tensor in outputs):
            reasons.append("outputs are not finite")
        else:
            return Subject(model, inputs, outputs + norms.output, norms.last, len(outputs))
    raise CouldNotRun(reasons[-1] if reasons else "no input is known for it")


# --- words -----------------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """The same for networks that differ by their name alone."""
    head = f"{type(model).__module__}\n{model!r}\n"
    shapes = "\n".join(
        f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items() if hasattr(value, "shape")
    )
    return hashlib.sha256((head + shapes).encode()).hexdigest()[:16]


def last_line(error: BaseException) -> str:
    """Class and first line of the message, numbers and shapes left out so that reasons can be grouped."""
    text = (str(error).strip().splitlines() or [""])[0]
    return plain(f"{type(error).__name__}: {text}")[:200]


def plain(text: str, site: str = "") -> str:
    text = text.replace(site, "SITE") if site else text
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e-?\d+)?", "N", re.sub(r"[\[(][\d, x×]+[\])]", "(…)", text))


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, dict):
        return {key: _shapes(item) for key, item in value.items()}
    return [_shapes(item) for item in value] if isinstance(value, list | tuple) else str(value)
