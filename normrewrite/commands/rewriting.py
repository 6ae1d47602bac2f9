"""The commands around a rewrite: inspect, convert, calibrate, revert."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normrewrite import files
from normrewrite.api.advise import advise as advise_model
from normrewrite.api.calibrate import NOTHING, Calibration, calibratable
from normrewrite.api.calibrate import calibrate_ as calibrate_model
from normrewrite.api.convert import as_scopes
from normrewrite.api.convert import plan as plan_model
from normrewrite.api.initialise import Initialisation, initialise_
from normrewrite.api.inspect import Inspection
from normrewrite.api.inspect import inspect as inspect_model
from normrewrite.api.plan import Plan, untouched
from normrewrite.api.replay import rewritten_again
from normrewrite.api.verify import verify as verify_networks
from normrewrite.commands import words
from normrewrite.commands.results import Advised, Calibrated, Converted, Planned, Reverted
from normrewrite.commands.source import Source, derived, opened
from normrewrite.data import Data, argument_names
from normrewrite.data import example as example_input
from normrewrite.diagnostics.comparison import Comparison
from normrewrite.errors import NormRewriteError
from normrewrite.execution import device_of
from normrewrite.nn.affine import ChannelAffine
from normrewrite.nn.sample import RowNorm
from normrewrite.nn.stand_in import StandIn
from normrewrite.nn.weights import gain_of
from normrewrite.norms import Gain
from normrewrite.passes.folding import fold, plain_state
from normrewrite.passes.reversion import reverted
from normrewrite.provenance.report import Report
from normrewrite.rules import Rules
from normrewrite.targets import rewrite


def inspect(
    source: Source,
    *,
    advise: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    each: Callable[[int], object] = lambda done: None,
) -> Inspection | Advised:
    """The norms of a model file. advise: data to tell from which target suits each."""
    model = source.read().model
    inspection = inspect_model(model)
    if advise is None:
        return inspection
    examples = opened(advise, model, mean, std)
    return Advised(inspection, advise_model(model, examples, batch_size=batch_size, each=each))


def convert(
    source: Source,
    to: str,
    *,
    rules: Rules = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    gain: Gain = "exact",
    scope: str = "batch",
    output: Path | None = None,
    manifest: Path | None = None,
    folded: bool = False,
    force: bool = False,
    dry_run: bool = False,
    expect: int | None = None,
    input_shape: str | None = None,
    calibrate: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    each: Callable[..., object] = lambda done, **_: None,
) -> Converted | Planned:
    """Rewrite the norms of a model file and write the twin beside it, once its function has been checked.

    calibrate: data to bring training nearer to eval on, as `calibrate` does; fresh weight norms are initialised by it.
    manifest: a JSON file for the manifest, too.
    """
    asked = dict(locals())
    rewrite(to, gain, as_scopes(scope))  # a wrong target is told before a large file is read
    output = output or derived(source.path, f"{slug(to)}.folded" if folded else slug(to))
    if not dry_run:
        source.check_outputs({"-o": output, "--manifest": manifest}, force, {"--calibrate": calibrate})
    each(f"reading {source.path.name}")
    file = source.read()
    data = None if calibrate is None else opened(calibrate, file.model, mean, std)
    inputs = _some_inputs(input_shape, data, argument_names(file.model), source.device)
    plan = plan_model(
        file.model,
        to,
        rules=rules,
        include=include,
        exclude=exclude,
        gain=gain,
        scope=scope,
        example_inputs=inputs,
    )
    plan.require(expect)
    if dry_run:
        return Planned(plan)
    fresh = plan.fresh
    each(f"rewriting and checking {len(plan.rewritten)} sites")
    twin, report, network = _rewritten(plan, input_shape, source.device)
    calibration, notes = _made_ready(twin, report, fresh, data, batch_size, each)
    if folded:
        return _write_folded(twin, report, output, force, network)
    each(f"writing {output.name}")
    came = words.begun(source, file.manifest).then(words.step(convert, source, asked))
    with files.with_manifest(twin.cpu(), manifest, report, came, force):
        form = source.save(file, twin, output, report=report, history=came, force=force)
    notes.append(_how_to_load(file.form, form, output))
    return Converted(report, str(output), form, network, calibration, "\n".join(filter(None, notes)))


def convert_again(
    source: Source,
    replay: Path,
    *,
    expect: int | None = None,
    input_shape: str | None = None,
    calibrate: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    output: Path | None = None,
    manifest: Path | None = None,
    force: bool = False,
    each: Callable[..., object] = lambda done, **_: None,
    **others: Any,
) -> Converted:
    """Rewrite another checkpoint of the same architecture as a manifest says, and write the twin beside it.

    replay: a manifest in JSON, or a twin's file. others: options of `convert` that have no say here.
    """
    asked = dict(locals())
    _nothing_else(others)
    output = output or derived(source.path, "replayed")
    inputs = {"--calibrate": calibrate, "--replay": replay}
    source.check_outputs({"-o": output, "--manifest": manifest}, force, inputs)
    record = files.record(replay, key=source.key, allow=source.allow, trust=source.trust)
    if record is None:
        raise NormRewriteError(
            f"--replay {replay}: carries no manifest. Give a twin's file, or one of convert --manifest."
        )
    each(f"reading {source.path.name}")
    file = source.read()
    each(f"rewriting and checking {len(record['sites'])} sites")
    twin, report = rewritten_again(file.model, record, f"--replay {replay}")
    report.require_exact()
    if expect is not None and len(report.rewritten) != expect:
        raise NormRewriteError(f"expected {expect} sites to be rewritten, found {len(report.rewritten)}.")
    network = _compared(file.model, twin, report, input_shape, source.device)
    data = None if calibrate is None else opened(calibrate, file.model, mean, std)
    calibration, notes = _made_ready(twin, report, untouched(file.model), data, batch_size, each)
    if data is None and any(entry.get("calibrated") for entry in record["sites"]):
        notes.append(
            "the manifest's twin was calibrated, which is of its own weights: --calibrate DATA does it for these"
        )
    each(f"writing {output.name}")
    came = words.begun(source, file.manifest).then(words.step(convert_again, source, asked, "convert"))
    with files.with_manifest(twin.cpu(), manifest, report, came, force):
        form = source.save(file, twin, output, report=report, history=came, force=force)
    notes.append(_how_to_load(file.form, form, output))
    return Converted(report, str(output), form, network, calibration, "\n".join(filter(None, notes)))


def _nothing_else(options: Mapping[str, Any]) -> None:
    """Raises for what only --to can be told."""
    given = [name for name, value in options.items() if value and (name, value) not in _USUAL]
    if given:
        option = "--rule" if given[0] == "rules" else f"--{given[0].replace('_', '-')}"
        raise NormRewriteError(
            f"--replay does what its manifest says, and {option} is for --to. Leave one of them out."
        )


_USUAL = (("gain", "exact"), ("scope", "batch"))


def _some_inputs(input_shape: str | None, data: Data | None, names: list[str], device: str) -> list[Tensor] | None:
    """Forward's arguments for one small batch, where there is something to take them from."""
    if input_shape is not None:
        return [example_input(input_shape).to(device)]
    if data is None:
        return None
    return [values.to(device) for values in data.first(2).positional(names)]


def _made_ready(
    twin: nn.Module,
    report: Report,
    fresh: bool,
    data: Data | None,
    batch_size: int,
    each: Callable[..., object],
) -> tuple[Calibration | Initialisation | None, list[str]]:
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
    return calibrate_model(twin, data, batch_size=batch_size, each=each)[1], []


def _rewritten(plan: Plan, input_shape: str | None, device: str) -> tuple[nn.Module, Report, Comparison | None]:
    """The twin, checked; in place where the whole network is not to be compared with it."""
    twin, report = plan.apply_() if input_shape is None else plan.apply()
    report.require_exact()
    return twin, report, _compared(plan.model, twin, report, input_shape, device)


def _compared(
    model: nn.Module, twin: nn.Module, report: Report, input_shape: str | None, device: str
) -> Comparison | None:
    """The whole network on random input, where its shape is given; raises where an exact twin differs."""
    if input_shape is None:
        return None
    network = verify_networks(model, twin, example_input(input_shape).to(device))
    if not network.ok and not report.live and not report.inexact:
        raise NormRewriteError(
            f"the twin computes another function; no file was written. {network.verdict}", exit_code=1
        )
    return network


def _write_folded(twin: nn.Module, report: Report, output: Path, force: bool, network: Comparison | None) -> Converted:
    whole, outcome, notes = fold(twin)
    files.write_tensors(plain_state(whole), output, force)
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
    return Converted(report, str(output), "folded state_dict", network, None, "\n".join([note, *notes]))


def _how_to_load(wanted: str, written: str, output: Path) -> str:
    if wanted != "module" or written == "module":
        return ""
    return f"the twin can't be pickled, so its state_dict was written: load it by nr.load({output.name!r}, arch=...)"


def slug(target: str) -> str:
    """A target as it stands in file names: `topk:1%` -> `topk-1pct`."""
    return rewrite(target).target.replace(":", "-").replace("%", "pct")


def calibrate(
    source: Source,
    *,
    data: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 250,
    output: Path | None = None,
    force: bool = False,
    each: Callable[..., object] = lambda done, **_: None,
) -> Calibrated:
    """Bring a twin's training nearer to the original's eval on unlabelled data, and write it beside."""
    asked = dict(locals())
    output = output or derived(source.path, "calibrated")
    source.check_outputs({"-o": output}, force, {"--data": data})
    file = source.read()
    examples = opened(data, file.model, mean, std)
    twin, calibration = calibrate_model(file.model, examples, batch_size=batch_size, each=each)
    came = words.begun(source, file.manifest).then(words.step(calibrate, source, asked))
    source.save(file, twin.cpu(), output, history=came, force=force)
    return Calibrated(calibration, str(output))


def revert(source: Source, *, output: Path | None = None, force: bool = False) -> Reverted:
    """Write a twin's file back as a network with torch's own batch norms."""
    asked = dict(locals())
    output = output or derived(source.path, "reverted")
    source.check_outputs({"-o": output}, force, {})
    file = source.read()
    came = words.begun(source, file.manifest).then(words.step(revert, source, asked))
    model, names, trained = reverted(file.model)
    source.save(file, model.cpu(), output, history=replace(came, report=None), force=force)
    return Reverted(names, trained, str(output))
