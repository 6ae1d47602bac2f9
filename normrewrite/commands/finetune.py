"""The command `finetune`."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from normrewrite import files, sites
from normrewrite.api.finetune import finetune_
from normrewrite.commands.job import Job
from normrewrite.commands.results import Written
from normrewrite.commands.source import Source, derived
from normrewrite.data import Data, argument_names, open_data
from normrewrite.errors import NormRewriteError
from normrewrite.options.fields import part
from normrewrite.options.finetune import Finetune, RecipeOptions
from normrewrite.provenance.history import History
from normrewrite.results import Wrote
from normrewrite.training import checkpoints
from normrewrite.training.recipe import recipe
from normrewrite.training.result import Finetuned


def finetune(source: Source, options: Finetune, progress: Callable[..., object]) -> Written:
    """Fine-tune a model file and write the trained twin, with its checkpoints in a folder beside it until it is done."""
    plan = recipe(part(options, RecipeOptions))  # a wrong option is told before a large file is read
    job = Job(source, options, "finetuned")
    folder, resume, log = folder_of(job.output), options.resume, options.log
    last = derived(job.output, "last") if options.val or plan.val_split else None
    before = checkpoints.finished(folder, plan.identity()) if resume and job.output.exists() else None
    if before is not None:
        return Written(before, [f"{job.output} is finished already: there is nothing to resume"])
    with checkpoints.claimed(folder, job.output):
        going_on = resume and checkpoints.newest_of(folder) is not None
        inputs = {"its folder of checkpoints": folder, "--log": log}
        job.check(outputs={"the last epoch's weights": last}, inputs=inputs, going_on=going_on)
        if log is not None and log.exists() and not log.is_dir():
            raise NormRewriteError(f"--log {log} is a file. Name a folder for TensorBoard's.")
        if options.force and not resume:
            checkpoints.discard(folder)
        teacher = options.teacher
        file, *teachers = source.read_all(source.path, *([] if teacher is None else [teacher]))
        data = _open("--data", options.data, file.model, options)
        came = job.came(file)
        try:
            trained = finetune_(
                file.model,
                data,
                teacher=teachers[0].model if teachers else None,
                val=None if options.val is None else _open("--val", options.val, file.model, options),
                checkpoints=folder,
                resume=resume,
                log=log,
                progress=progress,
                **part(options, RecipeOptions),
            )
        except KeyboardInterrupt as stop:  # or a signal of that kind
            newest = checkpoints.newest_of(folder)
            stop.args = (f"--resume goes on from {newest}",) if newest else ()
            raise
        return _written(*trained, job, file, came, options.force or going_on)


def folder_of(output: Path) -> Path:
    """Where the checkpoints of an output are: `twin.pt` -> `twin.checkpoints`."""
    return output.with_name(f"{output.stem}.checkpoints")


def _open(option: str, data: str, model: nn.Module, options: Finetune) -> Data:
    try:
        return open_data(data, argument_names(model), mean=options.mean, std=options.std, strict=options.strict)
    except NormRewriteError as error:  # which says --data, whatever it opens
        raise NormRewriteError(str(error).replace("--data", option, 1)) from error


def _written(
    model: nn.Module, result: Finetuned, job: Job, file: files.ModelFile, came: History, force: bool
) -> Written:
    """The files: by the first process, where there are several."""
    output, save = job.output, partial(job.source.save, file, history=came, force=force)
    outputs = [str(output)]
    record = {"output": str(output), "last": None, **result.as_dict()}
    if os.environ.get("RANK", "0") == "0":
        save(model.cpu(), output, learned=result.ranges)
        if result.last is not None:
            record["last"] = str(derived(output, "last"))
            model.load_state_dict(result.last)
            save(model, derived(output, "last"), learned=result.last_ranges)
            outputs.append(f"{record['last']} (the weights at the end)")
        checkpoints.finish(folder_of(output), record)
    nearest = "revert gives the nearest of torch's norms now, no longer the original's bits"
    way_back = [nearest] if any(map(sites.gives_back, model.modules())) else []
    return Written(record, [*result.summary(), *way_back, *map(Wrote, outputs)])
