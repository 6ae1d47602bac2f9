"""What a norm module computes, found by its class where that is torch's own, else by watching it.

>>> recognise(torchvision_frozen_batch_norm)
Kind(cls=FrozenBatchNorm, eps=1e-05, tail=())

A subclass that overrides forward may do more than normalise, and a class that is no subclass may do just that. Such a
module is copied, given well-conditioned random tensors in float64, and run in eval and in training on random input. Only
if both agree with a batch norm, followed by the module's own children in their order, is it taken for one.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from normrewrite.nn import batch, parts
from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.tolerances import SAME_FUNCTION

# The rank check tells the dimensions that a class stands for, also in subclasses that leave it alone.
_BY_RANK_CHECK = {
    nn.BatchNorm1d._check_input_dim: batch.BatchNorm1d,
    nn.BatchNorm2d._check_input_dim: batch.BatchNorm2d,
    nn.BatchNorm3d._check_input_dim: batch.BatchNorm3d,
}
_PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_EPS = (1e-5, 1e-3, 1e-6, 1e-4, 0.0)
_SAME = 1e-9  # of float64 outputs of order one: an eps of 1e-6 that is another's 1e-5 shows at 4e-6


@dataclass(frozen=True)
class Kind:
    """The class of ours that takes the module's place, its eps, and the children that it applies behind the norm."""

    cls: type[BatchNorm]
    eps: float
    tail: tuple[str, ...] = ()


def unreadable(module: nn.Module) -> str | None:
    """Why no norm's tensors can be taken over as they are, or None."""
    if is_parametrized(module):
        return "its parameters are parametrised; remove the parametrisation first"
    tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    if any(is_lazy(tensor) for tensor in tensors):
        return "is lazy and has no size yet; run the model on one batch first"
    dtypes = {
        str(tensor.dtype).removeprefix("torch."): tensor.dtype for tensor in tensors if tensor.is_floating_point()
    }
    odd = [name for name, dtype in dtypes.items() if dtype not in SAME_FUNCTION]
    if isinstance(module, _BatchNorm) and len(dtypes) > 1:
        odd = [" and ".join(sorted(dtypes))]
    return f"keeps {odd[0]}, which no norm can compute in" if odd else None


def recognise(module: nn.Module) -> Kind | str:
    """The kind of a batch norm that is not ours, or the reason why it is none."""
    name = type(module).__name__
    refusal = unreadable(module)
    if refusal is not None:
        return refusal
    if isinstance(module, _BatchNorm) and type(module).forward in _PLAIN_FORWARDS and "forward" not in vars(module):
        return Kind(_BY_RANK_CHECK.get(type(module)._check_input_dim, BatchNorm), module.eps)
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name} overrides forward and has hooks, so it can't be watched"
    if not isinstance(module._buffers.get("running_mean"), Tensor) or not isinstance(
        module._buffers.get("running_var"), Tensor
    ):
        return f"{name} overrides forward and keeps no running statistics, so it can't be told what it computes"
    kind = remembered(_SEEN, module, _watched)
    return kind or f"{name} overrides forward, and does more than a batch norm followed by its own children"


def native(module: nn.Module, *, tracked: bool = False, frozen: bool = True) -> Kind | str:
    """`recognise`, for rewrites that start from a norm that is not ours: with running statistics, or not frozen, if so asked."""
    if isinstance(module, BatchNorm):
        return f"is {module.metric} already: revert it first"
    kind = recognise(module)
    if isinstance(kind, Kind) and kind.cls is FrozenBatchNorm and not frozen:
        return "is frozen: training never measures it"
    if isinstance(kind, Kind) and tracked and not isinstance(module.running_mean, Tensor):
        return "has no running statistics"
    return kind


_PLAIN = (bool, int, float, str, tuple, type(None))
_SEEN: dict[tuple[Any, ...], "Kind | None"] = {}  # a network has dozens of norms that differ in their width alone
Found = TypeVar("Found")


def remembered(seen: dict[tuple[Any, ...], Found], module: nn.Module, watch: Callable[[nn.Module], Found]) -> Found:
    """What watching the module finds, or found in one that behaves alike."""
    alike = _alike(module)
    kind = seen[alike] if alike in seen else watch(module)
    if all(isinstance(value, _PLAIN) for value in parts.attributes(module).values()):
        seen[alike] = kind
    return kind


def _alike(module: nn.Module) -> tuple[Any, ...]:
    """What two modules of one behaviour have in common: class, plain attributes, children, and which tensors there are."""
    plain = sorted((name, repr(value)) for name, value in parts.attributes(module).items() if name != "num_features")
    tensors = sorted(name for name, value in {**module._parameters, **module._buffers}.items() if value is not None)
    return (
        type(module),
        tuple(plain),
        tuple(tensors),
        tuple((name, repr(child)) for name, child in module._modules.items()),
    )


def _watched(module: nn.Module) -> Kind | None:
    try:
        subject = copy.deepcopy(module).cpu().double()
    except Exception:  # a module that can't be copied can't be watched
        return None
    generator = torch.Generator().manual_seed(0)
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(subject, name, None)
        if isinstance(tensor, Tensor):
            tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    tail = tuple(subject._modules)
    for rank in (4, 2, 3, 5):
        x = 2 * torch.randn(6, len(subject.running_mean), *(5,) * (rank - 2), generator=generator, dtype=torch.float64)  # type: ignore[arg-type]
        for eps in (getattr(module, "eps", None), *_EPS):
            if isinstance(eps, float) and _agrees(subject, x, eps, tail, training=False):
                return _trained(subject, x, Kind(_BY_RANK_CHECK.get(_rank_check(module), BatchNorm), eps, tail))
    return None


def _rank_check(module: nn.Module) -> Any:
    return getattr(type(module), "_check_input_dim", None)


def _trained(subject: nn.Module, x: Tensor, kind: Kind) -> Kind | None:
    """The kind, once training is found to be a batch norm's too, or never to differ from eval (then it is frozen)."""
    if _agrees(subject, x, kind.eps, kind.tail, training=True, frozen=True):
        return None if kind.tail else Kind(FrozenBatchNorm, kind.eps)
    return kind if _agrees(subject, x, kind.eps, kind.tail, training=True) else None


@torch.no_grad()
def _agrees(
    subject: Any, x: Tensor, eps: float, tail: tuple[str, ...], *, training: bool, frozen: bool = False
) -> bool:
    watched = copy.deepcopy(subject).train(training)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            got = watched(x.clone())
        except Exception:  # the wrong rank, or a forward that needs more than x
            return False
        torch.manual_seed(0)
        live = training and not frozen
        mean, var = subject.running_mean.clone(), subject.running_var.clone()
        momentum = getattr(subject, "momentum", None)
        weight, bias = getattr(subject, "weight", None), getattr(subject, "bias", None)
        expected = F.batch_norm(x, mean, var, weight, bias, live, 0.0 if momentum is None else momentum, eps)
        for name in tail:
            expected = getattr(subject, name).train(training)(expected)
    same_output = (
        isinstance(got, Tensor) and got.shape == expected.shape and bool(((got - expected).abs() < _SAME).all())
    )
    return same_output and (momentum is None or bool(((watched.running_var - var).abs() < _SAME).all()))
