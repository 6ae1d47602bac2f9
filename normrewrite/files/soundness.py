"""Whether a module out of a pickle is put together as its class puts modules together: a file may set any attribute.

>>> fault(nn.ReLU()) is None
True
"""

import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from normrewrite.nn.origin import Origin
from normrewrite.outside import CODE, endless, is_name

_TABLES = {"_parameters": Tensor, "_buffers": Tensor, "_modules": nn.Module}
_OWN = {"training": bool, "_non_persistent_buffers_set": set}
_DEEPEST = 200
_HELD = 3_000_000  # things in all attributes, counted at each place where they stand
_PLACES = 100_000  # where modules may stand in a network; one that is shared stands at several
# Methods of every module that nobody calls on a part of a network: it may keep something else under their names, as YOLO's do.
_UNCALLED = frozenset(
    ("type", "half", "float", "double", "bfloat16", "cuda", "ipu", "xpu", "mtia", "share_memory", "compile")
)


def check(model: nn.Module) -> str | None:
    """What is wrong with the first damaged module of a network, in words; None where all are sound."""
    waiting, seen, places = [("", model, 0)], dict[int, nn.Module](), 0
    while waiting:
        name, module, depth = waiting.pop()
        places += 1
        wrong = None if id(module) in seen else fault(module)
        if depth > _DEEPEST or places > _PLACES:
            wrong = "is nested without end"
        if wrong is not None:
            return f"{name or type(module).__name__} {wrong}"
        seen[id(module)] = module
        parts = module._modules.items()
        waiting += [(f"{name}.{key}" if name else key, part, depth + 1) for key, part in parts if part is not None]
    held = [[_settings(value) for value in vars(module).values()] for module in seen.values()]
    return f"{type(model).__name__} has attributes nested without end" if endless(held, _HELD) else None


def fault(module: nn.Module) -> str | None:
    """What is wrong with one module, its parts aside; None where it is sound."""
    attributes = vars(module)
    tables = _TABLES | ({"tensors": Tensor} if isinstance(module, Origin) else {})
    for table, kind in tables.items():
        if not _holds(attributes.get(table), kind):
            return f"has no {table} as modules have"
        if shadowed := attributes.keys() & attributes[table].keys():
            return f"has two things called {min(shadowed)}"
    names = [*attributes, *(name for table in tables for name in attributes[table])]
    if unfit := [name for name in names if not is_name(name)]:
        return f"has a part called {unfit[0]!r}: {CODE}"
    if "" in names:
        return "has a part without a name"
    for name, value in attributes.items():
        if name.endswith("_hooks") and not (isinstance(value, dict) and all(map(callable, value.values()))):
            return f"has no {name} as modules have"
        if name not in _UNCALLED and callable(getattr(type(module), name, None)) and not callable(value):
            return f"has {name} of type {type(value).__name__} in place of a method"
    if missing := [name for name in _constants(type(module)) if not hasattr(module, name)]:
        return f"has no {missing[0]}"
    for name, hint in (_hints(type(module)) | _OWN).items():
        if name in attributes and not _fits(attributes[name], hint):
            return f"has {name} of type {type(attributes[name]).__name__}, which its class has not"
    return None


def _holds(table: object, kind: type) -> bool:
    return isinstance(table, dict) and all(
        isinstance(name, str) and isinstance(value, kind | None) for name, value in table.items()
    )


def _settings(value: object) -> object:
    """What a record of transformers' holds; any other value as it is."""
    return (
        vars(value)
        if type(value).__module__.startswith("transformers.") and not isinstance(value, nn.Module)
        else value
    )


def _constants(cls: type) -> list[str]:
    """What layers of torch.nn always have."""
    return list(getattr(cls, "__constants__", ())) if cls.__module__.startswith("torch.nn.modules.") else []


def _hints(cls: type) -> dict[str, Any]:
    """The types that a class declares for its attributes, of torch's and ours: others declare what they don't keep to."""
    if not cls.__module__.startswith(("torch.nn.", "normrewrite.")):
        return {}
    try:
        return get_type_hints(cls)
    except (NameError, TypeError, AttributeError):
        return {}


def _fits(value: object, hint: Any) -> bool:
    """Whether a value has a declared type, as far as that is plain; what is not plain fits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(each, arguments[0]) for each in value)
    if hint in (int, float) and isinstance(value, Tensor):  # some compute sizes so
        return value.dim() == 0
    if hint is float:
        return isinstance(value, int | float)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)
