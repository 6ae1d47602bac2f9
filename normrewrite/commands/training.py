"""The command `finetune`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from normrewrite import files, sites
from normrewrite.api.finetune import finetune_
from normrewrite.commands import words
from normrewrite.commands.results import Written
from normrewrite.commands.source import Source, derived
from normrewrite.data import Data, argument_names, open_data
from normrewrite.errors import NormRewriteError
from normrewrite.provenance.history import History
from normrewrite.results import Wrote
from normrewrite.training import checkpoints
from normrewrite.training.recipe import Recipe, recipe
from normrewrite.training.result import Finetuned


def finetune(
    source: Source,
    *,
    data: str,
    teacher: Path | None = None,
    val: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    strict: bool = False,
    output: Path | None = None,
    force: bool = False,
    resume: bool = False,
    log: Path | None = None,
    each: Callable[..., object] = lambda step: None,
    **options: Any,
) -> Written:
    """Fine-tune a model file and write the trained twin, with its checkpoints in a folder beside it until it is done.

    teacher: a file of the original, of the same --arch. strict: refuse a folder of images for one that can't be read.
    """
    asked = {name: value for name, value in locals().items() if name != "options"} | options
    plan = recipe(options)  # a wrong option is told before a large file is read
    output = output or derived(source.path, "finetuned")
    folder, last = folder_of(output), derived(output, "last") if val or plan.val_split else None
    before = checkpoints.finished(folder, plan.identity()) if resume and output.exists() else None
    if before is not None:
        return Written(before, [f"{output} is finished already: there is nothing to resume"])
    with checkpoints.claimed(folder, output):
        going_on = resume and checkpoints.newest_of(folder) is not None
        inputs = {"--data": data, "--val": val, "--teacher": teacher, "its folder of checkpoints": folder, "--log": log}
        source.check_outputs({"-o": output, "the last epoch's weights": last}, force or going_on, inputs)
        if log is not None and log.exists() and not log.is_dir():
            raise NormRewriteError(f"--log {log} is a file. Name a folder for TensorBoard's.")
        if force and not resume:
            checkpoints.discard(folder)
        file, *teachers = source.read_all(source.path, *([] if teacher is None else [teacher]))
        examples = _open("--data", data, file.model, mean, std, strict)
        came = words.begun(source, file.manifest)  # of the files as they are now
        came = came.then(words.step(finetune, source, asked, further=asdict(Recipe())))
        options["teacher"] = teachers[0].model if teachers else None
        options["val"] = None if val is None else _open("--val", val, file.model, mean, std, strict)
        try:
            trained = finetune_(file.model, examples, checkpoints=folder, resume=resume, log=log, each=each, **options)
        except KeyboardInterrupt as stop:  # or a signal of that kind
            kept = checkpoints.newest_of(folder)
            stop.args = (f"--resume goes on from {kept}",) if kept else ()
            raise
        return _written(*trained, source, file, output, came, force or going_on)


def folder_of(output: Path) -> Path:
    """Where the checkpoints of an output are: `twin.pt` -> `twin.checkpoints`."""
    return output.with_name(f"{output.stem}.checkpoints")


def _open(option: str, data: str, model: nn.Module, mean: Any, std: Any, strict: bool) -> Data:
    try:
        return open_data(data, argument_names(model), mean=mean, std=std, strict=strict)
    except NormRewriteError as error:  # which says --data, whatever it opens
        raise NormRewriteError(str(error).replace("--data", option, 1)) from error


def _written(
    model: nn.Module,
    result: Finetuned,
    source: Source,
    file: files.ModelFile,
    output: Path,
    came: History,
    force: bool,
) -> Written:
    """The files: by the first process, where there are several."""
    outputs = [str(output)]
    record = {"output": str(output), "last": None, **result.as_dict()}
    if os.environ.get("RANK", "0") == "0":
        source.save(file, model.cpu(), output, learned=result.ranges, history=came, force=force)
        if result.last is not None:
            record["last"] = str(derived(output, "last"))
            model.load_state_dict(result.last)
            source.save(file, model, derived(output, "last"), learned=result.last_ranges, history=came, force=force)
            outputs.append(f"{record['last']} (the weights at the end)")
        checkpoints.finish(folder_of(output), record)
    nearest = "revert gives the nearest of torch's norms now, no longer the original's bits"
    way_back = [nearest] if any(map(sites.is_rewritten, model.modules())) else []
    return Written(record, [*result.summary(), *way_back, *map(Wrote, outputs)])
