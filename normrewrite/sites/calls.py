"""Whether another module can answer a module's calls and hold its tensors: what stands between a call and forward.

>>> why_not_taken_over(pruned_norm)
'its weight is computed anew (by pruning, weight_norm or code of its own); make it a parameter first'
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn


def why_not_taken_over(module: nn.Module) -> str | None:
    """Why no norm can stand in for this one, whatever its forward computes; None where one can."""
    reason = why_called_otherwise(module)
    if reason is None and _takes_more(type(module).forward):
        reason = f"{type(module).__name__}.forward takes further arguments, which a norm has no place for"
    return reason or why_computed(module)


def why_called_otherwise(module: nn.Module) -> str | None:
    """Why a call is no call of its class's forward with hooks around it, or None."""
    name, own = type(module).__name__, type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    if "forward" in vars(module):
        return f"{name} has a forward of its own on the instance, which would not move along"
    if any(method in vars(cls) for cls in own for method in ("__call__", "_call_impl", "_wrapped_call_impl")):
        return f"{name} overrides __call__, so it may do more than its forward"
    return None


def why_computed(module: nn.Module) -> str | None:
    """Why a module's tensors are not those that it holds, by its own word: hooks and properties put others in their place."""
    tensors = module._parameters | module._buffers
    names = ("weight", "bias", "running_mean", "running_var")
    computed = [name for name in names if getattr(module, name, None) is not tensors.get(name)]
    if not computed:
        return None
    return f"its {computed[0]} is computed anew (by pruning, weight_norm or code of its own); make it a parameter first"


@lru_cache(maxsize=4096)
def _takes_more(forward: Callable[..., Any]) -> bool:
    """Whether forward has a parameter beside self and the input."""
    try:
        return len(inspect.signature(forward).parameters) != 2
    except (TypeError, ValueError):  # a forward without a readable signature
        return True
