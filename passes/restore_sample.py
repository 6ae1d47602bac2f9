"""The part of RestoreNative for norms within a sample: layer, group, instance and RMS norms.

before:  y = weight * (x - mean) / (C * S(x - mean) + eps) + bias                  any metric
after:   y = weight * (x - mean) / sqrt(mean((x - mean)^2) + eps) + bias           the class that it once was

Weight and bias come back to the bit where they still have the bits that the rewrite, or a calibration, gave them, and as
they are elsewhere; a bias that a calibration added goes. A norm that never was torch's gets torch's class of its scope.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from normrewrite.nn import sample
from normrewrite.nn.parts import assemble, attributes
from normrewrite.nn.sample import InstanceNorm, RowNorm
from normrewrite.sites.refusal import Refusal

_NATIVE: dict[type[RowNorm], type[nn.Module]] = {
    sample.LayerNorm: nn.LayerNorm,
    sample.RMSNorm: nn.RMSNorm,
    sample.GroupNorm: nn.GroupNorm,
    sample.InstanceNorm1d: nn.InstanceNorm1d,
    sample.InstanceNorm2d: nn.InstanceNorm2d,
    sample.InstanceNorm3d: nn.InstanceNorm3d,
}
_OURS = ("metric", "gain", "site", "origin", "centred", "channels_first")


def knows(old: nn.Module) -> bool:
    """Whether it is one of ours that was a norm within a sample before, and no batch norm of another scope."""
    if not isinstance(old, RowNorm) or old.origin is None:
        return isinstance(old, RowNorm)
    statistics = {"running_var", "running_scale"} & set(old.origin.slots[1])
    return not statistics or issubclass(old.origin.kind, _InstanceNorm | RowNorm)


def why_not(old: RowNorm) -> Refusal | None:
    if old.origin is not None:
        return None
    name = type(old).__name__
    if type(old) not in _NATIVE:
        return Refusal(f"{name} takes any rank, and torch has no such norm; use InstanceNorm1d, 2d or 3d")
    if getattr(old, "channels_first", False):
        return Refusal(f"{name} is channels first, and torch has no such norm")
    if isinstance(old, sample.GroupNorm) and not old.centred:
        return Refusal("is an RMS norm over a group, and torch has no such norm")
    if isinstance(old, sample.RMSNorm) and old.bias is not None:
        return Refusal("has a bias, and torch.nn.RMSNorm has none")
    return None


def rewrite(old: RowNorm) -> tuple[nn.Module, bool]:
    """The norm that it was, and whether every tensor has the bits it had."""
    cls, plain = _class(old)
    live = {name: value.detach() for name, value in old._parameters.items() if value is not None}
    nearest, buffers = dict(live), dict(old._buffers)
    if isinstance(old, InstanceNorm) and not issubclass(cls, RowNorm):
        del buffers["running_scale"]
        buffers["running_var"] = None
        if old.running_scale is not None:
            live["running_var"], nearest["running_var"] = old.running_scale, _variance(old)
    originals, exact = (nearest, False) if old.origin is None else old.origin.restore(live, nearest)
    if "running_var" in originals:
        buffers["running_var"] = originals["running_var"]
        buffers["running_mean"] = old.get_buffer("running_mean").to(originals["running_var"].dtype)
    return assemble(cls, plain, _parameters(old, originals), buffers), exact or not live


def _variance(old: InstanceNorm) -> Tensor:
    assert old.running_scale is not None and old.eps is not None
    return ((old.running_scale + old.eps) ** 2 - old.eps).clamp_min(0)


def _parameters(old: RowNorm, originals: dict[str, Tensor]) -> dict[str, nn.Parameter | None]:
    """The same parameter objects, with the original's values; without those that it didn't have."""
    parameters: dict[str, nn.Parameter | None] = dict.fromkeys(
        old._parameters if old.origin is None else old.origin.slots[0]
    )
    for name, parameter in old._parameters.items():
        if parameter is not None and (old.origin is None or old.origin.forgotten or name in old.origin.tensors):
            parameter.data = originals[name]
            parameters[name] = parameter
    return parameters


def _class(old: RowNorm) -> tuple[type[nn.Module], dict[str, Any]]:
    """What it was, with the plain attributes it had; a momentum set since then stays."""
    now = {name: value for name, value in attributes(old).items() if name not in _OURS}
    if old.origin is None:
        return _NATIVE[type(old)], now
    then = old.origin.attributes
    return old.origin.kind, then | {name: now[name] for name in then.keys() & {"momentum"}}
