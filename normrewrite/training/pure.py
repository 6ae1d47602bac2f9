"""What a training optimises: the model's parameters, or for `fp16-pure` half ones with a loss scale.

>>> with weights(model, recipe, machine) as found:
...     optimizer = found.optimised(optimizer)
...     found.scaled(loss).backward()
...     clip_grad_norm_(found.gradients(), 1.0); optimizer.step(); found.settle(finite=True)

Parameters, activations, norms and their gradients are half; normrewrite.arithmetic says how sums are taken. The loss is taken in
fp32 and scaled, so that gradients don't sink below half's smallest number. The optimiser's arithmetic and state are fp32, but
it starts each step from the half parameter, and what it writes is rounded to half: no fp32 copy of a parameter lives from one
step to the next, and an update below half the step between two half numbers is lost. That is what pure means.

It is a mode of a training: afterwards the parameters are the same objects in the dtype they came with, holding half numbers;
tensors that training has not changed, frozen ones among them, have the bits that they had.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normrewrite import sites
from normrewrite.arithmetic import half_arithmetic
from normrewrite.backends import watch
from normrewrite.errors import NormRewriteError
from normrewrite.nn.batch import FrozenBatchNorm
from normrewrite.nn.weights import WeightNorm
from normrewrite.training.recipe import Recipe

_GROW_AFTER, _LARGEST = 2000, 2.0**24


class Weights:
    """The model's own parameters, as they are."""

    saved: tuple[Any, ...] = ()  # what a checkpoint has to hold

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def optimised(self, optimizer: Optimizer) -> Optimizer:
        """The optimiser, before its first step, on what it is to work on."""
        return optimizer

    def scaled(self, loss: Tensor) -> Tensor:
        """What backward starts from."""
        return loss

    def gradients(self) -> list[nn.Parameter]:
        """The parameters that the optimiser sees, with this step's gradients."""
        return list(self.model.parameters())

    def settle(self, finite: bool) -> None:
        """After a step that was taken, or left out as gradients were not finite."""

    def wide(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state_dict of the training as one of the model that came."""
        return dict(state)

    def notes(self) -> list[str]:
        """What a result is to say."""
        return []


@contextmanager
def weights(model: nn.Module, recipe: Recipe, machine: Any) -> Iterator[Weights]:
    """What the recipe's precision optimises; inside, the model is in that precision."""
    if recipe.precision != "fp16-pure":
        yield Weights(model)
        return
    if machine.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise NormRewriteError(
            f"--precision fp16-pure works on one process or by DDP, not by {machine.distributed_type.value}: it makes its own "
            "copies of what the optimiser sees. Launch it so, or use --precision fp16."
        )
    half = HalfWeights(model.to(machine.device))
    try:
        with half_arithmetic(recipe.accumulator):
            yield half
    finally:
        half.restore()


class HalfWeights(Weights):
    """Parameters, and buffers that activations meet, in half until `restore`; inputs are cast on their way in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.scale = LossScale()
        self.saved = (self.scale,)
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # half, and as the optimiser sees it
        self.before = {name: tensor.data for name, tensor in _tensors(model)}
        self.elsewhere: dict[str, None] = {}
        self.hooks = [model.register_forward_pre_hook(_cast_inputs, with_kwargs=True), *_noted(model, self.elsewhere)]
        for _, tensor in _tensors(model):
            tensor.data = tensor.data.half()

    def optimised(self, optimizer: Optimizer) -> Optimizer:
        for group in optimizer.param_groups:
            group["params"] = [self._shadow(parameter) for parameter in group["params"]]
        return optimizer

    def _shadow(self, parameter: nn.Parameter) -> nn.Parameter:
        self.pairs.append((parameter, nn.Parameter(parameter.detach().float())))
        return self.pairs[-1][1]

    def scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale.value

    @torch.no_grad()
    def gradients(self) -> list[nn.Parameter]:
        for half, seen in self.pairs:
            seen.copy_(half)
            seen.grad = None if half.grad is None else half.grad.float() / self.scale.value
        return [seen for _, seen in self.pairs]

    @torch.no_grad()
    def settle(self, finite: bool) -> None:
        for half, seen in self.pairs:
            half.grad = None
            if finite:
                half.copy_(seen)
        self.scale.update(finite)

    def notes(self) -> list[str]:
        """What was not computed in half arithmetic."""
        lines = []
        if self.elsewhere:
            lines.append(f"norms of code of their own, not in half arithmetic: {', '.join(self.elsewhere)}")
        lengths = sum(isinstance(module, WeightNorm) for module in self.model.modules())
        if lengths:
            lines.append(f"{lengths} weight norms, computed in fp32 and rounded once")
        return lines

    def wide(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._wide(name, value) for name, value in state.items()}

    def _wide(self, name: str, value: Tensor) -> Tensor:
        if name not in self.before:
            return value
        before = self.before[name].to(value.device)
        return before if torch.equal(value.half(), before.half()) else value.to(before.dtype)

    def restore(self) -> None:
        """The model in the dtypes that it came with."""
        for hook in self.hooks:
            hook.remove()
        for name, tensor in list(_tensors(self.model)):
            tensor.data = self._wide(name, tensor.data)
            tensor.grad = None


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Floating parameters and buffers, by every name: all but running statistics and lengths, which stay wide."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (module._parameters | module._buffers).items():
            fixed = name in module._buffers and (name.startswith("running_") or isinstance(module, WeightNorm))
            if tensor is not None and tensor.is_floating_point() and not fixed:
                yield f"{prefix}.{name}" if prefix else name, tensor


def _cast_inputs(model: nn.Module, arguments: Any, options: Any) -> Any:
    """Float inputs in the dtype of the parameters: half, or wide in an averaged copy of the model."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, arguments)), {name: cast(value) for name, value in options.items()}


def _noted(model: nn.Module, elsewhere: dict[str, None]) -> Iterator[Any]:
    """Hooks that write down the norms which run in training and tell nothing of what they measure."""
    for site in sites.find(model, lambda module: sites.is_norm(module) or sites.is_sample_norm(module)):
        before: list[int] = []

        def start(module: nn.Module, _: object, before: list[int] = before) -> None:
            before.append(watch.told())

        def end(module: nn.Module, *_: object, before: list[int] = before, name: str = site.label) -> None:
            if watch.told() == before.pop() and module.training and not isinstance(module, FrozenBatchNorm):
                elsewhere[name] = None

        yield site.module.register_forward_pre_hook(start)
        yield site.module.register_forward_hook(end)


@dataclass
class LossScale:
    """Halved when gradients overflow, doubled after 2000 steps without: as torch.amp.GradScaler, which refuses half gradients."""

    value: float = 2.0**16
    steps: int = 0

    def update(self, finite: bool) -> None:
        self.steps = self.steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.steps % _GROW_AFTER == 0:
            self.value = min(2 * self.value, _LARGEST)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.steps = state["value"], state["steps"]
