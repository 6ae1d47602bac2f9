"""What a run measures: a training, a training under a rule for weight decay, or a conversion. Each gives a plain record.

>>> MEASURES["train"](run, Machine(Path("../shared/data"), torch.device("cpu"), results))["accuracy"]
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normrewrite as nr
from benchmarks.norm_matters import decay
from benchmarks.norm_matters.data import open_task
from benchmarks.norm_matters.networks import made
from benchmarks.norm_matters.run import Run
from benchmarks.targets import Inputs, outputs
from benchmarks.targets import measure as converted
from normrewrite.data import Data

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Machine:
    """data: the folder of images and trained networks; beside: where what later runs need is kept."""

    data: Path
    device: torch.device
    beside: Path


def train(run: Run, machine: Machine) -> dict[str, Any]:
    """nr.finetune_ from scratch, tested behind every epoch. A run that stops, as loss or gradient were not finite twenty times
    in a row, has the accuracy of the weights that it got to. One that was killed goes on from its last epoch; seconds are then
    those of the last part."""
    images, test = open_task(run.task, machine.data)
    model = made(run.network, run.norm, run.seed)
    if run.norm.initialise:
        nr.initialise_(model.train(), next(images.batches(256)).inputs)
    model.to(machine.device)
    started, checkpoints = time.perf_counter(), machine.beside / f"{run.key}.checkpoints"
    try:
        _, result = nr.finetune_(
            model,
            images,
            val=test,
            labels=True,
            seed=run.seed,
            checkpoints=checkpoints,
            resume=True,
            **run.recipe,
        )
    except nr.NormRewriteError as error:
        if error.exit_code != 1:
            raise
        record = {"accuracy": accuracy(model, test, machine.device), "stopped": str(error), "epochs": []}
    else:
        record = {"accuracy": result.epochs[-1].val_accuracy, "stopped": ""}
        record |= {name: getattr(result, name) for name in ("steps", "skipped_steps", "nonfinite_batches")}
        record["epochs"] = [asdict(epoch) for epoch in result.epochs]
    shutil.rmtree(checkpoints, ignore_errors=True)
    return record | {"seconds": time.perf_counter() - started}


@torch.no_grad()
def accuracy(model: nn.Module, test: Data, device: torch.device) -> float:
    model.eval()
    right = total = 0
    for batch in test.batches(250):
        batch = batch.to(device)
        assert batch.labels is not None
        right += int((model(*batch.inputs.values()).argmax(1) == batch.labels).sum())
        total += len(batch)
    return right / total


def decayed(run: Run, machine: Machine) -> dict[str, Any]:
    """A training under recipe["rule"]; those that follow the norms of the run with weight decay need it first."""
    images, test = open_task(run.task, machine.data)
    leader = decay.leader(run)
    norms_file = machine.beside / f"{leader.key}.pt"
    if run != leader and not norms_file.is_file():
        decayed(leader, machine)
    reference = None if run == leader else torch.load(norms_file, weights_only=True)
    model = made(run.network, run.norm, run.seed).to(machine.device)
    started = time.perf_counter()
    epochs, norms = decay.train(
        model, images, lambda: accuracy(model, test, machine.device), run.recipe, run.seed, reference
    )
    if run == leader:
        torch.save(norms, norms_file)
    return {
        "accuracy": epochs[-1]["val_accuracy"],
        "stopped": "",
        "epochs": epochs,
        "seconds": time.perf_counter() - started,
    }


def convert(run: Run, machine: Machine) -> dict[str, Any]:
    """A trained network, as in benchmarks.targets: accuracy before and after, and the largest difference of outputs."""
    _, test = open_task(run.task, machine.data)
    assert test.whole is not None and test.whole.labels is not None
    x = test.whole.inputs["input"]
    if run.network == "digits_resnet":
        x = x[:, :1]  # grey
        source = (ROOT / "examples" / "digits.pt", f"{ROOT / 'examples' / 'digits.py'}:digits_resnet")
    else:
        source = (machine.data / "weights" / f"{run.network}.pt", f"{machine.data / 'zoo.py'}:{run.network}")
    model = nr.load(*source).eval()
    measured = converted(model, run.norm.to, Inputs(x[:64], x, test.whole.labels), outputs(model, x))
    return {"accuracy": measured["copied"], "stopped": "", "epochs": [], **measured}


MEASURES: dict[str, Callable[[Run, Machine], dict[str, Any]]] = {"train": train, "decay": decayed, "convert": convert}
