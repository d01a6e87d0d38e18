"""Beta with independent elements: sample, score and entropy in one pass, and backward.

With the concentrations a and b, T = a + b and y = 1 - x, over a row of A elements:

    log p(x) = sum((a - 1) log x + (b - 1) log y - log B(a, b))

A draw is G_a / (G_a + G_b) of two Gammas. A Gamma of concentration c >= 1 is d (1 + t)^3 with
d = c - 1/3 and t = z / (3 sqrt(d)) of a normal z, accepted where 1 + t > 0 and, for a uniform u,

    log u < 3 d (log(1 + t) - t + t^2 / 2 - t^3 / 3)

in which z^2 / 2 + d (1 - v + log v) of the source, v = (1 + t)^3, has been worked out: the terms
that cancel are gone, which at c = 1e6 are as large as 1 of fp32. Of c < 1 it is a Gamma of 1 + c
times U^(1 / c), taken as a logarithm and only in the quotient of the two, so that no concentration
is too small. A value is kept away from 0 and 1 by what torch's sampler keeps.

fp32 loses the digits of log B(a, b), of size T, against the other terms. Here large terms are
paired before they are rounded. With e = x b - y a, u = e / a and v = -e / b,

    log p(x) = -a D(u) - log x - b D(v) - log y + K(a) + K(b) - K(T)
    D(u) = u - log(1 + u)                    K(z) = z log z - z - log Gamma(z)

in which D is a series near 0 and -a D(u) - log x = (a - 1) log x + a log(T / a) - e elsewhere. K
grows as log(z) / 2. With r(z) = log z - psi(z) and s(z) = z psi'(z) - 1, all of them small,

    H = K(T) - K(a) - K(b) - log(T / a) - log(T / b) + (a - 1) r(a) + (b - 1) r(b) - (T - 2) r(T)
    d log p / da = log x + log(T / a) + r(a) - r(T)
    dH / da = s(T) - s(a) + (1 + s(a)) / a - 2 (1 + s(T)) / T

Source: Marsaglia and Tsang 2000, "A simple method for generating gamma variables"; for D, Loader
2000, "Fast and accurate computation of binomial probabilities".
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprob.kernels import _halves as halves
from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tile as tile
from fastprob.kernels._launch import (
    AMD,
    NO_STATE,
    Grid,
    State,
    bounds_of,
    event_numel,
    fast,
    flat_grid,
    fold,
    gradients,
    launching,
    limited,
    parameter,
    tail,
    vector_of,
    wide_grid,
)
from fastprob.kernels.bernoulli import cost_of_rest

# How a value is chosen. GIVEN is for gradients of a value that does not depend on the parameters.
RANDOM, MEAN, MODE, GIVEN = range(4)
_RANDOM, _MEAN, _MODE, _GIVEN = (tl.constexpr(kind) for kind in range(4))
# One try in 20 fails at a concentration of 1, and fewer elsewhere: 16 in a row have a chance of
# 2e-21. Such a Gamma would be d, its value at z = 0.
TRIES = tl.constexpr(16)
# Each try has counters of its own: elements stay below 2^48.
NEXT_TRY = tl.constexpr(1 << 48)
BOOST = tl.constexpr(0x7FFF << 48)
OVER_LN2_THREE = tl.constexpr(4.328085122666891)
# Tiles and their warps, 8 elements a thread, which takes up to 244 registers: a tile of more than
# 256 threads would spill. A tile tries on until its last element is accepted, so that a larger one
# tries more often, besides waiting for each other's warps.
SINGLE = (256, 1)
# For the gather of A that is no power of two: within one warp it goes by shuffles, and a draw at
# A = 17 takes 543 issue slots an element in place of 310.
SIZES = ((512, 2), (1024, 4), (2048, 8))
# Larger A go in chunks, which leave less empty than whole rows of a gather, a multiple of 4: a draw
# at A = 171 takes 305 issue slots an element in place of 423.
GATHERED = 64


@functools.lru_cache(maxsize=4096)
def tiling(rows: int, a: int, vector: int) -> Grid:
    """The tiles for `rows` rows of `a` elements, `vector` of which are 128 bits."""
    count, warps = SINGLE
    if a & (a - 1) == 0 and a <= count:
        own = count // a
        return Grid(-(-rows // own), count, count, own, own, False, False, warps)
    if a > GATHERED:
        # A vector of each thread: 8 elements in fp32 take as many issue slots and up to 255
        # registers in place of 164, and 8 bytes of stack with all that can be asked.
        return wide_grid(rows, a, 32 * vector, 1)
    # Whole rows that are whole vectors. The smallest tile that is at least seven eighths full, or
    # the fullest; where 8 elements leave none so, as at A = 37, with vectors of 4.
    for unit in (vector, 4):
        even = unit // math.gcd(a, unit)
        fitting = [(c, w, c // a // even * even) for c, w in SIZES if a * 4 <= c]
        full = [s for s in fitting if s[2] * a * 8 >= s[0] * 7]
        if full:
            break
    count, warps, own = full[0] if full else max(fitting, key=lambda s: s[2] * a / s[0])
    padded = triton.next_power_of_2(own)
    return Grid(-(-rows // own), count, own * a, padded, own, True, False, warps)


def form_of(grid: Grid, size: int, entropy: bool, amd: bool = False) -> int:
    """How the scores of a draw are computed, see `_halves`.

    In halves for rows of 16 bits in chunks, with the entropy: 8 elements at once had up to 24 bytes
    of stack on sm_100, whatever the assembler was told.

    Args:
        grid: the tiles.
        size: bytes of an element.
        entropy: whether the entropy is wanted.
        amd: whether it runs on AMD, where a thread has fewer.
    """
    return halves.EIGHTS if grid.wide and size == 2 and entropy and not amd else halves.WHOLE


def most_registers(grid: Grid, size: int, kind: int) -> int | None:
    """The most registers of a draw on NVIDIA's GPUs, None for the assembler's own choice.

    Draws of 16 bits in chunks have 16 bytes of stack on sm_100 where they are clamped at A = 260,
    or, in halves for the entropy, at A = 65; told 232, none. In fp32, with half the elements, it
    takes 128 at A = 257 on sm_80, and 8 bytes; told 168, none.

    Args:
        grid: the tiles.
        size: bytes of an element.
        kind: how the value is chosen.
    """
    if not grid.wide or kind != RANDOM:
        return None
    return 232 if size == 2 else 168


def most_registers_of_backward(kind: int, clamp: int) -> int | None:
    """The same of a gradient.

    That is 128 on sm_90 for a mean clamped to bounds of each element, and 8 bytes of stack; told
    144, none.
    """
    return 144 if kind == MEAN and clamp else None


@triton.jit
def _any_below_one(a, b):
    """Whether a tile needs the formulas for a concentration below 1."""
    return tl.min(tl.minimum(a, b), 0) < 1.0


@triton.jit
def _log_uniform(word, FAST: tl.constexpr):
    """The logarithm to base 2 of a word as a uniform in (0, 1]."""
    return m.log2((word.to(tl.float32) + 1.0) * 2.3283064365386963e-10, FAST)


@triton.jit
def _normals(a, b, FAST: tl.constexpr):
    """Two standard normals of two words, as `_random.box_muller` has them."""
    if FAST:
        return random.box_muller(a, b, FAST)
    else:
        radius = tl.sqrt(tl.abs(_log_uniform(a, FAST) * -1.3862943611198906))
        turn = b.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
        cosine, sine = m.cos_sin_of_turn(turn)
        return radius * cosine, radius * sine


@triton.jit
def _shape(c, FAST: tl.constexpr):
    """d, and 1 / (3 sqrt(d)), of a concentration."""
    d = tl.where(c < 1.0, c + 1.0, c) - 0.3333333333333333
    return d, m.reciprocal(m.sqrt(d, FAST), FAST) * 0.3333333333333333


@triton.jit
def _try(root, d, scale, z, log_u, FAST: tl.constexpr):
    """One try of a Gamma: 1 + t where it is accepted, what there was where there was something.

    Args:
        root: 1 + t of those accepted before, 0 of others.
        d: as in `_shape`.
        scale: likewise.
        z: standard normals.
        log_u: logarithm to base 2 of uniforms.
        FAST: as in `_math`.
    """
    t = z * scale
    square = t * t
    new = 1.0 + t
    near = square * square * m.log1p_beyond_cube(t)
    cubic = t * (t * (0.5 - t * 0.3333333333333333) - 1.0)
    far = m.log2(tl.maximum(new, 1e-9), FAST) * m.LN2 + cubic
    bound = d * tl.where(tl.abs(t) < 0.25, near, far) * OVER_LN2_THREE
    taken = tl.maximum(tl.where(log_u < bound, new, 0.0), 0.0)
    return tl.where(root == 0.0, taken, root)


@triton.jit
def drawn(a, b, seed, call, start, i, LEAST: tl.constexpr, MOST: tl.constexpr, FAST: tl.constexpr):
    """Draws, between LEAST and MOST.

    Args:
        a: concentration1, `[COUNT]`.
        b: concentration0.
        seed: int64 scalar, the key.
        call: int64 scalar, the number of the draw.
        start: int64 scalar, flat index of the tile's first element.
        i: int32 `[COUNT]`, the elements from there.
        LEAST: the smallest value.
        MOST: the largest.
        FAST: as in `_math`.
    """
    element = start + i
    d_a, scale_a = _shape(a, FAST)
    d_b, scale_b = _shape(b, FAST)
    root_a = tl.zeros_like(a)
    root_b = tl.zeros_like(b)
    left = tl.full([], TRIES, tl.int32)
    counter = element
    while left > 0:
        first, second, third, fourth = random.philox(seed, call, counter)
        z_a, z_b = _normals(first, second, FAST)
        root_a = _try(root_a, d_a, scale_a, z_a, _log_uniform(third, FAST), FAST)
        root_b = _try(root_b, d_b, scale_b, z_b, _log_uniform(fourth, FAST), FAST)
        least = tl.min(tl.minimum(root_a, root_b), 0)
        counter += NEXT_TRY
        left = tl.where(least == 0.0, left - 1, 0)
        if not FAST:
            # Adds 0, as no root is below 0: AMD's compiler would keep the keys of all rounds in
            # registers from one try to the next, and has 24 scalar ones too few.
            seed += tl.where(least < 0.0, 1, 0)
    root_a = tl.where(root_a == 0.0, 1.0, root_a)
    root_b = tl.where(root_b == 0.0, 1.0, root_b)
    gamma_a = d_a * root_a * root_a * root_a
    gamma_b = d_b * root_b * root_b * root_b
    if _any_below_one(a, b):
        first, second, _, _ = random.philox(seed, call, element + BOOST)
        # In units of the smaller concentration: two that overflow would have no difference.
        unit = tl.minimum(a, b)
        less_a = _log_uniform(first, FAST) * (unit * m.reciprocal(a, FAST))
        less_b = _log_uniform(second, FAST) * (unit * m.reciprocal(b, FAST))
        less = tl.where(b < 1.0, less_b, 0.0) - tl.where(a < 1.0, less_a, 0.0)
        less = tl.minimum(tl.maximum(less, -200.0 * unit), 200.0 * unit) * m.reciprocal(unit, FAST)
        # The smaller one is made smaller: neither overflows, and never are both 0.
        gamma_a *= m.exp2(tl.minimum(-less, 0.0), FAST)
        gamma_b *= m.exp2(tl.minimum(less, 0.0), FAST)
    x = gamma_a * m.reciprocal(gamma_a + gamma_b, FAST)
    return tile.clamp(x, LEAST, MOST)


@triton.jit
def mode(a, b):
    """Where the density is highest; 1/2 where it is flat, and the end where it is infinite."""
    up = tl.maximum(a - 1.0, 0.0)
    down = tl.maximum(b - 1.0, 0.0)
    inner = up + down
    end = tl.where((a == 1.0) & (b == 1.0), 0.5, tl.where(a >= b, 1.0, 0.0))
    return tl.where(inner > 0.0, up / tl.where(inner > 0.0, inner, 1.0), end)


@triton.jit
def _inverses(a, b, FAST: tl.constexpr):
    """`a + b`, and the reciprocals of a, b and the sum."""
    total = a + b
    return (
        total,
        m.reciprocal(a, FAST),
        m.reciprocal(b, FAST),
        m.reciprocal(total, FAST),
    )


@triton.jit
def _logs(a, b, x, ENDS: tl.constexpr, FAST: tl.constexpr):
    """`log x` and `log(1 - x)`; 0 at an end where the concentration is 1, as xlogy has it.

    Each to its own last digits: of 1 less a small number by a polynomial.
    """
    y = 1.0 - x
    small = tl.minimum(x, y)
    rest = -cost_of_rest(small, 1e-7)
    if ENDS and not FAST:
        # NumPy, which interprets it, warns of a logarithm of 0.
        log_small = m.log(tl.where(small == 0.0, 1.0, small), FAST)
        log_small = tl.where(small == 0.0, float("-inf"), log_small)
    else:
        log_small = m.log(small, FAST)
    log_x = tl.where(x < y, log_small, rest)
    log_y = tl.where(x < y, rest, log_small)
    if ENDS:
        log_x = tl.where((x == 0.0) & (a == 1.0), 0.0, log_x)
        log_y = tl.where((y == 0.0) & (b == 1.0), 0.0, log_y)
    return y, log_x, log_y


@triton.jit
def _shares(total, by_a, by_b, FAST: tl.constexpr):
    """`log(T / a)`, `log(T / b)` and `log T`."""
    return m.log(total * by_a, FAST), m.log(total * by_b, FAST), m.log(total, FAST)


@triton.jit
def _norm(a, b, total, by_a, by_b, by_total, share_a, share_b, log_total):
    """`K(a) + K(b) - K(T)`."""
    log_a = log_total - share_a
    log_b = log_total - share_b
    k_a = 0.5 * log_a - m.HALF_LOG_2PI - m.stirling_rest(tl.minimum(by_a, 1.0))
    k_b = 0.5 * log_b - m.HALF_LOG_2PI - m.stirling_rest(tl.minimum(by_b, 1.0))
    k_total = 0.5 * log_total - m.HALF_LOG_2PI - m.stirling_rest(tl.minimum(by_total, 1.0))
    if _any_below_one(a, b):
        k_a = tl.where(a < 1.0, _small_k(a, log_a), k_a)
        k_b = tl.where(b < 1.0, _small_k(b, log_b), k_b)
        k_total = tl.where(total < 1.0, _small_k(total, log_total), k_total)
    return k_a + k_b - k_total


@triton.jit
def _small_k(z, log_z):
    """K of z below 1, by Gamma(z) = Gamma(1 + z) / z; of others a finite number."""
    return z * log_z - z + log_z - m.log_gamma1p(tl.minimum(z, 1.0))


@triton.jit
def _digammas(a, b, total, by_a, by_b, by_total, share_a, share_b, log_total):
    """The r of a, b and T."""
    r_a = m.digamma_gap(tl.minimum(by_a, 1.0))
    r_b = m.digamma_gap(tl.minimum(by_b, 1.0))
    r_total = m.digamma_gap(tl.minimum(by_total, 1.0))
    if _any_below_one(a, b):
        r_a = tl.where(a < 1.0, _small_r(a, by_a, log_total - share_a), r_a)
        r_b = tl.where(b < 1.0, _small_r(b, by_b, log_total - share_b), r_b)
        r_total = tl.where(total < 1.0, _small_r(total, by_total, log_total), r_total)
    return r_a, r_b, r_total


@triton.jit
def _small_r(z, by_z, log_z):
    """The r of z below 1, by psi(z) = psi(1 + z) - 1 / z."""
    return by_z + (log_z - m.digamma1p(tl.minimum(z, 1.0)))


@triton.jit
def _trigammas(a, b, total, by_a, by_b, by_total):
    """The s of a, b and T."""
    s_a = m.trigamma_excess(tl.minimum(by_a, 1.0))
    s_b = m.trigamma_excess(tl.minimum(by_b, 1.0))
    s_total = m.trigamma_excess(tl.minimum(by_total, 1.0))
    if _any_below_one(a, b):
        s_a = tl.where(a < 1.0, _small_s(a, by_a), s_a)
        s_b = tl.where(b < 1.0, _small_s(b, by_b), s_b)
        s_total = tl.where(total < 1.0, _small_s(total, by_total), s_total)
    return s_a, s_b, s_total


@triton.jit
def _small_s(z, by_z):
    """The s of z below 1, by psi'(z) = psi'(1 + z) + 1 / z^2."""
    return by_z + (z * m.trigamma1p(tl.minimum(z, 1.0)) - 1.0)


@triton.jit
def scored(
    a, b, x, SCORE: tl.constexpr, ENTROPY: tl.constexpr, ENDS: tl.constexpr, FAST: tl.constexpr
):
    """Log-density of x and entropy; a wrong number for what is not wanted.

    Args:
        a: concentration1.
        b: concentration0.
        x: values, from 0 to 1.
        SCORE: whether the log-density is wanted.
        ENTROPY: whether the entropy is wanted.
        ENDS: whether a value may be 0 or 1.
        FAST: as in `_math`.
    """
    total, by_a, by_b, by_total = _inverses(a, b, FAST)
    share_a, share_b, log_total = _shares(total, by_a, by_b, FAST)
    norm = _norm(a, b, total, by_a, by_b, by_total, share_a, share_b, log_total)
    score = norm
    if SCORE:
        y, log_x, log_y = _logs(a, b, x, ENDS, FAST)
        e = tl.fma(x, b, -(y * a))
        u = e * by_a
        v = -e * by_b
        near = -e * u * m.log1p_gap(u) - log_x
        far = (a - 1.0) * log_x + (a * share_a - e)
        score += tl.where(tl.abs(u) < 0.25, near, far)
        near = e * v * m.log1p_gap(v) - log_y
        far = (b - 1.0) * log_y + (b * share_b + e)
        score += tl.where(tl.abs(v) < 0.25, near, far)
    entropy = norm
    if ENTROPY:
        r_a, r_b, r_total = _digammas(
            a, b, total, by_a, by_b, by_total, share_a, share_b, log_total
        )
        entropy = (a - 1.0) * r_a + (b - 1.0) * r_b - (total - 2.0) * r_total
        entropy -= norm + share_a + share_b
    return score, entropy


@triton.jit
def _scored(
    a, b, x, COUNT: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr, ENDS: tl.constexpr,
    FAST: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """`scored`, of one half of a tile after the other where CUT, see `_halves`."""
    if CUT == halves._WHOLE:
        return scored(a, b, x, SCORE, ENTROPY, ENDS, FAST)
    else:
        a0, a1 = halves.cut(a, COUNT, CUT)
        b0, b1 = halves.cut(b, COUNT, CUT)
        x0, x1 = halves.cut(x, COUNT, CUT)
        score0, score1 = a0, a1
        entropy0, entropy1 = a0, a1
        for _ in range(2):
            score, entropy = scored(a0, b0, x0, SCORE, ENTROPY, ENDS, FAST)
            score0, score1 = score1, score
            entropy0, entropy1 = entropy1, entropy
            a0, b0, x0 = a1, b1, x1
        return (
            halves.joined_terms(score0, score1, COUNT, CUT),
            halves.joined_terms(entropy0, entropy1, COUNT, CUT),
        )


@triton.jit
def _draw_tile(
    conc1, conc0, value, drawn_value, low, high, lo, hi, seed, call,
    start, read, kept, rows,
    conc1_row, conc1_column, conc0_row, conc0_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, CONC1: tl.constexpr,
    CONC0: tl.constexpr, KIND: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, CLAMP: tl.constexpr, KEEP: tl.constexpr,
    FAST: tl.constexpr, CUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes the values of one tile; gives their scores and entropies.

    Of a tile that is not WHOLE the first `read` elements are drawn and the first `kept` of them
    stored.
    """
    i = tl.arange(0, COUNT)
    there = i < read
    stored = i < kept
    a = tile.load(
        conc1, start, i, there, 1.0, rows, conc1_row, conc1_column, A, COUNT, CONC1, WHOLE
    )
    b = tile.load(
        conc0, start, i, there, 1.0, rows, conc0_row, conc0_column, A, COUNT, CONC0, WHOLE
    )
    if KIND == _RANDOM:
        x = drawn(a, b, seed, call, start, i, LEAST, MOST, FAST)
    elif KIND == _MODE:
        x = mode(a, b)
    else:
        x = m.divide(a, a + b, FAST)
    if KEEP:
        tile.store(drawn_value, start, x, i, stored, COUNT, TILE, WHOLE)
    if CLAMP:
        bottom, top = tile.bounds(low, high, lo, hi, start, i, A, COUNT, CLAMP)
        tile.store(value, start, tile.clamp(x, bottom, top), i, stored, COUNT, TILE, WHOLE)
    else:
        tile.store(value, start, x, i, stored, COUNT, TILE, WHOLE)
    score = tl.zeros([COUNT], tl.float32)
    entropy = score
    if SCORE or ENTROPY:
        # The score is that of the value as it is stored, or would be without a clamp.
        x = x.to(value.dtype.element_ty).to(tl.float32)
        score, entropy = _scored(a, b, x, COUNT, SCORE, ENTROPY, KIND != _RANDOM, FAST, CUT)
    return score, entropy


@triton.jit
def _store_sums(
    score, entropy, scores, entropies, first, total_rows, rows,
    A: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr,
    GATHER: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The scores and entropies of a tile's rows, from those of its elements."""
    if SCORE:
        sums = tile.sum_rows(scores, A, COUNT, ROWS, OWN, GATHER)
        tile.store_rows(score, first, sums, total_rows, ROWS, OWN, WHOLE)
    if ENTROPY:
        sums = tile.sum_rows(entropies, A, COUNT, ROWS, OWN, GATHER)
        # An entropy has no sample dimensions: the rows of the first sample write it.
        tile.store_rows(entropy, first, sums, rows, ROWS, OWN, False)


@triton.jit
def _draw_rows(
    conc1, conc0, value, score, entropy, drawn_value, low, high, lo, hi, seed, call,
    program, total_rows, rows, conc1_row, conc1_column, conc0_row, conc0_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, CONC1: tl.constexpr,
    CONC0: tl.constexpr, KIND: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, CLAMP: tl.constexpr, KEEP: tl.constexpr,
    FAST: tl.constexpr, CUT: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """OWN wide rows chunk by chunk; UNIT and LAST as of `_tile.wide_rows`."""
    THREADS: tl.constexpr = 32  # One warp.
    start, skip, last, read, kept = tile.wide_rows(program, total_rows, A, OWN, UNIT, LAST)
    i = tl.arange(0, COUNT)
    scores = tl.zeros([THREADS], tl.float32)
    entropies = tl.zeros([THREADS], tl.float32)
    row = program * OWN
    end = skip + A
    for chunk in range(0, last, COUNT):
        terms, more = _draw_tile(
            conc1, conc0, value, drawn_value, low, high, lo, hi, seed, call,
            start + chunk, read - chunk, kept - chunk, rows,
            conc1_row, conc1_column, conc0_row, conc0_column,
            A, COUNT, COUNT, CONC1, CONC0, KIND, LEAST, MOST, SCORE, ENTROPY, CLAMP, KEEP, FAST,
            CUT, A % COUNT == 0,
        )  # fmt: skip
        if chunk < skip:
            terms = tl.where(i < skip, 0.0, terms)
            more = tl.where(i < skip, 0.0, more)
        while end <= tl.minimum(chunk + COUNT, last):
            scores, terms = tile.ended(scores, terms, i, end - chunk, COUNT, THREADS, UNIT)
            entropies, more = tile.ended(entropies, more, i, end - chunk, COUNT, THREADS, UNIT)
            _store_sums(
                score, entropy, scores, entropies, row, total_rows, rows,
                A, THREADS, 1, 1, False, SCORE, ENTROPY, True,
            )  # fmt: skip
            scores = tl.zeros([THREADS], tl.float32)
            entropies = tl.zeros([THREADS], tl.float32)
            row += 1
            end += A
        scores += tile.of_threads(terms, COUNT, THREADS, UNIT)
        entropies += tile.of_threads(more, COUNT, THREADS, UNIT)


@triton.jit(do_not_specialize=["seed", "call", "total_rows", "rows"])
def draw_kernel(
    conc1, conc0, value, score, entropy, drawn_value, low, high, lo, hi,
    state, used, ticket, seed, call, total_rows, rows,
    conc1_row, conc1_column, conc0_row, conc0_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, CONC1: tl.constexpr,
    CONC0: tl.constexpr, KIND: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, CLAMP: tl.constexpr, KEEP: tl.constexpr,
    HOST: tl.constexpr, ADVANCE: tl.constexpr, FAST: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Values, scores and entropies of OWN rows; chunk by chunk where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    if KIND == _RANDOM:
        seed, call = random.open_state(state, seed, call, HOST)
    if WIDE:
        UNIT: tl.constexpr = tile.vector(value.dtype.element_ty.primitive_bitwidth)
        if A % UNIT == 0 or (program + 1) * OWN < total_rows:
            _draw_rows(
                conc1, conc0, value, score, entropy, drawn_value, low, high, lo, hi, seed, call,
                program, total_rows, rows, conc1_row, conc1_column, conc0_row, conc0_column,
                A, COUNT, OWN, CONC1, CONC0, KIND, LEAST, MOST, SCORE, ENTROPY, CLAMP, KEEP, FAST,
                CUT, UNIT, False,
            )  # fmt: skip
        else:
            _draw_rows(
                conc1, conc0, value, score, entropy, drawn_value, low, high, lo, hi, seed, call,
                program, total_rows, rows, conc1_row, conc1_column, conc0_row, conc0_column,
                A, COUNT, OWN, CONC1, CONC0, KIND, LEAST, MOST, SCORE, ENTROPY, CLAMP, KEEP, FAST,
                CUT, UNIT, True,
            )  # fmt: skip
    else:
        start = program * TILE
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            scores, entropies = _draw_tile(
                conc1, conc0, value, drawn_value, low, high, lo, hi, seed, call,
                start, COUNT, COUNT, rows,
                conc1_row, conc1_column, conc0_row, conc0_column,
                A, COUNT, TILE, CONC1, CONC0, KIND, LEAST, MOST, SCORE, ENTROPY, CLAMP, KEEP,
                FAST, CUT, True,
            )  # fmt: skip
            _store_sums(
                score, entropy, scores, entropies, program * OWN, total_rows, rows,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, True,
            )  # fmt: skip
        else:
            left = tl.minimum(end - start, TILE).to(tl.int32)
            scores, entropies = _draw_tile(
                conc1, conc0, value, drawn_value, low, high, lo, hi, seed, call,
                start, left, left, rows,
                conc1_row, conc1_column, conc0_row, conc0_column,
                A, COUNT, TILE, CONC1, CONC0, KIND, LEAST, MOST, SCORE, ENTROPY, CLAMP, KEEP,
                FAST, CUT, False,
            )  # fmt: skip
            _store_sums(
                score, entropy, scores, entropies, program * OWN, total_rows, rows,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip
    if KIND == _RANDOM:
        if not FAST:
            # Read again, which costs less than scalar registers all the way.
            seed, call = random.open_state(state, seed, call, HOST)
        random.close_state(state, used, ticket, seed, call, ADVANCE, False)


@triton.jit
def _score_tile(
    conc1, conc0, value, start, read, rows,
    conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, CONC1: tl.constexpr, CONC0: tl.constexpr,
    VALUE: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr, FAST: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores and entropies of the elements of one tile; `read` as of `_draw_tile`."""
    i = tl.arange(0, COUNT)
    there = i < read
    a = tile.load(
        conc1, start, i, there, 1.0, rows, conc1_row, conc1_column, A, COUNT, CONC1, WHOLE
    )
    b = tile.load(
        conc0, start, i, there, 1.0, rows, conc0_row, conc0_column, A, COUNT, CONC0, WHOLE
    )
    x = a
    if SCORE:
        x = tile.load(
            value, start, i, there, 0.5, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
        )
    return scored(a, b, x, SCORE, ENTROPY, True, FAST)


@triton.jit
def _score_rows(
    conc1, conc0, value, score, entropy, program, total_rows, rows,
    conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, CONC1: tl.constexpr,
    CONC0: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The scores and entropies of wide rows, as in `_draw_rows`."""
    THREADS: tl.constexpr = 32  # One warp.
    start, skip, last, read, _ = tile.wide_rows(program, total_rows, A, OWN, UNIT, LAST)
    i = tl.arange(0, COUNT)
    scores = tl.zeros([THREADS], tl.float32)
    entropies = tl.zeros([THREADS], tl.float32)
    row = program * OWN
    end = skip + A
    for chunk in range(0, last, COUNT):
        terms, more = _score_tile(
            conc1, conc0, value, start + chunk, read - chunk, rows,
            conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
            A, COUNT, CONC1, CONC0, VALUE, SCORE, ENTROPY, FAST, A % COUNT == 0,
        )  # fmt: skip
        if chunk < skip:
            terms = tl.where(i < skip, 0.0, terms)
            more = tl.where(i < skip, 0.0, more)
        while end <= tl.minimum(chunk + COUNT, last):
            scores, terms = tile.ended(scores, terms, i, end - chunk, COUNT, THREADS, UNIT)
            entropies, more = tile.ended(entropies, more, i, end - chunk, COUNT, THREADS, UNIT)
            _store_sums(
                score, entropy, scores, entropies, row, total_rows, rows,
                A, THREADS, 1, 1, False, SCORE, ENTROPY, True,
            )  # fmt: skip
            scores = tl.zeros([THREADS], tl.float32)
            entropies = tl.zeros([THREADS], tl.float32)
            row += 1
            end += A
        scores += tile.of_threads(terms, COUNT, THREADS, UNIT)
        entropies += tile.of_threads(more, COUNT, THREADS, UNIT)


@triton.jit(do_not_specialize=["total_rows", "rows"])
def score_kernel(
    conc1, conc0, value, score, entropy, total_rows, rows,
    conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, CONC1: tl.constexpr,
    CONC0: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Scores of given values, and entropies, of OWN rows; chunk by chunk where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    if WIDE:
        UNIT: tl.constexpr = tile.vector(
            conc1.dtype.element_ty.primitive_bitwidth, value.dtype.element_ty.primitive_bitwidth
        )
        if A % UNIT == 0 or (program + 1) * OWN < total_rows:
            _score_rows(
                conc1, conc0, value, score, entropy, program, total_rows, rows,
                conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
                A, COUNT, OWN, CONC1, CONC0, VALUE, SCORE, ENTROPY, FAST, UNIT, False,
            )  # fmt: skip
        else:
            _score_rows(
                conc1, conc0, value, score, entropy, program, total_rows, rows,
                conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
                A, COUNT, OWN, CONC1, CONC0, VALUE, SCORE, ENTROPY, FAST, UNIT, True,
            )  # fmt: skip
    else:
        start = program * TILE
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            scores, entropies = _score_tile(
                conc1, conc0, value, start, COUNT, rows,
                conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
                A, COUNT, CONC1, CONC0, VALUE, SCORE, ENTROPY, FAST, True,
            )  # fmt: skip
            _store_sums(
                score, entropy, scores, entropies, program * OWN, total_rows, rows,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, True,
            )  # fmt: skip
        else:
            left = tl.minimum(end - start, TILE).to(tl.int32)
            scores, entropies = _score_tile(
                conc1, conc0, value, start, left, rows,
                conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
                A, COUNT, CONC1, CONC0, VALUE, SCORE, ENTROPY, FAST, False,
            )  # fmt: skip
            _store_sums(
                score, entropy, scores, entropies, program * OWN, total_rows, rows,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip


@triton.jit
def _backward_tile(
    grad_value, grad_score, grad_entropy, conc1, conc0, value, by_conc1, by_conc0,
    grad_conc1, grad_conc0, grad_scored, low, high, lo, hi, start, left, rows,
    conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
    upstream_row, upstream_column,
    A: tl.constexpr, COUNT: tl.constexpr, CONC1: tl.constexpr, CONC0: tl.constexpr,
    VALUE: tl.constexpr, UPSTREAM: tl.constexpr, KIND: tl.constexpr, BY_VALUE: tl.constexpr,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr,
    CLAMP: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    a = tile.load(
        conc1, start, i, inside, 1.0, rows, conc1_row, conc1_column, A, COUNT, CONC1, WHOLE
    )
    b = tile.load(
        conc0, start, i, inside, 1.0, rows, conc0_row, conc0_column, A, COUNT, CONC0, WHOLE
    )
    total, by_a, by_b, by_total = _inverses(a, b, FAST)
    grad_a = tl.zeros([COUNT], tl.float32)
    grad_b = grad_a
    along = grad_a
    x = by_a
    y = by_b
    if BY_SCORE or KIND != _GIVEN:
        x = tile.load(
            value, start, i, inside, 0.5, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
        )
        y = 1.0 - x
    if BY_VALUE:
        along = tile.load(
            grad_value, start, i, inside, 0.0, rows, upstream_row, upstream_column,
            A, COUNT, UPSTREAM, WHOLE,
        )  # fmt: skip
        if CLAMP:
            # x is what was drawn. One that rounds to a bound is a bound, as in the value's dtype.
            bottom, top = tile.bounds(low, high, lo, hi, start, i, A, COUNT, CLAMP)
            kept = tile.clamp(x, bottom, top).to(value.dtype.element_ty).to(tl.float32) == x
            along = tl.where(kept, along, 0.0)
    if BY_SCORE:
        share_a, share_b, log_total = _shares(total, by_a, by_b, FAST)
        r_a, r_b, r_total = _digammas(
            a, b, total, by_a, by_b, by_total, share_a, share_b, log_total
        )
        y, log_x, log_y = _logs(total, total, x, True, FAST)
        by_row = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
        e = tl.fma(x, b, -(y * a))
        u = e * by_a
        v = -e * by_b
        ratio_a = tl.where(tl.abs(u) < 0.25, u - u * u * m.log1p_gap(u), log_x + share_a)
        ratio_b = tl.where(tl.abs(v) < 0.25, v - v * v * m.log1p_gap(v), log_y + share_b)
        grad_a = by_row * (ratio_a + (r_a - r_total))
        grad_b = by_row * (ratio_b + (r_b - r_total))
        if TO_VALUE or KIND != _GIVEN:
            # At an end the largest number in place of infinity, which `divide` does not bear.
            slope = m.divide(a - 1.0, tl.where(x == 0.0, 1.2e-38, x), FAST)
            slope -= m.divide(b - 1.0, tl.where(y == 0.0, 1.2e-38, y), FAST)
            if TO_VALUE:
                tile.store(grad_scored, start, by_row * slope, i, inside, COUNT, COUNT, WHOLE)
            elif KIND == _MODE:
                # 0 but for the rounding of x, whose share in the other terms it takes back. At an
                # end the mode stays where it is.
                along += tl.where(x * y > 0.0, by_row * slope, 0.0)
            else:
                along += by_row * slope
    if KIND == _RANDOM:
        if WHOLE:
            slope_a = tl.load(by_conc1 + start + i)
            slope_b = tl.load(by_conc0 + start + i)
        else:
            slope_a = tl.load(by_conc1 + start + i, mask=inside, other=0.0)
            slope_b = tl.load(by_conc0 + start + i, mask=inside, other=0.0)
        grad_a += along * (slope_a * y)
        grad_b -= along * (slope_b * x)
    elif KIND == _MEAN:
        grad_a += along * (y * by_total)
        grad_b -= along * (x * by_total)
    elif KIND == _MODE:
        inner = tl.maximum(a - 1.0, 0.0) + tl.maximum(b - 1.0, 0.0)
        rate = along * m.reciprocal(tl.where(inner > 0.0, inner, 1.0), FAST)
        grad_a += tl.where((inner > 0.0) & (a > 1.0), rate * y, 0.0)
        grad_b -= tl.where((inner > 0.0) & (b > 1.0), rate * x, 0.0)
    if BY_ENTROPY:
        # The entropy has no sample dimensions: its gradient goes to the first sample alone.
        per_row = tile.of_first_rows(grad_entropy, start, i, inside, rows, A, COUNT, WHOLE)
        s_a, s_b, s_total = _trigammas(a, b, total, by_a, by_b, by_total)
        shared = s_total - 2.0 * (1.0 + s_total) * by_total
        grad_a += per_row * (shared - s_a + (1.0 + s_a) * by_a)
        grad_b += per_row * (shared - s_b + (1.0 + s_b) * by_b)
    tile.store(grad_conc1, start, grad_a, i, inside, COUNT, COUNT, WHOLE)
    tile.store(grad_conc0, start, grad_b, i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["total", "rows"])
def backward_kernel(
    grad_value, grad_score, grad_entropy, conc1, conc0, value, by_conc1, by_conc0,
    grad_conc1, grad_conc0, grad_scored, low, high, lo, hi, total, rows,
    conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
    upstream_row, upstream_column,
    A: tl.constexpr, COUNT: tl.constexpr, CONC1: tl.constexpr, CONC0: tl.constexpr,
    VALUE: tl.constexpr, UPSTREAM: tl.constexpr, KIND: tl.constexpr, BY_VALUE: tl.constexpr,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr,
    CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of COUNT elements, of a value that is given or has derivatives by KIND."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _backward_tile(
            grad_value, grad_score, grad_entropy, conc1, conc0, value, by_conc1, by_conc0,
            grad_conc1, grad_conc0, grad_scored, low, high, lo, hi, start, COUNT, rows,
            conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
            upstream_row, upstream_column,
            A, COUNT, CONC1, CONC0, VALUE, UPSTREAM, KIND, BY_VALUE, BY_SCORE, BY_ENTROPY,
            TO_VALUE, CLAMP, FAST, True,
        )  # fmt: skip
    else:
        _backward_tile(
            grad_value, grad_score, grad_entropy, conc1, conc0, value, by_conc1, by_conc0,
            grad_conc1, grad_conc0, grad_scored, low, high, lo, hi, start,
            (total - start).to(tl.int32), rows,
            conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
            upstream_row, upstream_column,
            A, COUNT, CONC1, CONC0, VALUE, UPSTREAM, KIND, BY_VALUE, BY_SCORE, BY_ENTROPY,
            TO_VALUE, CLAMP, FAST, False,
        )  # fmt: skip


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and the largest value that a draw may have: the ends of torch's sampler."""
    info = torch.finfo(dtype)
    return info.tiny, 1.0 - info.eps / 2


def draw(
    concentration1: Tensor,  # [*batch, *event]
    concentration0: Tensor,  # [*batch, *event]
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
    """A value, its score, the entropy and the value before its clamp, in one launch.

    Args:
        concentration1: a, greater than 0; of one shape, dtype and device with the other.
        concentration0: b, likewise.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions, summed over.
        kind: RANDOM, MEAN or MODE.
        state: where the noise comes from, for a RANDOM value.
        score: whether the log-density is wanted.
        entropy: whether the entropy is wanted.
        clamp: the operators' `Bounds` that the value is clamped to after it was scored, or None.
        keep: whether the value before the clamp is wanted, which a backward pass reads.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`, entropy `[*batch]` and
        the value before the clamp, which without one is the value; None for what was not wanted.
    """
    like = concentration1
    full = shape + like.shape
    batch = like.shape[: like.dim() - ndims]
    a = event_numel(like.shape, ndims)
    value = torch.empty(full, dtype=like.dtype, device=like.device)
    scores = torch.empty(shape + batch, dtype=like.dtype, device=like.device) if score else None
    entropies = torch.empty(batch, dtype=like.dtype, device=like.device) if entropy else None
    kind_of_clamp, lo, hi, low, high = bounds_of(clamp)
    before = torch.empty_like(value) if keep and kind_of_clamp else None
    kept = (value if before is None else before) if keep else None
    total = value.numel()
    if total == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return value, scores, entropies, kept
    one = parameter(concentration1, ndims, bool(shape))
    zero = parameter(concentration0, ndims, bool(shape))
    least, most = limits(like.dtype)
    source = state or NO_STATE
    grid = tiling(total // a, a, vector_of(like.dtype))
    registers = most_registers(grid, like.element_size(), kind)
    with launching(like):
        draw_kernel[(grid.programs,)](
            one.tensor, zero.tensor, value, scores, entropies, before, low, high, lo, hi,
            source.pair, None, source.ticket, source.seed, source.call,
            total // a, like.numel() // a, one.row, one.column, zero.row, zero.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, CONC1=one.layout, CONC0=zero.layout, KIND=kind,
            LEAST=least, MOST=most, SCORE=score, ENTROPY=entropy, CLAMP=kind_of_clamp,
            KEEP=before is not None, HOST=source.pair is None, ADVANCE=source.ticket is not None,
            FAST=fast(like), CUT=form_of(grid, like.element_size(), entropy, AMD),
            num_warps=grid.warps, **limited(like, registers),
        )  # fmt: skip
    return value, scores, entropies, kept


def score(
    concentration1: Tensor,  # [*batch, *event]
    concentration0: Tensor,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    *,
    entropy: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The log-density of a given value and the entropy, in one launch.

    Args:
        concentration1: as in `draw`.
        concentration0: as in `draw`.
        value: what is scored, from 0 to 1; None for the entropy alone.
        ndims: number of event dimensions, summed over.
        entropy: whether the entropy is wanted.

    Returns:
        log-density `[*sample, *batch]`, of the dtype that concentration and value promote to, and
        entropy `[*batch]`, of that of the concentration.
    """
    like = concentration1
    shape = torch.Size() if value is None else value.shape[: value.dim() - like.dim()]
    batch = like.shape[: like.dim() - ndims]
    a = event_numel(like.shape, ndims)
    dtype = like.dtype if value is None else torch.promote_types(like.dtype, value.dtype)
    scores = None if value is None else torch.empty(shape + batch, dtype=dtype, device=like.device)
    entropies = torch.empty(batch, dtype=like.dtype, device=like.device) if entropy else None
    rows = like.numel() // a if a else 0
    total_rows = rows * shape.numel()
    if total_rows == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return scores, entropies
    one = parameter(concentration1, ndims, bool(shape))
    zero = parameter(concentration0, ndims, bool(shape))
    given = one if value is None else parameter(value, ndims, False)
    grid = tiling(total_rows, a, vector_of(like.dtype, given.tensor.dtype))
    with launching(like):
        score_kernel[(grid.programs,)](
            one.tensor, zero.tensor, given.tensor, scores, entropies, total_rows, rows,
            one.row, one.column, zero.row, zero.column, given.row, given.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, CONC1=one.layout, CONC0=zero.layout,
            VALUE=given.layout, SCORE=value is not None, ENTROPY=entropy, FAST=fast(like),
            num_warps=grid.warps,
        )  # fmt: skip
    return scores, entropies


def draw_backward(
    grad_value: Tensor | None,  # [*sample, *batch, *event]
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    concentration1: Tensor,  # [*batch, *event]
    concentration0: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event]
    ndims: int,
    *,
    kind: int = RANDOM,
    clamp: Any = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `draw` by the concentrations, of their shape.

    The value is read where the other families draw theirs anew: it is 4 bytes of 20, and a draw is
    190 issue slots and more.

    Args:
        grad_value: gradient of the value, None for none.
        grad_score: gradient of the log-density, None for none.
        grad_entropy: gradient of the entropy, None for none.
        concentration1: as in `draw`.
        concentration0: as in `draw`.
        value: what `draw` has given, before its clamp.
        ndims: as in `draw`.
        kind: as in `draw`, or GIVEN where no gradient flows through the value.
        clamp: as in `draw`; it stops the gradient of a value outside.
    """
    return _backward(
        grad_value, grad_score, grad_entropy, concentration1, concentration0, value, ndims, kind,
        False, clamp,
    )[:2]  # fmt: skip


def score_backward(
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    concentration1: Tensor,  # [*batch, *event]
    concentration0: Tensor,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    *,
    to_value: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `score` by the concentrations and the value, of the shapes of these.

    Args:
        grad_score: gradient of the log-density, None for none.
        grad_entropy: gradient of the entropy, None for none.
        concentration1: as in `draw`.
        concentration0: as in `draw`.
        value: as in `score`.
        ndims: as in `score`.
        to_value: whether the gradient of the value is wanted.
    """
    return _backward(
        None, grad_score, grad_entropy, concentration1, concentration0, value, ndims, GIVEN,
        to_value,
    )  # fmt: skip


def slopes(concentration1: Tensor, concentration0: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """`dx/da / (1 - x)` and `-dx/db / x` of a drawn value x, fp32, by ATen: a launch for each.

    Implicit reparameterization (Figurnov et al. 2018, https://arxiv.org/abs/1805.08498). ATen
    picks one of four expansions for each element; a tile would compute all of them.
    """
    a, b, x = (
        t.to(torch.float32).broadcast_to(value.shape)
        for t in (concentration1, concentration0, value)
    )
    total = a + b
    by_a = torch._dirichlet_grad(x, a, total)  # type: ignore[attr-defined]
    by_b = torch._dirichlet_grad(1.0 - x, b, total)  # type: ignore[attr-defined]
    # Nothing to do but for transposed concentrations, which ATen may follow.
    return by_a.contiguous(), by_b.contiguous()


def _backward(
    grad_value, grad_score, grad_entropy, concentration1, concentration0, value, ndims, kind,
    to_value, clamp=None,
) -> Any:  # fmt: skip
    like = concentration1
    full = like.shape if value is None else value.shape
    shape = full[: len(full) - like.dim()]
    a = event_numel(like.shape, ndims)
    grad_one, grad_zero = gradients(shape, concentration1), gradients(shape, concentration0)
    grad_scored = None
    if to_value:
        # The entropy does not depend on the value.
        make = torch.zeros if grad_score is None else torch.empty
        grad_scored = make(full, dtype=value.dtype, device=like.device)
        to_value = grad_score is not None
    total = grad_one.numel()
    if total == 0:
        return torch.zeros_like(concentration1), torch.zeros_like(concentration0), grad_scored
    if grad_value is None and grad_score is None:
        # A value without an upstream gradient needs no derivatives.
        kind = GIVEN
    by_one, by_zero = None, None
    if kind == RANDOM:
        by_one, by_zero = slopes(concentration1, concentration0, value)
    one = parameter(concentration1, ndims, bool(shape))
    zero = parameter(concentration0, ndims, bool(shape))
    given = one if value is None else parameter(value, ndims, False)
    upstream = parameter(grad_value if grad_value is not None else grad_one, ndims, False)
    kind_of_clamp, lo, hi, low, high = bounds_of(None if grad_value is None else clamp)
    programs, count, warps = flat_grid(total)
    with launching(like):
        backward_kernel[(programs,)](
            upstream.tensor, tail(grad_score), tail(grad_entropy), one.tensor, zero.tensor,
            given.tensor, by_one, by_zero, grad_one, grad_zero, grad_scored, low, high, lo, hi,
            total, like.numel() // a, one.row, one.column, zero.row, zero.column,
            given.row, given.column, upstream.row, upstream.column,
            A=a, COUNT=count, CONC1=one.layout, CONC0=zero.layout, VALUE=given.layout,
            UPSTREAM=upstream.layout, KIND=kind, BY_VALUE=grad_value is not None,
            BY_SCORE=grad_score is not None, BY_ENTROPY=grad_entropy is not None,
            TO_VALUE=to_value, CLAMP=kind_of_clamp, FAST=fast(like), num_warps=warps,
            **limited(like, most_registers_of_backward(kind, kind_of_clamp)),
        )  # fmt: skip
    return fold(grad_one, concentration1), fold(grad_zero, concentration0), grad_scored
