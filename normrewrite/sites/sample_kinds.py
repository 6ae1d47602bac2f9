"""What a norm within a sample computes, told by its class where that is torch's own, else by watching it.

>>> recognise_sample(llama_rms_norm)
SampleKind(scope='rms', eps=1e-06, shape=(512,), groups=1, channels_first=False, ranks=None, metric='l2', ...)

Libraries write the same few norms again and again. A module with nothing but a weight and a bias, each (C,), is copied,
given random ones in float64, and run in both modes on what trials.py has. Only if it agrees with a layer, RMS, group or instance
norm, also where eps is all that matters, is it taken for one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from normrewrite.nn import parts, sample
from normrewrite.nn.sample import RowNorm
from normrewrite.norms import Gain
from normrewrite.sites.kinds import remembered, unreadable
from normrewrite.sites.refusal import Refusal
from normrewrite.sites.trials import RANKS, layouts, outcome, same, subject_of, takes, trials

Scope = Literal["layer", "group", "instance", "rms"]
SAMPLE_SCOPES: tuple[Scope, ...] = get_args(Scope)

_SEEN: dict[tuple[Any, ...], "SampleKind | Refusal"] = {}
_EPS = (1e-5, 1e-6, 1e-3, 1e-8, 1e-12, 0.0)
_SAME = 2e-5  # in units of the largest output: many such modules compute in fp32 whatever they are given


@dataclass(frozen=True)
class SampleKind:
    """Which elements share statistics, and what is added to the variance (None: the machine epsilon).

    shape is that of the parameters: the last dimensions that a layer or RMS norm reduces, else the channels. channels_first:
    a layer or RMS norm over dimension 1 at each position. ranks: those of the inputs that a watched module takes; None: its
    class tells. metric, gain, ours: a norm that is ours already has them.
    """

    scope: Scope
    eps: float | None
    shape: tuple[int, ...]
    groups: int = 1
    channels_first: bool = False
    ranks: tuple[int, ...] | None = None
    metric: str = "l2"
    gain: Gain = "exact"
    ours: bool = False


def known(norm: RowNorm) -> SampleKind | Refusal:
    """The kind of one of ours, which says itself what it is."""
    own: dict[str, Any] = {"ranks": norm.ranks_taken, "metric": norm.metric, "gain": norm.gain, "ours": True}
    if isinstance(norm, sample.GroupNorm):
        return SampleKind("group", norm.eps, (norm.num_channels,), norm.num_groups, **own)
    if isinstance(norm, sample.InstanceNorm):
        return SampleKind("instance", norm.eps, (norm.num_features,), norm.num_features, **own)
    if isinstance(norm, sample.LayerNorm):
        scope: Scope = "rms" if isinstance(norm, sample.RMSNorm) else "layer"
        return SampleKind(scope, norm.eps, norm.normalized_shape, 1, norm.channels_first, **own)
    return Refusal("is of unknown scope")


def recognise_sample(module: nn.Module) -> SampleKind | Refusal:
    """The kind of a norm within a sample that is not ours, or the reason why it is none."""
    kind = unreadable(module) or _by_class(module) or _shape_refusal(module)
    if kind is not None:
        return kind
    watched = remembered(_SEEN, module, _watched)
    return (
        watched if isinstance(watched, Refusal) else replace(watched, shape=tuple(module.get_parameter("weight").shape))
    )


def _by_class(module: nn.Module) -> SampleKind | None:
    forward = type(module).forward
    if isinstance(module, nn.LayerNorm) and forward is nn.LayerNorm.forward:
        return SampleKind("layer", module.eps, module.normalized_shape)
    if isinstance(module, nn.RMSNorm) and forward is nn.RMSNorm.forward:
        return SampleKind("rms", module.eps, module.normalized_shape)
    if isinstance(module, nn.GroupNorm) and forward is nn.GroupNorm.forward:
        return SampleKind("group", module.eps, (module.num_channels,), module.num_groups)
    if isinstance(module, _InstanceNorm) and forward is _InstanceNorm.forward:
        return SampleKind("instance", module.eps, (module.num_features,), module.num_features)
    return None


def _shape_refusal(module: nn.Module) -> Refusal | None:
    """Why a module with a forward of its own can't be watched."""
    name = type(module).__name__
    if module._forward_hooks or module._forward_pre_hooks:
        return Refusal(f"{name} has its own forward and hooks, so it can't be watched")
    if any(child is not None for child in module._modules.values()):
        return Refusal(f"{name} has its own forward and children, so it may do more than normalise")
    if any(buffer is not None for buffer in module._buffers.values()):
        return Refusal(f"{name} has its own forward and buffers, so it may do more than normalise")
    tensors = {name: value for name, value in module._parameters.items() if value is not None}
    shapes = {value.shape for value in tensors.values()}
    if "weight" not in tensors or not tensors.keys() <= {"weight", "bias"} or len(shapes) > 1:
        return Refusal(f"{name} has its own forward, and other parameters than a weight and a bias of one size")
    if len(tensors["weight"].shape) != 1 or len(tensors["weight"]) < 2:
        return Refusal(f"{name} has its own forward, and its weight is not (C,) with C of at least 2")
    return None


@torch.no_grad()
def _watched(module: nn.Module) -> SampleKind | Refusal:
    name, subject = type(module).__name__, subject_of(module)
    if subject is None:
        return Refusal(f"{name} has its own forward and can't be copied, so it can't be watched")
    with torch.random.fork_rng(devices=[]):
        kind = _kind(subject.eval(), len(subject.weight))
    return kind or Refusal(
        f"{name} has its own forward, and is no layer, RMS, group or instance norm with a weight and a bias"
    )


def _kind(subject: nn.Module, width: int) -> SampleKind | None:
    """The one kind that it agrees with wherever the channels stand where that kind has them; first where it takes more."""
    taken = [(rank, axis, x) for rank, axis, x in layouts(width) if takes(subject, x)]
    ranks = {first: tuple(rank for rank, axis, _ in taken if axis == _axis(first, rank)) for first in (False, True)}
    for first in sorted(ranks, key=lambda first: -len(ranks[first])):
        inputs = [x for rank in ranks[first] for x in trials(width, rank, _axis(first, rank))]
        for kind in _candidates(subject, width, first) if inputs else ():
            if all(_agrees(kind, subject, x, training) for training in (False, True) for x in inputs):
                others = [(rank, axis, x) for rank, axis, x in taken if axis != _axis(first, rank)]
                wider = any(rank in ranks[first] or _is_norm(kind, subject, axis, x) for rank, axis, x in others)
                return None if wider else replace(kind, ranks=None if ranks[first] == _all(first) else ranks[first])
    return None


def _all(channels_first: bool) -> tuple[int, ...]:
    return RANKS[1:] if channels_first else RANKS


def _axis(channels_first: bool, rank: int) -> int:
    return 1 if channels_first else rank - 1


def _is_norm(kind: SampleKind, subject: nn.Module, axis: int, x: Tensor) -> bool:
    """Whether it is this norm with the channels elsewhere, too. Broadcasting makes something of other layouts, which is none of
    a norm's business: there the twin raises."""
    if x.dim() == 1:
        return False
    to = _axis(kind.channels_first, x.dim())
    moved = _expected(kind, subject, x.movedim(axis, to)).movedim(to, axis)
    return same(outcome(subject, x), moved, _SAME)


def _agrees(kind: SampleKind, subject: nn.Module, x: Tensor, training: bool) -> bool:
    """Whether both give the same; where the norm itself raises, so does the twin."""
    expected = outcome(lambda x: _expected(kind, subject, x), x)
    return expected is None or same(outcome(subject.train(training), x), expected, _SAME)


def _candidates(module: nn.Module, width: int, channels_first: bool) -> Iterator[SampleKind]:
    own = [value for value in parts.attributes(module).values() if isinstance(value, float) and 0 < value < 0.1]
    for eps in dict.fromkeys((*own, *_EPS)):
        yield SampleKind("layer", eps, (width,), channels_first=channels_first)
        yield SampleKind("rms", eps, (width,), channels_first=channels_first)
        if channels_first:
            groups = getattr(module, "num_groups", 1)
            if isinstance(groups, int) and groups > 0 and width % groups == 0:
                yield SampleKind("group", eps, (width,), groups)
            yield SampleKind("instance", eps, (width,), width)


def _expected(kind: SampleKind, subject: Any, x: Tensor) -> Tensor:
    weight, bias = subject.weight, getattr(subject, "bias", None)
    if kind.scope in ("group", "instance"):
        return F.group_norm(x, kind.groups, weight, bias, kind.eps or 0.0)
    last = x.movedim(1, -1) if kind.channels_first else x
    if kind.scope == "layer":
        y = F.layer_norm(last, kind.shape, weight, bias, kind.eps or 0.0)
    else:
        y = F.rms_norm(last, list(kind.shape), weight, kind.eps)
        y = y if bias is None else y + bias
    return y.movedim(-1, 1) if kind.channels_first else y
