"""TruncatedNormal with independent elements: sample, score and entropy in one pass, and backward.

A Normal cut to [low, high], in units of the scale from loc: z = (x - loc) / scale between a and b,
mirrored where a + b < 0, so that a is the bound nearer to the mean. Over a row of A elements:

    log p(x) = -sum((z - c)(z + c) / 2 + log(scale M))
    M = integral from a to b of exp(-(z - c)(z + c) / 2) dz

fp32 bears two sets of formulas. The central one, for a < 2 and b - a >= 3/4, has c = 0 and takes
the probabilities below a and above b as they are, each from its own tail. The outer one has c = a
and measures from there, u = z - a and w = b - a. With the hazard h of the Normal, k(x) = h(x) - x,
and r the probability above b over that above a:

    -log(r) = w (a + w / 2) + log(h(b) / h(a))                      M = (1 - r) / h(a)

where both terms are positive and log(h(b) / h(a)) = log1p((w + k(b) - k(a)) / h(a)), so that
nothing cancels: exact however far out a is, and however close b is to a. A tile without outer
elements leaves their formulas out, which a policy that stays near its bounds never sees run.

A value at probability p is found by inversion: centrally from the nearer tail; outside as the root
of the equation above for -log(1 - p (1 - r)), by one step of Halley's method from the root of a
quadratic that is off by 1.6% at most, which leaves 5e-7.

With e the density of z, A = (1 - p) e(a) / e(z), B = p e(b) / e(z), and E over the truncated
distribution, a value has the derivatives of a fixed p, and a score those of an exponential family:

    dx/dloc = 1 - A - B             dx/dscale = z - a A - b B
    dl/dloc = (z - E[z]) / scale    dl/dscale = (z^2 - E[z^2]) / scale    dl/dx = -z / scale

Source: Robert 1995, https://arxiv.org/abs/0907.4010, for the tails.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tile as tile
from fastprob.kernels._launch import (
    NO_STATE,
    State,
    bounds_of,
    event_numel,
    fast,
    flat_grid,
    fold,
    forward_grid,
    gradients,
    launching,
    parameter,
    tail,
)

# Times the warps of `_launch`'s tiles: with half the elements a thread 186 registers and 126 issue
# slots an element forward, where with all of them 255 do not suffice.
WARPS = 2
# The same for gradients in half precision: 8 elements a thread are 128 bits. Those of scores take
# 199 registers; those of draws would take 255 and 168 bytes of stack, so that they are computed in
# two halves, one behind the other: 204 registers, and 159 issue slots where 4 elements a thread
# take 172.
HALF_WARPS = 1
# How a value is chosen.
RANDOM, MEDIAN, MEAN, MODE = range(4)
_RANDOM, _MEDIAN, _MEAN, _MODE = (tl.constexpr(kind) for kind in range(4))
# Values lie between the quantiles at 1e-6 and 1 - 1e-6, as TorchRL's.
EPS = 1e-6
_STEP = tl.constexpr((1.0 - 2.0 * EPS) * 2.0**-23)
_FIRST = tl.constexpr((1.0 - 2.0 * EPS) * 2.0**-24 + EPS)
ROOT_TWO_PI = tl.constexpr(2.5066282746310002)
OVER_ROOT_TWO_PI = tl.constexpr(0.3989422804014327)
# From here on bounds are as good as none; the square is still finite.
FAR = tl.constexpr(1e15)
# Bounds as numbers, before they are divided by a scale of 1e-6 or more.
_FARTHEST = 1e30
_FARTHEST_BOUND = tl.constexpr(_FARTHEST)


@triton.jit
def _standardize(mu, sigma, low, high, FAST: tl.constexpr):
    """The interval in units of the scale, mirrored so that a is the nearer bound.

    Returns:
        a, b, whether it is mirrored, and whether an element is an outer one.
    """
    a = m.divide(low - mu, sigma, FAST)
    b = m.divide(high - mu, sigma, FAST)
    flip = a + b < 0
    near = tl.where(flip, -b, a)
    far = tl.where(flip, -a, b)
    return near, far, flip, (near >= 2.0) | (far - near < 0.75)


@triton.jit
def _outer_interval(a, sigma, low, high, outer, FAST: tl.constexpr):
    """The near bound and the width of outer elements; of others those of another interval."""
    w = tl.minimum(m.divide(high - low, sigma, FAST), FAR)
    return tl.where(outer, tl.minimum(a, FAR), 1.0), tl.where(outer, w, 1.0)


@triton.jit
def _masses(a, b, FAST: tl.constexpr):
    """Of the Normal: sqrt(2 pi) times the density at a and b; mass below a, above b and between.

    For central elements.
    """
    density_a, tail_a = m.normal_tail(tl.abs(a), FAST)
    density_b, above = m.normal_tail(tl.abs(b), FAST)
    inner = a < 0
    below = tl.where(inner, tail_a, 1.0 - tail_a)
    mass = tl.where(inner, 1.0 - tail_a, tail_a) - above
    return density_a, density_b, below, above, mass


@triton.jit
def _over_mass(mass, FAST: tl.constexpr):
    """1 / M of central elements; of others, whose mass may be 0, a finite number."""
    return m.reciprocal(tl.maximum(mass, 1e-30) * ROOT_TWO_PI, FAST)


@triton.jit
def _central_quantile(p, q, below, above, mass, FAST: tl.constexpr):
    """The z with the probability p below it and q above it, of the truncated distribution."""
    lower = below + p * mass
    upper = above + q * mass
    z = m.normal_quantile(tl.minimum(tl.minimum(lower, upper), 0.5), FAST)
    return tl.where(lower < upper, -z, z)


@triton.jit
def _within_reach(a, w, FAST: tl.constexpr):
    """The way w, cut to where `_quadrature` is finite; it serves none that is cut."""
    return tl.minimum(w, 2.0 * m.reciprocal(tl.abs(a) + 1.0, FAST))


@triton.jit
def _quadrature(a, w, FAST: tl.constexpr):
    """Gauss and Legendre's quadrature of 4 nodes over u, for elements of a nearly flat density.

    Its error is 1e-9 where the density varies by less than a factor of e, which is what the first
    result says; others get a w at which all is finite.

    Returns:
        whether it serves, w, one over the mass, and the nodes with the density at each.
    """
    serves = w * (tl.abs(a) + w) < 1.0
    w = _within_reach(a, w, FAST)
    u0 = w * 0.06943184420297371
    u1 = w * 0.33000947820757187
    u2 = w * 0.66999052179242813
    u3 = w * 0.93056815579702629
    e0 = m.exp(-u0 * (a + 0.5 * u0), FAST) * 0.17392742256872692
    e1 = m.exp(-u1 * (a + 0.5 * u1), FAST) * 0.32607257743127308
    e2 = m.exp(-u2 * (a + 0.5 * u2), FAST) * 0.32607257743127308
    e3 = m.exp(-u3 * (a + 0.5 * u3), FAST) * 0.17392742256872692
    return serves, w, m.reciprocal(e0 + e1 + e2 + e3, FAST), u0, u1, u2, u3, e0, e1, e2, e3


@triton.jit
def _flat(a, w, FAST: tl.constexpr):
    """By `_quadrature`: whether it serves, the mass below w, and E[u] and E[u (u + 2 a)] there."""
    serves, w, share, u0, u1, u2, u3, e0, e1, e2, e3 = _quadrature(a, w, FAST)
    first = e0 * u0 + e1 * u1 + e2 * u2 + e3 * u3
    second = e0 * u0 * (u0 + 2.0 * a) + e1 * u1 * (u1 + 2.0 * a)
    second += e2 * u2 * (u2 + 2.0 * a) + e3 * u3 * (u3 + 2.0 * a)
    return serves, w * m.reciprocal(share, FAST), first * share, second * share


@triton.jit
def _outer(a, w, FAST: tl.constexpr):
    """What the formulas of outer elements share.

    Returns:
        k(a), h(a), k(b), r and 1 - r.
    """
    k_a = m.hazard_excess(a, FAST)
    h_a = a + k_a
    k_b = m.hazard_excess(a + w, FAST)
    gap = w * (a + 0.5 * w) + m.log1p((w + k_b - k_a) * m.reciprocal(h_a, FAST), FAST)
    gap = tl.minimum(gap, 200.0)
    # k(b) - k(a) has an error of 1e-7, which a short w must not be measured by.
    flat, mass, _, _ = _flat(a, w, FAST)
    rest = tl.where(flat, mass * h_a, -m.expm1(-gap, FAST))
    return k_a, h_a, k_b, tl.where(flat, 1.0 - rest, m.exp(-gap, FAST)), rest


@triton.jit
def _outer_quantile(p, q, a, w, k_a, h_a, r, rest, FAST: tl.constexpr):
    """The u with the probability p below it and q above it, of the truncated distribution."""
    inside = p * rest
    goal = tl.where(
        inside < 0.5,
        -m.log1p(-tl.minimum(inside, 0.5), FAST),
        -m.log(q + p * r, FAST),
    )
    # The hazard's slope at a for a short way, 1 for a long one.
    slope = (12.0 * h_a * k_a + goal) * m.reciprocal(12.0 + goal, FAST)
    root = m.sqrt(h_a * h_a + 2.0 * slope * goal, FAST)
    u = tl.minimum(2.0 * goal * m.reciprocal(h_a + root, FAST), w)
    k_z = m.hazard_excess(a + u, FAST)
    way = u * (a + 0.5 * u) + m.log1p((u + k_z - k_a) * m.reciprocal(h_a, FAST), FAST)
    step = (goal - way) * m.reciprocal(a + u + k_z, FAST)
    far = u + step * m.reciprocal(1.0 + 0.5 * step * k_z, FAST)
    # The same from the mass below u, for a density that is nearly flat.
    flat, _, _, _ = _flat(a, w, FAST)
    u = _within_reach(a, u, FAST)
    _, mass, _, _ = _flat(a, u, FAST)
    step = inside * m.reciprocal(h_a, FAST) - mass
    step = step * m.exp(u * (a + 0.5 * u), FAST)
    near = u + step * m.reciprocal(1.0 - 0.5 * step * (a + u), FAST)
    return tl.minimum(tl.maximum(tl.where(flat, near, far), 0.0), w)


@triton.jit
def _outer_slopes(p, q, a, w, u, k_a, h_a, k_b, r, FAST: tl.constexpr):
    """The derivatives by loc and by scale of the value at u, at a fixed p."""
    k_z = m.hazard_excess(a + u, FAST)
    h_z = m.reciprocal(a + u + k_z, FAST)
    share = m.reciprocal(q + p * r, FAST)
    of_b = p * r * share
    # The hazard at z less those at the bounds, each without what cancels.
    by_loc = (q * share * (u + k_z - k_a) - of_b * (w - u + k_b - k_z)) * h_z
    at_b = of_b * (a + w + k_b) * h_z
    by_scale = u + a * by_loc - w * at_b
    # Of a density that is nearly flat only little is left of all this. There the mass below u, over
    # the density at u, times how much the means below w exceed those below u.
    flat, _, first, second = _flat(a, w, FAST)
    u = _within_reach(a, u, FAST)
    _, mass, first_below, second_below = _flat(a, u, FAST)
    mass = mass * m.exp(u * (a + 0.5 * u), FAST)
    by_loc = tl.where(flat, mass * (first - first_below), by_loc)
    return by_loc, tl.where(flat, mass * (second - second_below), by_scale)


@triton.jit
def _outer_moments(a, w, k_a, k_b, r, rest, FAST: tl.constexpr):
    """E[u] and E[u (u + 2 a)]: closed forms, which lose as much as a flat density gains."""
    b = a + w
    inverse = m.reciprocal(rest, FAST)
    first = (k_a - r * (w + k_b)) * inverse
    lift = w * (2.0 * a + w) + b * k_b - a * k_a
    second = 1.0 + a * k_a - r * lift * inverse
    flat, _, flat_first, flat_second = _flat(a, w, FAST)
    return tl.where(flat, flat_first, first), tl.where(flat, flat_second, second)


@triton.jit
def _outer_entropy_slopes(a, w, k_a, h_a, k_b, r, rest, first, second, FAST: tl.constexpr):
    """The derivatives of the entropy of u by a, at a fixed w, and by w."""
    b = a + w
    h_b = b + k_b
    v_a, v_b = m.hazard_slope(a, k_a, FAST), m.hazard_slope(b, k_b, FAST)
    inverse = m.reciprocal(rest, FAST)
    odds = r * inverse
    rate = odds * (k_a - k_b - w)
    lift = w * (2.0 * a + w) + b * k_b - a * k_a
    change = 2.0 * w + (k_b - b * v_b) - (k_a - a * v_a)
    by_a = -k_a - rate + 0.5 * (k_a - a * v_a - rate * inverse * lift - odds * change)
    by_w = odds * h_b + 0.5 * (odds * h_b * lift * inverse - odds * (2.0 * b + k_b - b * v_b))
    flat, near, share, u0, u1, u2, u3, e0, e1, e2, e3 = _quadrature(a, w, FAST)
    # Minus the covariance of u and a u + u^2 / 2.
    sums = e0 * u0 * (a + 0.5 * u0) * (u0 - first) + e1 * u1 * (a + 0.5 * u1) * (u1 - first)
    sums += e2 * u2 * (a + 0.5 * u2) * (u2 - first) + e3 * u3 * (a + 0.5 * u3) * (u3 - first)
    by_a = tl.where(flat, -sums * share, by_a)
    at_b = m.exp(-near * (a + 0.5 * near), FAST) * share * m.reciprocal(near, FAST)
    edge = at_b * (1.0 - 0.5 * (second - near * (near + 2.0 * a)))
    return by_a, tl.where(flat, edge, by_w)


@triton.jit
def _probability(
    seed, call, start, flip, COUNT: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr = -1
):
    """The probabilities below and above a value, mirrored with the interval.

    Where HALF is 0 or 1, for the COUNT elements of that half, see `_halves`.
    """
    if KIND == _RANDOM:
        if HALF < 0:
            step = random.steps(seed, call, start, COUNT)
        else:
            group = start // 4 + tl.arange(0, COUNT // 4) * 2 + HALF
            w0, w1, w2, w3 = random.philox(seed, call, group)
            step = random.spread(w0 >> 9, w1 >> 9, w2 >> 9, w3 >> 9, COUNT)
            step = step.to(tl.int32, bitcast=True).to(tl.float32)
        step = tl.where(flip, 8388607.0 - step, step)
        p = step * _STEP + _FIRST
        q = (8388607.0 - step) * _STEP + _FIRST
        return p, q
    else:
        half = tl.full([COUNT], 0.5, tl.float32)
        return half, half


@triton.jit
def _halves(x, COUNT: tl.constexpr, SPLIT: tl.constexpr):
    """The two halves of a tile: of each 8 elements, which a thread has, the first and last 4.

    Where not SPLIT, both are x: a number, or what nothing asks for.
    """
    if SPLIT:
        eights = tl.permute(tl.reshape(x, [COUNT // 8, 2, 4]), (0, 2, 1))
        first, last = tl.split(eights)
        return tl.reshape(first, [COUNT // 2]), tl.reshape(last, [COUNT // 2])
    else:
        return x, x


@triton.jit
def _joined(first, last, COUNT: tl.constexpr):
    """The tile that two halves make."""
    first = tl.reshape(first, [COUNT // 8, 4])
    last = tl.reshape(last, [COUNT // 8, 4])
    return tl.reshape(tl.permute(tl.join(first, last), (0, 2, 1)), [COUNT])


@triton.jit
def _load(
    loc, scale, low, high, lo, hi, start, i, inside, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Loc, scale and the bounds: numbers, where LOW and HIGH are below 0."""
    mu = tile.load(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
    sigma = tile.load(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    if LOW < 0:
        return mu, sigma, lo, hi
    else:
        least = tile.load(
            low, start, i, inside, -1.0, rows, low_row, low_column, A, COUNT, LOW, WHOLE
        )
        most = tile.load(
            high, start, i, inside, 1.0, rows, high_row, high_column, A, COUNT, HIGH, WHOLE
        )
        least = tile.clamp(least, -_FARTHEST_BOUND, _FARTHEST_BOUND)
        return mu, sigma, least, tile.clamp(most, -_FARTHEST_BOUND, _FARTHEST_BOUND)


@triton.jit
def _draw_tile(
    loc, scale, low, high, value, lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi,
    seed, call, start, skip, left, rows, loc_row, loc_column, scale_row, scale_column,
    low_row, low_column, high_row, high_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes the values of one tile; gives minus their scores, and entropies, 0 outside."""
    i = tl.arange(0, COUNT)
    inside = (i >= skip) & (i < left)
    mu, sigma, least, most = _load(
        loc, scale, low, high, lo, hi, start, i, inside, rows,
        loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
        A, COUNT, LOC, SCALE, LOW, HIGH, WHOLE,
    )  # fmt: skip
    a, b, flip, outer = _standardize(mu, sigma, least, most, FAST)
    p, q = _probability(seed, call, start, flip, COUNT, KIND)
    density_a, density_b, below, above, mass = _masses(a, b, FAST)
    if KIND == _MODE:
        z = tl.maximum(a, 0.0)
    elif KIND == _MEAN:
        z = (density_a - density_b) * _over_mass(mass, FAST)
    else:
        z = _central_quantile(p, q, below, above, mass, FAST)
    x = mu + tl.where(flip, -z, z) * sigma
    energy = z * z * 0.5
    second = energy
    if ENTROPY:
        second = 1.0 + (a * density_a - b * density_b) * _over_mass(mass, FAST)
    if tl.max(outer.to(tl.int32), 0) > 0:
        a, w = _outer_interval(a, sigma, least, most, outer, FAST)
        k_a, h_a, k_b, r, rest = _outer(a, w, FAST)
        if KIND == _MEAN or ENTROPY:
            first, outer_second = _outer_moments(a, w, k_a, k_b, r, rest, FAST)
            second = tl.where(outer, outer_second, second)
        if KIND == _MODE:
            u = tl.maximum(-a, 0.0)
        elif KIND == _MEAN:
            u = first
        else:
            u = _outer_quantile(p, q, a, w, k_a, h_a, r, rest, FAST)
        edge = tl.where(flip, most - u * sigma, least + u * sigma)
        x = tl.where(outer, edge, x)
        energy = tl.where(outer, u * (a + 0.5 * u), energy)
        outer_mass = rest * m.reciprocal(h_a, FAST) * OVER_ROOT_TWO_PI
        mass = tl.where(outer, outer_mass, mass)
    x = tile.clamp(x, least, most)
    if CLAMP:
        bottom, top = tile.bounds(
            clamp_low, clamp_high, clamp_lo, clamp_hi, start, i, A, COUNT, CLAMP
        )
        x = tile.clamp(x, bottom, top)
    tile.store(value, start, x, i, inside, COUNT, TILE, WHOLE and TILE % 4 == 0)
    log_size = energy
    entropy = energy
    if SCORE or ENTROPY:
        log_size = m.log2(sigma * mass, FAST) * m.LN2 + m.HALF_LOG_2PI
        energy += log_size
        if not WHOLE:
            energy = tl.where(inside, energy, 0.0)
    if ENTROPY:
        entropy = log_size + 0.5 * second
        if not WHOLE:
            entropy = tl.where(inside, entropy, 0.0)
    return energy, entropy


@triton.jit
def _store_sums(
    score, entropy, energy, terms, first, total_rows, rows, lead,
    A: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr,
    GATHER: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The scores and entropies of a tile's rows, from its terms."""
    if SCORE:
        sums = tile.sum_rows(energy, A, COUNT, ROWS, GATHER, lead)
        tile.store_rows(score, first, -sums, total_rows, ROWS, OWN, WHOLE)
    if ENTROPY:
        sums = tile.sum_rows(terms, A, COUNT, ROWS, GATHER, lead)
        # An entropy has no sample dimensions: the rows of the first sample write it.
        tile.store_rows(entropy, first, sums, rows, ROWS, OWN, False)


@triton.jit(do_not_specialize=["seed", "call", "total_rows", "rows"])
def draw_kernel(
    loc, scale, low, high, value, score, entropy, lo, hi,
    clamp_low, clamp_high, clamp_lo, clamp_hi, state, used, ticket, seed, call, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, CLAMP: tl.constexpr, HOST: tl.constexpr,
    ADVANCE: tl.constexpr, KEEP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Values, scores and entropies of OWN rows; of one row, chunk by chunk, where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    if KIND == _RANDOM:
        seed, call = random.open_state(state, seed, call, HOST)
    if WIDE:
        begin = program * A
        # Chunks begin with a group of the noise; where all are whole, the row does.
        start = begin if A % COUNT == 0 else begin // 4 * 4
        energies = tl.zeros([COUNT], tl.float32)
        entropies = tl.zeros([COUNT], tl.float32)
        for chunk in range(0, tile.span(A, COUNT), COUNT):
            skip = (begin - start - chunk).to(tl.int32)
            energy, terms = _draw_tile(
                loc, scale, low, high, value, lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi,
                seed, call, start + chunk, skip, skip + A, rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column,
                A, COUNT, COUNT, LOC, SCALE, LOW, HIGH, KIND, SCORE, ENTROPY, CLAMP, FAST,
                A % COUNT == 0,
            )  # fmt: skip
            energies += energy
            entropies += terms
        _store_sums(
            score, entropy, energies, entropies, program, total_rows, rows, 0,
            A, COUNT, 1, 1, False, SCORE, ENTROPY, True,
        )  # fmt: skip
    else:
        start, lead = tile.begin(program, TILE)
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            energy, terms = _draw_tile(
                loc, scale, low, high, value, lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi,
                seed, call, start, 0, tile.kept(lead, TILE, COUNT), rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column,
                A, COUNT, TILE, LOC, SCALE, LOW, HIGH, KIND, SCORE, ENTROPY, CLAMP, FAST, True,
            )  # fmt: skip
            _store_sums(
                score, entropy, energy, terms, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, True,
            )  # fmt: skip
        else:
            energy, terms = _draw_tile(
                loc, scale, low, high, value, lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi,
                seed, call, start, 0, tl.minimum(end - start, lead + TILE).to(tl.int32), rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column,
                A, COUNT, TILE, LOC, SCALE, LOW, HIGH, KIND, SCORE, ENTROPY, CLAMP, FAST, False,
            )  # fmt: skip
            _store_sums(
                score, entropy, energy, terms, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip
    if KIND == _RANDOM:
        random.close_state(state, used, ticket, seed, call, ADVANCE, KEEP)


@triton.jit
def _central_slopes(a, b, density_a, density_b, mass, FAST: tl.constexpr):
    """E[z], E[z^2], and the derivatives of the entropy by loc and scale, times -scale and scale."""
    a = tl.maximum(a, -FAR)
    b = tl.minimum(b, FAR)
    inverse = _over_mass(mass, FAST)
    at_a = density_a * inverse
    at_b = density_b * inverse
    second = 1.0 + a * at_a - b * at_b
    by_a = at_a * (0.5 * (second - a * a) - 1.0)
    by_b = at_b * (1.0 - 0.5 * (second - b * b))
    return at_a - at_b, second, by_a + by_b, 1.0 - a * by_a - b * by_b


@triton.jit
def _draw_slopes(
    mu, sigma, least, most, along, by_row, rate, bottom, top, seed, call, start,
    COUNT: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr, PATHWISE: tl.constexpr,
    BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr,
    CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradients by loc and scale, from those of values, scores and entropies.

    Of COUNT elements: a tile, or that half of one.
    """
    a, b, flip, outer = _standardize(mu, sigma, least, most, FAST)
    p, q = _probability(seed, call, start, flip, COUNT, KIND, HALF)
    density_a, density_b, below, above, mass = _masses(a, b, FAST)
    first, second, shift, stretch = _central_slopes(a, b, density_a, density_b, mass, FAST)
    if KIND == _MODE:
        z = tl.maximum(a, 0.0)
        by_loc = tl.where(a < 0, 1.0, 0.0)
        by_scale = tl.zeros([COUNT], tl.float32)
    else:
        z = _central_quantile(p, q, below, above, mass, FAST)
        a = tl.maximum(a, -FAR)
        b = tl.minimum(b, FAR)
        at_a = q * m.exp(0.5 * (z - a) * (z + a), FAST)
        at_b = p * m.exp(0.5 * (z - b) * (z + b), FAST)
        by_loc = 1.0 - at_a - at_b
        by_scale = z - a * at_a - b * at_b
    x = mu + tl.where(flip, -z, z) * sigma
    lean = z - first
    spread = z * z - second
    if tl.max(outer.to(tl.int32), 0) > 0:
        a, w = _outer_interval(a, sigma, least, most, outer, FAST)
        k_a, h_a, k_b, r, rest = _outer(a, w, FAST)
        outer_first, outer_second = _outer_moments(a, w, k_a, k_b, r, rest, FAST)
        if BY_ENTROPY:
            outer_shift, widen = _outer_entropy_slopes(
                a, w, k_a, h_a, k_b, r, rest, outer_first, outer_second, FAST
            )
            shift = tl.where(outer, outer_shift, shift)
            stretch = tl.where(outer, 1.0 - a * outer_shift - w * widen, stretch)
        if KIND == _MODE:
            u = tl.maximum(-a, 0.0)
        else:
            u = _outer_quantile(p, q, a, w, k_a, h_a, r, rest, FAST)
            outer_loc, outer_scale = _outer_slopes(p, q, a, w, u, k_a, h_a, k_b, r, FAST)
            by_loc = tl.where(outer, outer_loc, by_loc)
            by_scale = tl.where(outer, outer_scale, by_scale)
        x = tl.where(outer, tl.where(flip, most - u * sigma, least + u * sigma), x)
        z = tl.where(outer, a + u, z)
        lean = tl.where(outer, u - outer_first, lean)
        spread = tl.where(outer, u * (u + 2.0 * a) - outer_second, spread)
    inverse = m.reciprocal(sigma, FAST)
    to_loc = tl.zeros([COUNT], tl.float32)
    to_scale = tl.zeros([COUNT], tl.float32)
    if BY_VALUE and PATHWISE:
        if CLAMP:
            x = tile.clamp(x, least, most)
            along = tl.where((x >= bottom) & (x <= top), along, 0.0)
        along = tl.where(flip, -along, along)
    if BY_SCORE:
        by_row *= inverse
        to_loc = by_row * lean
        to_scale = by_row * spread
        if PATHWISE:
            along -= by_row * z
    if BY_ENTROPY:
        rate *= inverse
        to_loc -= rate * shift
        to_scale += rate * stretch
    if PATHWISE:
        to_loc += along * by_loc
        to_scale += along * by_scale
    return tl.where(flip, -to_loc, to_loc), to_scale


@triton.jit
def _draw_backward_tile(
    grad_value, grad_score, grad_entropy, loc, scale, low, high, grad_loc, grad_scale, lo, hi,
    clamp_low, clamp_high, clamp_lo, clamp_hi, used, start, left, rows,
    value_row, value_column, loc_row, loc_column, scale_row, scale_column,
    low_row, low_column, high_row, high_column,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    PATHWISE: tl.constexpr, BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, CLAMP: tl.constexpr, HALVES: tl.constexpr,
    FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    mu, sigma, least, most = _load(
        loc, scale, low, high, lo, hi, start, i, inside, rows,
        loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
        A, COUNT, LOC, SCALE, LOW, HIGH, WHOLE,
    )  # fmt: skip
    seed = start
    call = start
    if KIND == _RANDOM:
        seed = tl.load(used)
        call = tl.load(used + 1)
    along = tl.zeros([COUNT], tl.float32)
    by_row = along
    rate = along
    bottom = along
    top = along
    if BY_VALUE and PATHWISE:
        along = tile.load(
            grad_value, start, i, inside, 0.0, rows, value_row, value_column,
            A, COUNT, VALUE, WHOLE,
        )  # fmt: skip
        if CLAMP:
            bottom, top = tile.bounds(
                clamp_low, clamp_high, clamp_lo, clamp_hi, start, i, A, COUNT, CLAMP
            )
    if BY_SCORE:
        by_row = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
    if BY_ENTROPY:
        # The entropy has no sample dimensions: its gradient goes to the first sample alone.
        rate = tile.of_first_rows(grad_entropy, start, i, inside, rows, A, COUNT, WHOLE)
    if HALVES:
        mu0, mu1 = _halves(mu, COUNT, True)
        sigma0, sigma1 = _halves(sigma, COUNT, True)
        least0, least1 = _halves(least, COUNT, LOW >= 0)
        most0, most1 = _halves(most, COUNT, HIGH >= 0)
        along0, along1 = _halves(along, COUNT, BY_VALUE and PATHWISE)
        by_row0, by_row1 = _halves(by_row, COUNT, BY_SCORE)
        rate0, rate1 = _halves(rate, COUNT, BY_ENTROPY)
        bottom0, bottom1 = _halves(bottom, COUNT, CLAMP == 2)
        top0, top1 = _halves(top, COUNT, CLAMP == 2)
        to_loc0, to_scale0 = _draw_slopes(
            mu0, sigma0, least0, most0, along0, by_row0, rate0, bottom0, top0, seed, call, start,
            COUNT // 2, 0, KIND, PATHWISE, BY_VALUE, BY_SCORE, BY_ENTROPY, CLAMP, FAST,
        )  # fmt: skip
        to_loc1, to_scale1 = _draw_slopes(
            mu1, sigma1, least1, most1, along1, by_row1, rate1, bottom1, top1, seed, call, start,
            COUNT // 2, 1, KIND, PATHWISE, BY_VALUE, BY_SCORE, BY_ENTROPY, CLAMP, FAST,
        )  # fmt: skip
        to_loc = _joined(to_loc0, to_loc1, COUNT)
        to_scale = _joined(to_scale0, to_scale1, COUNT)
    else:
        to_loc, to_scale = _draw_slopes(
            mu, sigma, least, most, along, by_row, rate, bottom, top, seed, call, start,
            COUNT, -1, KIND, PATHWISE, BY_VALUE, BY_SCORE, BY_ENTROPY, CLAMP, FAST,
        )  # fmt: skip
    tile.store(grad_loc, start, to_loc, i, inside, COUNT, COUNT, WHOLE)
    tile.store(grad_scale, start, to_scale, i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["total", "rows"])
def draw_backward_kernel(
    grad_value, grad_score, grad_entropy, loc, scale, low, high, grad_loc, grad_scale, lo, hi,
    clamp_low, clamp_high, clamp_lo, clamp_hi, used, total, rows,
    value_row, value_column, loc_row, loc_column, scale_row, scale_column,
    low_row, low_column, high_row, high_column,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    PATHWISE: tl.constexpr, BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, CLAMP: tl.constexpr, HALVES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of COUNT elements, the noise drawn anew from the state that the draw has used."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _draw_backward_tile(
            grad_value, grad_score, grad_entropy, loc, scale, low, high, grad_loc, grad_scale,
            lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi, used, start, COUNT, rows,
            value_row, value_column, loc_row, loc_column, scale_row, scale_column,
            low_row, low_column, high_row, high_column,
            A, COUNT, VALUE, LOC, SCALE, LOW, HIGH, KIND, PATHWISE, BY_VALUE, BY_SCORE,
            BY_ENTROPY, CLAMP, HALVES, FAST, True,
        )  # fmt: skip
    else:
        _draw_backward_tile(
            grad_value, grad_score, grad_entropy, loc, scale, low, high, grad_loc, grad_scale,
            lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi, used, start,
            (total - start).to(tl.int32), rows,
            value_row, value_column, loc_row, loc_column, scale_row, scale_column,
            low_row, low_column, high_row, high_column,
            A, COUNT, VALUE, LOC, SCALE, LOW, HIGH, KIND, PATHWISE, BY_VALUE, BY_SCORE,
            BY_ENTROPY, CLAMP, HALVES, FAST, False,
        )  # fmt: skip


@triton.jit
def _score_tile(
    loc, scale, low, high, value, lo, hi, start, left, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    mu, sigma, least, most = _load(
        loc, scale, low, high, lo, hi, start, i, inside, rows,
        loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
        A, COUNT, LOC, SCALE, LOW, HIGH, WHOLE,
    )  # fmt: skip
    a, b, flip, outer = _standardize(mu, sigma, least, most, FAST)
    density_a, density_b, _, _, mass = _masses(a, b, FAST)
    x = mu
    energy = mass
    second = mass
    if SCORE:
        x = tile.load(
            value, start, i, inside, 0.0, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
        )
        z = m.divide(x - mu, sigma, FAST)
        energy = z * z * 0.5
    if ENTROPY:
        second = 1.0 + (a * density_a - b * density_b) * _over_mass(mass, FAST)
    if tl.max(outer.to(tl.int32), 0) > 0:
        a, w = _outer_interval(a, sigma, least, most, outer, FAST)
        k_a, h_a, k_b, r, rest = _outer(a, w, FAST)
        outer_mass = rest * m.reciprocal(h_a, FAST) * OVER_ROOT_TWO_PI
        mass = tl.where(outer, outer_mass, mass)
        if SCORE:
            u = m.divide(tl.where(flip, most - x, x - least), sigma, FAST)
            energy = tl.where(outer, u * (a + 0.5 * u), energy)
        if ENTROPY:
            _, outer_second = _outer_moments(a, w, k_a, k_b, r, rest, FAST)
            second = tl.where(outer, outer_second, second)
    log_size = m.log2(sigma * mass, FAST) * m.LN2 + m.HALF_LOG_2PI
    entropy = log_size
    if SCORE:
        energy = tl.where((x < least) | (x > most), float("inf"), energy + log_size)
        if not WHOLE:
            energy = tl.where(inside, energy, 0.0)
    if ENTROPY:
        entropy = log_size + 0.5 * second
        if not WHOLE:
            entropy = tl.where(inside, entropy, 0.0)
    return energy, entropy


@triton.jit(do_not_specialize=["total_rows", "rows"])
def score_kernel(
    loc, scale, low, high, value, score, entropy, lo, hi, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, VALUE: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scores of given values, and entropies, of OWN rows; of one row where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    if WIDE:
        begin = program * A
        energies = tl.zeros([COUNT], tl.float32)
        entropies = tl.zeros([COUNT], tl.float32)
        for chunk in range(0, A, COUNT):
            energy, terms = _score_tile(
                loc, scale, low, high, value, lo, hi, begin + chunk, A - chunk, rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column, value_row, value_column,
                A, COUNT, LOC, SCALE, LOW, HIGH, VALUE, SCORE, ENTROPY, FAST, A % COUNT == 0,
            )  # fmt: skip
            energies += energy
            entropies += terms
        _store_sums(
            score, entropy, energies, entropies, program, total_rows, rows, 0,
            A, COUNT, 1, 1, False, SCORE, ENTROPY, True,
        )  # fmt: skip
    else:
        start, lead = tile.begin(program, TILE)
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            energy, terms = _score_tile(
                loc, scale, low, high, value, lo, hi, start, COUNT, rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column, value_row, value_column,
                A, COUNT, LOC, SCALE, LOW, HIGH, VALUE, SCORE, ENTROPY, FAST, True,
            )  # fmt: skip
            _store_sums(
                score, entropy, energy, terms, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, True,
            )  # fmt: skip
        else:
            energy, terms = _score_tile(
                loc, scale, low, high, value, lo, hi, start,
                tl.minimum(end - start, lead + TILE).to(tl.int32), rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column, value_row, value_column,
                A, COUNT, LOC, SCALE, LOW, HIGH, VALUE, SCORE, ENTROPY, FAST, False,
            )  # fmt: skip
            _store_sums(
                score, entropy, energy, terms, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip


@triton.jit
def _score_backward_tile(
    grad_score, grad_entropy, loc, scale, low, high, value, score,
    grad_loc, grad_scale, grad_value, lo, hi, start, left, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    mu, sigma, least, most = _load(
        loc, scale, low, high, lo, hi, start, i, inside, rows,
        loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
        A, COUNT, LOC, SCALE, LOW, HIGH, WHOLE,
    )  # fmt: skip
    a, b, flip, outer = _standardize(mu, sigma, least, most, FAST)
    density_a, density_b, _, _, mass = _masses(a, b, FAST)
    first, second, shift, stretch = _central_slopes(a, b, density_a, density_b, mass, FAST)
    x = mu
    if BY_SCORE:
        x = tile.load(
            value, start, i, inside, 0.0, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
        )
    z = m.divide(tl.where(flip, mu - x, x - mu), sigma, FAST)
    lean = z - first
    spread = z * z - second
    if tl.max(outer.to(tl.int32), 0) > 0:
        a, w = _outer_interval(a, sigma, least, most, outer, FAST)
        k_a, h_a, k_b, r, rest = _outer(a, w, FAST)
        outer_first, outer_second = _outer_moments(a, w, k_a, k_b, r, rest, FAST)
        if BY_SCORE:
            u = m.divide(tl.where(flip, most - x, x - least), sigma, FAST)
            lean = tl.where(outer, u - outer_first, lean)
            spread = tl.where(outer, u * (u + 2.0 * a) - outer_second, spread)
        if BY_ENTROPY:
            outer_shift, widen = _outer_entropy_slopes(
                a, w, k_a, h_a, k_b, r, rest, outer_first, outer_second, FAST
            )
            shift = tl.where(outer, outer_shift, shift)
            stretch = tl.where(outer, 1.0 - a * outer_shift - w * widen, stretch)
    inverse = m.reciprocal(sigma, FAST)
    to_loc = tl.zeros([COUNT], tl.float32)
    to_scale = tl.zeros([COUNT], tl.float32)
    if BY_SCORE:
        by_row = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
        # Outside of the bounds the score is -inf whatever the parameters.
        found = tile.of_rows(score, start, i, inside, A, COUNT, WHOLE)
        by_row = tl.where(found == float("-inf"), 0.0, by_row) * inverse
        to_loc = by_row * lean
        to_scale = by_row * spread
        if TO_VALUE:
            by_value = by_row * z
            by_value = tl.where(flip, by_value, -by_value)
            tile.store(grad_value, start, by_value, i, inside, COUNT, COUNT, WHOLE)
    if BY_ENTROPY:
        rate = tile.of_first_rows(grad_entropy, start, i, inside, rows, A, COUNT, WHOLE) * inverse
        to_loc -= rate * shift
        to_scale += rate * stretch
    tile.store(grad_loc, start, tl.where(flip, -to_loc, to_loc), i, inside, COUNT, COUNT, WHOLE)
    tile.store(grad_scale, start, to_scale, i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["total", "rows"])
def score_backward_kernel(
    grad_score, grad_entropy, loc, scale, low, high, value, score,
    grad_loc, grad_scale, grad_value, lo, hi, total, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the score of given values and of the entropy, of COUNT elements."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _score_backward_tile(
            grad_score, grad_entropy, loc, scale, low, high, value, score,
            grad_loc, grad_scale, grad_value, lo, hi, start, COUNT, rows,
            loc_row, loc_column, scale_row, scale_column,
            low_row, low_column, high_row, high_column, value_row, value_column,
            A, COUNT, LOC, SCALE, LOW, HIGH, VALUE, BY_SCORE, BY_ENTROPY, TO_VALUE, FAST, True,
        )  # fmt: skip
    else:
        _score_backward_tile(
            grad_score, grad_entropy, loc, scale, low, high, value, score,
            grad_loc, grad_scale, grad_value, lo, hi, start, (total - start).to(tl.int32), rows,
            loc_row, loc_column, scale_row, scale_column,
            low_row, low_column, high_row, high_column, value_row, value_column,
            A, COUNT, LOC, SCALE, LOW, HIGH, VALUE, BY_SCORE, BY_ENTROPY, TO_VALUE, FAST, False,
        )  # fmt: skip


def _limits(low: Any, high: Any, ndims: int, repeated: bool) -> tuple[Any, dict[str, Any]]:
    """The bounds as arguments of a kernel, numbers or parameters; the others None."""
    if not isinstance(low, Tensor):
        numbers = {
            "lo": max(float(low), -_FARTHEST), "hi": min(float(high), _FARTHEST),
            "low_row": 0, "low_column": 0, "high_row": 0, "high_column": 0, "LOW": -1, "HIGH": -1,
        }  # fmt: skip
        return (None, None), numbers
    least, most = parameter(low, ndims, repeated), parameter(high, ndims, repeated)
    return (least.tensor, most.tensor), {
        "lo": None, "hi": None, "low_row": least.row, "low_column": least.column,
        "high_row": most.row, "high_column": most.column, "LOW": least.layout,
        "HIGH": most.layout,
    }  # fmt: skip


def draw(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    low: Tensor | float,  # [*batch, *event]
    high: Tensor | float,  # [*batch, *event]
    shape: torch.Size,
    ndims: int,
    *,
    kind: int = RANDOM,
    state: State | None = None,
    score: bool = True,
    entropy: bool = False,
    clamp: Any = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """A value, its score, the entropy and the state that was used, in one launch.

    Args:
        loc: mean of the Normal; of one shape, dtype and device with `scale`.
        scale: its standard deviation, 1e-6 or more.
        low: lower bound; a number, or of the shape and dtype of `loc`.
        high: upper bound; a number where `low` is one, a tensor where it is one.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions, summed over.
        kind: RANDOM, MEDIAN, MEAN or MODE.
        state: where the noise comes from, for a RANDOM value.
        score: whether the log-density is wanted.
        entropy: whether the entropy is wanted.
        clamp: the `Bounds` that the value is projected onto, after it was scored.
        keep: whether the backward pass needs the state.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`, entropy `[*batch]`, and
        an int64 pair; None for what was not wanted.
    """
    full = shape + loc.shape
    batch = loc.shape[: loc.dim() - ndims]
    a = event_numel(loc.shape, ndims)
    value = torch.empty(full, dtype=loc.dtype, device=loc.device)
    scores = torch.empty(shape + batch, dtype=loc.dtype, device=loc.device) if score else None
    entropies = torch.empty(batch, dtype=loc.dtype, device=loc.device) if entropy else None
    used = torch.empty(2, dtype=torch.int64, device=loc.device) if keep and state else None
    total = value.numel()
    if total == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return value, scores, entropies, used if used is None else used.zero_()
    rows, total_rows = loc.numel() // a, total // a
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    (least, most), limits = _limits(low, high, ndims, bool(shape))
    clamped, clamp_lo, clamp_hi, clamp_low, clamp_high = bounds_of(clamp)
    source = state or NO_STATE
    grid = forward_grid(total_rows, a, True)
    with launching(loc):
        draw_kernel[(grid.programs,)](
            mu.tensor, sigma.tensor, least, most, value, scores, entropies,
            clamp_low=clamp_low, clamp_high=clamp_high, clamp_lo=clamp_lo, clamp_hi=clamp_hi,
            state=source.pair, used=used, ticket=source.ticket, seed=source.seed,
            call=source.call, total_rows=total_rows, rows=rows, loc_row=mu.row,
            loc_column=mu.column, scale_row=sigma.row, scale_column=sigma.column, **limits,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, LOC=mu.layout, SCALE=sigma.layout,
            KIND=kind, SCORE=score, ENTROPY=entropy, CLAMP=clamped, HOST=source.pair is None,
            ADVANCE=source.ticket is not None, KEEP=used is not None, FAST=fast(loc),
            num_warps=WARPS * grid.warps,
        )  # fmt: skip
    return value, scores, entropies, used


def draw_backward(
    grad_value: Tensor | None,  # [*sample, *batch, *event]
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    low: Tensor | float,  # [*batch, *event]
    high: Tensor | float,  # [*batch, *event]
    used: Tensor | None,
    shape: torch.Size,
    ndims: int,
    *,
    kind: int = RANDOM,
    pathwise: bool = True,
    clamp: Any = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `draw` by loc and scale, `[*batch, *event]`.

    Args:
        grad_value: gradient of the value, None for none.
        grad_score: gradient of the log-density, None for none.
        grad_entropy: gradient of the entropy, None for none.
        loc: as in `draw`.
        scale: as in `draw`.
        low: as in `draw`.
        high: as in `draw`.
        used: what `draw` has kept, for a RANDOM value.
        shape: as in `draw`.
        ndims: as in `draw`.
        kind: as in `draw`; not MEAN.
        pathwise: whether gradients flow through the value; if not, it is a constant.
        clamp: as in `draw`.
    """
    a = event_numel(loc.shape, ndims)
    grad_loc, grad_scale = gradients(shape, loc), gradients(shape, scale)
    total = grad_loc.numel()
    if total == 0:
        return torch.zeros_like(loc), torch.zeros_like(scale)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    (least, most), limits = _limits(low, high, ndims, bool(shape))
    upstream = parameter(grad_value if grad_value is not None else grad_loc, ndims, False)
    clamped, clamp_lo, clamp_hi, clamp_low, clamp_high = bounds_of(clamp)
    programs, count, warps = flat_grid(total)
    # With the gradients of entropies a clamped draw's would take 72 bytes of stack on sm_100.
    # A warp of 64 threads on AMD leaves a thread 4 elements as it is.
    halves = loc.element_size() == 2 and grad_entropy is None and torch.version.hip is None
    with launching(loc):
        draw_backward_kernel[(programs,)](
            upstream.tensor, tail(grad_score), tail(grad_entropy), mu.tensor, sigma.tensor,
            least, most, grad_loc, grad_scale,
            clamp_low=clamp_low, clamp_high=clamp_high, clamp_lo=clamp_lo, clamp_hi=clamp_hi,
            used=used, total=total, rows=loc.numel() // a, value_row=upstream.row,
            value_column=upstream.column, loc_row=mu.row, loc_column=mu.column,
            scale_row=sigma.row, scale_column=sigma.column, **limits,
            A=a, COUNT=count, VALUE=upstream.layout, LOC=mu.layout, SCALE=sigma.layout,
            KIND=kind, PATHWISE=pathwise, BY_VALUE=grad_value is not None,
            BY_SCORE=grad_score is not None, BY_ENTROPY=grad_entropy is not None,
            CLAMP=clamped, HALVES=halves, FAST=fast(loc),
            num_warps=warps * (HALF_WARPS if halves else WARPS),
        )  # fmt: skip
    return fold(grad_loc, loc), fold(grad_scale, scale)


def score(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    low: Tensor | float,  # [*batch, *event]
    high: Tensor | float,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    *,
    entropy: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The log-density of a given value and the entropy, in one launch.

    Args:
        loc: as in `draw`.
        scale: as in `draw`.
        low: as in `draw`.
        high: as in `draw`.
        value: what is scored, `-inf` outside of the bounds; None for the entropy alone.
        ndims: number of event dimensions, summed over.
        entropy: whether the entropy is wanted.

    Returns:
        log-density `[*sample, *batch]`, of the dtype that loc and value promote to, and entropy
        `[*batch]`, of that of loc.
    """
    shape = torch.Size() if value is None else value.shape[: value.dim() - loc.dim()]
    batch = loc.shape[: loc.dim() - ndims]
    a = event_numel(loc.shape, ndims)
    dtype = loc.dtype if value is None else torch.promote_types(loc.dtype, value.dtype)
    scores = None if value is None else torch.empty(shape + batch, dtype=dtype, device=loc.device)
    entropies = torch.empty(batch, dtype=loc.dtype, device=loc.device) if entropy else None
    rows = loc.numel() // a if a else 0
    total_rows = rows * shape.numel()
    if total_rows == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return scores, entropies
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    (least, most), limits = _limits(low, high, ndims, bool(shape))
    given = mu if value is None else parameter(value, ndims, False)
    grid = forward_grid(total_rows, a, True)
    with launching(loc):
        score_kernel[(grid.programs,)](
            mu.tensor, sigma.tensor, least, most, given.tensor, scores, entropies,
            total_rows=total_rows, rows=rows, loc_row=mu.row, loc_column=mu.column,
            scale_row=sigma.row, scale_column=sigma.column, **limits,
            value_row=given.row, value_column=given.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, LOC=mu.layout, SCALE=sigma.layout,
            VALUE=given.layout, SCORE=value is not None, ENTROPY=entropy, FAST=fast(loc),
            num_warps=WARPS * grid.warps,
        )  # fmt: skip
    return scores, entropies


def score_backward(
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    low: Tensor | float,  # [*batch, *event]
    high: Tensor | float,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    scores: Tensor | None,  # [*sample, *batch]
    ndims: int,
    *,
    to_value: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `score` by loc, scale and value, of the shapes of these.

    Args:
        grad_score: gradient of the log-density, None for none.
        grad_entropy: gradient of the entropy, None for none.
        loc: as in `draw`.
        scale: as in `draw`.
        low: as in `draw`.
        high: as in `draw`.
        value: as in `score`.
        scores: what `score` has given; where it is `-inf` there is no gradient.
        ndims: as in `score`.
        to_value: whether the gradient of the value is wanted.
    """
    shape = torch.Size() if value is None else value.shape[: value.dim() - loc.dim()]
    a = event_numel(loc.shape, ndims)
    grad_loc, grad_scale = gradients(shape, loc), gradients(shape, scale)
    grad_value = (
        torch.empty(value.shape, dtype=value.dtype, device=loc.device)
        if to_value and value is not None
        else None
    )
    total = grad_loc.numel()
    if total == 0:
        return torch.zeros_like(loc), torch.zeros_like(scale), grad_value
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    (least, most), limits = _limits(low, high, ndims, bool(shape))
    given = mu if value is None else parameter(value, ndims, False)
    if grad_score is None and grad_value is not None:
        grad_value.zero_()
    to_value = grad_value is not None and grad_score is not None
    programs, count, warps = flat_grid(total)
    with launching(loc):
        score_backward_kernel[(programs,)](
            tail(grad_score), tail(grad_entropy), mu.tensor, sigma.tensor, least, most,
            given.tensor, tail(scores), grad_loc, grad_scale, grad_value,
            total=total, rows=loc.numel() // a, loc_row=mu.row, loc_column=mu.column,
            scale_row=sigma.row, scale_column=sigma.column, **limits,
            value_row=given.row, value_column=given.column,
            A=a, COUNT=count, LOC=mu.layout, SCALE=sigma.layout, VALUE=given.layout,
            BY_SCORE=grad_score is not None, BY_ENTROPY=grad_entropy is not None,
            TO_VALUE=to_value, FAST=fast(loc),
            num_warps=warps * (HALF_WARPS if loc.element_size() == 2 else WARPS),
        )  # fmt: skip
    return fold(grad_loc, loc), fold(grad_scale, scale), grad_value
