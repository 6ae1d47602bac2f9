"""Torch: batch-scope statistics over all ranks of a process group, by any metric, forward and backward.

>>> y, mean, spread = normalise(x, weight, bias, metric("l1"), "exact", 1e-5, torch.distributed.group.WORLD)

The ranks' batches are taken as one, whatever their sizes (none at all included): n, mean, S and C(n) are those of one
process on the joined batch, and so are y and dx. Averages of local deviations about local means are not: they miss how
the local means differ. Messages hold a few numbers a channel, their number is fixed by the family:

    family   forward                                                     backward
    mean     sum of n and x; then sum of |d|^power                       sum of g*d/scale, g and w
    top      sum of n and x; then gather each rank's k largest |d|       the same
    span     gather n, sum of x, max and min                             the same

Of equal extremes the lowest rank's counts, there the first in its batch (for k > 1, any): as in the joined batch. It
stays where it was found, and only that rank's backward sees it. dweight and dbias are this rank's own terms, to be summed
by whoever sums gradients (DDP), as torch.nn.SyncBatchNorm's. Second
derivatives and torch.func are refused. C(n) is looked up by n, so that a GPU waits for the first message.
"""

from typing import Any

import torch
from torch import Tensor, distributed
from torch._compile import _disable_dynamo
from torch.autograd import Function
from torch.nn.functional import pad

from normrewrite.backends import measuring, torch_batch
from normrewrite.backends.call import Call
from normrewrite.backends.families import Sparse, laid_out_as, largest, wide
from normrewrite.backends.measuring import per_channel
from normrewrite.backends.once import once, refuse_transforms
from normrewrite.norms import Gain, Metric
from normrewrite.norms import metric as row_of

_ONCE = "a synchronised norm", "Let ranks measure for themselves: nr.nn.synchronise_(model, synchronised=False)."


def several(group: Any = None) -> Any:
    """The group (None: that of all ranks) if this process shares it with others, else None: nothing is to be exchanged."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return (group or distributed.group.WORLD) if distributed.get_world_size(group) > 1 else None


def why_not(call: Call) -> str | None:
    if call.relu or call.sample:
        return "ranks exchange statistics of a batch, without ReLU"
    return "the batch is this process's own" if call.group is None else None


def of_call(call: Call, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return normalise(call.x, weight, bias, call.metric, call.gain, call.eps, call.group)


@_disable_dynamo  # it would trace the sizes that messages bring; torch.compiler.disable would import it with this file
def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, row: Metric | str, gain: Gain, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`operators.batch_norm` of the joined batch: y of this rank's x: (N, C, *), N >= 0; mean and C * S (C,), alike on all.

    Every rank of the group has to call it, with the same C, and run its backward. Raises NormRewriteError, on all ranks
    alike, where the joined batch has fewer than two elements a channel, or fewer than the row reads.
    """
    refuse_transforms(*_ONCE)
    row = row if isinstance(row, Metric) else row_of(row)
    return _Normalise.apply(x, weight, bias, row, gain, eps, group)  # type: ignore[no-any-return, no-untyped-call]


class _Normalise(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        row: Metric,
        gain: Gain,
        eps: float,
        group: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = wide(x)
        n, mean, raw, (indices, signs) = _MEASURE[row.family](values, row, group)
        constant = row.gain(n, gain)
        spread = raw * constant
        y = torch.empty_like(x)
        if x.numel():
            y = laid_out_as(torch_batch.centred_affine(x, mean, spread + eps, weight, bias), x)
        ctx.save_for_backward(x, weight, bias, mean, spread, indices, signs)
        ctx.settings = row, constant, n, eps, group
        ctx.mark_non_differentiable(mean, spread)
        return y, mean, spread

    @staticmethod
    @once(*_ONCE)
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, spread, indices, signs = ctx.saved_tensors
        row, constant, n, eps, group = ctx.settings
        dweight, dbias = measuring.sums(g, x, mean, spread + eps) if x.numel() else torch.zeros_like(mean).expand(2, -1)
        dx = None
        if ctx.needs_input_grad[0]:
            slopes = torch_batch.slope_sum(signs, row, constant, n)
            total = summed(torch.stack([dweight, dbias, slopes]), group)
            dx = torch_batch.input_gradient(g, x, weight, mean, spread, (indices, signs), total, row, constant, n, eps)
        parameters = [None if of is None else d.to(of.dtype) for d, of in ((dweight, weight), (dbias, bias))]
        return dx, *parameters, None, None, None, None


@_disable_dynamo
def mean(x: Tensor, group: Any) -> Tensor:
    """The mean (C,) of the joined batch, with its gradient. x: (N, C, *), fp32 or float64."""
    refuse_transforms(*_ONCE)
    return _Mean.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


class _Mean(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        n, mean = mean_of(x, group)
        ctx.settings = x.shape, n, group
        return mean

    @staticmethod
    @once(*_ONCE)
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        shape, n, group = ctx.settings
        return per_channel((summed(g, group) / n).to(g.dtype), len(shape)).expand(shape), None


# --- messages --------------------------------------------------------------------------------------------------------


def summed(values: Tensor, group: Any) -> Tensor:
    """The sum over all ranks, float64: so counts stay exact."""
    total = values.double()
    distributed.all_reduce(total, group=group)
    return total


def gathered(values: Tensor, group: Any) -> Tensor:
    """(ranks, *shape): every rank's values, in order of rank."""
    everyone = [torch.empty_like(values) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(everyone, values.contiguous(), group=group)
    return torch.stack(everyone)


def mean_of(x: Tensor, group: Any) -> tuple[int, Tensor]:
    """(n, mean (C,)) of the joined batch. x: (N, C, *), fp32 or float64."""
    count = x.new_tensor([x.numel() // x.shape[1]], dtype=torch.float64)
    n, *_ = total = summed(torch.cat([count, x.sum(measuring.over(x), dtype=torch.float64)]), group)
    return int(n), (total[1:] / n).to(x.dtype)


# --- families --------------------------------------------------------------------------------------------------------

Measured = tuple[int, Tensor, Tensor, Sparse]  # n, mean (C,), S (C,), where this rank read it


def _mean(x: Tensor, row: Metric, group: Any) -> Measured:
    n, mean = mean_of(x, group)
    magnitudes, inward = measuring.power_sums(x, mean, row)
    total = summed(magnitudes, group).to(x.dtype)
    return n, mean, *measuring.spread_of(torch.stack([total, inward]), n, row.power)  # inward of this rank


def _top(x: Tensor, row: Metric, group: Any) -> Measured:
    n, mean = mean_of(x, group)
    d = _by_channel(x) - mean[:, None]
    candidates, indices = _largest_here(d.abs(), row.k(n))
    winners, ours = largest_of_all(gathered(candidates, group), distributed.get_rank(group))
    signs = d.gather(1, indices).sign() if x.numel() else torch.zeros_like(candidates)
    return n, mean, winners.mean(1), (indices, signs.where(ours, 0))


def _span(x: Tensor, row: Metric, group: Any) -> Measured:
    values, channels = _by_channel(x), x.shape[1]
    sides, indices = _largest_here(torch.cat([values, -values]), 1)
    count = x.new_tensor([values.shape[1]], dtype=torch.float64)
    everyone = gathered(torch.cat([count, values.sum(1, dtype=torch.float64), sides[:, 0].double()]), group)
    n, *_ = total = everyone[:, : 1 + channels].sum(0)
    winners, ours = largest_of_all(everyone[:, 1 + channels :, None], distributed.get_rank(group))
    high, low = winners.to(x.dtype).view(2, channels)
    signs = x.new_tensor([[1.0], [-1.0]]) * ours.view(2, channels)
    return int(n), (total[1:] / n).to(x.dtype), high + low, (indices.view(2, channels).T, signs.T)


_MEASURE = {"mean": _mean, "top": _top, "span": _span}


def _by_channel(x: Tensor) -> Tensor:
    """(N, C, *) -> (C, n)."""
    return x.transpose(0, 1).flatten(1)


def _largest_here(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """This rank's k largest of each line, (lines, k), and where they stand; -inf at 0 where it has not as many."""
    held = min(k, values.shape[1])
    if held == 0:
        return values.new_full((len(values), k), -torch.inf), values.new_zeros(len(values), k, dtype=torch.int64)
    best, indices = largest(values, held)
    return pad(best, (0, k - held), value=-torch.inf), pad(indices, (0, k - held))


def largest_of_all(candidates: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The k largest of all ranks' candidates (ranks, lines, k): themselves, and which of one rank's are among them."""
    ranks, lines, k = candidates.shape
    pool = candidates.transpose(0, 1).reshape(lines, ranks * k)  # by rank: of equals a stable sort takes the lowest
    winners = pool.sort(dim=1, descending=True, stable=True).indices[:, :k]
    won = torch.zeros_like(pool, dtype=torch.bool).scatter_(1, winners, True).view(lines, ranks, k)
    return pool.gather(1, winners), won[:, rank]
