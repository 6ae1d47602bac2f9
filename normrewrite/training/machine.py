"""What a training runs on: one accelerator of accelerate's for device, mixed precision, processes and logs.

>>> with accelerator(model, recipe) as machine:
...     network, optimizer = machine.prepare(model, optimizer)
"""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from normrewrite.errors import NormRewriteError, first_line
from normrewrite.execution import device_of
from normrewrite.training.recipe import Recipe

# as accelerate calls them
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16", "fp16-pure": "no", "int8": "no"}
_FOREIGN = ("DEEPSPEED", "MEGATRON_LM")  # engines of their own, which take the loop's place


@contextmanager
def accelerator(model: nn.Module, recipe: Recipe, log: Path | None = None) -> Iterator[Any]:
    """An Accelerator on the model's device; log: folder for TensorBoard.

    Its state is one a process: what this one set is taken back, so that a next one may choose another precision.
    """
    _require("accelerate", "fine-tuning")
    if log is not None:
        _require("tensorboard", "--log")
        _make_folder(log)
    from accelerate.state import AcceleratorState, GradientState

    ours = not AcceleratorState._shared_state
    with _explained(recipe.timeout):
        machine = _made(device_of(model), recipe, log)
        try:
            if log is not None:
                machine.init_trackers("normrewrite")
            yield machine
        finally:
            for tracker in machine.trackers:
                tracker.finish()
            machine.free_memory()
            if ours:
                AcceleratorState._reset_state()
                GradientState._reset_state()


def _make_folder(log: Path) -> None:
    try:
        log.mkdir(parents=True, exist_ok=True)
        if not os.access(log, os.W_OK | os.X_OK):
            raise PermissionError(None, "it is not writable")
    except OSError as error:
        raise NormRewriteError(
            f"--log {log}: {error.strerror}. Name a folder that can be made or written in."
        ) from error


def _made(device: torch.device, recipe: Recipe, log: Path | None) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    _check_launch(recipe)
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)  # accelerate takes the current one, where it runs alone
    _meet(device, timedelta(seconds=recipe.timeout))
    try:
        machine = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=_MIXED[recipe.precision],
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.accumulate),
            log_with=None if log is None else "tensorboard",
            project_dir=log,
        )
    except ValueError as error:
        raise NormRewriteError(f"--precision {recipe.precision}: {first_line(error)} Use another precision.") from error
    if _asked_for("FSDP") and device.type == "cpu":
        _shard_on_cpus(machine)
    if sharded(machine):
        # all have read the file; accelerate's own way fails at buffers
        machine.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return machine


def release(machine: Any, network: nn.Module) -> None:
    """Take from a network what `prepare` put around its forward, which neither pickles nor copies."""
    model = machine.unwrap_model(network, keep_fp32_wrapper=False)
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


# --- several processes ------------------------------------------------------------------------------------------------


def prepare(machine: Any, network: nn.Module, optimizer: Any, loss: Callable[[], Tensor]) -> tuple[nn.Module, Any]:
    """Both as the processes need them. loss: of some inputs; DDP has to be told where parameters take no part in it."""
    if machine.num_processes > 1:
        from accelerate.utils import DistributedDataParallelKwargs

        learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss(), learned, allow_unused=True)
        unused = any(gradient is None for gradient in gradients)
        machine.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
    prepared: tuple[nn.Module, Any] = machine.prepare(network, optimizer)
    return prepared


def sharded(machine: Any) -> bool:
    """Whether parameters are shared out over the processes, by FSDP."""
    return bool(machine.is_fsdp2)


def whole_weights(machine: Any, network: nn.Module) -> dict[str, Tensor]:
    """The whole state_dict on every process, which all have to call this."""
    if not sharded(machine):
        return network.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(get_model_state_dict(network, options=StateDictOptions(full_state_dict=True)))  # type: ignore[arg-type]


def align_buffers(machine: Any, network: nn.Module) -> None:
    """Every process takes the first one's running statistics, which are what a file will hold."""
    if machine.num_processes > 1:
        for buffer in network.buffers():
            distributed.broadcast(buffer, 0)


def _asked_for(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def _meet(device: torch.device, timeout: timedelta) -> None:
    """All processes, where there are several; accelerate looks for them in the environment alone."""
    from accelerate.state import PartialState

    try:
        processes = PartialState(cpu=device.type == "cpu", timeout=timeout)
    except ValueError as error:
        raise NormRewriteError(f"{first_line(error)}. Launch with torchrun or accelerate launch.") from error
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    if processes.num_processes != ranks:
        raise NormRewriteError(
            f"torch.distributed runs {ranks} processes, and accelerate sees {processes.num_processes}. Set RANK, WORLD_SIZE and "
            "LOCAL_RANK, as torchrun does."
        )


def _check_launch(recipe: Recipe) -> None:
    for engine in filter(_asked_for, _FOREIGN):
        raise NormRewriteError(
            f"--use_{engine.lower()}: finetune runs under DDP and FSDP alone. Launch it with torchrun, or accelerate launch "
            "with --multi_gpu or --use_fsdp --fsdp_version 2."
        )
    if _asked_for("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise NormRewriteError(
            "--use_fsdp: FSDP's first version flattens parameters, and finetune needs each as it is. Add --fsdp_version 2."
        )
    if _asked_for("FSDP") and recipe.precision in ("fp16-pure", "int8"):
        raise NormRewriteError(
            f"--precision {recipe.precision} beside --use_fsdp: it works on one process or by DDP. Launch it with torchrun."
        )
    if _asked_for("FSDP") and recipe.ema is not None:
        raise NormRewriteError("--ema beside --use_fsdp: averaged weights can't be sharded yet. Leave one of the two.")


def _shard_on_cpus(machine: Any) -> None:
    """Accelerate gives FSDP to GPUs and their like, and would take DDP here without a word; torch's FSDP2 runs on CPUs too."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    if machine.mixed_precision != "no":
        plugin.set_mixed_precision(machine.mixed_precision)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    if not sharded(machine):
        raise NormRewriteError("--use_fsdp: this version of accelerate can't shard on CPUs. Launch it with torchrun.")


@contextmanager
def _explained(timeout: float) -> Iterator[None]:
    """A lost process shows in the others as torch's or gloo's error, from whatever they were exchanging: a checkpoint, a
    batch's statistics, a gradient."""
    try:
        yield
    except (RuntimeError, NormRewriteError) as error:
        lost = lost_connection(error)
        if lost is None:
            raise
        cause = re.sub(r"^\[.*?\] ", "", str(lost).strip().splitlines()[0]).split(". ")[0].rstrip(".")
        raise NormRewriteError(
            f"process {os.environ.get('RANK', '?')}: another process died, or kept this one waiting for more than {timeout:g} s "
            f"({cause}). Checkpoints are whole: start all processes again with --resume; or raise --timeout.",
            exit_code=1,
        ) from error


# What gloo's errors, plain RuntimeErrors, can be told by: the file they come from, or where they name none, the words.
_OF_GLOO = ("/gloo/", "Application timeout caused pair closure")


def lost_connection(error: BaseException | None) -> BaseException | None:
    """The error that a connection to another process ended with, where that is what led to `error`."""
    while error is not None and not isinstance(error, distributed.DistError):
        if any(words in str(error) for words in _OF_GLOO):
            break
        error = error.__cause__
    return error


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NormRewriteError(f"{what} needs {package}: pip install normrewrite[train]")
