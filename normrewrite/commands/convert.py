"""The command `convert`: by a target, or as a manifest says."""

from collections.abc import Callable
from dataclasses import fields

from torch import Tensor, nn

from normrewrite import files
from normrewrite.api.calibrate import NOTHING, Calibration, calibratable, calibrate_
from normrewrite.api.convert import as_scopes, plan
from normrewrite.api.initialise import Initialisation, initialise_
from normrewrite.api.plan import Plan, untouched
from normrewrite.api.replay import rewritten_again
from normrewrite.api.verify import verify
from normrewrite.commands.job import Job
from normrewrite.commands.results import Converted, Planned
from normrewrite.commands.source import Source, opened
from normrewrite.data import Data, argument_names
from normrewrite.data import example as example_input
from normrewrite.diagnostics.comparison import Comparison
from normrewrite.errors import NormRewriteError
from normrewrite.execution import device_of
from normrewrite.nn.affine import ChannelAffine
from normrewrite.nn.sample import RowNorm
from normrewrite.nn.stand_in import StandIn
from normrewrite.nn.weights import gain_of
from normrewrite.options.convert import Convert, PlanOptions
from normrewrite.options.fields import asked, flag_of, part
from normrewrite.passes.folding import fold, plain_state
from normrewrite.provenance.report import Report
from normrewrite.rules import parse_rule
from normrewrite.targets import rewrite

Progress = Callable[..., object]
Ready = tuple[Calibration | Initialisation | None, list[str]]


def convert(source: Source, options: Convert, progress: Progress) -> Converted | Planned:
    """Rewrite the norms of a model file and write the twin beside it, once its function has been checked."""
    rules = [parse_rule(text) for text in options.rules]
    if options.replay is not None:
        return _again(source, options, progress)
    to = options.to or ""
    rewrite(
        to, options.gain, as_scopes(options.scope), offset=options.offset
    )  # a wrong target is told before a large file is read
    job = Job(source, options, f"{slug(to)}.folded" if options.folded else slug(to))
    if not options.dry_run:
        job.check(outputs={"--manifest": options.manifest})
    progress(f"reading {source.path.name}")
    file = source.read()
    data = None if options.calibrate is None else opened(options.calibrate, file.model, options)
    inputs = _some_inputs(options.input_shape, data, argument_names(file.model), source.device)
    chosen = plan(file.model, to, rules=rules, example_inputs=inputs, **part(options, PlanOptions))
    chosen.require(options.expect)
    if options.dry_run:
        return Planned(chosen)
    fresh = chosen.fresh
    progress(f"rewriting and checking {len(chosen.rewritten)} sites")
    twin, report, network = _rewritten(chosen, options.input_shape, source.device)
    ready = _made_ready(twin, report, fresh, data, options.batch_size, progress)
    if options.folded:
        return _write_folded(twin, report, job, network)
    return _write(job, file, twin, report, network, ready, progress)


def _again(source: Source, options: Convert, progress: Progress) -> Converted:
    """Rewrite another checkpoint of the same architecture as a manifest, in JSON or in a twin's file, says."""
    _nothing_else(options)
    job = Job(source, options, "replayed")
    job.check(outputs={"--manifest": options.manifest})
    assert options.replay is not None
    record = files.record(options.replay, key=source.key, allow=source.allow, trust=source.trust)
    if record is None:
        raise NormRewriteError(
            f"--replay {options.replay}: carries no manifest. Give a twin's file, or one of convert --manifest."
        )
    progress(f"reading {source.path.name}")
    file = source.read()
    progress(f"rewriting and checking {len(record['sites'])} sites")
    twin, report = rewritten_again(file.model, record, f"--replay {options.replay}")
    report.require_exact()
    if options.expect is not None and len(report.rewritten) != options.expect:
        raise NormRewriteError(f"expected {options.expect} sites to be rewritten, found {len(report.rewritten)}.")
    network = _compared(file.model, twin, report, options.input_shape, source.device)
    data = None if options.calibrate is None else opened(options.calibrate, file.model, options)
    calibration, notes = _made_ready(twin, report, untouched(file.model), data, options.batch_size, progress)
    if data is None and any(entry.get("calibrated") for entry in record["sites"]):
        notes.append(
            "the manifest's twin was calibrated, which is of its own weights: --calibrate DATA does it for these"
        )
    return _write(job, file, twin, report, network, (calibration, notes), progress)


_FOR_TARGETS = {"to", "rules", "folded", "dry_run", *(field.name for field in fields(PlanOptions))}


def _nothing_else(options: Convert) -> None:
    """Raises for what only --to can be told."""
    for field, _, _ in asked(options):
        if field.name in _FOR_TARGETS:
            raise NormRewriteError(
                f"--replay does what its manifest says, and {flag_of(field)} is for --to. Leave one of them out."
            )


def _some_inputs(input_shape: str | None, data: Data | None, names: list[str], device: str) -> list[Tensor] | None:
    """Forward's arguments for one small batch, where there is something to take them from."""
    if input_shape is not None:
        return [example_input(input_shape).to(device)]
    if data is None:
        return None
    return [values.to(device) for values in data.first(2).positional(names)]


def _made_ready(
    twin: nn.Module, report: Report, fresh: bool, data: Data | None, batch_size: int, progress: Progress
) -> Ready:
    """What data can do for a twin, in place: calibrate it, or initialise its weight norms; and what is to be said of it."""
    if data is None:
        hint = f"{len(report.inexact)} sites can't be exact: --calibrate DATA fits them to the original"
        return None, [hint] if report.inexact else []
    if fresh and any(gain_of(module) is not None for module in twin.modules()):
        batch = data.first(batch_size).to(device_of(twin))
        named = set(batch.inputs) <= set(argument_names(twin))  # forward(*inputs) has no names
        return initialise_(twin, batch.inputs if named else tuple(batch.inputs.values())), []
    if not calibratable(twin):
        return None, [NOTHING]
    return calibrate_(twin, data, batch_size=batch_size, progress=progress)[1], []


def _rewritten(chosen: Plan, input_shape: str | None, device: str) -> tuple[nn.Module, Report, Comparison | None]:
    """The twin, checked; in place where the whole network is not to be compared with it."""
    twin, report = chosen.apply_() if input_shape is None else chosen.apply()
    report.require_exact()
    return twin, report, _compared(chosen.model, twin, report, input_shape, device)


def _compared(
    model: nn.Module, twin: nn.Module, report: Report, input_shape: str | None, device: str
) -> Comparison | None:
    """The whole network on random input, where its shape is given; raises where an exact twin differs."""
    if input_shape is None:
        return None
    network = verify(model, twin, example_input(input_shape).to(device))
    if not network.ok and not report.live and not report.inexact:
        raise NormRewriteError(
            f"the twin computes another function; no file was written. {network.verdict}", exit_code=1
        )
    return network


def _write(
    job: Job,
    file: files.ModelFile,
    twin: nn.Module,
    report: Report,
    network: Comparison | None,
    ready: Ready,
    progress: Progress,
) -> Converted:
    calibration, notes = ready
    progress(f"writing {job.output.name}")
    form = job.save(file, twin, job.came(file), report, job.options.manifest)
    if file.form == "module" and form != "module":
        notes.append(
            f"the twin can't be pickled, so its state_dict was written: load it by nr.load({job.output.name!r}, arch=...)"
        )
    return Converted(report, str(job.output), form, network, calibration, "\n".join(notes))


def _write_folded(twin: nn.Module, report: Report, job: Job, network: Comparison | None) -> Converted:
    whole, outcome, notes = fold(twin)
    files.write_tensors(plain_state(whole), job.output, job.options.force)
    gone = {
        name for name, module in whole.named_modules() if isinstance(module, StandIn) and not hasattr(module, "norm")
    }
    affine = [module for module in whole.modules() if isinstance(module, ChannelAffine)]
    note = (
        f"plain state_dict: {len(gone.union(outcome.into_neighbour))} norms folded into a neighbour (give it a bias, and put "
        f"nn.Identity in the norm's place); {len(affine)} are y = weight * x + bias by channel under the norm's name"
    )
    staying = {type(module).__name__: 0 for module in whole.modules() if isinstance(module, nn.GroupNorm | RowNorm)}
    if staying:
        note += f"; those that measure each input ({', '.join(staying)}) have weight and bias under their names"
    return Converted(report, str(job.output), "folded state_dict", network, None, "\n".join([note, *notes]))


def slug(target: str) -> str:
    """A target as it stands in file names: `topk:1%` -> `topk-1pct`."""
    return rewrite(target).target.replace(":", "-").replace("%", "pct")
