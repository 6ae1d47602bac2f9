"""Mean-only batch normalisation: what follows a weight norm, where a batch norm's scale lives in the weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.backends import half, ranks
from normrewrite.backends.accumulate import Accumulator
from normrewrite.backends.families import statistics_dtype, wide
from normrewrite.backends.measuring import over, per_channel
from normrewrite.errors import NormRewriteError
from normrewrite.nn.functional import average_in, averaging_factor, group_of, is_empty
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import keep_wide, require_rank, through_tail
from normrewrite.nn.tracing import OneNode


class MeanOnlyBatchNorm(OneNode):
    """y = x - mean + bias by channel: Salimans & Kingma, arXiv:1602.07868, section 4. (N, C, *), any rank from 2.

    >>> norm = MeanOnlyBatchNorm(64)
    >>> norm(torch.randn(8, 64, 7, 7)).shape
    torch.Size([8, 64, 7, 7])

    num_features: C. momentum: as torch.nn.BatchNorm2d's (None: cumulative average). Training subtracts the batch's mean
    and averages it into running_mean (fp32 at least, in half precision too); eval subtracts running_mean. y has x's dtype.
    synchronised, process_group: the mean of all ranks' batches, as BatchNorm's.
    Raises NormRewriteError for other shapes, and where training sees one value a channel (y would be bias).
    """

    rank: int | None = None  # of the inputs at which that layer's channels are at dimension 1
    synchronised = False
    process_group: Any = None
    track_running_stats = True  # False: running_mean stays where it is, as torch.nn.BatchNorm2d's
    weight: None = None  # it has no scale: a weight norm in front has it
    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        synchronised: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.synchronised = synchronised
        self.process_group = process_group
        self.num_features = num_features
        self.momentum = momentum
        self.site = ""  # the dotted name in a converted model, for errors
        self.origin: Origin | None = None  # what it was before a rewrite
        # the one that has its scale; in a tuple, so that it is not registered here too
        self.layer: tuple[nn.Module, ...] = ()
        self.tail: tuple[str, ...] = ()  # children that are applied behind the norm: a fused activation, dropout
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        mean = torch.zeros(num_features, device=device, dtype=statistics_dtype(self.bias.dtype))
        self.register_buffer("running_mean", mean)
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        accumulator = half.chosen(input)
        if accumulator is not None and self.training and input.numel():
            return through_tail(self, self._centred_in_half(input, accumulator))
        x = wide(input)
        mean = self._batch_mean(x) if self.training else self.running_mean
        centred = x - per_channel(mean, x.dim()) + per_channel(self.bias, x.dim())
        return through_tail(self, centred.to(input.dtype))

    def _batch_mean(self, x: Tensor) -> Tensor:
        group = group_of(self)
        if is_empty(x, group):
            averaging_factor(self, x)  # it counts, as with torch
            return self.running_mean
        mean = x.mean(over(x)) if group is None else ranks.mean(x, group)
        self._average(x, mean, group)
        return mean

    def _centred_in_half(self, x: Tensor, accumulator: Accumulator) -> Tensor:
        y, mean = half.centre(x, self.bias, half.not_shared(accumulator, group_of(self)))
        self._average(x, mean)
        return y

    def _average(self, x: Tensor, mean: Tensor, group: Any = None) -> None:
        if self.track_running_stats:
            average_in(averaging_factor(self, x, group), (self.running_mean, mean))

    def _check(self, input: Tensor) -> None:
        require_rank(self, input)
        where = self.site or type(self).__name__
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise NormRewriteError(f"{where} expects (N, {self.num_features}, *), got shape {tuple(input.shape)}.")
        if self.training and input.numel() == self.num_features and group_of(self) is None:
            raise NormRewriteError(
                f"{where} needs more than one value a channel when training, got shape {tuple(input.shape)}. "
                "Raise the batch size or call .eval()."
            )

    def reset_parameters(self) -> None:
        self.running_mean.zero_()
        self.num_batches_tracked.zero_()
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MeanOnlyBatchNorm":
        names = ["running_mean"]
        return keep_wide(self, names, lambda: super(MeanOnlyBatchNorm, self)._apply(fn, recurse))  # type: ignore[no-any-return, no-untyped-call]
