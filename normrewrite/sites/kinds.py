"""What a batch norm computes, found by its class where that is torch's own, else by watching it.

>>> recognise(torchvision_frozen_batch_norm)
Kind(cls=FrozenBatchNorm, eps=1e-05, tail=(), ranks=(4,), metric='l2', gain='exact', ours=False)

A subclass that overrides forward may do more than normalise, and a class that is no subclass may do just that. Such a
module is copied, given well-conditioned random tensors in float64, and run in eval and in training on what trials.py has. Only
if all agree with a batch norm, followed by the module's own children in their order, is it taken for one.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from normrewrite.nn import batch, parts
from normrewrite.nn.batch import BatchNorm, FrozenBatchNorm
from normrewrite.nn.native import AnyBatchNorm
from normrewrite.norms import Gain
from normrewrite.sites.calls import why_not_taken_over
from normrewrite.sites.refusal import Refusal
from normrewrite.sites.trials import layouts, outcome, same, subject_of, takes, trials
from normrewrite.tolerances import SAME_FUNCTION

# The rank check tells the dimensions that a class stands for, also in subclasses that leave it alone.
_BY_RANK_CHECK: dict[Any, type[BatchNorm]] = {
    nn.BatchNorm1d._check_input_dim: batch.BatchNorm1d,
    nn.BatchNorm2d._check_input_dim: batch.BatchNorm2d,
    nn.BatchNorm3d._check_input_dim: batch.BatchNorm3d,
    nn.SyncBatchNorm._check_input_dim: BatchNorm,
    AnyBatchNorm._check_input_dim: BatchNorm,
}
_BY_RANKS: dict[tuple[int, ...], type[BatchNorm]] = {
    cls.ranks: cls for cls in (batch.BatchNorm1d, batch.BatchNorm2d, batch.BatchNorm3d)
}
_PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_EPS = (1e-5, 1e-3, 1e-6, 1e-4, 0.0)
_RANKS = (2, 3, 4, 5)
_SAME = 1e-9  # of the largest output, in float64: an eps of 1e-6 that is another's 1e-5 shows at 4e-6


@dataclass(frozen=True)
class Kind:
    """The class of ours that takes the module's place, its eps, the children that it applies behind the norm, and the ranks of
    input that it takes (None: all from 2). metric, gain, ours: a norm that is ours already has them."""

    scope: ClassVar[Literal["batch"]] = "batch"
    cls: type[BatchNorm]
    eps: float
    tail: tuple[str, ...] = ()
    ranks: tuple[int, ...] | None = None
    metric: str = "l2"
    gain: Gain = "exact"
    ours: bool = False


def known(norm: BatchNorm) -> Kind:
    """The kind of one of ours, which says itself what it is."""
    return Kind(type(norm), norm.eps, norm.tail, norm.ranks, norm.metric, norm.gain, ours=True)


def unreadable(module: nn.Module) -> Refusal | None:
    """Why no norm's tensors can be taken over as they are, or None."""
    if is_parametrized(module):
        return Refusal("its parameters are parametrised; remove the parametrisation first")
    reason = why_not_taken_over(module)
    if reason is not None:
        return Refusal(reason)
    tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    if any(is_lazy(tensor) for tensor in tensors):
        return Refusal("is lazy and has no size yet; run the model on one batch first")
    dtypes = {
        str(tensor.dtype).removeprefix("torch."): tensor.dtype for tensor in tensors if tensor.is_floating_point()
    }
    odd = [name for name, dtype in dtypes.items() if dtype not in SAME_FUNCTION]
    if isinstance(module, _BatchNorm) and len(dtypes) > 1:
        odd = [" and ".join(sorted(dtypes))]
    return Refusal(f"keeps {odd[0]}, which no norm can compute in") if odd else None


def recognise(module: nn.Module) -> Kind | Refusal:
    """The kind of a batch norm that is not ours, or the reason why it is none."""
    name = type(module).__name__
    refusal = unreadable(module)
    if refusal is not None:
        return refusal
    if _is_plain(module):
        cls = _BY_RANK_CHECK[_rank_check(module)]
        return Kind(cls, module.eps, (), cls.ranks)  # type: ignore[arg-type]
    if module._forward_hooks or module._forward_pre_hooks:
        return Refusal(f"{name} overrides forward and has hooks, so it can't be watched")
    if not isinstance(module._buffers.get("running_mean"), Tensor) or not isinstance(
        module._buffers.get("running_var"), Tensor
    ):
        return Refusal(
            f"{name} overrides forward and keeps no running statistics, so it can't be told what it computes"
        )
    kind = remembered(_SEEN, module, _watched)
    return kind or Refusal(f"{name} overrides forward, and does more than a batch norm followed by its own children")


def _is_plain(module: nn.Module) -> bool:
    return (
        isinstance(module, _BatchNorm)
        and type(module).forward in _PLAIN_FORWARDS
        and _rank_check(module) in _BY_RANK_CHECK
    )


_PLAIN = (bool, int, float, str, tuple, type(None))
_TENSORS = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
_SEEN: dict[tuple[Any, ...], "Kind | None"] = {}  # a network has dozens of norms that differ in their width alone
Reading = TypeVar("Reading")


def remembered(
    seen: dict[tuple[Any, ...], Reading], module: nn.Module, watch: Callable[[nn.Module], Reading]
) -> Reading:
    """What watching the module finds, or found in one that behaves alike."""
    alike = _alike(module)
    reading = seen[alike] if alike in seen else watch(module)
    plain = all(isinstance(value, _PLAIN) for value in parts.attributes(module).values())
    if plain and _TENSORS.issuperset(alike[2]):  # what other tensors hold may be a switch, too
        seen[alike] = reading
    return reading


def _alike(module: nn.Module) -> tuple[Any, ...]:
    """What two modules of one behaviour have in common: class, plain attributes, children, and which tensors there are."""
    plain = sorted((name, repr(value)) for name, value in parts.attributes(module).items() if name != "num_features")
    tensors = sorted(name for name, value in {**module._parameters, **module._buffers}.items() if value is not None)
    return (
        (type(module), type(module).forward),
        tuple(plain),
        tuple(tensors),
        tuple((name, repr(child)) for name, child in module._modules.items()),
    )


@torch.no_grad()
def _watched(module: nn.Module) -> Kind | None:
    subject = subject_of(module)
    if subject is None:  # a module that can't be copied can't be watched
        return None
    with torch.random.fork_rng(devices=[]):
        layouts = _layouts(subject.eval())
        return _kind(subject, *layouts) if layouts[0] else None


def _layouts(subject: Any) -> tuple[tuple[int, ...], set[int]]:
    """The ranks at which it takes (N, C, *), and those at which it takes channels elsewhere."""
    taken = [(rank, axis) for rank, axis, x in layouts(len(subject.running_mean)) if takes(subject, x)]
    return tuple(rank for rank, axis in taken if axis == 1), {rank for rank, axis in taken if axis != 1}


def _kind(subject: Any, ranks: tuple[int, ...], elsewhere: set[int]) -> Kind | None:
    """What it agrees with on every input of these ranks, in eval and in training."""
    tail, width = tuple(subject._modules), len(subject.running_mean)
    inputs = [x for rank in ranks for x in trials(width, rank, axis=1)]
    for eps in (getattr(subject, "eps", None), *_EPS):
        if isinstance(eps, float) and _agrees(subject, inputs[0], eps, tail, training=False):
            break
    else:
        return None
    frozen = _agrees(subject, inputs[0], eps, tail, training=True, frozen=True)
    if frozen and tail:
        return None
    # A frozen norm multiplies and adds by broadcasting, at ranks that nobody had in mind: there the twin raises.
    if elsewhere & set(ranks) if frozen else elsewhere:
        return None
    watched = [(subject, x, training) for training in (False, True) for x in inputs]
    watched += [(_aged(subject), inputs[0], True)]
    if not all(_agrees(old, x, eps, tail, training=training, frozen=frozen) for old, x, training in watched):
        return None
    cls = FrozenBatchNorm if frozen else _BY_RANKS.get(ranks, BatchNorm)
    return Kind(cls, eps, tail, None if ranks == _RANKS else ranks)


def _aged(subject: Any) -> Any:
    """The same after a million batches: some normalise otherwise, or begin to, by then."""
    aged = copy.deepcopy(subject)
    if isinstance(getattr(aged, "num_batches_tracked", None), Tensor):
        aged.num_batches_tracked.fill_(10**6)
    return aged


def _rank_check(module: nn.Module) -> Any:
    return getattr(type(module), "_check_input_dim", None)


def _agrees(
    subject: Any, x: Tensor, eps: float, tail: tuple[str, ...], *, training: bool, frozen: bool = False
) -> bool:
    """Whether it does what a batch norm does: the same output and the same running statistics, or an error of both."""
    watched = (copy.deepcopy(subject) if training else subject).train(training)
    mean, var = subject.running_mean.clone(), subject.running_var.clone()

    def batch_norm(x: Tensor) -> Tensor:
        weight, bias = getattr(subject, "weight", None), getattr(subject, "bias", None)
        y = F.batch_norm(x, mean, var, weight, bias, training and not frozen, _momentum(subject), eps)
        for name in tail:
            y = getattr(subject, name).train(training)(y)
        return y

    output, expected = outcome(watched, x), outcome(batch_norm, x)
    return (
        same(output, expected, _SAME, least=1.0)
        and same(watched.running_mean, mean, _SAME)
        and same(watched.running_var, var, _SAME)
    )


def _momentum(subject: Any) -> float:
    """The weight of a batch in the running statistics; a norm that names none must leave them alone."""
    momentum = getattr(subject, "momentum", 0.0)
    return 1 / (int(subject.num_batches_tracked) + 1) if momentum is None else momentum
