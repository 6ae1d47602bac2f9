"""Norms within a sample with a metric, drop-in for torch.nn's: `nr.nn.LayerNorm(512, metric="l1")`.

Each is a view of its input as (B, G, K, S): lines (B, G) of K * S elements share statistics, channels (G, K) share a weight.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from normrewrite.backends import operators, torch_batch
from normrewrite.backends.dispatch import asked
from normrewrite.backends.families import statistics_dtype
from normrewrite.errors import NormRewriteError
from normrewrite.nn.functional import average_in, rectified
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import keep_wide
from normrewrite.nn.tracing import OneNode
from normrewrite.norms import Gain, require_gain
from normrewrite.norms import metric as row_of


class RowNorm(OneNode):
    """What LayerNorm, RMSNorm, GroupNorm and InstanceNorm share; they say how an input is `view`ed, and how it comes back.

    y = weight * (x - mean) / (C * S + eps) + bias over each line of `view(x)`: (B, G, K, S); mean is 0 where not `centred`.
    eps is added to the scale (torch adds it to the variance); None is the machine epsilon of the statistics, as torch's.
    Statistics are computed in fp32 at least, and y comes in x's dtype. Raises NormRewriteError where a line has fewer than
    two elements, or fewer than the metric reads.
    """

    centred: bool = True
    ranks_taken: tuple[int, ...] | None = None  # where it stands for a norm that takes inputs of some ranks alone
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        eps: float | None,
        weight: bool,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        metric: str,
        gain: Gain,
    ) -> None:
        super().__init__()
        require_gain(gain)
        self.eps = eps
        self.metric = str(row_of(metric))
        self.gain: Gain = gain
        self.site = ""  # the dotted name in a converted model, for errors
        self.origin: Origin | None = None  # what it was before a rewrite
        ones, zeros = (make(*shape, device=device, dtype=dtype) for make in (torch.ones, torch.zeros))
        self.register_parameter("weight", nn.Parameter(ones) if weight else None)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    def view(self, x: Tensor) -> Tensor:
        """x as (B, G, K, S), without a copy where its strides allow."""
        raise NotImplementedError

    def from_view(self, y: Tensor, x: Tensor) -> Tensor:
        """`view` undone: y, as viewed, in the shape of x."""
        return y.reshape(x.shape)

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        return self.from_view(self._normalised(self.view(input))[0], input)

    def _normalised(
        self, viewed: Tensor, relu: bool = False, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean and C * S of the lines of an input as viewed; with relu, y is relu(y + residual), by one operator."""
        weight, bias = (None if value is None else value.view(viewed.shape[1:3]) for value in (self.weight, self.bias))
        eps = torch.finfo(statistics_dtype(viewed.dtype)).eps if self.eps is None else self.eps
        call = asked(viewed, self.metric, self.gain, eps, sample=True, centred=self.centred, relu=relu)
        try:
            return operators.normalise(call, weight, bias, residual)
        except NormRewriteError as error:
            if not self.site:
                raise
            raise NormRewriteError(
                f"{self.site}: {error} (rows of {viewed.shape[2]} channels × {viewed.shape[3]} positions)"
            ) from error

    def _check(self, input: Tensor) -> None:
        if self.ranks_taken is not None and input.dim() not in self.ranks_taken:
            self._refuse(f"{' or '.join(f'{rank}D' for rank in self.ranks_taken)} input", input)
        self._check_input(input)

    def _check_input(self, input: Tensor) -> None:
        raise NotImplementedError

    def _refuse(self, wanted: str, input: Tensor) -> None:
        raise NormRewriteError(f"{self.site or type(self).__name__} expects {wanted}, got shape {tuple(input.shape)}.")

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        gain = "" if self.gain == "exact" else f", gain={self.gain!r}"
        return f"{self._sizes()}, metric={self.metric!r}{gain}, eps={self.eps}, affine={self.weight is not None}"

    def _sizes(self) -> str:
        raise NotImplementedError


class LayerNorm(RowNorm):
    """Layer normalisation over the last dimensions, its spread measured by `metric`.

    >>> LayerNorm(512, metric="l1")(torch.randn(8, 100, 512)).shape
    torch.Size([8, 100, 512])
    >>> LayerNorm(64, channels_first=True)(torch.randn(8, 64, 7, 7)).shape       # over the channels, at each position
    torch.Size([8, 64, 7, 7])

    Arguments are torch.nn.LayerNorm's, and three more:
    metric: `l1`, `linf`, `topk:K`, `topk:P%`, `range` or `l2`; see normrewrite.norms.
    gain: `exact` (statistics read 1 on unit Gaussians) or `paper` (the constants as published).
    channels_first: normalise (N, C, *) over C alone, as ConvNeXt does.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        metric: str = "l1",
        gain: Gain = "exact",
        channels_first: bool = False,
    ) -> None:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if channels_first and len(shape) > 1:
            raise NormRewriteError(f"channels_first normalises over one dimension, got normalized_shape {shape}.")
        super().__init__(shape, eps, elementwise_affine, elementwise_affine and bias, device, dtype, metric, gain)
        self.normalized_shape = shape
        self.elementwise_affine = elementwise_affine
        self.channels_first = channels_first

    def view(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1) if self.channels_first else x
        return last.reshape(-1, 1, math.prod(self.normalized_shape), 1)

    def from_view(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.channels_first:
            return y.reshape(x.shape)
        return y.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)

    def _check_input(self, input: Tensor) -> None:
        if self.channels_first:
            if input.dim() < 2 or input.shape[1:2] != self.normalized_shape:
                self._refuse(f"(N, {self.normalized_shape[0]}, *)", input)
        elif input.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            self._refuse(f"(*, {', '.join(map(str, self.normalized_shape))})", input)

    def _sizes(self) -> str:
        return f"{self.normalized_shape}{', channels_first=True' if self.channels_first else ''}"


class RMSNorm(LayerNorm):
    """`LayerNorm` without the mean: y = weight * x / (C * S(x) + eps); arguments as torch.nn.RMSNorm's.

    >>> RMSNorm(512, metric="l1")(torch.randn(8, 100, 512)).shape
    torch.Size([8, 100, 512])

    C is the same constant as with a mean, where n elements spread by sqrt(1 - 1/n) less about their own: the weight takes it.
    """

    centred = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        metric: str = "l1",
        gain: Gain = "exact",
        channels_first: bool = False,
    ) -> None:
        super().__init__(
            normalized_shape,
            eps,
            elementwise_affine,
            False,
            device,
            dtype,
            metric=metric,
            gain=gain,
            channels_first=channels_first,
        )


class GroupNorm(RowNorm):
    """Group normalisation of (N, C, *), any rank from 2: each sample over its groups of channels and all positions.

    >>> GroupNorm(4, 64, metric="topk:10")(torch.randn(8, 64, 7, 7)).shape
    torch.Size([8, 64, 7, 7])

    Arguments are torch.nn.GroupNorm's and LayerNorm's `metric` and `gain`. centred: False leaves the mean in (RMS over a
    group). One group is layer normalisation over the whole sample.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        metric: str = "l1",
        gain: Gain = "exact",
        centred: bool = True,
    ) -> None:
        if num_channels % num_groups:
            raise NormRewriteError(f"{num_channels} channels can't be divided into {num_groups} groups.")
        super().__init__((num_channels,), eps, affine, affine, device, dtype, metric, gain)
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.affine = affine
        self.centred = centred

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], self.num_groups, x.shape[1] // self.num_groups, math.prod(x.shape[2:]))

    def forward_relu(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(norm(input) + residual), without hooks: what `norm_relu` calls."""
        self._check(input)
        if not operators.as_one(input, residual):
            return rectified(self.from_view(self._normalised(self.view(input))[0], input), residual)
        added = None if residual is None else self.view(residual)
        return self.from_view(self._normalised(self.view(input), relu=True, residual=added)[0], input)

    def _check_input(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_channels:
            self._refuse(f"(N, {self.num_channels}, *)", input)

    def _sizes(self) -> str:
        return f"{self.num_groups}, {self.num_channels}{'' if self.centred else ', centred=False'}"


class InstanceNorm(RowNorm):
    """Instance normalisation of (N, C, *), any rank from 3: each channel of each sample over its positions.

    >>> InstanceNorm(64, affine=True, metric="l1")(torch.randn(8, 64, 7, 7)).shape
    torch.Size([8, 64, 7, 7])

    Arguments are torch.nn.InstanceNorm2d's and LayerNorm's `metric` and `gain`. With track_running_stats, training keeps
    running_mean and running_scale (means over the samples of a batch, fp32 at least), and eval uses them in their place; switched
    off later, both stay, and eval measures.
    """

    ranks: ClassVar[tuple[int, int] | None] = None  # of one sample alone, and of a batch
    running_mean: Tensor | None
    running_scale: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        metric: str = "l1",
        gain: Gain = "exact",
    ) -> None:
        super().__init__((num_features,), eps, affine, affine, device, dtype, metric, gain)
        self.num_features = num_features
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        for name in ("running_mean", "running_scale", "num_batches_tracked"):
            self.register_buffer(name, None)
        if track_running_stats:
            wide = statistics_dtype(dtype or torch.get_default_dtype())
            self.running_mean = torch.zeros(num_features, device=device, dtype=wide)
            self.running_scale = torch.ones(num_features, device=device, dtype=wide)
            self.num_batches_tracked = torch.tensor(0, dtype=torch.long, device=device)

    def view(self, x: Tensor) -> Tensor:
        batch = x[None] if self._alone(x) else x
        return batch.reshape(*batch.shape[:2], 1, math.prod(batch.shape[2:]))

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        running = (self.running_mean, self.running_scale) if self.track_running_stats else (None, None)
        if running[0] is not None and running[1] is not None and not self.training:
            viewed = self.view(input)
            assert self.eps is not None
            y = torch_batch.affine(viewed, running[0], running[1] + self.eps, self.weight, self.bias)
            return self.from_view(y, input)
        y, mean, spread = self._normalised(self.view(input))
        if running[0] is not None and running[1] is not None:
            average_in(self.momentum or 0.0, (running[0], mean.mean(0)), (running[1], spread.mean(0)))
        return self.from_view(y, input)

    def _alone(self, input: Tensor) -> bool:
        """Whether the input is one sample without a batch dimension."""
        return self.ranks is not None and input.dim() == self.ranks[0]

    def _check_input(self, input: Tensor) -> None:
        if self.ranks is not None and input.dim() not in self.ranks:
            self._refuse(f"{' or '.join(f'{rank}D' for rank in self.ranks)} input", input)
        channels = input.shape[0 if self._alone(input) else 1] if input.dim() > 1 else None
        sized = self.weight is not None or self.running_mean is not None  # torch, too, takes any width without
        if channels is None or (sized and channels != self.num_features):
            self._refuse(f"(N, {self.num_features}, *)", input)

    def _sizes(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, track_running_stats={self.track_running_stats}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InstanceNorm":
        """`.half()`, `.to(...)`: parameters follow, running statistics keep fp32 at least, to the bit."""
        names = ["running_mean", "running_scale"]
        return keep_wide(self, names, lambda: super(InstanceNorm, self)._apply(fn, recurse))  # type: ignore[no-any-return, no-untyped-call]


class InstanceNorm1d(InstanceNorm):
    """`InstanceNorm` for (N, C, L) and (C, L), as torch.nn.InstanceNorm1d."""

    ranks = (2, 3)


class InstanceNorm2d(InstanceNorm):
    """`InstanceNorm` for (N, C, H, W) and (C, H, W), as torch.nn.InstanceNorm2d."""

    ranks = (3, 4)


class InstanceNorm3d(InstanceNorm):
    """`InstanceNorm` for (N, C, D, H, W) and (C, D, H, W), as torch.nn.InstanceNorm3d."""

    ranks = (4, 5)
