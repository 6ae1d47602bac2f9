"""A norm as one kernel in PTX, for plugins that live inside an engine: no library and no Python where it runs.

>>> one = kernel(op, given, (8, 1, 1024, 1), "float16", 89)
>>> one.name, one.threads, one.rows, one.groups            # of x, weight, bias, samples (int32), y; grid in ahead.Kernel

One launch keeps a row in registers, so a row is 8192 elements at most, 4096 for `linf`, `topk` and `range`. n is compiled in, and
so is C(n); the batch stays open.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from normrewrite.errors import NormRewriteError
from normrewrite.plugins.spec import Op, Values

PTX = 87  # the version asked for, 8.7: the least that knows sm_120, so that older drivers take it
_ENTRY = re.compile(r"(\.entry \w+\()(.*?)(\n\))", re.DOTALL)
_PARAMETERS = 5  # x, weight, bias, samples, y


@dataclass(frozen=True)
class Kernel:
    """Its grid is ceil(samples / rows) * groups programs of `threads` threads, with `shared` bytes of shared memory."""

    name: str
    ptx: str
    threads: int
    shared: int
    rows: int
    groups: int


def kernel(op: Op, values: Values, shape: Sequence[int], dtype: str, capability: int) -> Kernel:
    """The operator with these attributes on x of (B, G, K, S); B is what the kernel is tuned for, and may be another.

    Raises NormRewriteError where one launch can't do it, by name.
    """
    from normrewrite.backends.triton.ahead import compiled, once

    x = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")
    parameter = torch.empty(x.shape[1:3], dtype=torch.float32 if op.int8 else x.dtype, device="meta")
    try:
        launch = once(x, parameter, parameter, op.row(values), values["eps"], bool(values["centred"]))
    except NormRewriteError as error:
        raise NormRewriteError(f"{op.name} ahead of time: {error}") from error
    made = compiled(launch, capability, PTX)
    metadata = made.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise NormRewriteError(
            f"{op.name} ahead of time: the kernel wants scratch memory, which an engine can't give it."
        )
    numbers = launch.arguments
    ptx = without_scratch(made.asm["ptx"])
    return Kernel(metadata.name, ptx, 32 * launch.warps, metadata.shared, numbers["ROWS"], numbers["GROUPS"])


def without_scratch(ptx: str) -> str:
    """The kernel without the two pointers to scratch memory that Triton appends, and that nothing may read."""
    entry = _ENTRY.search(ptx)
    parameters = entry[2].split(",") if entry else []
    hidden = [re.findall(r"\w+_param_\d+", text)[0] for text in parameters[_PARAMETERS:]]
    if entry is None or len(hidden) != 2 or any(re.search(rf"\[{name}\]", ptx) for name in hidden):
        raise NormRewriteError(
            f"this Triton passes other hidden arguments ({len(hidden)}) than is known; 3.6 passes two."
        )
    remaining = ",".join(parameters[:_PARAMETERS])
    return ptx[: entry.start(2)] + remaining + ptx[entry.end(2) :]
