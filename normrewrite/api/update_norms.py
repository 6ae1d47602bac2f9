"""Running statistics measured anew, of torch's batch norms and ours together: what averaged weights need.

>>> average = torch.optim.swa_utils.AveragedModel(twin)
>>> update_norms(average, loader)                   # what torch's update_bn does, which passes ours by
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normrewrite.data import NO_BATCH, Batch, Data, argument_names, as_data
from normrewrite.errors import NormRewriteError
from normrewrite.execution import call, device_of
from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.nn.mean_only import MeanOnlyBatchNorm
from normrewrite.nn.renorm import BatchRenorm
from normrewrite.options.fields import callback, options, quiet, takes
from normrewrite.options.groups import BatchSize
from normrewrite.sites.modes import same_flags

_RUNNING = {"running_mean": 0.0, "running_var": 1.0, "running_scale": 1.0}
_NEVER = (1 << 60, (1 << 60) + 1, (1 << 60) + 1)  # a schedule whose corrections begin after any number of batches


@options
class UpdateCall(BatchSize):
    """What `update_norms` takes in Python."""

    model: nn.Module = field(kw_only=False)
    data: Tensor | Data | Iterable[Any] = field(kw_only=False)
    progress: Callable[[int], object] = callback(default=quiet)


@takes(UpdateCall)
def update_norms(options: UpdateCall) -> nn.Module:
    """Measure every batch norm's running statistics anew on the data, in place; returns the model.

    >>> update_norms(average, images, batch_size=64)

    As torch.optim.swa_utils.update_bn, to the bit for torch's norms, and the same for ours: from nothing, the average over the
    batches of what training measures. Momentum, every training flag and the renorm schedule are as before afterwards. Norms that
    stay as they are: frozen ones, those that `model.train()` leaves in eval, and those that the data don't reach.

    data: (N, ...) inputs, Data, or batches (a tensor, (tensor, labels) or a dict each), taken one at a time; labels are not used.
    batch_size: of a tensor or Data; that of the training. progress: called with the number of inputs after every batch.
    Raises NormRewriteError where no norm has statistics to measure, or the model can't run on the data; nothing is changed then.
    """
    model = options.model
    measure_anew(model, _batches(options.data, argument_names(model), options.batch_size), options.progress)
    return model


def measure_anew(
    model: nn.Module, batches: Iterable[Batch], progress: Callable[[int], object], *, alone: bool = False
) -> list[nn.Module]:
    """What `update_norms` does; the norms that the batches reached. alone: whatever is no such norm runs as in eval."""
    names, device = argument_names(model), device_of(model)
    with same_flags(model):
        model.train()
        norms = [module for module in model.modules() if _measures(module)]
        if not norms:
            raise NormRewriteError(
                f"{type(model).__name__} holds no batch norm that measures running statistics in training, so there is nothing "
                "to update."
            )
        if alone:
            for module in model.modules():
                module.training = False
            for norm in norms:
                norm.training = True
        done = 0
        with torch.no_grad(), _from_nothing(norms) as reached:
            for batch in batches:
                call(model, batch.to(device), names)
                done += len(batch)
                progress(len(batch))
            if not done:
                raise NormRewriteError(NO_BATCH)
    return reached


def _batches(data: Tensor | Data | Iterable[Any], names: list[str], size: int) -> Iterator[Batch]:
    if isinstance(data, Tensor | Data) or not isinstance(data, Iterable):
        yield from as_data(data, names).batches(size)
    else:
        for item in data:
            yield from as_data([item], names).batches(size)


def _measures(module: nn.Module) -> bool:
    """Whether its running statistics move in a pass through the model as it is."""
    ours = isinstance(module, BatchNorm | MeanOnlyBatchNorm) and not isinstance(module, FrozenBatchNorm)
    if not (ours or isinstance(module, _BatchNorm)) or not module.training:
        return False
    tracks = getattr(module, "track_running_stats", True)
    return bool(tracks) and module.running_mean is not None and module.num_batches_tracked is not None


@contextmanager
def _from_nothing(norms: list[Any]) -> Iterator[list[nn.Module]]:
    """Norms that average from their next batch on. What no batch has reached comes back, and all does where the pass fails.

    Gives a list that holds those that were reached, in the end.
    """
    moved: list[nn.Module] = []
    before = [_state(norm) for norm in norms]
    settings = [
        (norm, name, vars(norm)[name]) for norm in norms for name in ("momentum", "schedule") if name in vars(norm)
    ]
    try:
        for norm in norms:
            _reset(norm)
        yield moved
    except BaseException:
        for state in before:
            _put_back(state)
        raise
    else:
        for norm, state in zip(norms, before, strict=True):
            reached = bool(norm.num_batches_tracked)
            moved += [norm] if reached else []
            _put_back([pair for pair in state if not reached or _is_kept(norm, pair[0])])
    finally:
        for norm, name, value in settings:
            setattr(norm, name, value)


State = list[tuple[Tensor, Tensor]]  # a buffer, and what it held


def _state(norm: nn.Module) -> State:
    names = [*_RUNNING, "num_batches_tracked", "trained"]
    live = [norm._buffers[name] for name in names if norm._buffers.get(name) is not None]
    return [(buffer, buffer.clone()) for buffer in live if buffer is not None]


def _put_back(state: State) -> None:
    for buffer, value in state:
        buffer.copy_(value)


def _is_kept(norm: nn.Module, buffer: Tensor) -> bool:
    """Batch Renorm's own count of training steps, and its mark of statistics that were trained before."""
    return isinstance(norm, BatchRenorm) and any(
        norm._buffers[name] is buffer for name in ("num_batches_tracked", "trained")
    )


def _reset(norm: Any) -> None:
    norm.momentum = None
    norm.num_batches_tracked.zero_()
    for name, value in _RUNNING.items():
        if norm._buffers.get(name) is not None:
            norm._buffers[name].fill_(value)
    if isinstance(
        norm, BatchRenorm
    ):  # it is to measure as it would in its first step: statistics of nothing correct nothing
        norm.trained.fill_(False)
        norm.schedule = _NEVER
