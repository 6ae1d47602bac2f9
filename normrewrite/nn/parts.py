"""Modules taken apart and put together again, without running a constructor."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normrewrite.errors import NormRewriteError

Model = TypeVar("Model", bound=nn.Module)


def assemble(
    cls: type[nn.Module],
    attributes: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter | None],
    buffers: Mapping[str, Tensor | None],
) -> Any:
    """A module of `cls` from its parts: a subclass's own constructor may take anything, and would draw new tensors."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    vars(module).update(attributes)
    module._parameters.update(parameters)
    module._buffers.update(buffers)
    return module


def learns(value: Tensor | None) -> bool:
    """Whether it is a tensor that an optimiser is to step."""
    return value is not None and value.requires_grad


INTERNAL = frozenset(vars(nn.Module()))


def attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module's own class, private ones too: not its tensors, submodules, hooks or training flag."""
    return {name: value for name, value in vars(module).items() if name not in INTERNAL}


def shallow(module: nn.Module) -> Any:
    """The same class, attributes and tensors in a new module."""
    new = assemble(type(module), attributes(module), module._parameters, module._buffers)
    new._modules.update(module._modules)
    return new


def deepcopy(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """A deep copy; process groups, which can't be copied, stay the same ones."""
    memo = {} if memo is None else memo
    groups = [getattr(module, "process_group", None) for module in model.modules()]
    memo.update({id(group): group for group in groups if group is not None})
    return copy.deepcopy(model, memo)


def keep_wide(module: nn.Module, names: list[str], apply: Callable[[], object]) -> Any:
    """Run a `.half()` or `.to(...)` on module, but leave the named buffers at fp32 or wider, to the bit."""
    before = {name: getattr(module, name) for name in names}
    apply()
    for name, old in before.items():
        new = getattr(module, name)
        if new is not None and torch.finfo(new.dtype).bits < 32:
            setattr(module, name, old.to(new.device))
    return module


def require_rank(module: Any, input: Tensor) -> None:
    """Refuses an input of another rank than the one at which the layer in front has what a norm was."""
    if module.rank is not None and input.dim() != module.rank:
        raise NormRewriteError(
            f"{module.site or type(module).__name__}: the norm that stood here is a part of the layer in front, for inputs "
            f"of {module.rank} dimensions, (N, C, *); got shape {tuple(input.shape)}. Give a batch, or convert to another target."
        )


def through_tail(module: Any, output: Tensor) -> Tensor:
    """What a norm applies to its own result: the children named in `module.tail`, in order."""
    for name in module.tail:
        output = module._modules[name](output)
    return output
