"""The part of SwapMetric for norms within a sample: layer, group, instance and RMS norms keep their scope.

before:  y = weight * (x - mean) / sqrt(mean((x - mean)^2) + eps) + bias           torch's, and sample_kinds.py's finds
after:   y = weight * (x - mean) / (C * S(x - mean) + eps) + bias                  metric l1, linf, topk:K, range

Statistics are those of each sample, in eval too, so no weight and no bias makes this exact: calibration brings it near. The
parameters stay the same objects, and what they were travels in `origin`. An instance norm with running statistics
is eval-exact as a batch norm is: running_scale = sqrt(running_var + eps) - eps. Not centred (RMS), mean is 0.
"""

import math
from typing import Any

from torch import Tensor, nn

from normrewrite.backends.families import statistics_dtype
from normrewrite.errors import NormRewriteError
from normrewrite.nn import sample
from normrewrite.nn.origin import Origin
from normrewrite.nn.parts import assemble, attributes, shallow
from normrewrite.nn.sample import RowNorm
from normrewrite.norms import Gain, Metric
from normrewrite.sites.refusal import Refusal
from normrewrite.sites.sample_kinds import SampleKind, Scope

_SCOPES: dict[Scope, type[RowNorm]] = {
    "layer": sample.LayerNorm,
    "rms": sample.RMSNorm,
    "group": sample.GroupNorm,
    "instance": sample.InstanceNorm,
}
_BY_RANK: dict[type[nn.Module], type[RowNorm]] = {
    nn.InstanceNorm1d: sample.InstanceNorm1d,
    nn.InstanceNorm2d: sample.InstanceNorm2d,
    nn.InstanceNorm3d: sample.InstanceNorm3d,
}


def why_too_short(norm: SampleKind, to: Metric) -> Refusal | None:
    """Layer and RMS norms alone have a length that no input changes."""
    if norm.scope not in ("layer", "rms"):
        return None
    try:
        to.gain(math.prod(norm.shape))
    except NormRewriteError as error:
        return Refusal(str(error))
    return None


def rewrite(old: Any, norm: SampleKind, to: Metric, gain: Gain) -> RowNorm:
    pairs = {name: (value, value) for name, value in old._parameters.items() if value is not None}
    if norm.ours:
        new: RowNorm = shallow(old)
        new.metric, new.gain, new.origin = str(to), gain, old.origin or Origin(old, pairs)
        return new
    statistics, moved = _statistics(old, norm) if norm.scope == "instance" else ({}, {})
    parameters = {name: old._parameters.get(name) for name in ("weight", "bias")}
    new = assemble(_class(old, norm), _attributes(old, norm, to, gain), parameters, statistics)
    new.origin = Origin(old, pairs | moved)
    return new


def _class(old: nn.Module, kind: SampleKind) -> type[RowNorm]:
    return next((ours for theirs, ours in _BY_RANK.items() if isinstance(old, theirs)), _SCOPES[kind.scope])


def _statistics(old: Any, kind: SampleKind) -> tuple[dict[str, Tensor | None], dict[str, tuple[Tensor, Tensor]]]:
    """The buffers of an instance norm, and the running variance with what took its place."""
    mean, var = old._buffers.get("running_mean"), old._buffers.get("running_var")
    if mean is None or var is None:
        return {"running_mean": None, "running_scale": None, "num_batches_tracked": None}, {}
    wide, eps = statistics_dtype(var.dtype), kind.eps or 0.0
    scale = (var.detach().to(wide, copy=True) + eps).sqrt_() - eps
    buffers = {"running_mean": mean.detach().to(wide, copy=True), "running_scale": scale}
    return buffers | {"num_batches_tracked": old.num_batches_tracked}, {"running_var": (var, scale)}


def _attributes(old: Any, kind: SampleKind, to: Metric, gain: Gain) -> dict[str, Any]:
    affine = old._parameters.get("weight") is not None
    own: dict[str, Any]
    if kind.scope in ("layer", "rms"):
        own = {"normalized_shape": kind.shape, "elementwise_affine": affine, "channels_first": kind.channels_first}
    elif kind.scope == "group":
        own = {"num_groups": kind.groups, "num_channels": kind.shape[0], "affine": affine, "centred": True}
    else:
        running = {name: getattr(old, name, None) for name in ("momentum", "track_running_stats")}
        own = {"num_features": kind.shape[0], "affine": affine} | running
    shared: dict[str, Any] = {"eps": kind.eps, "metric": str(to), "gain": gain, "site": "", "origin": None}
    if kind.ranks is not None:
        shared["ranks_taken"] = kind.ranks
    return attributes(old) | shared | own
