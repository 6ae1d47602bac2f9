"""ChangeScope: statistics of each sample instead of the batch: group, layer, instance or RMS normalisation.

before:  y = weight * (x - running_mean) / sqrt(running_var + eps) + bias          torch's batch norms and kinds.py's finds
after:   y = weight' * (z - m) / sqrt(v + eps') + bias'    m, v of one sample's channel group: torch.nn.GroupNorm
         z = scale * x + offset                            in front of it: nr.nn.OffsetNorm
         rms: m = 0, and v the mean square of the whole sample: nr.nn.GroupNorm(1, C, metric="l2", centred=False)

Statistics of a sample are no statistics of the data set, so eval is another function. The offset keeps it near: with
w = (x - running_mean) / sqrt(running_var + eps), and for the k channels of a group s = +1 +1 -1 -1 ..., u = +1 -1 +1 -1 ...
less its mean and at mean square 1, z = s * w + B * u has hardly a variance but B^2 + 1, so that

    y = weight * s * (s * w - m1 - m2 * u) + bias        m1 = mean(s * w), m2 = mean(u * s * w) of a sample and group

up to order 1/B: the norm's own function less two numbers a sample and group (RMS: less m2 alone). B = 0 is the plain norm, with
weight and bias copied. calibrate(data) fits all of it to what the original computes (normrewrite.diagnostics.least_squares).
`instance` throws the mean of each sample's channels away, and with it what many networks decide by: no offset brings that back.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from normrewrite.nn.offset import OffsetNorm, Size, unfitted
from normrewrite.nn.origin import Origin
from normrewrite.nn.sample import GroupNorm
from normrewrite.nn.stand_in import StandIn
from normrewrite.options.convert import AUTO
from normrewrite.passes.base import Rewrite
from normrewrite.passes.fold_affine import scale_of
from normrewrite.sites import Norm, Site
from normrewrite.sites.kinds import Kind
from normrewrite.sites.refusal import Refusal

EPS = 1e-5  # torch's own: what is normalised has a variance of B^2 + 1, whatever the batch norm's eps was
FEW = 4  # channels a group: fewer lose most of what they hold
_MOST_GROUPS, _WIDTH = 4, 16  # of `group` without a number: at most so many groups, of at least so many channels


class Start(NamedTuple):
    """What is in front of a norm, and its own parameters, (C,) each."""

    scale: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor


class ChangeScope(Rewrite):
    """A torch.fx pass, also usable on any nn.Module by `apply`.

    >>> ChangeScope("group", 4)(torch.fx.symbolic_trace(model)).modified
    True

    groups: for `group`, the largest number of them that also divides the channels; without one, the largest of 1 to 4 that
    divides them and leaves 16 channels each. offset: `auto`, `free` or B. None is what 0.1.0 did: plain norms, and 32 groups
    without a number.
    """

    def __init__(self, scope: str, groups: int | None = None, offset: Size | None = AUTO) -> None:
        self.scope = scope
        self.groups = groups
        self.offset = offset
        self.target = scope if groups is None else f"{scope}:{groups}"

    def with_offset(self, offset: Size | None) -> "ChangeScope":
        return ChangeScope(self.scope, self.groups, offset)

    def why_not(self, site: Site) -> Refusal | None:
        norm = site.native()
        return norm if isinstance(norm, Refusal) else None

    def inexact(self, site: Site) -> str:
        loss = "; it loses each sample's own channel means" if self.scope == "instance" else ""
        return f"statistics of each sample{loss}"

    def note(self, site: Site) -> str:
        return "; ".join(filter(None, (super().note(site), self._narrow(site), self._why_plain(site))))

    def _narrow(self, site: Site) -> str:
        """What groups of few channels lose: two of their directions, whatever the offset."""
        groups = self._groups(_channels(site.module))
        each = _channels(site.module) // groups
        if self.scope != "group" or groups == 1 or each >= FEW:
            return ""
        return f"only {each} channel{'s' * (each > 1)} a group: take fewer groups to lose less"

    def _why_plain(self, site: Site) -> str:
        """Why no offset is in front, where one was asked for."""
        old = site.module
        if not self.offset:
            return ""
        if self.scope == "instance":
            return "no offset: it would not bring them back"
        if self._groups(_channels(old)) == _channels(old):
            return "no offset: a group of one channel can't have one"
        if old.running_mean is None:
            return "no offset: it has no running statistics to make one of"
        if old.running_mean.is_meta:
            return "no offset: its statistics are on the meta device, and have no values yet"
        whole = all(values.isfinite().all() for values in self._start(old, site.norm))
        return "" if whole else "no offset: its statistics, weight or bias are not finite"

    def rewrite(self, site: Site) -> nn.Module:
        old, was = cast(Any, site.module), site.norm
        assert isinstance(was, Kind)
        norm, tail = self._norm(old, was.eps), {name: old._modules[name] for name in was.tail}
        offset = 0.0 if self._why_plain(site) else self.offset
        new: Any = StandIn(norm, tail) if tail else norm
        if offset:
            new = _behind(norm, self._start(old, was), tail)
        pairs = {
            name: (getattr(old, name, None), value) for name, value in (norm._parameters | new._parameters).items()
        }
        new.origin = Origin(old, pairs).keep(old)
        new.origin.offset = offset
        return new  # type: ignore[no-any-return]

    def _norm(self, old: Any, eps: float) -> Any:
        """The plain norm, with the parameters of the old one."""
        channels, like = _channels(old), _like(old)
        options: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
        if self.scope == "rms":
            norm: Any = GroupNorm(1, channels, eps, metric="l2", centred=False, **options)
        else:
            norm = nn.GroupNorm(self._groups(channels), channels, eps, **options)
        for name in ("weight", "bias"):
            value = getattr(old, name, None)
            if isinstance(value, Tensor):  # a frozen norm keeps buffers
                norm._parameters[name] = value if isinstance(value, nn.Parameter) else nn.Parameter(value.clone())
        return norm

    def _groups(self, channels: int) -> int:
        if self.scope == "group" and self.groups is None and self.offset is not None:
            fitting = (g for g in range(_MOST_GROUPS, 0, -1) if channels % g == 0 and channels // g >= _WIDTH)
            return next(fitting, 1)
        return {"layer": 1, "rms": 1, "instance": channels}.get(self.scope, math.gcd(self.groups or 32, channels))

    def _start(self, old: Any, kind: Norm | Refusal) -> Start:
        like = cast(Tensor, _like(old))
        start = offset_start(old, kind, self._groups(_channels(old)), unfitted(self.offset or 0.0))
        return Start(*(values.to(like.dtype) for values in start))


def offset_start(norm: Any, kind: Norm | Refusal, groups: int, size: float) -> Start:
    """What keeps a batch norm's function without any data. size: B, the offset's root mean square in a group."""
    sigma, mean = cast(Tensor, scale_of(norm, kind)), norm.running_mean.double()
    gamma = torch.ones_like(sigma) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(sigma) if norm.bias is None else norm.bias.detach().double()
    signs, direction = (values.repeat(groups) for values in directions(len(sigma) // groups, sigma.device))
    live = (norm.running_var.double() / sigma.square()).view(groups, -1).mean(1)  # 1, but for channels below eps
    power = (size**2 + live + EPS).sqrt().repeat_interleave(len(sigma) // groups)
    offset = size * direction
    return Start(signs / sigma, offset - signs * mean / sigma, gamma * signs * power, beta - gamma * signs * offset)


def directions(channels: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """s and u of one group: +1 +1 -1 -1 ..., and +1 -1 +1 -1 ... less its mean, at mean square 1. float64, (channels,)."""
    places = torch.arange(channels, device=device)
    alternating = 1.0 - 2.0 * (places % 2).double()
    centred = alternating - alternating.mean()
    return 1.0 - 2.0 * (places // 2 % 2).double(), centred / centred.square().mean().sqrt()


def _behind(norm: Any, start: Start, tail: dict[str, nn.Module]) -> OffsetNorm:
    """The norm, new and not used yet, with the offset in front."""
    new = OffsetNorm(norm, start.scale, start.offset, tail)
    for name, values in (("weight", start.weight), ("bias", start.bias)):
        norm._parameters[name] = nn.Parameter(values, norm._parameters[name].requires_grad)
    new.scale.requires_grad_(norm.weight.requires_grad)
    new.offset.requires_grad_(norm.bias.requires_grad)
    norm.eps = EPS
    return new


def _channels(old: Any) -> int:
    return len(old.running_mean) if old.running_mean is not None else int(old.num_features)


def _like(old: Any) -> Tensor | None:
    return next((value for value in (old.weight, old.running_mean) if isinstance(value, Tensor)), None)
