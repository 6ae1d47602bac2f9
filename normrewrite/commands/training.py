"""The command `finetune`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normrewrite import files, sites
from normrewrite.commands.source import Source, derived
from normrewrite.data import Data, argument_names, open_data
from normrewrite.errors import NormRewriteError
from normrewrite.training import checkpoints
from normrewrite.training.recipe import recipe
from normrewrite.training.result import Finetuned
from normrewrite.verbs.finetune import finetune_


@dataclass
class Written:
    """What `finetune` did."""

    record: dict[str, Any]
    text: str

    def as_dict(self) -> dict[str, Any]:
        return self.record

    def __str__(self) -> str:
        return self.text


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
    asked = recipe(options).identity()  # a wrong option is told before a large file is read
    output = output or derived(source.path, "finetuned")
    folder = folder_of(output)
    before = checkpoints.finished(folder, asked) if resume and output.exists() else None
    if before is not None:
        return Written(before, f"{output} is finished already: there is nothing to resume")
    files.check_writable(output, force or (resume and checkpoints.newest_of(folder) is not None))
    if force and not resume:
        checkpoints.discard(folder)
    file = source.read()
    inputs = _open("--data", data, file.model, mean, std, strict)
    options["teacher"] = None if teacher is None else source.read(teacher).model
    options["val"] = None if val is None else _open("--val", val, file.model, mean, std, strict)
    try:
        trained = finetune_(file.model, inputs, checkpoints=folder, resume=resume, log=log, each=each, **options)
    except KeyboardInterrupt:
        kept = checkpoints.newest_of(folder)
        raise KeyboardInterrupt(f"--resume goes on from {kept}" if kept else "") from None
    return _written(*trained, output, file.form)


def folder_of(output: Path) -> Path:
    """Where the checkpoints of an output are: `twin.pt` -> `twin.checkpoints`."""
    return output.with_name(f"{output.stem}.checkpoints")


def _open(option: str, data: str, model: nn.Module, mean: Any, std: Any, strict: bool) -> Data:
    try:
        return open_data(data, argument_names(model), mean=mean, std=std, strict=strict)
    except NormRewriteError as error:  # which says --data, whatever it opens
        raise NormRewriteError(str(error).replace("--data", option, 1)) from error


def _written(model: nn.Module, result: Finetuned, output: Path, form: files.Form) -> Written:
    """The files: by the first process, where there are several."""
    outputs = [str(output)]
    record = {"output": str(output), "last": None, **result.as_dict()}
    if os.environ.get("RANK", "0") == "0":
        written = files.save(  # whether it can be was looked at before the work
            model.cpu(), output, form=form, learned=result.ranges, force=True
        )
        if result.last is not None:
            record["last"] = str(_write_last(model, result, output, written))
            outputs.append(f"{record['last']} (the weights at the end)")
        checkpoints.finish(folder_of(output), record)
    nearest = "\nrevert gives the nearest of torch's norms now, no longer the original's bits"
    way_back = nearest if any(map(sites.is_rewritten, model.modules())) else ""
    return Written(record, "\n".join([f"{result}{way_back}", *(f"wrote {name}" for name in outputs)]))


def _write_last(model: nn.Module, result: Finetuned, output: Path, form: files.Form) -> Path:
    path = derived(output, "last")
    model.load_state_dict(result.last or {})
    files.save(model, path, form=form, learned=result.last_ranges, force=True)
    return path
