"""Triton, rows that fit into registers: layer and RMS norms, forward and backward, each in one read.

    row_forward   x -> y, mean, C * S, and where the sparse families read them
    row_once      x -> y: the first with its numbers compiled in, as a plugin ahead of time wants them
    row_backward  g, x -> dx, and sums of g and g*d/scale by column over the rows of a program

x: (samples * groups, n), row b * groups + g; weight and bias: (groups, n). A program keeps to one g, so that its columns are
channels. It takes ROWS rows at a time, each of WIDTH >= n columns, a power of two.
"""

import triton
import triton.language as tl

from normrewrite.backends.triton.tiles import affine, as_stored, following, parameter

ROW_SIZES = ["samples", "groups", "n", "k", "slots"]


@triton.jit
def rows_of(tile, group, samples, groups, n, ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr):
    """The rows of a group's tile (ROWS,), the offsets of their elements (ROWS, WIDTH), and whether these exist."""
    sample = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
    row = sample * groups + group
    column = tl.arange(0, WIDTH)
    width = n // VEC * VEC
    return row, row[:, None] * width + column[None, :], (sample < samples)[:, None] & (column < width)[None, :]


@triton.jit(do_not_specialize=ROW_SIZES)
def row_forward(
    x_ptr,  # (samples * groups, n), fp16/bf16/fp32
    weight_ptr,  # (groups, n), any float, or None
    bias_ptr,  # (groups, n), any float, or None
    y_ptr,  # as x
    mean_ptr,  # (samples * groups,), fp32, or None: what was measured is not kept
    spread_ptr,  # (samples * groups,), fp32: C * S, or None
    indices_ptr,  # (samples * groups, k), int64: (…, 2) of a span; or None
    signs_ptr,  # the same, fp32; or None
    gain,
    eps,
    samples,
    groups,
    n,
    k,
    FAMILY: tl.constexpr,  # "l1", "l2", "top", "span"
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    POSITIONS: tl.constexpr = 1,  # elements side by side that share a weight
):
    group = tl.program_id(0) % groups
    row, at, real = rows_of(tl.program_id(0) // groups, group, samples, groups, n, ROWS, WIDTH, VEC)
    exists = row < samples.to(tl.int64) * groups
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    size = n.to(tl.float32)
    mean = tl.sum(x, 1, keep_dims=True) / size
    poison = mean - mean  # NaN where x is not finite, else 0: extremes alone would not tell
    if not CENTRED:
        mean = poison
    d = tl.where(real, x - mean, 0.0)
    if CENTRED:  # once more, as a constant row's rounding would be divided by eps alone
        mean += tl.sum(d, 1, keep_dims=True) / size
        d = tl.where(real, x - mean, 0.0)
    if FAMILY == "l1":
        spread = tl.sum(tl.abs(d), 1, keep_dims=True) / size
    elif FAMILY == "l2":
        spread = tl.sqrt(tl.sum(d * d, 1, keep_dims=True) / size)
    else:
        column = tl.arange(0, WIDTH)[None, :]
        one = tl.arange(0, 1)[None, :]
        value = tl.full((ROWS, 1), float("inf"), tl.float32)
        place = tl.full((ROWS, 1), -1, tl.int64)
        last = (n - 1).to(tl.int64)
        if FAMILY == "span":
            values = tl.where(real, d, float("-inf"))
            high, high_at = following(values, column, value, place, 1)
            low, low_at = following(tl.where(real, -d, float("-inf")), column, value, place, 1)
            spread = high + low
            out = row[:, None] * 2 + one
            if indices_ptr is not None:
                tl.store(indices_ptr + out, tl.minimum(high_at, last), mask=exists[:, None])
                tl.store(indices_ptr + out + 1, tl.minimum(low_at, last), mask=exists[:, None])
                tl.store(signs_ptr + out, tl.full((ROWS, 1), 1.0, tl.float32), mask=exists[:, None])
                tl.store(signs_ptr + out + 1, tl.full((ROWS, 1), -1.0, tl.float32), mask=exists[:, None])
        else:
            values = tl.where(real, tl.abs(d), float("-inf"))
            spread = tl.zeros((ROWS, 1), tl.float32)
            for t in range(k):
                value, place = following(values, column, value, place, 1)
                spread += value / k
                sign = tl.sum(tl.where(column == place, d, 0.0), 1, keep_dims=True)
                sign = tl.where(sign > 0, 1.0, tl.where(sign < 0, -1.0, 0.0))
                out = row[:, None] * k + t + one
                if indices_ptr is not None:
                    tl.store(indices_ptr + out, tl.minimum(place, last), mask=exists[:, None])
                    tl.store(signs_ptr + out, sign, mask=exists[:, None])
    spread = gain * spread + poison
    channel = group.to(tl.int64) * (n // POSITIONS) + tl.arange(0, WIDTH) // POSITIONS
    there = tl.arange(0, WIDTH) < n
    factor = parameter(weight_ptr, channel, there, 1.0)[None, :] / (spread + eps)
    y = affine(x, mean, factor, parameter(bias_ptr, channel, there, 0.0)[None, :])
    tl.store(y_ptr + at, as_stored(y, y_ptr), mask=real)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, tl.sum(mean, 1), mask=exists)
        tl.store(spread_ptr + row, tl.sum(spread, 1), mask=exists)


@triton.jit
def row_once(
    x_ptr,  # as row_forward's, whose y it writes and nothing else
    weight_ptr,  # (groups, n / POSITIONS)
    bias_ptr,  # the same
    samples,
    y_ptr,
    GAIN: tl.constexpr,
    EPS: tl.constexpr,
    GROUPS: tl.constexpr,
    N: tl.constexpr,
    COUNT: tl.constexpr,  # k
    FAMILY: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    n = tl.full((), N, tl.int32)
    row_forward(
        x_ptr, weight_ptr, bias_ptr, y_ptr, None, None, None, None, GAIN, EPS, samples, GROUPS, n, COUNT,
        FAMILY, CENTRED, ROWS, WIDTH, VEC, POSITIONS,
    )  # fmt: skip


@triton.jit(do_not_specialize=ROW_SIZES)
def row_backward(
    g_ptr,  # (samples * groups, n), fp16/bf16/fp32: dL/dy
    x_ptr,  # the same
    weight_ptr,  # (groups, n), any float, or None
    mean_ptr,  # (samples * groups,), fp32
    spread_ptr,  # (samples * groups,), fp32: C * S
    indices_ptr,  # (samples * groups, k), int64
    signs_ptr,  # the same, fp32
    dx_ptr,  # as x
    partial_ptr,  # (2, slots, groups, n), fp32: sum g*d/scale, sum g
    gain,
    eps,
    samples,
    groups,
    n,
    k,
    slots,
    FAMILY: tl.constexpr,
    CENTRED: tl.constexpr,
    LIMIT: tl.constexpr,  # whether dx is fp16
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VEC: tl.constexpr,
):
    group, slot = tl.program_id(0) % groups, tl.program_id(0) // groups
    column = tl.arange(0, WIDTH)
    there = column < n
    channel = group.to(tl.int64) * n + column
    weight = parameter(weight_ptr, channel, there, 1.0)[None, :]
    size = n.to(tl.float32)
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    for i in range(slot, tl.cdiv(samples, ROWS), slots):
        row, at, real = rows_of(i, group, samples, groups, n, ROWS, WIDTH, VEC)
        exists = row < samples.to(tl.int64) * groups
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=real, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=exists, other=0.0)[:, None]
        spread = tl.load(spread_ptr + row, mask=exists, other=1.0)[:, None]
        scale = spread + eps
        d = tl.where(real, x - mean, 0.0)
        product = g * d / scale
        dweight += product
        dbias += g
        share = tl.sum(product * weight, 1, keep_dims=True)
        if WIDTH > 4096:  # read again, from the cache: registers don't hold all that is needed
            x = tl.load(x_ptr + at, mask=real, other=0.0, eviction_policy="evict_first").to(tl.float32)
            g = tl.load(g_ptr + at, mask=real, other=0.0, eviction_policy="evict_first").to(tl.float32)
            d = tl.where(real, x - mean, 0.0)
        if FAMILY == "l1":
            slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)) * (gain / size)
        elif FAMILY == "l2":
            slope = d * tl.where(spread > 0, gain * gain / (size * tl.maximum(spread, 1e-37)), 0.0)
        else:
            slope = tl.zeros((ROWS, WIDTH), tl.float32)
            constant = gain / k if FAMILY == "top" else gain
            for t in range(k):
                place = tl.load(indices_ptr + row * k + t, mask=exists, other=0).to(tl.int32)[:, None]
                sign = tl.load(signs_ptr + row * k + t, mask=exists, other=0.0)[:, None]
                slope += tl.where(column[None, :] == place, sign * constant, 0.0)
        dx = g * weight - share * slope
        if CENTRED:
            dx -= tl.sum(dx, 1, keep_dims=True) / size
        dx = dx / scale
        if LIMIT:
            limit = tl.where(spread <= eps, 65504.0, float("inf"))
            dx = tl.where(dx > limit, limit, tl.where(dx < -limit, -limit, dx))
        tl.store(dx_ptr + at, dx, mask=real)
    out = partial_ptr + (slot.to(tl.int64) * groups + group) * n + column
    tl.store(out, tl.sum(dweight, 0), mask=there)
    tl.store(out + slots.to(tl.int64) * groups * n, tl.sum(dbias, 0), mask=there)
