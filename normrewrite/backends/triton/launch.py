"""Triton, from Python: a norm forward and backward, as the operators of torch_batch.py and torch_sample.py ask for it.

>>> y, *measured, live = forward(x, None, weight, bias, metric("l1"), "exact", 1e-5, relu=True)
>>> dx, dweight, dbias, _ = backward(g, x, weight, bias, *measured, live, metric("l1"), "exact", 1e-5, relu=True)

x: (N, C, *), statistics by channel, or (B, G, K, S), statistics by (B, G), with sample=True. Bytes that they move are counted in
docs/kernels.md.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from normrewrite.backends import measuring
from normrewrite.backends.families import laid_out_as, taken, wide
from normrewrite.backends.triton import backward as back
from normrewrite.backends.triton import forward as fore
from normrewrite.backends.triton import geometry as shapes
from normrewrite.backends.triton import resident as resident
from normrewrite.backends.triton.geometry import Cut, Geometry, Tuning
from normrewrite.norms import Gain, Metric

TUNING = Tuning()
Measured = tuple[Tensor, Tensor, Tensor, Tensor]  # mean, C * S, indices and signs of a sparse family


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Metric,
    gain: Gain,
    eps: float,
    *,
    sample: bool = False,
    centred: bool = True,
    relu: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """relu(norm(x) + residual), as x; what was measured; and bits of what ReLU let through, where there is a residual.

    out: memory for the first where it has x's dtype and strides; it is left alone where they don't fit the kernels.
    """
    like, x = x, shapes.laid_out(x, sample)
    norm = _Norm(x, row, gain, eps, sample, centred)
    if out is None or out.stride() != x.stride():
        out = torch.empty_like(x)
    live = x.new_empty(norm.geometry.bits if relu and residual is not None else 0, dtype=torch.uint8)
    if norm.resident and not relu:
        mean, spread, indices, signs = norm.rows(x, weight, bias, out)
    else:
        mean, spread, indices, signs = norm.measure(x)
        residual = None if residual is None else laid_out_as(residual, x)
        bits = live if live.numel() else None
        _apply(x, residual, weight, bias, mean, spread, eps, norm.geometry, relu, bits, out)
    shape = like.shape[:2] if sample else like.shape[1:2]
    return laid_out_as(out, like), mean.view(shape), spread.view(shape), indices, signs, live


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    indices: Tensor,
    signs: Tensor,
    live: Tensor | None,
    row: Metric,
    gain: Gain,
    eps: float,
    *,
    sample: bool = False,
    centred: bool = True,
    relu: bool = False,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (as x), dweight and dbias (channels,), fp32, and the residual's gradient (as x; empty where there is none)."""
    like, x = x, shapes.laid_out(x, sample)
    norm, g = _Norm(x, row, gain, eps, sample, centred), laid_out_as(g, x)
    measured = mean.flatten(), spread.flatten(), indices, signs
    if norm.resident and not relu:
        dx, dweight, dbias = norm.rows_backward(g, x, weight, measured)
        masked = x.new_empty(0)
    else:
        dx, dweight, dbias, masked = norm.split_backward(g, x, weight, bias, measured, live if residual else None, relu)
    shape = like.shape[1:3] if sample else like.shape[1:2]
    masked = laid_out_as(masked, like) if masked.numel() else masked
    return laid_out_as(dx, like), dweight.view(shape), dbias.view(shape), masked


def affine(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    """relu(weight * (x - mean) / scale + bias + residual), as x: (N, C, *), with statistics that stand, (C,)."""
    like, x = x, shapes.laid_out(x, False)
    residual, y = None if residual is None else laid_out_as(residual, x), torch.empty_like(x)
    _apply(x, residual, weight, bias, mean.float(), scale.float(), 0.0, shapes.of_batch(x), relu, None, y)
    return laid_out_as(y, like)


def run(kernel: Any, programs: int, warps: int, arguments: dict[str, Any], registers: int | None = None) -> None:
    """Start a kernel on the device of its first tensor. registers: what a thread may take; None: as the compiler sees fit."""
    with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
        kernel[programs,](**arguments, num_warps=warps, maxnreg=registers)


def _launch(kernel: Any, programs: int, warps: int, arguments: dict[str, Any], registers: int | None = None) -> None:
    """Run a kernel with those of the arguments that it names."""
    if programs:
        run(kernel, programs, warps, {name: arguments[name] for name in kernel.arg_names}, registers)


def _pointers(**tensors: Tensor | None) -> dict[str, Any]:
    """Tensors by the names that kernels have for them."""
    return {f"{name}_ptr": tensor for name, tensor in tensors.items()}


def _walk(geometry: Geometry, pieces: Cut, at_once: int = 0) -> dict[str, Any]:
    """What kernels that walk along lanes, and those that combine their parts, are told."""
    members = TUNING.room(geometry.members * pieces.parts, at_once or TUNING.members)
    return geometry.sizes | pieces.sizes | {"MEMBERS": members}


def _apply(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    eps: float,
    geometry: Geometry,
    relu: bool,
    live: Tensor | None,
    y: Tensor,
) -> None:
    """Write y from x and what was measured; live: memory for the bits of what ReLU lets through."""
    pieces = TUNING.cut(geometry, x.element_size(), TUNING.repeat)
    tensors = _pointers(x=x, residual=residual, weight=weight, bias=bias, mean=mean, scale=spread, y=y, live=live)
    arguments = tensors | _walk(geometry, pieces) | {"eps": eps, "RELU": relu}
    _launch(fore.apply, pieces.programs, pieces.warps, arguments)


class _Norm:
    """One norm on one input: its geometry, its row, and its constants."""

    def __init__(self, x: Tensor, row: Metric, gain: Gain, eps: float, sample: bool, centred: bool) -> None:
        self.row, self.centred = row, centred
        self.geometry = shapes.of(x, sample)
        self.resident = sample and x.shape[3] == 1
        n = self.geometry.n
        self.gain = row.gain(n, gain)  # first, as it refuses what is too short
        self.family = shapes.family(row)
        self.k = 1 if self.family == "span" else row.k(n) if self.family == "top" else 0
        constants = {"gain": self.gain, "eps": eps, "n": float(n), "FAMILY": self.family, "CENTRED": centred}
        self.constants: dict[str, Any] = constants

    # --- statistics --------------------------------------------------------------------------------------------------

    def measure(self, x: Tensor) -> Measured:
        """mean and C * S (groups,), fp32, and where a sparse family read S."""
        if self.k > TUNING.largest_k:
            return self._by_torch(x)
        return self._sparse(x) if self.k else self._dense(x)

    def _dense(self, x: Tensor) -> Measured:
        groups, squares = self.geometry.groups, self.family == "l2"
        mean, spread = (x.new_zeros(groups, dtype=torch.float32) for _ in range(2))
        pieces = TUNING.cut(self.geometry, x.element_size())
        sums = x.new_empty(2, pieces.parts, self.geometry.lanes, dtype=torch.float32)
        indices, signs = self._taken(x)
        arguments = _pointers(x=x, partial=sums, mean=mean, spread=spread, signs=signs) | _walk(self.geometry, pieces)
        arguments |= self.constants | {"SQUARES": squares, "EXTREMES": False, "SIGNS": signs.numel() > 0}
        if squares or self.centred:
            _launch(fore.moments, pieces.programs, pieces.warps, arguments)
            _launch(fore.settle, groups, 8, arguments | {"STAGE": "mean and squares" if squares else "mean"})
        if not squares:
            _launch(fore.deviations, pieces.programs, pieces.warps, arguments)
            _launch(fore.settle, groups, 8, arguments | {"STAGE": "deviations"})
        return mean, spread, indices, signs

    def _sparse(self, x: Tensor) -> Measured:
        groups = self.geometry.groups
        mean, spread = (x.new_empty(groups, dtype=torch.float32) for _ in range(2))
        indices, signs = self._taken(x)
        pieces = TUNING.cut(self.geometry, x.element_size(), k=self.k)
        sums = x.new_empty(3, pieces.parts, self.geometry.lanes, dtype=torch.float32)
        arguments = _pointers(x=x, partial=sums, mean=mean, spread=spread, indices=indices, signs=signs)
        arguments |= self.constants | _walk(self.geometry, pieces, TUNING.peaks) | {"SQUARES": False, "EXTREMES": True}
        arguments |= {"k": self.k, "K": TUNING.searched(self.k), "SPAN": self.family == "span", "PART": pieces.part}
        _launch(fore.moments, pieces.programs, pieces.warps, arguments)
        warps = 4 if self.k == 1 and arguments["MEMBERS"] <= 512 else 8
        _launch(fore.select, groups, warps, arguments, _all_registers(warps))
        return mean, spread, indices, signs

    def _taken(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the indices and signs of every group; of a dense family by batch, for its sum of signs."""
        groups = self.geometry.groups
        shape = taken(self.row, groups, self.geometry.n)
        indices = x.new_empty(shape, dtype=torch.int64)
        if self.row.family == "mean" and not self.geometry.sample:
            return indices, x.new_zeros((groups, 1), dtype=torch.float32)
        return indices, x.new_empty(shape, dtype=torch.float32)

    def _by_torch(self, x: Tensor) -> Measured:
        """A k too large to be found one by one."""
        values = wide(x)
        if self.geometry.sample:
            mean = values.mean((2, 3), dtype=torch.float64).float() if self.centred else values.new_zeros(x.shape[:2])
            raw, sparse = measuring.measure_lines(values - mean[:, :, None, None], self.row)
        else:
            mean = values.mean(measuring.over(x), dtype=torch.float64).float()
            raw, sparse = measuring.measure(values, mean, self.row)
        assert sparse is not None  # of a family that takes k
        indices, signs = sparse
        return mean.flatten(), (raw * self.gain).flatten(), indices, signs

    # --- backward ----------------------------------------------------------------------------------------------------

    def split_backward(
        self,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        measured: Measured,
        live: Tensor | None,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dx, dweight, dbias, and g behind ReLU's mask where `live` holds its bits (else empty)."""
        geometry, (mean, spread, indices, signs) = self.geometry, measured
        again = self.family == "l2" or (self.family == "l1" and not self.centred)  # whether x is read again for dx
        masked = None if live is None else torch.empty_like(x)
        bits = partial(x.new_empty, geometry.bits, dtype=torch.uint8)
        live = bits() if relu and live is None and not again else live
        sign = bits() if self.family == "l1" and not again else None
        arguments = _pointers(
            g=g, x=x, weight=weight, bias=bias, mean=mean, spread=spread, indices=indices, signs=signs
        )
        arguments |= _pointers(live=live, sign=sign, masked=masked)
        arguments |= self.constants | {"k": signs.shape[-1], "groups": geometry.groups, "RELU": relu}
        terms, dweight, dbias = self._reduce(x, arguments)
        arguments |= {"terms_ptr": terms, "x_ptr": x if again else None}
        if masked is not None:
            arguments |= {"g_ptr": masked, "live_ptr": None, "RELU": False}
        return self._gradient(x, arguments), dweight, dbias, x.new_empty(0) if masked is None else masked

    def _reduce(self, x: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The terms of dx by group (4, groups), dweight and dbias (channels,)."""
        geometry = self.geometry
        pieces = TUNING.cut(geometry, x.element_size())
        sums = x.new_empty(3, pieces.parts, geometry.lanes, dtype=torch.float32)
        terms = x.new_empty(4, geometry.groups, dtype=torch.float32)
        dweight, dbias = (x.new_empty(geometry.channels, dtype=torch.float32) for _ in range(2))
        arguments = (
            arguments | _walk(geometry, pieces) | _pointers(partial=sums, terms=terms, dweight=dweight, dbias=dbias)
        )
        by_group = arguments | (_pointers(dweight=None, dbias=None) if geometry.sample else {})
        _launch(back.collect, pieces.programs, pieces.warps, arguments)
        _launch(back.coefficients, geometry.groups, 8, by_group)
        if geometry.sample:
            _launch(back.parameters, geometry.channels, 8, arguments)
        return terms, dweight, dbias

    def _gradient(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        dx = torch.empty_like(x)
        pieces = TUNING.cut(self.geometry, x.element_size(), TUNING.repeat)
        arguments = arguments | _walk(self.geometry, pieces) | {"dx_ptr": dx, "LIMIT": x.dtype is torch.float16}
        _launch(back.gradient, pieces.programs, pieces.warps, arguments)
        if self.k:
            entries = arguments["signs_ptr"].numel()
            _launch(back.correct, -(-entries // 128), 4, arguments | {"entries": entries, "ENTRIES": 128})
        return dx

    # --- rows in registers -------------------------------------------------------------------------------------------

    def rows(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor) -> Measured:
        """What was measured, and y written, of rows that are kept in registers."""
        samples, groups, *_ = x.shape
        mean, spread = (x.new_empty(samples * groups, dtype=torch.float32) for _ in range(2))
        indices, signs = self._taken(x)
        sizes = self._row_sizes(x)
        arguments = _pointers(
            x=x, weight=weight, bias=bias, y=y, mean=mean, spread=spread, indices=indices, signs=signs
        )
        programs = -(-samples // sizes["ROWS"]) * groups
        _launch(resident.row_forward, programs, _warps(sizes), arguments | self.constants | sizes | {"POSITIONS": 1})
        return mean, spread, indices, signs

    def rows_backward(
        self, g: Tensor, x: Tensor, weight: Tensor | None, measured: Measured
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dweight and dbias (groups * n,)."""
        mean, spread, indices, signs = measured
        samples, groups, n, _ = x.shape
        sizes = self._row_sizes(x)
        slots = max(1, min(-(-samples // sizes["ROWS"]), TUNING.row_programs // groups))
        sums = (x.new_empty if samples else x.new_zeros)((2, slots, groups * n), dtype=torch.float32)
        dx = torch.empty_like(x)
        arguments = _pointers(g=g, x=x, weight=weight, mean=mean, spread=spread, indices=indices, signs=signs, dx=dx)
        arguments |= self.constants | sizes | {"partial_ptr": sums, "slots": slots, "LIMIT": x.dtype is torch.float16}
        _launch(resident.row_backward, slots * groups if samples else 0, _warps(sizes), arguments, _registers(sizes))
        return dx, sums[0].sum(0), sums[1].sum(0)

    def _row_sizes(self, x: Tensor) -> dict[str, int]:
        samples, groups, n, _ = x.shape
        rows_each, width, vector = TUNING.rows(samples, n, x.element_size())
        sizes = {"samples": samples, "groups": groups, "n": n, "k": 2 if self.family == "span" else max(1, self.k)}
        return sizes | {"ROWS": rows_each, "WIDTH": width, "VEC": vector}


def _warps(sizes: dict[str, int]) -> int:
    """For rows in registers: eight elements a thread and more.

    The longest are given to as many threads as there can be where accesses are narrow: each has addresses of its own to keep.
    """
    most = 32 if sizes["WIDTH"] > 4096 and sizes["VEC"] < 4 else 16
    return max(1, min(most, sizes["ROWS"] * sizes["WIDTH"] // 256))


def _registers(sizes: dict[str, int]) -> int | None:
    """For rows in registers. The longest need no telling."""
    return _all_registers(_warps(sizes)) if sizes["WIDTH"] <= 4096 else None


def _all_registers(warps: int) -> int:
    """As many a thread as there are: of itself ptxas spills a few bytes to let more programs in."""
    return min(255, 65536 // (32 * warps))
