"""Modules taken apart and put together again, without running a constructor."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normrewrite.errors import NormRewriteError, first_line

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


class _Computed(TorchFunctionMode):
    """Tensors that were computed by a network (features that it keeps as attributes) are copied without their graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone())


def require_module(model: object) -> None:
    """Raises where a function is given something else for its model."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise NormRewriteError(
            f"the model is a {type(model).__name__}; needed is a torch.nn.Module in Python. Of a state_dict or compiled code, "
            "make the module and load the weights into it."
        )


def deepcopy(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """A deep copy; process groups, which can't be copied, stay the same ones, and what was computed leaves its graph.

    Raises NormRewriteError where an attribute can't be copied: a lock, a generator, an open file.
    """
    memo = {} if memo is None else memo
    groups = [getattr(module, "process_group", None) for module in model.modules()]
    memo.update({id(group): group for group in groups if group is not None})
    try:
        with _Computed():
            return copy.deepcopy(model, memo)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a foreign __deepcopy__ raises
        _refuse(model, error)


def _refuse(model: nn.Module, error: Exception) -> NoReturn:
    where = next(_uncopied(model), type(model).__name__)
    raise NormRewriteError(
        f"{where} can't be copied ({first_line(error)}), and so neither can the model. Take it off, or work in place: convert_, "
        "and the other functions with an underscore at their end, need no copy."
    ) from error


def _uncopied(model: nn.Module) -> Iterator[str]:
    """The attributes, and the modules with a __deepcopy__ of their own, that can't be copied; innermost first."""
    for name, module in reversed(list(model.named_modules())):
        own = {key: value for key, value in vars(module).items() if key != "_modules"}
        place = name or type(model).__name__
        yield from (f"{place}.{key}" for key, value in own.items() if not _copies(value))
        if hasattr(module, "__deepcopy__") and not _copies(module):
            yield f"{name or 'the model itself'} ({type(module).__name__})"


def _copies(value: object) -> bool:
    try:
        with _Computed():
            copy.deepcopy(value)
    except Exception:
        return False
    return True


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
