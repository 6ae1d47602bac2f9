"""Triton, backward: two reductions by part, three coefficients a group, then

    dx = weight/scale * g - a - b * v        v: the sign or deviation that the dense family slopes by; 0 for sparse ones

    collect       g, x -> partial       one read of both: sum g, sum g*d, and for l1 sum sign(d)
    coefficients  partial -> scale, a, b by group; dweight and dbias where a group is a channel
    parameters    partial -> dweight, dbias by channel, where groups are of a sample
    gradient      g -> dx               x is not read again but for v = d: ReLU's mask and sign(d) were left as bits
    correct       dx at the few elements that a sparse family read

g is what comes behind ReLU's mask. Where a residual was added, `collect` writes that g: it is the residual's gradient, and
what `gradient` reads. d = 0 counts as negative in l1's bits, in the sum as in dx: a subgradient like another. That is why the
sum is taken again here, though the forward keeps one, where d = 0 counts 0: that one is the operator's, for a backward by torch.
"""

import triton
import triton.language as tl

from normrewrite.backends.triton.tiles import (
    OF_TWO,
    SIZES,
    UNROLL,
    affine,
    lanes_of,
    member,
    over,
    pack,
    parameter,
    passed,
    step_of,
    tile,
    unpack,
)


@triton.jit(do_not_specialize=SIZES)
def collect(
    g_ptr,  # matrix, fp16/bf16/fp32: dL/dy
    x_ptr,  # the same
    weight_ptr,  # (channels,), any float, or None
    bias_ptr,  # (channels,), any float, or None
    mean_ptr,  # (groups,), fp32
    spread_ptr,  # (groups,), fp32: C * S
    live_ptr,  # bits of ReLU's mask: read where masked g is to be written, else written, if there
    sign_ptr,  # bits of d > 0, to be written, or None
    masked_ptr,  # as g: g behind the mask, to be written, or None
    partial_ptr,  # (3, parts, lanes), fp32: sum g, sum g*d, sum sign(d)
    eps,
    lanes,
    length,
    channels,
    blocks,
    parts,
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
    AXIS: tl.constexpr = 0 if COLUMNS else 1
    H: tl.constexpr = STEPS if COLUMNS else LANES
    W: tl.constexpr = LANES if COLUMNS else STEPS
    lane, channel, exists = lanes_of(block, lanes, channels, LANES, COLUMNS)
    group = lane // members if SAMPLE else channel
    mean = over(tl.load(mean_ptr + group, mask=exists, other=0.0), COLUMNS)
    scale = tl.load(spread_ptr + group, mask=exists, other=1.0) + eps
    factor = over(parameter(weight_ptr, channel, exists, 1.0) / scale, COLUMNS)
    offset = over(parameter(bias_ptr, channel, exists, 0.0), COLUMNS)
    upstream = tl.zeros((H, W), tl.float32)
    product = tl.zeros((H, W), tl.float32)
    signs = tl.zeros((H, W), tl.float32)
    for i in tl.range(iterations, loop_unroll_factor=OF_TWO):
        first = step_of(part, iterations, i, STEPS)
        at, real = tile(block, first, lanes, length, channels, LANES, STEPS, COLUMNS, VEC)
        to, there = tile(block, first, lanes, length, channels, LANES, STEPS, COLUMNS, VEC, 8)
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=real, other=0.0).to(tl.float32)
        if RELU:
            if masked_ptr is not None:
                live = unpack(tl.load(live_ptr + to, mask=there, other=0), H, W)
            else:
                live = passed(affine(x, mean, factor, offset)) & real
                if live_ptr is not None:
                    tl.store(live_ptr + to, pack(live, H, W), mask=there)
            g = tl.where(live, g, 0.0)
        if masked_ptr is not None:
            tl.store(masked_ptr + at, g, mask=real)
        d = x - mean
        upstream += g
        product += g * d  # 0 where nothing is, as g is
        if sign_ptr is not None:
            positive = (d > 0) & real
            signs += tl.where(positive, 1.0, tl.where(real, -1.0, 0.0))
            tl.store(sign_ptr + to, pack(positive, H, W), mask=there)
    out = partial_ptr + part.to(tl.int64) * lanes + lane
    plane = parts.to(tl.int64) * lanes
    tl.store(out, tl.sum(upstream, AXIS), mask=exists)
    tl.store(out + plane, tl.sum(product, AXIS), mask=exists)
    if sign_ptr is not None:
        tl.store(out + 2 * plane, tl.sum(signs, AXIS), mask=exists)


@triton.jit(do_not_specialize=[*SIZES, "k", "groups"])
def coefficients(
    partial_ptr,  # (3, parts, lanes), fp32: sum g, sum g*d, sum sign(d)
    weight_ptr,  # (channels,), any float, or None
    spread_ptr,  # (groups,), fp32: C * S
    signs_ptr,  # (groups, k), fp32: of a sparse family
    terms_ptr,  # (4, groups), fp32: scale, a, b, and the largest |dx| that fp16 is to hold
    dweight_ptr,  # (channels,), fp32, or None
    dbias_ptr,  # (channels,), fp32, or None
    gain,
    eps,
    n,
    k,
    groups,
    lanes,
    channels,
    parts,
    members,
    lane_of_group,
    lane_of_member,
    FAMILY: tl.constexpr,  # "l1", "l2", "top", "span"
    CENTRED: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    group = tl.program_id(0)
    plane = parts.to(tl.int64) * lanes
    upstream = tl.zeros((MEMBERS,), tl.float32)
    product = tl.zeros((MEMBERS,), tl.float32)
    signs = tl.zeros((MEMBERS,), tl.float32)
    weighted = tl.zeros((MEMBERS,), tl.float32)
    weighted_product = tl.zeros((MEMBERS,), tl.float32)
    for start in range(0, members * parts, MEMBERS):
        m = start + tl.arange(0, MEMBERS)
        at, lane = member(group, m, parts, lanes, lane_of_group, lane_of_member)
        real = m < members * parts
        weight = parameter(weight_ptr, lane % channels, real, 1.0)
        u = tl.load(partial_ptr + at, mask=real, other=0.0)
        p = tl.load(partial_ptr + plane + at, mask=real, other=0.0)
        upstream += u
        product += p
        weighted += weight * u
        weighted_product += weight * p
        if FAMILY == "l1" and CENTRED:
            signs += tl.load(partial_ptr + 2 * plane + at, mask=real, other=0.0)
    spread = tl.load(spread_ptr + group)
    scale = spread + eps
    if dweight_ptr is not None:
        tl.store(dweight_ptr + group, tl.sum(product, 0) / scale)
        tl.store(dbias_ptr + group, tl.sum(upstream, 0))
    share = tl.sum(weighted_product, 0) / scale  # sum weight*g*d/scale
    inward = tl.sum(weighted, 0) / n
    if FAMILY == "l1":
        b = share * gain / n
        if CENTRED:
            inward -= b * (tl.sum(signs, 0) / n)
    elif FAMILY == "l2":
        b = tl.where(spread > 0, share * gain * gain / (n * tl.maximum(spread, 1e-37)), 0.0)
    else:
        b = share * gain / k if FAMILY == "top" else share * gain
        taken = tl.zeros((MEMBERS,), tl.float32)
        for start in range(0, k, MEMBERS):
            t = start + tl.arange(0, MEMBERS)
            taken += tl.load(signs_ptr + group.to(tl.int64) * k + t, mask=t < k, other=0.0)
        inward -= b * (tl.sum(taken, 0) / n)
    tl.store(terms_ptr + group, scale)
    tl.store(terms_ptr + groups + group, inward / scale if CENTRED else 0.0)
    tl.store(terms_ptr + 2 * groups + group, b / scale)
    tl.store(terms_ptr + 3 * groups + group, tl.where(spread <= eps, 65504.0, float("inf")))


@triton.jit(do_not_specialize=SIZES)
def parameters(
    partial_ptr,  # (2, parts, lanes), fp32: sum g, sum g*d
    spread_ptr,  # (groups,), fp32: C * S
    dweight_ptr,  # (channels,), fp32
    dbias_ptr,  # (channels,), fp32
    eps,
    lanes,
    channels,
    parts,
    members,  # lanes a group
    MEMBERS: tl.constexpr,
):
    channel = tl.program_id(0)
    samples = lanes // channels
    dweight = tl.zeros((MEMBERS,), tl.float32)
    dbias = tl.zeros((MEMBERS,), tl.float32)
    for start in range(0, samples * parts, MEMBERS):
        m = start + tl.arange(0, MEMBERS)
        at, lane = member(channel, m, parts, lanes, 1, channels)
        real = m < samples * parts
        scale = tl.load(spread_ptr + lane // members, mask=real, other=1.0) + eps
        dbias += tl.load(partial_ptr + at, mask=real, other=0.0)
        dweight += tl.load(partial_ptr + parts.to(tl.int64) * lanes + at, mask=real, other=0.0) / scale
    tl.store(dweight_ptr + channel, tl.sum(dweight, 0))
    tl.store(dbias_ptr + channel, tl.sum(dbias, 0))


@triton.jit(do_not_specialize=[*SIZES, "groups"])
def gradient(
    g_ptr,  # matrix, fp16/bf16/fp32: dL/dy, behind the mask if there is none here
    x_ptr,  # the same, or None where nothing of it is needed
    weight_ptr,  # (channels,), any float, or None
    bias_ptr,  # (channels,), any float, or None
    mean_ptr,  # (groups,), fp32
    terms_ptr,  # (4, groups), fp32: scale, a, b, limit
    live_ptr,  # bits of ReLU's mask, or None
    sign_ptr,  # bits of d > 0, or None
    dx_ptr,  # as x
    groups,
    lanes,
    length,
    channels,
    blocks,
    iterations,
    members,
    SAMPLE: tl.constexpr,
    FAMILY: tl.constexpr,
    RELU: tl.constexpr,  # whether the mask is to be told from x again
    LIMIT: tl.constexpr,  # whether dx is fp16
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
    scale = tl.load(terms_ptr + group, mask=exists, other=1.0)
    factor = over(parameter(weight_ptr, channel, exists, 1.0) / scale, COLUMNS)
    a = over(tl.load(terms_ptr + groups + group, mask=exists, other=0.0), COLUMNS)
    b = over(tl.load(terms_ptr + 2 * groups + group, mask=exists, other=0.0), COLUMNS)
    if LIMIT:
        limit = over(tl.load(terms_ptr + 3 * groups + group, mask=exists, other=0.0), COLUMNS)
    if x_ptr is not None:
        mean = over(tl.load(mean_ptr + group, mask=exists, other=0.0), COLUMNS)
        offset = over(parameter(bias_ptr, channel, exists, 0.0), COLUMNS)
    for i in tl.range(iterations, loop_unroll_factor=UNROLL if VEC > 1 else OF_TWO):
        first = step_of(part, iterations, i, STEPS)
        at, real = tile(block, first, lanes, length, channels, LANES, STEPS, COLUMNS, VEC)
        to, there = tile(block, first, lanes, length, channels, LANES, STEPS, COLUMNS, VEC, 8)
        g = tl.load(g_ptr + at, mask=real, other=0.0).to(tl.float32)
        if x_ptr is not None:
            x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
            if RELU:
                g = tl.where(passed(affine(x, mean, factor, offset)), g, 0.0)
        if live_ptr is not None:
            g = tl.where(unpack(tl.load(live_ptr + to, mask=there, other=0), H, W), g, 0.0)
        dx = g * factor - a
        if sign_ptr is not None:
            dx -= tl.where(unpack(tl.load(sign_ptr + to, mask=there, other=0), H, W), b, -b)
        elif FAMILY == "l2":
            dx -= b * (x - mean)
        elif FAMILY == "l1":
            dx -= b * tl.where(x > mean, 1.0, tl.where(x < mean, -1.0, 0.0))
        if LIMIT:
            dx = tl.where(dx > limit, limit, tl.where(dx < -limit, -limit, dx))
        tl.store(dx_ptr + at, dx, mask=real)


@triton.jit(do_not_specialize=[*SIZES, "k", "groups", "entries"])
def correct(
    g_ptr,  # matrix, fp16/bf16/fp32: dL/dy, behind the mask if there is none here
    weight_ptr,  # (channels,), any float, or None
    terms_ptr,  # (4, groups), fp32: scale, a, b, limit
    live_ptr,  # bits of ReLU's mask, or None
    indices_ptr,  # (groups, k), int64: places in a group
    signs_ptr,  # (groups, k), fp32
    dx_ptr,  # as x: overwritten at these places
    entries,
    groups,
    k,
    lanes,
    length,
    channels,
    lane_of_group,
    lane_of_member,
    LIMIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    real = entry < entries
    group = entry // k
    place = tl.load(indices_ptr + entry, mask=real, other=0)
    lane = group * lane_of_group + place // length * lane_of_member
    step = place % length
    if COLUMNS:
        row, column, width = lane // channels * length + step, lane % channels, channels
    else:
        row, column, width = lane, step, length
    at = row * width + column
    g = tl.load(g_ptr + at, mask=real, other=0.0).to(tl.float32)
    if live_ptr is not None:
        packed = tl.load(live_ptr + row * tl.cdiv(width, 8) + column // 8, mask=real, other=0).to(tl.int32)
        g = tl.where((packed >> (column % 8).to(tl.int32)) & 1 != 0, g, 0.0)
    factor = parameter(weight_ptr, lane % channels, real, 1.0) / tl.load(terms_ptr + group, mask=real, other=1.0)
    a = tl.load(terms_ptr + groups + group, mask=real, other=0.0)
    b = tl.load(terms_ptr + 2 * groups + group, mask=real, other=0.0)
    dx = g * factor - a - b * tl.load(signs_ptr + entry, mask=real, other=0.0)
    if LIMIT:
        limit = tl.load(terms_ptr + 3 * groups + group, mask=real, other=0.0)
        dx = tl.where(dx > limit, limit, tl.where(dx < -limit, -limit, dx))
    tl.store(dx_ptr + at, dx, mask=real)
