"""Triton, forward: statistics by part, settled by group, applied.

    moments     x -> partial        one read: the mean of each part, and its squares or its largest and smallest
    deviations  x, mean -> partial  one more read, for l1: sum |x - mean|
    settle      partial -> mean, C * S of the dense family
    select      partial, x -> mean, C * S, and where the sparse families read them: only the parts that lead are read again
    apply       x -> y              with residual and ReLU, if asked for

Every program writes its own numbers, and adds in an order that its position alone fixes: the same bits on every run.

Parts add up what lies about a mean, and their means are added in float64: a constant group's mean is that constant to the bit.
Its scale is eps alone, by which a rounding would be divided.
"""

import triton
import triton.language as tl

from normrewrite.backends.triton.tiles import (
    OF_TWO,
    SIZES,
    UNROLL,
    affine,
    as_stored,
    following,
    lanes_of,
    member,
    over,
    pack,
    parameter,
    passed,
    step_of,
    steps_in,
    tile,
)


@triton.jit(do_not_specialize=SIZES)
def moments(
    x_ptr,  # matrix, fp16/bf16/fp32
    partial_ptr,  # (3, parts, lanes), fp32: mean; squares about it, or largest; smallest
    lanes,
    length,
    channels,
    blocks,
    parts,
    iterations,
    SQUARES: tl.constexpr,
    EXTREMES: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    lane, _, exists = lanes_of(block, lanes, channels, LANES, COLUMNS)
    out = partial_ptr + part.to(tl.int64) * lanes + lane
    plane = parts.to(tl.int64) * lanes
    if SQUARES:
        count = tl.zeros((LANES,), tl.float32)
        mean = tl.zeros((LANES,), tl.float32)
        squares = tl.zeros((LANES,), tl.float32)
        for i in tl.range(iterations, loop_unroll_factor=UNROLL):
            at, real = tile(
                block, step_of(part, iterations, i, STEPS), lanes, length, channels, LANES, STEPS, COLUMNS, VEC
            )
            x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
            more = tl.sum(real.to(tl.float32), AXIS)
            centre = tl.sum(x, AXIS) / tl.maximum(more, 1.0)
            centre += tl.sum(tl.where(real, x - over(centre, COLUMNS), 0.0), AXIS) / tl.maximum(more, 1.0)
            d = tl.where(real, x - over(centre, COLUMNS), 0.0)
            share = more / tl.maximum(count + more, 1.0)  # Chan, Golub & LeVeque 1979: two samples' squares as one's
            squares += tl.sum(d * d, AXIS) + (centre - mean) * (centre - mean) * count * share
            mean += (centre - mean) * share
            count += more
        tl.store(out, mean, mask=exists)
        tl.store(out + plane, squares, mask=exists)
    else:
        # about the mean of its first tile, a part's sum keeps the digits of small differences
        at, real = tile(block, step_of(part, iterations, 0, STEPS), lanes, length, channels, LANES, STEPS, COLUMNS, VEC)
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
        first = tl.sum(x, AXIS) / tl.maximum(tl.sum(real.to(tl.float32), AXIS), 1.0)
        pivot = over(first, COLUMNS)
        total = tl.where(real, x - pivot, 0.0)
        if EXTREMES:
            high = tl.where(real, x, float("-inf"))
            low = tl.where(real, x, float("inf"))
        for i in tl.range(1, iterations, loop_unroll_factor=UNROLL):
            at, real = tile(
                block, step_of(part, iterations, i, STEPS), lanes, length, channels, LANES, STEPS, COLUMNS, VEC
            )
            x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
            total += tl.where(real, x - pivot, 0.0)
            if EXTREMES:
                high = tl.maximum(high, tl.where(real, x, float("-inf")))
                low = tl.minimum(low, tl.where(real, x, float("inf")))
        tl.store(out, first + tl.sum(total, AXIS) / steps_in(part, iterations * STEPS, length), mask=exists)
        if EXTREMES:
            tl.store(out + plane, tl.max(high, AXIS), mask=exists)
            tl.store(out + 2 * plane, tl.min(low, AXIS), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def deviations(
    x_ptr,  # matrix, fp16/bf16/fp32
    mean_ptr,  # (groups,), fp32
    partial_ptr,  # (2, parts, lanes), fp32: sum |x - mean|, and sum sign(x - mean) where it is kept
    lanes,
    length,
    channels,
    blocks,
    parts,
    iterations,
    members,  # lanes a group, where groups are of a sample
    SAMPLE: tl.constexpr,
    SIGNS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    lane, channel, exists = lanes_of(block, lanes, channels, LANES, COLUMNS)
    mean = over(tl.load(mean_ptr + (lane // members if SAMPLE else channel), mask=exists, other=0.0), COLUMNS)
    total = tl.zeros((STEPS, LANES) if COLUMNS else (LANES, STEPS), tl.float32)
    signs = tl.zeros((STEPS, LANES) if COLUMNS else (LANES, STEPS), tl.float32)
    for i in tl.range(iterations, loop_unroll_factor=UNROLL):
        at, real = tile(block, step_of(part, iterations, i, STEPS), lanes, length, channels, LANES, STEPS, COLUMNS, VEC)
        d = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32) - mean
        total += tl.where(real, tl.abs(d), 0.0)
        if SIGNS:
            signs += tl.where(real, tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)), 0.0)
    out = partial_ptr + part.to(tl.int64) * lanes + lane
    tl.store(out, tl.sum(total, AXIS), mask=exists)
    if SIGNS:
        tl.store(out + parts.to(tl.int64) * lanes, tl.sum(signs, AXIS), mask=exists)


@triton.jit(do_not_specialize=SIZES)
def settle(
    partial_ptr,  # (parts, lanes), fp32: means, and squares in the plane behind; or sums, and those of signs
    mean_ptr,  # (groups,), fp32
    spread_ptr,  # (groups,), fp32: C * S
    signs_ptr,  # (groups,), fp32: sum sign(d), where it is kept
    gain,
    n,
    lanes,
    length,
    parts,
    iterations,
    members,
    lane_of_group,
    lane_of_member,
    SIGNS: tl.constexpr,
    STAGE: tl.constexpr,  # "mean", "mean and squares", "deviations"
    CENTRED: tl.constexpr,
    STEPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    group = tl.program_id(0)
    if STAGE == "deviations":
        total = tl.zeros((MEMBERS,), tl.float32)
        signs = tl.zeros((MEMBERS,), tl.float32)
        for start in range(0, members * parts, MEMBERS):
            m = start + tl.arange(0, MEMBERS)
            at, _ = member(group, m, parts, lanes, lane_of_group, lane_of_member)
            total += tl.load(partial_ptr + at, mask=m < members * parts, other=0.0)
            if SIGNS:
                more = tl.load(partial_ptr + parts.to(tl.int64) * lanes + at, mask=m < members * parts, other=0.0)
                signs += more
        tl.store(spread_ptr + group, gain * (tl.sum(total, 0) / n))
        if SIGNS:
            tl.store(signs_ptr + group, tl.sum(signs, 0))
    else:
        part = iterations * STEPS
        mean = _mean(partial_ptr, group, lanes, length, parts, part, members, lane_of_group, lane_of_member, MEMBERS)
        if not CENTRED:
            mean = mean * 0.0
        tl.store(mean_ptr + group, mean)
        if STAGE == "mean and squares":
            squares = tl.zeros((MEMBERS,), tl.float32)
            for start in range(0, members * parts, MEMBERS):
                m = start + tl.arange(0, MEMBERS)
                at, _ = member(group, m, parts, lanes, lane_of_group, lane_of_member)
                real = m < members * parts
                apart = tl.load(partial_ptr + at, mask=real, other=0.0) - mean
                own = tl.load(partial_ptr + parts.to(tl.int64) * lanes + at, mask=real, other=0.0)
                squares += tl.where(real, own + steps_in(m % parts, part, length) * apart * apart, 0.0)
            tl.store(spread_ptr + group, gain * tl.sqrt(tl.sum(squares, 0) / n))


@triton.jit
def _mean(
    partial_ptr,  # (parts, lanes), fp32: means
    group,
    lanes,
    length,
    parts,
    part,  # steps each
    members,
    lane_of_group,
    lane_of_member,
    MEMBERS: tl.constexpr,
):
    """The mean of a group, of those of its parts. n would be rounded in fp32, from 2^24 on."""
    total = tl.zeros((MEMBERS,), tl.float64)
    count = tl.zeros((MEMBERS,), tl.float64)
    for start in range(0, members * parts, MEMBERS):
        m = start + tl.arange(0, MEMBERS)
        at, _ = member(group, m, parts, lanes, lane_of_group, lane_of_member)
        real = m < members * parts
        more = tl.where(real, steps_in(m % parts, part, length), 0.0).to(tl.float64)
        total += more * tl.load(partial_ptr + at, mask=real, other=0.0).to(tl.float64)
        count += more
    return (tl.sum(total, 0) / tl.sum(count, 0)).to(tl.float32)


@triton.jit
def _extremes(
    x_ptr,
    partial_ptr,
    group,
    k,
    lanes,
    length,
    channels,
    parts,
    members,
    lane_of_group,
    lane_of_member,
    SIGN: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
    COLUMNS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """The k largest of SIGN * x in a group (K,), falling, and their places: all stand in the k parts of largest extreme."""
    rank = tl.arange(0, K)
    chosen = tl.zeros((K,), tl.int64)
    value = tl.full((1,), float("inf"), tl.float32)
    place = tl.full((1,), -1, tl.int64)
    for t in range(tl.minimum(k, members * parts)):
        best = tl.full((1,), float("-inf"), tl.float32)
        best_at = tl.full((1,), 2**62, tl.int64)
        for start in range(0, members * parts, MEMBERS):
            m = start + tl.arange(0, MEMBERS)
            at, _ = member(group, m, parts, lanes, lane_of_group, lane_of_member)
            real = m < members * parts
            peak = tl.where(real, SIGN * tl.load(partial_ptr + at, mask=real, other=0.0), float("-inf"))
            found, found_at = following(peak, m, value, place, 0)
            best_at = tl.where(found > best, found_at, tl.where(found == best, tl.minimum(best_at, found_at), best_at))
            best = tl.maximum(best, found)
        value = best
        place = best_at
        chosen = tl.where(rank == t, best_at, chosen)

    chosen = tl.minimum(chosen, (members * parts - 1).to(tl.int64))  # beyond all where only NaN was left
    _, lane = member(group, chosen, parts, lanes, lane_of_group, lane_of_member)
    step = (chosen % parts)[:, None] * PART + tl.arange(0, PART)[None, :]
    real = (rank < tl.minimum(k, members * parts))[:, None] & (step < length)
    if COLUMNS:
        at = ((lane // channels)[:, None] * length + step) * channels + (lane % channels)[:, None]
    else:
        at = lane[:, None] * length + step
    x = SIGN * tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    values = tl.reshape(tl.where(real, x, float("-inf")), (K * PART,))
    places = (chosen // parts)[:, None] * length + step
    places = tl.reshape(tl.where(real, places, tl.full(places.shape, 2**62, tl.int64)), (K * PART,))

    extreme = tl.full((K,), float("-inf"), tl.float32)
    extreme_at = tl.full((K,), 2**62, tl.int64)
    value = tl.full((1,), float("inf"), tl.float32)
    place = tl.full((1,), -1, tl.int64)
    for t in range(k):
        value, place = following(values, places, value, place, 0)
        extreme = tl.where(rank == t, value, extreme)
        extreme_at = tl.where(rank == t, place, extreme_at)
    return extreme, extreme_at


@triton.jit(do_not_specialize=[*SIZES, "k"])
def select(
    x_ptr,  # matrix, fp16/bf16/fp32
    partial_ptr,  # (3, parts, lanes), fp32: mean, largest, smallest
    mean_ptr,  # (groups,), fp32
    spread_ptr,  # (groups,), fp32: C * S
    indices_ptr,  # (groups, k), int64: (groups, 2) of a span
    signs_ptr,  # the same, fp32
    gain,
    n,
    k,
    lanes,
    length,
    channels,
    parts,
    members,
    lane_of_group,
    lane_of_member,
    SPAN: tl.constexpr,
    CENTRED: tl.constexpr,
    K: tl.constexpr,  # a power of two from k
    PART: tl.constexpr,  # steps a part
    COLUMNS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    group = tl.program_id(0)
    plane = parts.to(tl.int64) * lanes
    mean = _mean(partial_ptr, group, lanes, length, parts, PART, members, lane_of_group, lane_of_member, MEMBERS)
    poison = mean - mean  # NaN where x is not finite, else 0: extremes alone would not tell
    if not CENTRED:
        mean = poison
    tl.store(mean_ptr + group, mean)

    high, high_at = _extremes(
        x_ptr, partial_ptr + plane, group, k, lanes, length, channels, parts, members, lane_of_group, lane_of_member,
        1, K, PART, COLUMNS, MEMBERS,
    )  # fmt: skip
    low, low_at = _extremes(
        x_ptr, partial_ptr + 2 * plane, group, k, lanes, length, channels, parts, members, lane_of_group, lane_of_member,
        -1, K, PART, COLUMNS, MEMBERS,
    )  # fmt: skip
    last = members.to(tl.int64) * length - 1
    group = group.to(tl.int64)
    one = tl.arange(0, 1)
    if SPAN:
        spread = tl.max(high, 0) + tl.max(low, 0)
        tl.store(indices_ptr + group * 2, tl.minimum(tl.min(high_at, 0), last))
        tl.store(indices_ptr + group * 2 + 1, tl.minimum(tl.min(low_at, 0), last))
        tl.store(signs_ptr + group * 2, 1.0)
        tl.store(signs_ptr + group * 2 + 1, -1.0)
    else:
        # The k largest |d| lie in both sides' k extremes: above the mean in the one, below it in the other.
        above, below = high - mean, -low - mean
        above = tl.where(above >= 0, above, float("-inf"))
        below = tl.where(below < 0, -below, float("-inf"))
        total = tl.zeros((1,), tl.float32)
        value = tl.full((1,), float("inf"), tl.float32)
        place = tl.full((1,), -1, tl.int64)
        for t in range(k):
            up, up_at = following(above, high_at, value, place, 0)
            down, down_at = following(below, low_at, value, place, 0)
            value = tl.maximum(up, down)
            upward = (up > down) | ((up == down) & (up_at < down_at))
            place = tl.where(upward, up_at, down_at)
            total += value
            sign = tl.where(value > 0, tl.where(upward, 1.0, -1.0), 0.0)
            tl.store(indices_ptr + group * k + t + one, tl.minimum(place, last))
            tl.store(signs_ptr + group * k + t + one, sign)
        spread = tl.sum(total, 0) / k
    tl.store(spread_ptr + group, gain * spread + poison)


@triton.jit(do_not_specialize=SIZES)
def apply(
    x_ptr,  # matrix, fp16/bf16/fp32
    residual_ptr,  # as x, or None
    weight_ptr,  # (channels,), any float, or None
    bias_ptr,  # (channels,), any float, or None
    mean_ptr,  # (groups,), fp32
    scale_ptr,  # (groups,), fp32: C * S, to which eps is added
    y_ptr,  # as x
    live_ptr,  # bits: which outputs ReLU let through; or None
    eps,
    lanes,
    length,
    channels,
    blocks,
    iterations,
    members,
    SAMPLE: tl.constexpr,
    RELU: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    H: tl.constexpr = STEPS if COLUMNS else LANES
    W: tl.constexpr = LANES if COLUMNS else STEPS
    lane, channel, exists = lanes_of(block, lanes, channels, LANES, COLUMNS)
    group = lane // members if SAMPLE else channel
    mean = over(tl.load(mean_ptr + group, mask=exists, other=0.0), COLUMNS)
    scale = tl.load(scale_ptr + group, mask=exists, other=1.0) + eps
    factor = over(parameter(weight_ptr, channel, exists, 1.0) / scale, COLUMNS)
    offset = over(parameter(bias_ptr, channel, exists, 0.0), COLUMNS)
    for i in tl.range(iterations, loop_unroll_factor=UNROLL if residual_ptr is None else OF_TWO):
        first = step_of(part, iterations, i, STEPS)
        at, real = tile(block, first, lanes, length, channels, LANES, STEPS, COLUMNS, VEC)
        y = affine(tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32), mean, factor, offset)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + at, mask=real, other=0.0).to(tl.float32)
        if RELU:
            live = passed(y)
            y = tl.where(live, y, 0.0)
            if live_ptr is not None:
                to, there = tile(block, first, lanes, length, channels, LANES, STEPS, COLUMNS, VEC, 8)
                tl.store(live_ptr + to, pack(live & real, H, W), mask=there)
        tl.store(y_ptr + at, as_stored(y, y_ptr), mask=real)
