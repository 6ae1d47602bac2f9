"""Batch Renorm: training normalises as inference does, up to bounded corrections that carry no gradient."""

from typing import Any

import torch
from torch import Tensor

from normrewrite.backends import measuring
from normrewrite.backends.plain import transformed
from normrewrite.nn.batch import BatchNorm
from normrewrite.nn.functional import average_in, averaging_factor, group_of, is_empty, normalise, rectified
from normrewrite.nn.recomputation import recalled, recomputing, remember
from normrewrite.norms import Gain

# Steps of Ioffe 2017, section 4: all is batch norm until the first, r is free at the second, d at the third.
SCHEDULE = (5_000, 40_000, 25_000)


@torch.library.custom_op("normrewrite::renorm_corrections", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _corrections(
    mean: Tensor,
    spread: Tensor,
    running_mean: Tensor,
    running_scale: Tensor,
    r_max: Tensor,
    d_max: Tensor,
    eps: float,
    owner: Tensor,
) -> tuple[Tensor, Tensor]:
    """r and d: those of the first forward, where this is its recomputation; owner: a tensor that the norm keeps.

    One operator, so that torch.compile keeps them: it would compute them anew in the backward, from running statistics that the
    forward has moved since.
    """
    measured = torch.stack([mean, spread])
    if recomputing():
        return recalled(owner, measured)
    r, d = corrections(mean, spread, running_mean, running_scale, r_max, d_max, eps)
    remember(owner, torch.cat([measured, torch.stack([r, d])]))
    return r, d


def corrections(
    mean: Tensor, spread: Tensor, running_mean: Tensor, running_scale: Tensor, r_max: Tensor, d_max: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """r and d of a batch."""
    running = running_scale + eps
    r = ((spread + eps) / running).clamp(1 / r_max, r_max)
    return r, ((mean - running_mean) / running).clamp(-d_max, d_max)


@_corrections.register_fake
def _(
    mean: Tensor,
    spread: Tensor,
    running_mean: Tensor,
    running_scale: Tensor,
    r_max: Tensor,
    d_max: Tensor,
    eps: float,
    owner: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(spread), torch.empty_like(mean)


class BatchRenorm(BatchNorm):
    """`BatchNorm` whose training is corrected towards its running statistics. Ioffe 2017, arXiv:1702.03275.

    >>> norm = BatchRenorm(64)                      # l2, as published; metric="l1" measures otherwise

    In training, with batch statistics m, s and running ones M, S: r = clip(s/S, 1/r_max, r_max) and
    d = clip((m - M)/S, -d_max, d_max), both without gradient, and

        y = weight * ((x - m)/s * r + d) + bias

    Eval is BatchNorm's. schedule: (start, r_end, d_end) in steps: r_max rises from 1 and d_max from 0 between start and
    their ends; None: the full limits at once. The buffer `trained` says so too: statistics that were trained before.
    track_running_stats switched off later: M and S stay, and still correct. Activation checkpointing repeats a forward with the
    corrections that it had, and averages a batch in once.
    """

    def __init__(
        self,
        num_features: int,
        *arguments: Any,
        metric: str = "l2",
        gain: Gain = "exact",
        r_max: float = 3.0,
        d_max: float = 5.0,
        schedule: tuple[int, int, int] | None = SCHEDULE,
        **options: Any,
    ) -> None:
        """Positional arguments and further options are BatchNorm's."""
        super().__init__(num_features, *arguments, metric=metric, gain=gain, **options)
        self.r_max = r_max
        self.d_max = d_max
        self.schedule = schedule
        self.trained: Tensor
        self.register_buffer("trained", torch.tensor(False))

    def _normalised(self, input: Tensor, training: bool, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        group = group_of(self)
        if not training or self.running_mean is None or self.running_scale is None or is_empty(input, group):
            return super()._normalised(input, training, relu, residual)
        y, mean, spread = normalise(input, None, None, self.metric, self.gain, self.eps, group)
        with torch.no_grad():
            values = mean, spread, self.running_mean, self.running_scale, *self.limits(), self.eps
            r, d = corrections(*values) if transformed() else _corrections(*values, self.trained)
            if self.track_running_stats and not recomputing():
                factor = averaging_factor(self, input, group)
                average_in(factor, (self.running_mean, mean), (self.running_scale, spread))
        r, d = (r, d) if self.weight is None else (self.weight * r, self.weight * d)
        d = d if self.bias is None else d + self.bias
        y = torch.addcmul(measuring.per_channel(d, y.dim()), y, measuring.per_channel(r, y.dim())).to(input.dtype)
        return rectified(y, residual) if relu else y

    def limits(self) -> tuple[Tensor, Tensor]:
        """(r_max, d_max) at this step."""
        assert self.running_mean is not None
        done = self.running_mean.new_ones(2)
        if self.schedule is not None and self.num_batches_tracked is not None:
            start, r_end, d_end = self.schedule
            done = ((self.num_batches_tracked - start) / done.new_tensor([r_end - start, d_end - start])).clamp(0, 1)
        done = torch.where(self.trained, 1.0, done)
        return 1 + (self.r_max - 1) * done[0], self.d_max * done[1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, schedule={self.schedule}"
