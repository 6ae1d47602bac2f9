"""How the project's modules look to torch.fx: one node each, as torch.nn's own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy


def as_one_node(module: nn.Module, input: Proxy) -> Tensor:
    """Record `module(input)` as one call_module node of the trace that `input` belongs to.

    torch.fx steps into every module outside torch.nn, and would bake the training flag in. This keeps the module whole.
    """
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), {})  # type: ignore[no-any-return]


def as_one_function(function: Callable[..., Tensor], module: nn.Module, *arguments: Any) -> Tensor:
    """Record `function(module, *arguments)` as one call_function node; the module is read as an attribute of the root."""
    tracer: Any = next(argument for argument in arguments if isinstance(argument, Proxy)).tracer
    attribute = tracer.create_proxy("get_attr", tracer.path_of_module(module), (), {})
    return tracer.create_proxy("call_function", function, (attribute, *arguments), {})  # type: ignore[no-any-return]
