"""The mathematics of Beta's kernels: see the head of `beta.py`.

Values to values, and the sums of a tile's rows.
"""

import triton
import triton.language as tl

from fastprob.kernels import _halves as halves
from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tile as tile
from fastprob.kernels.bernoulli import cost_of_rest

# One try in 20 fails at a concentration of 1, and fewer elsewhere: 16 in a row have a chance of
# 2e-21. Such a Gamma would be d, its value at z = 0.
TRIES = tl.constexpr(16)
# Each try has counters of its own: elements stay below 2^48.
NEXT_TRY = tl.constexpr(1 << 48)
BOOST = tl.constexpr(0x7FFF << 48)
OVER_LN2_THREE = tl.constexpr(4.328085122666891)


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
def inverses(a, b, FAST: tl.constexpr):
    """`a + b`, and the reciprocals of a, b and the sum."""
    total = a + b
    return (
        total,
        m.reciprocal(a, FAST),
        m.reciprocal(b, FAST),
        m.reciprocal(total, FAST),
    )


@triton.jit
def logs(a, b, x, ENDS: tl.constexpr, FAST: tl.constexpr):
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
def shares(total, by_a, by_b, FAST: tl.constexpr):
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
def digammas(a, b, total, by_a, by_b, by_total, share_a, share_b, log_total):
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
def trigammas(a, b, total, by_a, by_b, by_total):
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
    total, by_a, by_b, by_total = inverses(a, b, FAST)
    share_a, share_b, log_total = shares(total, by_a, by_b, FAST)
    norm = _norm(a, b, total, by_a, by_b, by_total, share_a, share_b, log_total)
    score = norm
    if SCORE:
        y, log_x, log_y = logs(a, b, x, ENDS, FAST)
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
        r_a, r_b, r_total = digammas(a, b, total, by_a, by_b, by_total, share_a, share_b, log_total)
        entropy = (a - 1.0) * r_a + (b - 1.0) * r_b - (total - 2.0) * r_total
        entropy -= norm + share_a + share_b
    return score, entropy


@triton.jit
def scored_by(
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
def store_sums(
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
