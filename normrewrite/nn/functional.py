"""`batch_norm` as torch's, with a metric: the function behind the modules of `normrewrite.nn`."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from normrewrite.backends import operators, ranks, torch_batch
from normrewrite.backends.dispatch import asked
from normrewrite.backends.families import statistics_dtype
from normrewrite.backends.watch import tell
from normrewrite.errors import NormRewriteError
from normrewrite.norms import Gain


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_scale: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    metric: str = "l1",
    gain: Gain = "exact",
    group: Any = None,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalise each channel over the batch and all positions, its spread measured by `metric`.

    >>> y = batch_norm(x, None, None, training=True, metric="linf")

    input: (N, C, *), any rank from 2, any float dtype; weight, bias: (C,); running_mean, running_scale: (C,), fp32 or
    float64, updated in place in training as torch's: (1 - momentum) * running + momentum * batch. A channel whose
    batch statistics are not finite keeps its running ones. In eval: weight * (x - running_mean)/(running_scale + eps) + bias.
    group: a torch.distributed process group, whose ranks' inputs are measured as one batch; None: this process's own.
    relu: relu(y), with a residual of input's shape relu(y + residual): on CUDA in the same pass over memory.
    An empty batch comes back empty, and moves nothing. Raises NormRewriteError where training sees one value a channel, or
    fewer than the metric reads.
    """
    tensors = (input, running_mean, running_scale, weight, bias, residual)
    if has_torch_function(tensors):  # one node under torch.fx
        return handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_scale,
            weight,
            bias,
            training=training,
            momentum=momentum,
            eps=eps,
            metric=metric,
            gain=gain,
            group=group,
            relu=relu,
            residual=residual,
        )
    together = relu and operators.as_one(input, residual)
    if not training:
        if running_mean is None or running_scale is None:
            raise NormRewriteError(
                "batch_norm in eval needs running_mean and running_scale; pass training=True without them."
            )
        if together:
            return operators.affine_relu(input, residual, running_mean, running_scale + eps, weight, bias)
        y = torch_batch.affine(input, running_mean, running_scale + eps, weight, bias)
        return rectified(y, residual) if relu else y
    if is_empty(input, group):
        zeros = input.new_zeros(input.shape[1], dtype=statistics_dtype(input.dtype))
        return torch_batch.affine(
            input, zeros, zeros + 1, weight, bias
        )  # weight and bias get gradients of 0, as torch's
    together = together and group is None
    y, mean, spread = normalise(input, weight, bias, metric, gain, eps, group, together, residual)
    if running_mean is not None and running_scale is not None:
        average_in(momentum, (running_mean, mean), (running_scale, spread))
    return rectified(y, residual) if relu and not together else y


def is_empty(input: Tensor, group: Any) -> bool:
    """Whether there is nothing to measure in a batch: it goes through, as with torch, and leaves the statistics alone."""
    return group is None and input.dim() > 1 and input.numel() == 0


def rectified(y: Tensor, residual: Tensor | None) -> Tensor:
    """relu(y + residual), by torch."""
    return torch.relu(y if residual is None else y + residual)


def normalise(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    metric: str,
    gain: Gain,
    eps: float,
    group: Any,
    relu: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and C * S of the batch: this process's own, or that of all ranks of a group. relu: y is relu(y + residual)."""
    call = asked(input, metric, gain, eps, relu=relu, group=group)
    if group is None or call.accumulator is not None:  # ranks count all of theirs
        check_trainable(input)
    return operators.normalise(call, weight, bias, residual)


def check_trainable(input: Tensor) -> None:
    if input.dim() < 2:
        raise NormRewriteError(f"batch_norm needs (N, C, *), got shape {tuple(input.shape)}.")
    if input.numel() // input.shape[1] < 2:
        raise NormRewriteError(
            f"batch_norm needs more than one value a channel when training, got shape {tuple(input.shape)}. "
            "Raise the batch size or call .eval()."
        )


def group_of(norm: Any) -> Any:
    """The process group that a norm measures with, None for this process alone: it asks for one, and there are others."""
    return ranks.several(norm.process_group) if norm.synchronised else None


def averaging_factor(norm: Any, input: Tensor, group: Any = None) -> float | Tensor:
    """The weight of this batch in a norm's running statistics; counts the batch, as torch does.

    A cumulative average counts and takes only batches that are finite throughout, on all ranks alike: one NaN would leave it
    short for good, and before the first such batch its weight would be 1/0.
    """
    if norm.num_batches_tracked is None:
        return norm.momentum or 0.0
    if norm.momentum is not None:
        norm.num_batches_tracked.add_(1)
        return norm.momentum  # type: ignore[no-any-return]
    finite = torch.isfinite(input).all()
    enters = finite if group is None else ranks.summed(~finite, group) == 0
    norm.num_batches_tracked.add_(enters)
    return torch.where(enters, norm.num_batches_tracked.double().reciprocal(), 0.0)


@torch.no_grad()
def average_in(momentum: float | Tensor, *pairs: tuple[Tensor, Tensor]) -> None:
    """Average the batch into running statistics, given as (running, batch), unless one of them is not finite.

    One NaN under mixed precision would poison the buffers for good.
    """
    finite = torch.isfinite(sum(batch for _, batch in pairs))  # type: ignore[arg-type]
    tell(finite)
    for running, batch in pairs:
        factor = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
        new = torch.lerp(running, batch.to(running.dtype), factor)
        running.copy_(torch.where(finite, new, running))
