"""Compiles kernels ahead of time and tells of them as JSON; a process of its own, as the tests' interprets all kernels.

python -m tests.backends.triton.worker NAME:CAPABILITY ...         # of CASES or AT_THE_EDGE
python -m tests.backends.triton.worker every:90                   # minutes: all that spills, of all rows, dtypes, layouts, scopes
"""

import itertools
import json
import re
import sys
from typing import Any

import torch

from normrewrite.backends.triton import launch
from normrewrite.backends.triton.ahead import Launch, compiled, parameter_types, recorded
from normrewrite.norms import metric
from tests.ptxas import assembled

Told = dict[str, Any]
_LAST: Told = {"shape": (64, 256, 56, 56), "dtype": torch.float16, "memory_format": torch.channels_last, "relu": True}
_FIRST: Told = _LAST | {"memory_format": torch.contiguous_format, "relu": False}
_ROWS: Told = _FIRST | {"shape": (8192, 1, 1024, 1), "sample": True}
_GROUPS: Told = _FIRST | {"shape": (64, 32, 8, 3136), "sample": True}
CASES: dict[str, Told] = {
    "l1": _LAST | {"spec": "l1"},
    "l1 add": _LAST | {"spec": "l1", "residual": True},
    "linf": _LAST | {"spec": "linf"},
    "topk": _FIRST | {"spec": "topk:10", "dtype": torch.bfloat16},
    "topk of many": _LAST | {"spec": "topk:128"},
    "l2": _FIRST | {"spec": "l2", "dtype": torch.float32},
    "groups": _GROUPS | {"spec": "range"},
    "rows": _ROWS | {"spec": "l1"},
    "long rows": _ROWS | {"spec": "l1", "shape": (64, 1, 8192, 1)},
    "rows of few": _ROWS | {"spec": "topk:10", "shape": (64, 1, 4096, 1)},
}
AT_THE_EDGE: dict[str, Told] = {
    "too few registers": _ROWS | {"spec": "topk:10", "shape": (64, 1, 4096, 1), "registers": 32},
    "narrow rows": _ROWS | {"spec": "l1", "shape": (64, 1, 4098, 1)},
    "long l2 rows": _ROWS | {"spec": "l2", "shape": (64, 1, 8192, 1)},
}


SPECS = ("l1", "l2", "linf", "range", "topk:10")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def launches(
    spec: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    relu: bool,
    residual: bool = False,
    sample: bool = False,
    registers: int | None = None,
) -> list[Launch]:
    """What a forward and a backward would run; registers: what a thread may take of them, where it is not as chosen."""
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    weight = torch.empty(shape[1:3] if sample else shape[1], device="meta")
    told = (metric(spec), "exact", 1e-5)
    added = torch.empty_like(x) if residual else None
    with recorded() as found:
        _, *kept = launch.forward(x, added, weight, weight, *told, sample=sample, relu=relu)
        launch.backward(x, x, weight, weight, *kept, *told, sample=sample, relu=relu, residual=residual)
    return found if registers is None else [each._replace(registers=registers) for each in found]


def told_of(launch: Launch, capability: int) -> Told:
    """What the compiler and its code tell of a kernel."""
    kernel = compiled(launch, capability)
    ptx, ir = kernel.asm["ptx"], kernel.asm["ttir"]
    report = _assembled(ptx, capability)
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", report).groups()
    )  # type: ignore[union-attr]
    return {
        "kernel": launch.kernel.__name__,
        "capability": capability,
        "ptx": re.search(r"\.version (\S+)", ptx)[1],  # type: ignore[index]
        "target": re.search(r"\.target (\S+)", ptx)[1],  # type: ignore[index]
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),  # type: ignore[index]
        "spilled": stack + stores + loads,
        "atomics": len(re.findall(r"^\s*(atom|red)\.", ptx, re.MULTILINE)),
        "wide loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "wide stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "narrow loads": len(re.findall(r"ld\.global\S*\.b16", ptx)),
        "offsets of elements": sorted(set(re.findall(r"tt\.addptr .*ptr<(?:f16|bf16|i8)>>, tensor<\S*(i\d+)>", ir))),
        "scratch": kernel.metadata.global_scratch_size + kernel.metadata.profile_scratch_size,
    }


def _assembled(ptx: str, capability: int) -> str:
    """What ptxas reports; raises where it refuses."""
    done = assembled(ptx, capability)
    done.check_returncode()
    return done.stderr


def every() -> dict[Any, Launch]:
    """Distinct kernels of every row, dtype, layout, scope and form, in sizes that 16 bytes divide and in odd ones."""
    batches = ((2, 24, 9, 11), (256, 256, 56, 56))
    samples = ((64, 1, 200, 1), (8192, 1, 1024, 1), (64, 1, 4096, 1), (64, 32, 8, 3136), (8, 64, 1, 49), (16, 4, 6, 35))
    forms = ((False, False), (True, False), (True, True))  # relu, residual
    layouts = (torch.contiguous_format, torch.channels_last)
    product = [
        *itertools.product(SPECS, batches, DTYPES, layouts, forms, (False,)),
        *itertools.product(SPECS, samples, DTYPES, layouts[:1], forms, (True,)),
    ]
    found = {}
    for spec, shape, dtype, layout, form, sample in product:
        if not (sample and shape[3] == 1 and form[0]):  # rows in registers have no ReLU
            for each in launches(spec, shape, dtype, layout, *form, sample):
                types = parameter_types(each)
                constants = [(name, str(each.arguments[name])) for name in each.kernel.arg_names if name not in types]
                found.setdefault((each.kernel.__name__, *types.items(), *constants, each.warps), each)
    return found


def spills(capability: int) -> Told:
    """How many kernels there are, and what is told of those that spill."""
    told = [told_of(each, capability) for each in every().values()]
    return {"kernels": len(told), "spilling": [each for each in told if each["spilled"]]}


def main() -> None:
    found: dict[str, Any] = {}
    for asked in sys.argv[1:]:
        name, _, capability = asked.partition(":")
        if name == "every":
            found[asked] = spills(int(capability))
            continue
        found[asked] = [told_of(each, int(capability)) for each in launches(**(CASES | AT_THE_EDGE)[name])]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
