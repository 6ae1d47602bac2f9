"""How the project's modules look to torch.fx: one node each, as torch.nn's own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy


class OneNode(nn.Module):
    """A module that torch.fx records as one call_module node, whole, with its hooks still to run.

    torch.fx steps into every module outside torch.nn: it would bake the training flag in, and run hooks on the trace as well as
    in the module that the trace calls.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        traced = next((value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)), None)
        return super().__call__(*args, **kwargs) if traced is None else _as_one_node(self, traced.tracer, args, kwargs)


def _as_one_node(module: nn.Module, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call as the tracer takes that of a leaf: some note there where each module stands."""

    def leaf(*args: Any, **kwargs: Any) -> Any:
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)

    return tracer.call_module(module, leaf, args, kwargs)


def as_one_function(function: Callable[..., Tensor], module: nn.Module, *arguments: Any) -> Tensor:
    """Record `function(module, *arguments)` as one call_function node; the module is read as an attribute of the root."""
    tracer: Any = next(argument for argument in arguments if isinstance(argument, Proxy)).tracer
    attribute = tracer.create_proxy("get_attr", tracer.path_of_module(module), (), {})
    return tracer.create_proxy("call_function", function, (attribute, *arguments), {})  # type: ignore[no-any-return]
