"""The kernels that the library of plugins in C++ holds: compiled beforehand, few for all sizes, and a table of them.

>>> made = tables(recorded_kernels(["float16"], ["NormRewriteMean"]), [80], compiled_to_ptx)
>>> write(made, Path("build"))                             # build/kernels.bin, build/tables.cpp, for plugins/cpp

python -m normrewrite.plugins.embedded FOLDER --dtypes float32,float16 --capabilities 80,89

The launches are those of launch.py, recorded for one tensor of each kind that fixed.py's sizes tell apart; the C++ side cuts a
tensor as fixed.py does, gives the arguments the names that they have there, and finds the kernel by its constants. PTX for the
least capability serves every later GPU, by its driver's compiler; machine code for the others starts without that.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from triton import knobs

from normrewrite.backends.triton import forward
from normrewrite.backends.triton import launch as launching
from normrewrite.backends.triton import resident as resident
from normrewrite.backends.triton.ahead import Launch, compiled, parameter_types, recorded
from normrewrite.backends.triton.fixed import Fixed, using
from normrewrite.backends.triton.geometry import why_not
from normrewrite.errors import NormRewriteError
from normrewrite.norms import METRICS, Metric, metric
from normrewrite.plugins.compute import strides
from normrewrite.plugins.spec import DTYPES, INT8, NAMESPACE, OPS, VERSION, Op

FIXED = Fixed()
EVERY = (*DTYPES, INT8[0])
LEAST = 80  # compute capability of the PTX
PTX = 80  # its version, 8.0: what drivers of CUDA 12.0 take
_KEPT = ("mean_ptr", "spread_ptr", "indices_ptr", "signs_ptr")  # what row_forward writes for a backward


# --- which kernels ---------------------------------------------------------------------------------------------------


def launches(row: Metric, eps: float, centred: bool, x: Tensor) -> list[Launch]:
    """What the library launches for a norm of x: (B, G, K, S), on the meta device, linear or channels-last."""
    weight = torch.empty(x.shape[1:3], dtype=torch.float32 if x.dtype is torch.int8 else x.dtype, device=x.device)
    with using(FIXED), recorded() as launched:
        launching.forward(x, None, weight, weight, row, "exact", eps, sample=True, centred=centred)
    return [_y_alone(each) for each in launched]


def _y_alone(launch: Launch) -> Launch:
    """Rows in registers keep nothing."""
    if launch.kernel.__name__ != "row_forward":
        return launch
    return launch._replace(arguments=launch.arguments | dict.fromkeys(_KEPT))


@cache
def recorded_kernels(dtypes: tuple[str, ...], operators: tuple[str, ...]) -> dict[str, Launch]:
    """By its key, one launch of every kernel that norms of these dtypes by these operators need, whatever their sizes."""
    by_key: dict[str, Launch] = {}
    for x in (x for dtype in dtypes for x in _samples(dtype)):
        for row in (row for name in operators for row in _rows(OPS[name]) if _dtype(x) in OPS[name].dtypes):
            for centred in (True, False) if _fits(x, row) else ():
                by_key |= {key(each): each for each in launches(row, 1e-5, centred, x)}
    return by_key


def _fits(x: Tensor, row: Metric) -> bool:
    return (row.count or 1) <= x.shape[2] * x.shape[3] and why_not(x.shape, row, True) is None


def _rows(op: Op) -> list[Metric]:
    """Rows that tell all of an operator's kernels apart."""
    if op.base.family == "top":
        return [
            metric(f"{name}:{k}" if METRICS[name].countable else name) for name in op.metrics for k in FIXED.extremes
        ]
    return [METRICS[name] for name in op.metrics]


def _samples(dtype: str) -> Iterator[Tensor]:
    """Tensors of every width, of whole accesses and of others: linear, channels-last, and rows."""
    empty = partial(torch.empty_strided, dtype=getattr(torch, dtype), device="meta")
    for shape in ((2, 2, FIXED.extremes[-1], run - short) for run in FIXED.runs for short in (0, 1)):
        yield empty(shape, strides(shape))
    for shape in ((2, side - short, 1, FIXED.extremes[-1]) for side in FIXED.sides for short in (0, 1)):
        # HWC8 pads channels, which the kernels don't
        if dtype == "float32" or (dtype == "float16" and shape[1] % 8 == 0):
            yield empty(shape, strides(shape, multiple=1))
    for shape in ((2, 2, width - short, 1) for width in FIXED.widths for short in (0, 1)):
        yield empty(shape, strides(shape))


def key(launch: Launch) -> str:
    """What tells a kernel from others: `apply float16 SAMPLE=1 RELU=0 LANES=8 ...`, constants in the kernel's own order."""
    x = launch.arguments.get("x_ptr")
    return " ".join([launch.kernel.__name__, "-" if x is None else _dtype(x), *_constants(launch)])


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _constants(launch: Launch) -> list[str]:
    values = [(p.name, launch.arguments.get(p.name, p.default)) for p in launch.kernel.params if p.is_constexpr]
    return [f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in values]


# --- compiled, and written -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. arguments: `x_ptr:p lanes:i eps:f`, in its order; codes: by capability, PTX for the least."""

    key: str
    entry: str
    threads: int
    shared: int
    arguments: str
    codes: dict[int, bytes]


def arguments(launch: Launch) -> str:
    """Names of what the kernel is given at run time, and p(ointer), i(nt32), l(ong) or f(loat32) of each."""
    kinds = {"i32": "i", "i64": "l", "fp32": "f"}
    return " ".join(f"{name}:{kinds.get(kind, 'p')}" for name, kind in parameter_types(launch).items())


def compiled_kernel(name: str, launch: Launch, capabilities: Sequence[int]) -> Kernel:
    """Compiled for these GPUs. Raises NormRewriteError where the compiler asks for memory that nobody would give it."""
    codes: dict[int, bytes] = {}
    for capability in capabilities:
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True  # two fifths of the text
            made = compiled(launch, capability, PTX if capability == LEAST else None)
        metadata = made.metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NormRewriteError(f"{name}: the compiled kernel wants scratch memory, which nothing gives it.")
        codes[capability] = made.asm["ptx"].encode() + b"\0" if capability == LEAST else made.asm["cubin"]
    return Kernel(name, metadata.name, 32 * launch.warps, metadata.shared, arguments(launch), codes)


def write(kernels: Iterable[Kernel], folder: Path) -> None:
    """kernels.bin and tables.cpp, of which plugins/cpp/CMakeLists.txt makes a library."""
    kernels = sorted(kernels, key=lambda kernel: kernel.key)
    blob, lines = bytearray(), []
    for kernel in kernels:
        codes = []
        for capability, code in sorted(kernel.codes.items()):
            blob += b"\0" * (-len(blob) % 64)
            codes.append(f"{{{capability}, {_bool(capability == LEAST)}, {len(blob)}}}")
            blob += code
        texts = ", ".join(json.dumps(text) for text in (kernel.key, kernel.entry, kernel.arguments))
        lines.append(f"    {{{texts}, {kernel.threads}, {kernel.shared}, {{{', '.join(codes)}}}}},")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.bin").write_bytes(blob)
    (folder / "tables.cpp").write_text(_TABLES.format(kernels="\n".join(lines), **_constants_of_tables()))


_TABLES = """// Made by normrewrite.plugins.embedded: operators and sizes as Python defines them, and the compiled kernels.
#include "tables.h"

namespace normrewrite {{
char const* const NAMESPACE = "{namespace}";
char const* const VERSION = "{version}";
std::vector<Operator> const OPERATORS = {{
{operators}
}};
std::map<std::string, std::vector<std::string>> const CONSTANTS = {{
{constants}
}};
Sizes const SIZES = {{{sizes}}};
std::vector<Kernel> const KERNELS = {{
{kernels}
}};
}}  // namespace normrewrite
"""


def _constants_of_tables() -> dict[str, str]:
    kernels = (forward.moments, forward.deviations, forward.settle, forward.select, forward.apply, resident.row_forward)
    named = [(each.__name__, [p.name for p in each.params if p.is_constexpr]) for each in kernels]
    sizes = [FIXED.sides, FIXED.runs, FIXED.widths, FIXED.extremes, FIXED.searched_parts]
    numbers = [
        FIXED.part,
        FIXED.members,
        FIXED.tile,
        FIXED.repeat,
        FIXED.row_width,
        FIXED.sparse_width,
        FIXED.largest_k,
    ]
    return {
        "namespace": NAMESPACE,
        "version": VERSION,
        "operators": "\n".join(map(_operator, OPS.values())),
        "constants": "\n".join(
            f"    {{{json.dumps(name)}, {_list(json.dumps(p) for p in of)}}}," for name, of in named
        ),
        "sizes": ", ".join([*map(_list, sizes), *map(str, numbers)]),
    }


def _operator(op: Op) -> str:
    attributes = ",\n".join(f"        {_attribute(a)}" for a in op.attributes)
    return f'    {{"{op.name}", "{op.base.family}", {_bool(op.int8)}, {{\n{attributes}}}}},'


def _attribute(attribute: Any) -> str:
    bounds, default = attribute.range, attribute.default
    limits = [
        str(limit) if abs(limit) < float("inf") else f"{'-' * (limit < 0)}INFINITY"
        for limit in (bounds.least, bounds.most)
    ]
    parts = [
        json.dumps(attribute.name),
        _bool(attribute.kind == "int"),
        *limits,
        _bool(bounds.above),
        json.dumps(bounds.words),
    ]
    values = default if attribute.kind == "floats" else [default]
    return f"{{{', '.join(parts)}, {_list(repr(value) for value in values)}}}"


def _list(values: Iterable[Any]) -> str:
    return f"{{{', '.join(map(str, values))}}}"


def _bool(value: bool) -> str:
    return "true" if value else "false"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--dtypes", default=",".join(EVERY), show_default=True)
@click.option("--operators", default="all", show_default=True)
@click.option("--capabilities", default=str(LEAST), show_default=True, help=f"{LEAST} is PTX, others are machine code.")
@click.option("--processes", default=2, show_default=True)
def main(folder: Path, dtypes: str, operators: str, capabilities: str, processes: int) -> None:
    """Compile the kernels of the C++ library and write kernels.bin and tables.cpp into FOLDER."""
    asked = _asked("--dtypes", dtypes, EVERY), _asked("--operators", operators, list(OPS))
    numbers = [int(number) for number in _asked("--capabilities", capabilities, [str(n) for n in range(LEAST, 130)])]
    with ProcessPoolExecutor(processes) as pool:
        made = list(pool.map(partial(_compiled, *asked, numbers), recorded_kernels(*asked), chunksize=8))
    write(made, folder)
    click.echo(f"{len(made)} kernels for {', '.join(asked[1])} in {', '.join(asked[0])}")


def _compiled(dtypes: tuple[str, ...], operators: tuple[str, ...], capabilities: Sequence[int], name: str) -> Kernel:
    """In a process of a pool, which can be told of a kernel by its key alone."""
    return compiled_kernel(name, recorded_kernels(dtypes, operators)[name], capabilities)


def _asked(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    if text == "all":
        return tuple(known)
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is unknown. Known: {', '.join(known)}.", param_hint=option)
    return names


if __name__ == "__main__":
    main()
