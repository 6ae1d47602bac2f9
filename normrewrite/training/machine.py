"""What a training runs on: one accelerator of accelerate's for device, mixed precision, processes and logs.

>>> with accelerator(model, recipe) as machine:
...     network, optimizer = machine.prepare(model, optimizer)
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normrewrite.errors import NormRewriteError, first_line
from normrewrite.training.recipe import Recipe
from normrewrite.verify import device_of

# as accelerate calls them
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16", "fp16-pure": "no", "int8": "no"}


@contextmanager
def accelerator(model: nn.Module, recipe: Recipe, log: Path | None = None) -> Iterator[Any]:
    """An Accelerator on the model's device; log: folder for TensorBoard.

    Its state is one a process: what this one set is taken back, so that a next one may choose another precision.
    """
    _require("accelerate", "fine-tuning")
    if log is not None:
        _require("tensorboard", "--log")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    ours, device = not AcceleratorState._shared_state, device_of(model)
    try:
        if device.type != "cpu" and device.index is not None:
            torch.accelerator.set_device_index(device.index)  # accelerate takes the current one, where it runs alone
        found = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=_MIXED[recipe.precision],
            gradient_accumulation_steps=recipe.accumulate,
            log_with=None if log is None else "tensorboard",
            project_dir=log,
        )
    except ValueError as error:
        raise NormRewriteError(f"--precision {recipe.precision}: {first_line(error)} Use another precision.") from error
    try:
        if log is not None:
            found.init_trackers("normrewrite")
        yield found
    finally:
        for tracker in found.trackers:
            tracker.finish()
        found.free_memory()
        if ours:
            AcceleratorState._reset_state()
            GradientState._reset_state()


def release(found: Any, network: nn.Module) -> None:
    """Take from a network what `prepare` put around its forward, which neither pickles nor copies."""
    model = found.unwrap_model(network, keep_fp32_wrapper=False)
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NormRewriteError(f"{what} needs {package}: pip install normrewrite[train]")
