"""Weight decay of scale-invariant weights as what it is, a step size. Hoffer et al. 2018, arXiv:1803.01814, section 2.

A step turns such a weight by lr / ||w||^2, and weight decay only holds ||w|| down. Three ways to turn it as far without:

    StepSizeCorrection     scales each step by ||w||^2 / ||w_ref||^2, w_ref that of a run with weight decay (eq. 4)
    NormSchedule           sets the norm to ||w_ref|| after each step
    ExponentialSchedule    needs no such run: lr grows as weight decay would have made the weights shrink

>>> found = scale_invariant(model)                                  # which weights, normrewrite.sites.invariance
>>> record = NormRecord(found.weights)                              # beside a run with weight decay: record.step() each epoch
>>> optimizer = SGD(param_groups(model, weight_decay=0.0, rest=5e-4), lr=0.1, momentum=0.9)
>>> correction = StepSizeCorrection(optimizer, found.weights, record.reference())    # correction.step() each epoch

Norms are of the blocks of channels that share statistics, one a channel in front of a batch norm. All keep their place in
a state_dict.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from normrewrite.errors import NormRewriteError
from normrewrite.sites.invariance import InvariantWeight

Reference = Mapping[str, Tensor]  # by weight: the norms of its blocks, (epochs, blocks)


class NormRecord:
    """The norms of weights, epoch by epoch: now, and at each `step`.

    >>> record = NormRecord(scale_invariant(model).weights)
    >>> record.step()                                       # behind each epoch, as a learning rate schedule
    >>> torch.save(record.reference(), "norms.pt")          # {name: (epochs, blocks)}, fp32 at least, on the CPU
    """

    def __init__(self, weights: Sequence[InvariantWeight]) -> None:
        self.weights = tuple(weights)
        self.norms: dict[str, list[Tensor]] = {weight.name: [] for weight in self.weights}
        self.step()

    def step(self) -> None:
        for weight in self.weights:
            self.norms[weight.name].append(weight.norms().cpu())

    def reference(self) -> dict[str, Tensor]:
        return {name: torch.stack(norms) for name, norms in self.norms.items()}

    state_dict = reference

    def load_state_dict(self, state: Reference) -> None:
        self.norms = {name: list(norms) for name, norms in state.items()}


class _ByReference:
    """Hooks around an optimiser's step that follow recorded norms: row 0 until the first `step()`, the last one for good."""

    def __init__(self, optimizer: Optimizer, weights: Sequence[InvariantWeight], reference: Reference) -> None:
        """Raises NormRewriteError where the optimiser doesn't step a weight or decays it, or where its norms are missing."""
        self.weights = tuple(weights)
        self.epoch = 0
        _require_undecayed(optimizer, self.weights)
        self._follow(reference)
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before()),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]

    def step(self) -> None:
        """On to the next epoch's norms."""
        self.epoch += 1

    def remove(self) -> None:
        """Leave the optimiser alone again."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "reference": self._reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]
        self._follow(state["reference"])

    def _follow(self, reference: Reference) -> None:
        for weight in self.weights:
            if weight.name not in reference or reference[weight.name].shape[1:] != (weight.blocks,):
                shape = tuple(reference[weight.name].shape) if weight.name in reference else "none"
                raise NormRewriteError(
                    f"{weight.name}: reference norms are (epochs, {weight.blocks}), got {shape}. Record them by NormRecord "
                    "on the same network."
                )
        self._reference = {weight.name: reference[weight.name].clone() for weight in self.weights}

    def _wanted(self, weight: InvariantWeight) -> Tensor:
        by_epoch = self._reference[weight.name]
        norms: Tensor = by_epoch[min(self.epoch, len(by_epoch) - 1)]
        return norms.to(weight.parameter.device)

    def _before(self) -> None:
        pass

    def _after(self) -> None:
        raise NotImplementedError


class StepSizeCorrection(_ByReference):
    """Scale each step of each block, momentum included, by ||w||^2 / ||w_ref||^2. Hoffer et al. 2018, eq. 4.

    >>> correction = StepSizeCorrection(optimizer, scale_invariant(model).weights, record.reference())

    The directions are then those of the run with weight decay, to first order in lr * weight_decay. For plain SGD exactly,
    if reference norms are of every step and taken times sqrt(1 - lr * weight_decay): there a step turns by
    lr / ((1 - lr * weight_decay) ||w_ref||^2). It holds a copy of the weights during a step.
    """

    def _before(self) -> None:
        self._old = [(weight.parameter.detach().clone(), weight.norms()) for weight in self.weights]

    @torch.no_grad()
    def _after(self) -> None:
        for weight, (old, norms) in zip(self.weights, self._old, strict=True):
            ratio = norms / self._wanted(weight)
            factor = torch.where(ratio.isfinite(), ratio, 1.0).square()  # a block that weight decay brought to zero
            weight.parameter.sub_(old).mul_(weight.expanded(factor).to(old.dtype)).add_(old)
        self._old.clear()


class NormSchedule(_ByReference):
    """Set the norm of each block to ||w_ref||, at once, after every step and at each epoch. Hoffer et al. 2018, section 2.

    >>> schedule = NormSchedule(optimizer, scale_invariant(model).weights, record.reference())

    A zero block stays zero.
    """

    def __init__(self, optimizer: Optimizer, weights: Sequence[InvariantWeight], reference: Reference) -> None:
        super().__init__(optimizer, weights, reference)
        self._after()

    def step(self) -> None:
        super().step()
        self._after()

    @torch.no_grad()
    def _after(self) -> None:
        for weight in self.weights:
            norms = weight.norms()
            factor = self._wanted(weight) / torch.where(norms == 0, 1.0, norms)
            weight.parameter.mul_(weight.expanded(factor).to(weight.parameter.dtype))


class ExponentialSchedule(LRScheduler):
    """SGD without weight decay that takes the very path of SGD with it, by a growing learning rate. Call `step` each batch.

    >>> optimizer = SGD(param_groups(model, weight_decay=0.0, rest=5e-4), lr=0.1, momentum=0.9)
    >>> schedule = ExponentialSchedule(optimizer, weight_decay=5e-4)

    Li & Arora 2019, arXiv:1910.07454: with lr_t = lr * a^(-2t-1), a the larger root of
    x^2 - (1 + momentum - lr * weight_decay) x + momentum, the weights are a^(-t) times those of the run with weight decay.
    For that their momentum has to start as if they had been there before, which is set here where the optimiser has none yet.

    Only groups with `scale_invariant` grow (param_groups makes them); the others keep their own. lr_lambda: step -> factor of
    the learning rate of the run with weight decay, as LambdaLR's; without momentum that is exact too, with momentum while it
    stands still. The learning rate grows by exp(2 * lr * weight_decay / (1 - momentum)) a step: fp32 ends at an exponent of 88.
    Raises NormRewriteError for optimisers other than plain or heavy-ball SGD, and lr * weight_decay >= (1 - sqrt(momentum))^2.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weight_decay: float,
        lr_lambda: Callable[[int], float] | None = None,
        last_epoch: int = -1,
    ) -> None:
        self.weight_decay = weight_decay
        self.lr_lambda = lr_lambda
        self.shrunk = [0.0] * len(optimizer.param_groups)  # ln of what weight decay would have left of the weights
        for group in optimizer.param_groups:
            _require_heavy_ball(optimizer, group)
        super().__init__(optimizer, last_epoch)
        for i, group in enumerate(optimizer.param_groups):
            if group.get("scale_invariant"):
                self._start_momentum(group, self._planned(i))

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch >= 0:
            self.shrunk = [before + self._shrinking(i) for i, before in enumerate(self.shrunk)]
        super().step(epoch)

    def get_lr(self) -> list[float | Tensor]:
        return [self._planned(i) * math.exp(-2 * shrunk - self._shrinking(i)) for i, shrunk in enumerate(self.shrunk)]

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "lr_lambda"}

    def _planned(self, i: int) -> float:
        """The learning rate of the run with weight decay."""
        return float(self.base_lrs[i]) * (1.0 if self.lr_lambda is None else self.lr_lambda(self.last_epoch))

    def _shrinking(self, i: int) -> float:
        """ln a of this step."""
        group = self.optimizer.param_groups[i]
        if not group.get("scale_invariant"):
            return 0.0
        return math.log(shrinkage(self._planned(i), self.weight_decay, group["momentum"]))

    def _start_momentum(self, group: dict[str, Any], lr: float) -> None:
        """Momentum of a weight that comes from a * w: so w, growing by 1/a a step, stands for one that stood still."""
        a = shrinkage(lr, self.weight_decay, group["momentum"])
        for parameter in group["params"] if group["momentum"] and lr else ():
            state = self.optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = parameter.detach() * (-(1 - a) / (a * lr))


def shrinkage(lr: float, weight_decay: float, momentum: float = 0.0) -> float:
    """What a step with weight decay leaves of a weight without gradient, in the long run: 1 - lr * weight_decay without momentum.

    >>> shrinkage(0.1, 5e-4, 0.9)
    0.99949...

    Raises NormRewriteError where the momentum is too large for it: the weight would swing instead.
    """
    decay, largest = lr * weight_decay, (1 - math.sqrt(momentum)) ** 2
    if not decay < largest:
        raise NormRewriteError(
            f"lr * weight_decay is {decay:g}, and the schedule needs less than (1 - sqrt(momentum))^2 = {largest:.3g}. "
            "Lower one of the three."
        )
    # the discriminant in the terms that cancel: (1 + m - d)^2 - 4m would be rounded where it is small
    discriminant = (1 - momentum) ** 2 - decay * (2 * (1 + momentum) - decay)
    return min((1 + momentum - decay + math.sqrt(max(discriminant, 0.0))) / 2, 1.0)


def _require_undecayed(optimizer: Optimizer, weights: Sequence[InvariantWeight]) -> None:
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for weight in weights:
        group = groups.get(id(weight.parameter))
        if group is None:
            raise NormRewriteError(
                f"{weight.name}: {type(optimizer).__name__} doesn't step it. Make it from param_groups(model)."
            )
        if group.get("weight_decay"):
            raise NormRewriteError(
                f"{weight.name}: the optimiser decays it by {group['weight_decay']:g}, and the reference norms stand for that "
                "already. Make it from param_groups(model, weight_decay=0.0)."
            )


def _require_heavy_ball(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    if not isinstance(optimizer, SGD) or group["nesterov"] or group["dampening"]:
        raise NormRewriteError(
            f"the exponential schedule is a theorem on SGD with or without momentum, no Nesterov and no dampening; got "
            f"{type(optimizer).__name__}. Use StepSizeCorrection or NormSchedule."
        )
    if group.get("scale_invariant") and group["weight_decay"]:
        raise NormRewriteError(
            f"a scale-invariant group is decayed by {group['weight_decay']:g}, and the schedule stands for that already. "
            "Make the optimiser from param_groups(model, weight_decay=0.0)."
        )
