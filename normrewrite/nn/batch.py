"""Batch norms with a metric, drop-in for torch.nn's: `nr.nn.BatchNorm2d(64, metric="l1")`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.backends.families import statistics_dtype
from normrewrite.errors import NormRewriteError
from normrewrite.nn.functional import averaging_factor, batch_norm, group_of
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import keep_wide, through_tail
from normrewrite.nn.tracing import OneNode
from normrewrite.norms import Gain, require_gain
from normrewrite.norms import metric as row_of


class BatchNorm(OneNode):
    """Batch normalisation over (N, *) of (N, C, *), its spread measured by `metric`; any rank from 2.

    >>> norm = BatchNorm(64, metric="topk:10")
    >>> norm(torch.randn(8, 64, 7, 7)).shape
    torch.Size([8, 64, 7, 7])

    Arguments are torch.nn.BatchNorm2d's, and these:
    metric: `l1`, `linf`, `topk:K`, `topk:P%`, `range` or `l2`; see normrewrite.norms.
    gain: `exact` (statistics read 1 on unit Gaussians) or `paper` (the constants as published).
    synchronised: measure the batches of all ranks as one in training, as torch.nn.SyncBatchNorm does, on any device;
    process_group: the ranks (None: all). Without torch.distributed, or with one rank, it makes no difference.

    In training y = weight * (x - mean) / (C * S + eps) + bias, and running_mean, running_scale follow as torch's running
    statistics do (momentum None: cumulative average). running_scale holds C * S: a scale, not a variance and not its
    inverse. The running statistics stay fp32 when the module is cast to half precision. A state_dict of it loads
    anywhere; training needs two values a channel, or none.
    """

    ranks: tuple[int, ...] | None = None  # of the inputs that it takes; None: all from 2
    synchronised = False
    process_group: Any = None
    running_mean: Tensor | None
    running_scale: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        metric: str = "l1",
        gain: Gain = "exact",
        synchronised: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        require_gain(gain)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.metric = str(row_of(metric))
        self.gain: Gain = gain
        self.site = ""  # the dotted name in a converted model, for errors
        self.origin: Origin | None = None  # what it was before a rewrite
        self.tail: tuple[str, ...] = ()  # children that are applied behind the norm: a fused activation, dropout
        self.synchronised = synchronised
        self.process_group = process_group
        if affine:
            self.weight: nn.Parameter | None = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
            self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        if track_running_stats:
            wide = statistics_dtype(dtype or torch.get_default_dtype())
            self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=wide))
            self.register_buffer("running_scale", torch.ones(num_features, device=device, dtype=wide))
            self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        else:
            for name in ("running_mean", "running_scale", "num_batches_tracked"):
                self.register_buffer(name, None)

    def forward(self, input: Tensor) -> Tensor:
        return through_tail(self, self._checked(input))

    def forward_relu(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(norm(input) + residual), without hooks and tail: what `norm_relu` calls."""
        return self._checked(input, relu=True, residual=residual)

    def _checked(self, input: Tensor, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """`_normalised` of an input that fits, its errors with the site."""
        self._check_input(input)
        try:
            return self._normalised(input, self.training, relu, residual)
        except NormRewriteError as error:
            if not self.site:
                raise
            raise NormRewriteError(f"{self.site}: {error} (input {tuple(input.shape)})") from error

    def _normalised(self, input: Tensor, training: bool, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        live = training or self.running_mean is None
        updating = training and self.track_running_stats
        group = group_of(self) if training else None
        return batch_norm(
            input,
            self.running_mean if updating or not live else None,
            self.running_scale if updating or not live else None,
            self.weight,
            self.bias,
            live,
            averaging_factor(self, input, group) if updating else 0.0,
            self.eps,
            self.metric,
            self.gain,
            group,
            relu,
            residual,
        )

    def _check_input(self, input: Tensor) -> None:
        where = self.site or type(self).__name__
        if self.ranks is not None and input.dim() not in self.ranks:
            wanted = " or ".join(f"{rank}D" for rank in self.ranks)
            raise NormRewriteError(f"{where} expects {wanted} input, got shape {tuple(input.shape)}.")
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise NormRewriteError(f"{where} expects (N, {self.num_features}, *), got shape {tuple(input.shape)}.")

    @property
    def running_var(self) -> Tensor | None:
        """What torch's eval would need for the same function, (C,): for tools that fold batch norms themselves."""
        return None if self.running_scale is None else (self.running_scale + self.eps) ** 2 - self.eps

    def reset_running_stats(self) -> None:
        if self.running_mean is not None and self.running_scale is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_scale.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        gain = "" if self.gain == "exact" else f", gain={self.gain!r}"
        synchronised = ", synchronised=True" if self.synchronised else ""
        return (
            f"{self.num_features}, metric={self.metric!r}{gain}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}{synchronised}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchNorm":
        """`.half()`, `.to(...)`: parameters follow, running statistics keep fp32 at least, to the bit."""
        names = ["running_mean", "running_scale"]
        return keep_wide(self, names, lambda: super(BatchNorm, self)._apply(fn, recurse))  # type: ignore[no-any-return, no-untyped-call]


class BatchNorm1d(BatchNorm):
    """`BatchNorm` for (N, C) and (N, C, L), as torch.nn.BatchNorm1d."""

    ranks = (2, 3)


class BatchNorm2d(BatchNorm):
    """`BatchNorm` for (N, C, H, W), as torch.nn.BatchNorm2d."""

    ranks = (4,)


class BatchNorm3d(BatchNorm):
    """`BatchNorm` for (N, C, D, H, W), as torch.nn.BatchNorm3d."""

    ranks = (5,)


class FrozenBatchNorm(BatchNorm):
    """`BatchNorm` whose statistics and parameters stand still, in training too; weight and bias may be buffers.

    What frozen batch norms of detection models become; made by conversion, not by hand.
    """

    def _normalised(self, input: Tensor, training: bool, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        return super()._normalised(input, False, relu, residual)
