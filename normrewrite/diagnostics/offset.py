"""The affine in front of a norm within a sample, fitted on tables: y = weight * norm(scale * x + offset) + bias nearest to r.

>>> tables = Tables.of(x, r)                              # x before the norm, r the original's output at the same place
>>> best = fitted(tables, Form.of(norm), bound=5)         # scale, offset, weight, bias: (C,) each

For offsets large against x the norm is static except in two directions a sample and group: the pooled means
sum_c a_c x_c and sum_c u_c a_c x_c (a: scale; u: offset over its root mean square B; without centring, the second alone).
Signs of a and the direction of u are free, and are chosen where pooled means of samples vary least. From there L-BFGS
follows the residual variance of the regression of r on the norm's output, which the tables give in closed form.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from normrewrite.backends.families import wide

_RIDGE = 1e-9  # a channel without variance gets weight 0; a large offset leaves little
_SHRINKAGE = 0.1  # of what samples have in common, to what each channel has of its own
_ITERATIONS = 60
_FIRST = (3.0, 1.0)  # root mean squares of the offset to start from; the small one is for groups of few channels
_SIZES = 1e-3  # what |scale| may cost that is off 1 / standard deviation, against a share of variance


@dataclass(frozen=True)
class Tables:
    """Of one site, in float64: means of x and r over positions, and their second moments about these, by sample and channel.

    count: (N, 1), positions; the others (N, C).
    """

    count: Tensor
    x: Tensor
    r: Tensor
    xx: Tensor
    rr: Tensor
    xr: Tensor

    @classmethod
    def of(cls, x: Tensor, r: Tensor) -> "Tables":
        """x, r: (N, C, *). Products in the inputs' own precision, fp32 at least: they are centred."""
        x, r = (wide(values).reshape(*values.shape[:2], -1) for values in (x, r))
        means = [values.mean(2, dtype=torch.float64) for values in (x, r)]
        dx, dr = (values - mean[..., None].to(values) for values, mean in zip((x, r), means, strict=True))
        products = [(one * other).mean(2, dtype=torch.float64) for one, other in ((dx, dx), (dr, dr), (dx, dr))]
        return cls(torch.full_like(means[0][:, :1], x.shape[2]), *means, *products)

    @classmethod
    def joined(cls, tables: Iterable["Tables"]) -> "Tables":
        """Those of several batches as one."""
        parts = list(tables)
        return cls(*(torch.cat([getattr(part, column.name) for part in parts]) for column in fields(cls)))

    def mean(self, values: Tensor) -> Tensor:
        """(N, C) -> (C,): over all positions of all samples."""
        return torch.sum(self.count * values, 0) / self.count.sum()

    def spread(self, values: Tensor, inside: Tensor) -> Tensor:
        """(C,): the variance over all positions of what has these means and second moments about them in each sample."""
        return self.mean((values - self.mean(values)).square() + inside)

    def standardised(self, eps: float) -> tuple["Tables", Tensor, Tensor]:
        """x with mean 0 and variance 1 by channel; the mean and standard deviation that it had."""
        mean, deviation = self.mean(self.x), (self.spread(self.x, self.xx) + eps).sqrt()
        x = (self.x - mean) / deviation
        tables = Tables(self.count, x, self.r, self.xx / deviation**2, self.rr, self.xr / deviation)
        return tables, mean, deviation


@dataclass(frozen=True)
class Form:
    """What a norm divides by: the root mean square over each of `groups` of channels, about their mean where `centred`."""

    groups: int
    centred: bool
    scale: Callable[[Tensor], Tensor]  # of a mean square
    eps: float

    @classmethod
    def of(cls, norm: Any) -> "Form":
        """torch adds eps to the variance, ours to the scale."""
        native, eps = isinstance(norm, nn.GroupNorm), norm.eps
        scale: Callable[[Tensor], Tensor] = (lambda v: (v + eps).sqrt()) if native else (lambda v: v.sqrt() + eps)
        return cls(norm.num_groups, native or norm.centred, scale, eps)

    def grouped(self, values: Tensor) -> Tensor:
        """(*, C) as (*, G, k)."""
        grouped: Tensor = values.unflatten(-1, (self.groups, -1))
        return grouped


@dataclass(frozen=True)
class Affines:
    """In front of a norm and behind it, (C,) each in float64; explained: share of r's variance, over all channels."""

    scale: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor
    explained: float


def explained(tables: Tables, form: Form, scale: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> float:
    """1 - mean (weight * o + bias - r)^2 / var(r), over all channels together."""
    mean, variance, cross = _moments(tables, form, scale, offset)
    rest = weight * mean + bias - tables.mean(tables.r)
    varying = tables.spread(tables.r, tables.rr)
    residual = weight**2 * variance - 2 * weight * cross + varying + rest**2
    return float(1 - residual.sum() / varying.sum().clamp_min(1e-30))


def regressed(tables: Tables, form: Form, scale: Tensor, offset: Tensor) -> Affines:
    """The weight and bias that are best behind the norm, by channel, with this affine in front of it."""
    mean, variance, cross = _moments(tables, form, scale, offset)
    weight = cross / (variance + _RIDGE)
    bias = tables.mean(tables.r) - weight * mean
    share = explained(tables, form, scale, offset, weight, bias)
    return Affines(scale, offset, weight, bias, share)


def _moments(tables: Tables, form: Form, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of o = norm(scale * x + offset), by channel: its mean, its variance, its covariance with r."""
    d, inside = form.grouped(scale * tables.x + offset), scale**2 * tables.xx
    if form.centred:
        d = d - d.mean(2, keepdim=True)
    spread = form.scale((d**2 + form.grouped(inside)).mean(2, keepdim=True))
    by_channel = spread.expand_as(d).flatten(1)
    o = d.flatten(1) / by_channel
    mean = tables.mean(o)
    cross = tables.mean((o - mean) * tables.r + scale * tables.xr / by_channel)
    return mean, tables.spread(o, inside / by_channel**2), cross


# --- the fit ----------------------------------------------------------------------------------------------------------


def fitted(tables: Tables, form: Form, bound: float) -> Affines:
    """The best affines that were found. bound: how large the offset gets, as root mean square over a group, in standard
    deviations of x."""
    standard, mean, deviation = tables.standardised(form.eps)
    signs, direction = _start(standard, form)
    ends = [_descended(standard, form, signs, min(first, bound) * direction, bound) for first in _FIRST]
    left = torch.stack([form.grouped(_residual(standard, form, *end)).sum(-1) for end in ends])
    # groups have nothing to do with each other: each keeps its own best end
    scale, offset = (_chosen(left, form.grouped(torch.stack(values))) for values in zip(*ends, strict=True))
    scale = scale / deviation
    return regressed(tables, form, scale, offset - scale * mean)


def _residual(tables: Tables, form: Form, scale: Tensor, offset: Tensor) -> Tensor:
    """(C,): the variance of r that the best weight and bias behind the norm leave."""
    _, variance, cross = _moments(tables, form, scale, offset)
    return tables.spread(tables.r, tables.rr) - cross**2 / (variance + _RIDGE)


def _descended(tables: Tables, form: Form, signs: Tensor, offset: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """scale and offset of the best finite iterate of L-BFGS, over the logarithm of |scale| and the offset."""
    size, offset = torch.zeros_like(signs).requires_grad_(), offset.clone().requires_grad_()
    varying = tables.spread(tables.r, tables.rr).sum().clamp_min(1e-30)
    best = [(math.inf, signs, offset.detach().clone())]
    optimiser = torch.optim.LBFGS([size, offset], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        scale = signs * size.exp()
        excess = (form.grouped(offset**2).mean(-1) / bound**2 - 1).clamp_min(0).sum()
        loss: Tensor = _residual(tables, form, scale, offset).sum() / varying + _SIZES * (size**2).mean() + excess
        loss.backward()
        if float(loss.detach()) < best[0][0]:
            best[0] = float(loss.detach()), scale.detach(), offset.detach().clone()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return best[0][1:]


# --- where it starts ---------------------------------------------------------------------------------------------------


def _start(tables: Tables, form: Form) -> tuple[Tensor, Tensor]:
    """Signs of the scale and a direction of the offset, mean square 1 a group: those in which pooled means vary least."""
    pooled = form.grouped(tables.x).transpose(0, 1)  # (G, N, k)
    common = pooled.mT @ (tables.count * pooled) / tables.count.sum()
    common = (1 - _SHRINKAGE) * common + _SHRINKAGE * torch.diag_embed(common.diagonal(dim1=1, dim2=2))
    if not form.centred:  # nothing but the offset's direction is lost
        smallest = torch.linalg.eigh(common)[1][..., 0]
        return torch.ones_like(smallest).flatten(), (smallest * smallest.shape[-1] ** 0.5).flatten()
    tried = _flipped(_candidates(common), common)
    signs = _chosen((_product(tried, common) * tried).sum(-1), tried)
    return signs, _orthogonal(form.grouped(signs), common).flatten()


def _chosen(loss: Tensor, values: Tensor) -> Tensor:
    """(C,): of each group the values, (S, G, k), with the smallest finite loss, (S, G)."""
    best = loss.nan_to_num(math.inf).argmin(0)
    return values[best, torch.arange(len(best))].flatten()


def _candidates(common: Tensor) -> Tensor:
    """(S, G, k) signs to start from: alternating, the smallest eigenvector's, and a few drawn at random."""
    groups, k = common.shape[:2]
    alternating = torch.ones(groups, k).to(common)
    alternating[:, 1::2] = -1
    smallest = torch.linalg.eigh(common)[1][..., 0]
    drawn = torch.rand(6, groups, k, generator=torch.Generator().manual_seed(0)).to(common) - 0.5
    return torch.where(torch.stack([alternating, smallest, *drawn]) < 0, -1.0, 1.0).to(common)


def _flipped(signs: Tensor, common: Tensor) -> Tensor:
    """Flip one sign a group, whichever helps most, until none makes s'Ks smaller. signs: (S, G, k); common K: (G, k, k)."""
    diagonal = common.diagonal(dim1=1, dim2=2)
    products = _product(signs, common)
    while True:
        change, at = (diagonal - signs * products).min(-1, keepdim=True)  # a quarter of what the flip changes
        flips = torch.where(change < -1e-9, -2.0, 0.0).to(signs) * signs.gather(-1, at)
        if not flips.any():
            return signs
        signs = signs.scatter_add(-1, at, flips)
        products = products + flips * common[torch.arange(len(common)), at[..., 0]]


def _product(signs: Tensor, common: Tensor) -> Tensor:
    return torch.einsum("sgk,gkl->sgl", signs, common)


def _orthogonal(signs: Tensor, common: Tensor) -> Tensor:
    """(G, k): the offset's direction for these signs, with sum 0 and mean square 1 a group."""
    k = signs.shape[-1]
    along = signs[:, :, None] * signs[:, None, :] / k
    across = torch.eye(k).to(signs) - along
    beyond = 2 * common.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]  # more than any eigenvalue: s itself comes last
    vectors = torch.linalg.eigh(across @ common @ across + beyond * along)[1]
    direction: Tensor = signs * vectors[..., 0] * k**0.5
    return direction
