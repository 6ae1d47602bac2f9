"""Half arithmetic: normalisation by any metric where every number is half, and each sum goes through a chosen accumulator.

>>> rule = Rule(metric("l1"), "exact", eps=1e-5, accumulator=accumulator("half:64"))
>>> y, mean, spread = normalise(x, weight, bias, rule)                    # x: (B, G, K, S), fp16, as torch_sample.py's

torch_batch.py and torch_sample.py compute statistics in fp32, as torch's half kernels do: that squares leave half's range, from
6e-8 to 65504, is nowhere to be seen. Here every elementwise result is rounded to half (d, |d|^power, d/scale, weight * and
+ bias, and all of the backward's), and these sums over a line's elements, in their order, go through the accumulator:

    forward     sum x          sum |d|^power; for top the k it reads; a span reads none
                sum d, which corrects the mean of a line that lies more than families.FAR of its scales from 0
    backward    sum gh*d/scale      sum dx, of what centring takes off      by channel: sum g (dbias), sum g*d/scale (dweight)

with gh = weight * g. The constants C, eps, 1/n and 1/k are fp32 numbers; what they are applied to is rounded after. eps below
2^-24, half's smallest number, counts as that. A batch norm is a norm by lines of its input with channels first,
(1, C, 1, N * positions), in that order. C, w and the backward are those of the other backends:

    dx = (t - mean t) / scale       t = gh - C * mean(gh*d/scale) * n * dS/dd          without mean t where not centred

Running statistics are the caller's, in fp32: mean and spread come as fp32 tensors of half numbers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function

from normrewrite.backends.accumulate import Accumulator
from normrewrite.backends.call import Call
from normrewrite.backends.context import here, thread
from normrewrite.backends.families import (
    Sparse,
    by_batch,
    dense_slope,
    distant,
    extremes,
    from_batch,
    laid_out_as,
    largest,
    nothing,
    sparse_slope,
    within_half,
)
from normrewrite.backends.once import once, refuse_transforms
from normrewrite.backends.watch import tell
from normrewrite.errors import NormRewriteError
from normrewrite.norms import Gain, Metric

SMALLEST = 2.0**-24
_ONCE = "half arithmetic", "Compute that outside nr.half_arithmetic, or in another precision."


def chosen(x: Tensor) -> Accumulator | None:
    """The accumulator, where x is to be normalised in half: while normrewrite.arithmetic says so."""
    return here.now.accumulator if x.dtype is torch.float16 and thread.modes else None


def why_not(call: Call) -> str | None:
    if call.relu:
        return "half arithmetic computes no ReLU"
    return "no half arithmetic is chosen here" if call.accumulator is None else None


@_disable_dynamo  # it looks which means lie far out, and its constants are looked up by functions that keep them
def of_call(call: Call, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    assert call.accumulator is not None
    rule = Rule(call.row, call.gain, call.eps, not_shared(call.accumulator, call.group), call.centred)
    return (normalise if call.sample else normalise_batch)(call.x, weight, bias, rule)


def not_shared(accumulator: Accumulator, group: Any) -> Accumulator:
    """The accumulator, for a norm that measures this process's batch alone."""
    if group is not None:
        raise NormRewriteError(
            f"half arithmetic (sums by {accumulator}) measures one process's batch, and this norm is synchronised: ranks "
            "exchange sums in float64. Undo it by nr.nn.synchronise_(model, synchronised=False), or use another precision."
        )
    return accumulator


@dataclass(frozen=True)
class Rule:
    """What is computed. native: torch's own l2, sqrt(mean d² + eps); its spread is the variance, as its running statistics'."""

    row: Metric
    gain: Gain
    eps: float
    accumulator: Accumulator
    centred: bool = True
    native: bool = False

    def constant(self, n: int) -> float:
        """C(n)."""
        return 1.0 if self.native else self.row.gain(n, self.gain)

    @property
    def shift(self) -> float:
        """What is added to the scale, or under the root."""
        return max(self.eps, SMALLEST)


@_disable_dynamo
def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Each line of x: (B, G, K, S) over its last two dimensions; weight, bias: (G, K) or None. Gradients are half, too.

    Returns y (as x), mean (B, G) and C * S (B, G), or the variance where native; the last two detached, fp32. Raises
    NormRewriteError where a line has fewer elements than the metric reads.
    """
    refuse_transforms(*_ONCE)
    y, mean, spread = _Normalise.apply(x, weight, bias, rule)  # type: ignore[no-untyped-call]
    tell(torch.isfinite(mean) & torch.isfinite(spread))
    return y, mean, spread


def normalise_batch(x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """x: (N, C, *) by its own batch; weight, bias, mean and spread: (C,)."""
    weight, bias = (None if value is None else value[:, None] for value in (weight, bias))
    y, mean, spread = normalise(by_batch(x), weight, bias, rule)
    return laid_out_as(from_batch(y, x), x), mean[0], spread[0]


@_disable_dynamo
def centre(x: Tensor, bias: Tensor, accumulator: Accumulator) -> tuple[Tensor, Tensor]:
    """x - mean + bias by channel of x: (N, C, *), and mean (C,), detached, fp32."""
    refuse_transforms(*_ONCE)
    y, mean = _Centre.apply(by_batch(x), bias, accumulator)  # type: ignore[no-untyped-call]
    tell(torch.isfinite(mean))
    return laid_out_as(from_batch(y, x), x), mean


# --- forward and backward ----------------------------------------------------------------------------------------------------


class _Normalise(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        constant = rule.constant(x.shape[2] * x.shape[3])  # first, as it refuses what is too short
        mean = rule.accumulator.mean(_lines(x)) if rule.centred else x.new_zeros(x.shape[0] * x.shape[1])
        d = x - _by_line(mean, x)
        raw, sparse = _measure(_lines(d), _lines(x), rule)
        far = distant(mean, _scale(raw, rule, constant)) if rule.centred and not rule.native else None
        if far is not None:  # the rounding of a constant line's mean would be divided by eps alone
            mean = torch.where(far, mean + rule.accumulator.mean(_lines(d)), mean)
            d = x - _by_line(mean, x)
            raw, sparse = _measure(_lines(d), _lines(x), rule)
        spread, scale = (raw.float() * constant).half(), _scale(raw, rule, constant)
        y = d / _by_line(scale, x)
        y = y if weight is None else y * _by_channel(weight)
        y = y if bias is None else y + _by_channel(bias)
        ctx.save_for_backward(x, weight, mean, scale if rule.native else raw, scale, *sparse)
        ctx.settings = rule, constant, None if bias is None else bias.dtype
        statistics = mean.float().view(x.shape[:2]), spread.float().view(x.shape[:2])
        ctx.mark_non_differentiable(*statistics)
        return laid_out_as(y, x), *statistics

    @staticmethod
    @once(*_ONCE)
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, root, scale, *sparse = ctx.saved_tensors
        rule, constant, bias_dtype = ctx.settings
        d = x - _by_line(mean, x)
        unit, total = d / _by_line(scale, x), rule.accumulator.sum
        dweight = None if weight is None else total(_channels(g * unit)).to(weight.dtype)
        dbias = None if bias_dtype is None else total(_channels(g)).to(bias_dtype)
        gh = g if weight is None else g * _by_channel(weight)
        dx = _pulled(_lines(gh), _lines(gh * unit), _lines(d), root, sparse, rule, constant)
        if rule.centred:
            dx = dx - rule.accumulator.mean(dx)[:, None]
        dx = within_half(dx / scale[:, None], scale[:, None], 2 * rule.shift, x.dtype)
        return laid_out_as(dx.view(x.shape), x), dweight, dbias, None


def _scale(raw: Tensor, rule: Rule, constant: float) -> Tensor:
    scale = ((raw.float() * constant).half().float() + rule.shift).half()
    return scale.sqrt() if rule.native else scale


class _Centre(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, accumulator: Accumulator) -> tuple[Tensor, Tensor]:
        mean = accumulator.mean(_lines(x))
        ctx.settings = accumulator, bias.dtype
        statistic = mean.float()
        ctx.mark_non_differentiable(statistic)
        return x - _by_line(mean, x) + _by_channel(bias[:, None]), statistic

    @staticmethod
    @once(*_ONCE)
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, None]:
        accumulator, dtype = ctx.settings
        dbias = accumulator.sum(_lines(g)).to(dtype)
        return g - _by_line(accumulator.mean(_lines(g)), g), dbias, None


def _measure(d: Tensor, x: Tensor, rule: Rule) -> tuple[Tensor, Sparse]:
    """S of each line (R,), half, and where a sparse family read it; where native S². d, x: (R, n)."""
    row, mean = rule.row, rule.accumulator.mean
    if row.family == "mean":
        powers = mean(d.abs() if row.power == 1 else d.abs().pow(row.power))
        return powers if row.power == 1 or rule.native else powers.pow(1 / row.power), nothing(powers)
    if row.family == "span":
        return extremes(x, row)
    indices = largest(d.abs(), row.k(d.shape[1]))[1].sort(1).values
    taken = d.gather(1, indices)
    return mean(taken.abs()), (indices, taken.sign())


def _pulled(
    gh: Tensor, pull: Tensor, d: Tensor, root: Tensor, sparse: list[Tensor], rule: Rule, constant: float
) -> Tensor:
    """t of each line, (R, n): gh less what the scale takes of it. pull: gh*d/scale; root: S, or the scale where native."""
    if rule.row.family == "mean":
        share = (rule.accumulator.mean(pull).float() * constant).half()
        return gh - dense_slope(d, root[:, None], rule.row) * share[:, None]
    indices, signs = sparse
    share = rule.accumulator.sum(pull).float()[:, None] * constant * sparse_slope(signs.float(), rule.row)
    return gh.scatter_add(1, indices, -share.half())


def _lines(values: Tensor) -> Tensor:
    """(B, G, K, S) -> (B * G, n)."""
    return values.reshape(values.shape[0] * values.shape[1], values.shape[2] * values.shape[3])


def _channels(values: Tensor) -> Tensor:
    """(B, G, K, S) -> (G, K, B * S)."""
    return values.permute(1, 2, 0, 3).flatten(2)


def _by_line(values: Tensor, x: Tensor) -> Tensor:
    """(B * G,) -> (B, G, 1, 1)."""
    return values.view(*x.shape[:2], 1, 1)


def _by_channel(values: Tensor) -> Tensor:
    """(G, K) -> (1, G, K, 1), half."""
    return values.half()[None, :, :, None]
