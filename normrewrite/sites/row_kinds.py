"""What a norm within a sample computes, told by its class where that is torch's own, else by watching it.

>>> recognise_row(llama_rms_norm)
RowKind(scope='rms', eps=1e-06, shape=(512,), groups=1, channels_first=False)

Libraries write the same few norms again and again. A module with nothing but a weight and a bias, each (C,), is copied,
given random ones in float64, and run on random input in both modes. Only if it agrees with a layer, RMS, group or instance
norm, also where eps is all that matters, is it taken for one.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.instancenorm import _InstanceNorm

from normrewrite.nn import parts
from normrewrite.sites.kinds import remembered, unreadable

Scope = Literal["layer", "group", "instance", "rms"]
ROW_SCOPES: tuple[Scope, ...] = get_args(Scope)

_SEEN: dict[tuple[Any, ...], "RowKind | str"] = {}
_EPS = (1e-5, 1e-6, 1e-3, 1e-8, 1e-12, 0.0)
# Inputs of order one, and two that an eps of 1e-5, and of 1e-8, outweighs: an eps that is another's shows.
_SCALES = (2.0, 1e-2, 1e-4)
_SAME = 2e-5  # in units of the largest output: many such modules compute in fp32 whatever they are given


@dataclass(frozen=True)
class RowKind:
    """Which elements share statistics, and what is added to the variance (None: the machine epsilon).

    shape is that of the parameters: the last dimensions that a layer or RMS norm reduces, else the channels. channels_first:
    a layer or RMS norm over dimension 1 at each position.
    """

    scope: Scope
    eps: float | None
    shape: tuple[int, ...]
    groups: int = 1
    channels_first: bool = False


def recognise_row(module: nn.Module) -> RowKind | str:
    """The kind of a norm within a sample that is not ours, or the reason why it is none."""
    told = unreadable(module) or _by_class(module) or _shape_refusal(module)
    if told is not None:
        return told
    found = remembered(_SEEN, module, _watched)
    return found if isinstance(found, str) else replace(found, shape=tuple(module.get_parameter("weight").shape))


def _by_class(module: nn.Module) -> RowKind | None:
    forward = type(module).forward
    if "forward" in vars(module):
        return None
    if isinstance(module, nn.LayerNorm) and forward is nn.LayerNorm.forward:
        return RowKind("layer", module.eps, module.normalized_shape)
    if isinstance(module, nn.RMSNorm) and forward is nn.RMSNorm.forward:
        return RowKind("rms", module.eps, module.normalized_shape)
    if isinstance(module, nn.GroupNorm) and forward is nn.GroupNorm.forward:
        return RowKind("group", module.eps, (module.num_channels,), module.num_groups)
    if isinstance(module, _InstanceNorm) and forward is _InstanceNorm.forward:
        return RowKind("instance", module.eps, (module.num_features,), module.num_features)
    return None


def _shape_refusal(module: nn.Module) -> str | None:
    """Why a module with a forward of its own can't be watched."""
    name = type(module).__name__
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} has its own forward and hooks, so it can't be watched"
    if any(child is not None for child in module._modules.values()):
        return f"{name} has its own forward and children, so it may do more than normalise"
    if any(buffer is not None for buffer in module._buffers.values()):
        return f"{name} has its own forward and buffers, so it may do more than normalise"
    tensors = {name: value for name, value in module._parameters.items() if value is not None}
    shapes = {value.shape for value in tensors.values()}
    if "weight" not in tensors or not tensors.keys() <= {"weight", "bias"} or len(shapes) > 1:
        return f"{name} has its own forward, and other parameters than a weight and a bias of one size"
    if len(tensors["weight"].shape) != 1 or len(tensors["weight"]) < 2:
        return f"{name} has its own forward, and its weight is not (C,) with C of at least 2"
    return None


def _watched(module: nn.Module) -> RowKind | str:
    name = type(module).__name__
    try:
        subject = copy.deepcopy(module).cpu().double()
    except Exception:  # whatever a foreign class raises
        return f"{name} has its own forward and can't be copied, so it can't be watched"
    generator = torch.Generator().manual_seed(0)
    for tensor in subject.parameters():
        tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    width = len(subject.weight)  # type: ignore[arg-type]
    for channels_first, shape in ((False, (3, 5, width)), (True, (3, width, 4, 5)), (True, (3, width, 7))):
        noise = 0.5 + torch.randn(shape, generator=generator, dtype=torch.float64)
        seen = _outputs(subject, [scale * noise for scale in _SCALES])
        for kind in _candidates(module, width, channels_first) if seen else ():
            if all(_same(got, _expected(kind, subject, x)) for x, got in seen):
                return kind
    return f"{name} has its own forward, and is no layer, RMS, group or instance norm with a weight and a bias"


@torch.no_grad()
def _outputs(subject: nn.Module, inputs: list[Tensor]) -> list[tuple[Tensor, Any]]:
    """Each input with what the module makes of it, in both modes; nothing where it takes no such input."""
    seen = []
    for training, x in itertools.product((False, True), inputs):
        with torch.random.fork_rng(devices=[]):
            try:
                seen.append((x, subject.train(training)(x.clone())))
            except Exception:  # whatever a foreign forward raises: the wrong rank, or it needs more than x
                return []
    return seen


def _candidates(module: nn.Module, width: int, channels_first: bool) -> Iterator[RowKind]:
    own = [value for value in parts.attributes(module).values() if isinstance(value, float) and 0 < value < 0.1]
    for eps in dict.fromkeys((*own, *_EPS)):
        yield RowKind("layer", eps, (width,), channels_first=channels_first)
        yield RowKind("rms", eps, (width,), channels_first=channels_first)
        if channels_first:
            groups = getattr(module, "num_groups", 1)
            if isinstance(groups, int) and groups > 0 and width % groups == 0:
                yield RowKind("group", eps, (width,), groups)
            yield RowKind("instance", eps, (width,), width)


def _expected(kind: RowKind, subject: Any, x: Tensor) -> Tensor:
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


def _same(got: Any, expected: Tensor) -> bool:
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return False
    return bool((got - expected).abs().max() <= _SAME * expected.abs().max())
