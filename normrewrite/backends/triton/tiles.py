"""Triton: how every kernel sees memory, and the few forms that they share.

A tensor is a matrix, dense and row-major: channels-last (samples * length, channels), channels-first (lanes, length). A *lane*
is one channel of one sample (of the whole batch, where it is channels-last and statistics are a batch's), `length` elements
long: a column of the first matrix, stretch by stretch, or a row of the second. A program takes a block of LANES lanes and
walks along a *part* of each, a tile of LANES x STEPS elements at a time. Element offsets are 64-bit throughout.
"""

import triton
import triton.language as tl

# Sizes vary from layer to layer: kernels are not compiled anew for those that are 1 or a multiple of 16. How wide an access
# may be is told by VEC alone, which divides the matrix's width.
SIZES = ["lanes", "length", "channels", "blocks", "parts", "iterations", "members", "lane_of_group", "lane_of_member"]

UNROLL = tl.constexpr(4)  # tiles that are read ahead of their use: one is one access a thread
OF_TWO = tl.constexpr(2)  # the same of two tensors, or one element at a time: four would spill


@triton.jit
def lanes_of(block, lanes, channels, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """The lanes of a block (LANES,): which they are, their channels, and whether they exist."""
    if COLUMNS:
        across = tl.cdiv(channels, LANES)
        channel = (block % across) * LANES + tl.arange(0, LANES)
        return (block // across).to(tl.int64) * channels + channel, channel, channel < channels
    else:
        lane = block.to(tl.int64) * LANES + tl.arange(0, LANES)
        return lane, lane % channels, lane < lanes


@triton.jit
def tile(
    block,
    first,
    lanes,
    length,
    channels,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
    PER: tl.constexpr = 1,
):
    """Where the tile of a block that begins at step `first` stands: offsets and whether they exist, as it lies in memory.

    PER = 8: the same of its bits, stored eight a byte in rows of their own.
    """
    if COLUMNS:
        across = tl.cdiv(channels, LANES)
        step = first + tl.arange(0, STEPS)
        row = (block // across).to(tl.int64) * length + step
        exists = step < length
        column = (block % across) * (LANES // PER) + tl.arange(0, LANES // PER)
        width = channels // VEC * VEC
    else:
        row = block.to(tl.int64) * LANES + tl.arange(0, LANES)
        exists = row < lanes
        column = first // PER + tl.arange(0, STEPS // PER)
        width = length // VEC * VEC
    if PER > 1:
        width = tl.cdiv(width, PER)
    return row[:, None] * width + column[None, :], exists[:, None] & (column < width)[None, :]


@triton.jit
def step_of(part, iterations, i, STEPS: tl.constexpr):
    """The first step of a part's i-th tile."""
    return (part * iterations + i).to(tl.int64) * STEPS


@triton.jit
def steps_in(part, size, length):
    """How many of a lane's steps a part of `size` has, fp32: the last may have fewer."""
    return tl.minimum(length - part.to(tl.int64) * size, size).to(tl.float32)


@triton.jit
def over(values, COLUMNS: tl.constexpr):
    """(LANES,) -> to meet a tile."""
    if COLUMNS:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def pack(flags, H: tl.constexpr, W: tl.constexpr):
    """(H, W) of truth values -> (H, W / 8) bytes, the first in the lowest bit."""
    bits = tl.reshape(flags.to(tl.int32), (H, W // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, 2).to(tl.uint8)


@triton.jit
def unpack(packed, H: tl.constexpr, W: tl.constexpr):
    """`pack` undone."""
    bits = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, (H, W)) != 0


@triton.jit
def member(group, m, parts, lanes, lane_of_group, lane_of_member):
    """The m-th part of a group, in the order of its elements: its place among (parts, lanes) and its lane."""
    lane = group.to(tl.int64) * lane_of_group + (m // parts).to(tl.int64) * lane_of_member
    return (m % parts).to(tl.int64) * lanes + lane, lane


@triton.jit
def affine(x, mean, factor, offset):
    """factor * (x - mean) + offset: what backward has to repeat to the bit where it asks which outputs were positive."""
    return (x - mean) * factor + offset


@triton.jit
def passed(y):
    """Whether ReLU lets y through, as torch's does NaN."""
    return (y <= 0) == 0


@triton.jit
def as_stored(y, pointer):
    """y as the pointer's memory is to hold it: whole numbers, rounded to even, within -128 to 127 where that is int8."""
    if pointer.dtype.element_ty == tl.int8:
        kept = tl.minimum(tl.maximum(y, -128.0), 127.0)
        return (kept + 12582912.0) - 12582912.0  # 1.5 * 2^23: beyond it fp32 has no fractions
    else:
        return y


@triton.jit
def parameter(pointer, at, exists, default: tl.constexpr):
    """weight or bias in fp32; `default` where there is none."""
    if pointer is None:
        return tl.full(at.shape, default, tl.float32)
    else:
        return tl.load(pointer + at, mask=exists, other=default).to(tl.float32)


@triton.jit
def following(values, places, value, place, AXIS: tl.constexpr):
    """The next after (value, place) in falling order along AXIS, and its place; of equal values the first place comes first.

    Axes are kept. Where nothing follows: -inf, at a place beyond all. NaN never comes.
    """
    after = (values < value) | ((values == value) & (places > place))
    best = tl.max(tl.where(after, values, float("-inf")), AXIS, keep_dims=True)
    beyond = tl.full(places.shape, 2**62, tl.int64)
    at = tl.min(tl.where(after & (values == best), places.to(tl.int64), beyond), AXIS, keep_dims=True)
    return best, at
