"""The mathematics of TruncatedNormal's kernels: see the head of `truncated_normal.py`.

Values to values; elements are central or outer ones, and each has formulas of its own.
"""

import triton
import triton.language as tl

from fastprob.kernels import _halves as halves
from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tile as tile

# Values lie between the quantiles at 1e-6 and 1 - 1e-6, as TorchRL's.
EPS = 1e-6
_STEP = tl.constexpr((1.0 - 2.0 * EPS) * 2.0**-23)
_FIRST = tl.constexpr((1.0 - 2.0 * EPS) * 2.0**-24 + EPS)
ROOT_TWO_PI = tl.constexpr(2.5066282746310002)
OVER_ROOT_TWO_PI = tl.constexpr(0.3989422804014327)
# From here on bounds are as good as none; the square is still finite.
FAR = tl.constexpr(1e15)
# Bounds as numbers, before they are divided by a scale of 1e-6 or more.
FARTHEST = 1e30
_FARTHEST = tl.constexpr(FARTHEST)


@triton.jit
def standardize(mu, sigma, low, high, FAST: tl.constexpr):
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
def outer_interval(a, sigma, least, most, outer, FAST: tl.constexpr):
    """The near bound and the width of outer elements; of others those of another interval."""
    w = tl.minimum(m.divide(most - least, sigma, FAST), FAR)
    return tl.where(outer, tl.minimum(a, FAR), 1.0), tl.where(outer, w, 1.0)


@triton.jit
def masses(a, b, FAST: tl.constexpr):
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
def over_mass(mass, FAST: tl.constexpr):
    """1 / M of central elements; of others, whose mass may be 0, a finite number."""
    return m.reciprocal(tl.maximum(mass, 1e-30) * ROOT_TWO_PI, FAST)


@triton.jit
def central_quantile(p, q, below, above, mass, FAST: tl.constexpr):
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
def outer(a, w, FAST: tl.constexpr):
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
def outer_quantile(p, q, a, w, k_a, h_a, r, rest, FAST: tl.constexpr):
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
def outer_slopes(p, q, a, w, u, k_a, h_a, k_b, r, FAST: tl.constexpr):
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
def outer_moments(a, w, k_a, k_b, r, rest, FAST: tl.constexpr):
    """E[u] and E[u (u + 2 a)]: closed forms, which lose as much as a flat density gains."""
    b = a + w
    inverse = m.reciprocal(rest, FAST)
    first = (k_a - r * (w + k_b)) * inverse
    lift = w * (2.0 * a + w) + b * k_b - a * k_a
    second = 1.0 + a * k_a - r * lift * inverse
    flat, _, flat_first, flat_second = _flat(a, w, FAST)
    return tl.where(flat, flat_first, first), tl.where(flat, flat_second, second)


@triton.jit
def outer_entropy_slopes(a, w, k_a, h_a, k_b, r, rest, first, second, FAST: tl.constexpr):
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
def central_slopes(a, b, density_a, density_b, mass, FAST: tl.constexpr):
    """E[z], E[z^2], and the derivatives of the entropy by loc and scale, times -scale and scale."""
    a = tl.maximum(a, -FAR)
    b = tl.minimum(b, FAR)
    inverse = over_mass(mass, FAST)
    at_a = density_a * inverse
    at_b = density_b * inverse
    second = 1.0 + a * at_a - b * at_b
    by_a = at_a * (0.5 * (second - a * a) - 1.0)
    by_b = at_b * (1.0 - 0.5 * (second - b * b))
    return at_a - at_b, second, by_a + by_b, 1.0 - a * by_a - b * by_b


@triton.jit
def _steps(seed, call, group, COUNT: tl.constexpr):
    a, b, c, d = random.philox(seed, call, group)
    return random.spread(a >> 9, b >> 9, c >> 9, d >> 9, COUNT).to(tl.int32, bitcast=True)


@triton.jit
def steps(seed, call, start, COUNT: tl.constexpr, CUT: tl.constexpr):
    """Of both halves the numbers of the steps that probabilities are the middles of.

    They are int32, 0 to 2^23 - 1. Drawn half by half: cut out of a whole tile in half precision
    they would go through shared memory.
    """
    first = start // 4
    if CUT == halves._WHOLE:
        step = _steps(seed, call, first + tl.arange(0, COUNT // 4), COUNT)
        return step, step
    else:
        group = tl.arange(0, COUNT // 8)
        if CUT == halves._EIGHTS:
            step = _steps(seed, call, first + group * 2, COUNT // 2)
            return step, _steps(seed, call, first + 1 + group * 2, COUNT // 2)
        else:
            step = _steps(seed, call, first + group, COUNT // 2)
            return step, _steps(seed, call, first + COUNT // 8 + group, COUNT // 2)


@triton.jit
def mirrored(step, flip, RANDOM: tl.constexpr):
    """The number of a step in fp32, mirrored with the interval; 0 where nothing is drawn."""
    if RANDOM:
        step = step.to(tl.float32)
        return tl.where(flip, 8388607.0 - step, step)
    else:
        return 0.0


@triton.jit
def probability(step, COUNT: tl.constexpr, RANDOM: tl.constexpr):
    """The probabilities below and above a value, of `mirrored` steps: 1/2 for the median."""
    if RANDOM:
        return step * _STEP + _FIRST, (8388607.0 - step) * _STEP + _FIRST
    else:
        middle = tl.full([COUNT], 0.5, tl.float32)
        return middle, middle


@triton.constexpr_function
def each(bits, low, entropy):
    """Elements that a thread has of a chunk of wide rows, as `truncated_normal.forward_form`."""
    return 4 if low >= 0 and entropy and bits == 32 else 8


@triton.jit
def raw(
    ptr, start, i, inside, other, rows, row_stride, column_stride,
    A: tl.constexpr, COUNT: tl.constexpr, LAYOUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`tile.load` in the parameter's type; nothing where LAYOUT is below 0."""
    if LAYOUT < 0:
        return 0.0
    else:
        at = tile.pointers(ptr, start, i, rows, row_stride, column_stride, A, COUNT, LAYOUT)
        if WHOLE:
            return tl.load(at)
        else:
            return tl.load(at, mask=inside, other=other)


@triton.jit
def interval(
    least, most, low, high, lo, hi, COUNT: tl.constexpr, LOW: tl.constexpr, CUT: tl.constexpr
):
    """The bounds of a half of what `raw` has loaded; the two numbers where LOW is below 0."""
    if LOW < 0:
        return lo, hi
    else:
        least = tile.clamp(halves.widened(least, low, COUNT, CUT), -_FARTHEST, _FARTHEST)
        return least, tile.clamp(halves.widened(most, high, COUNT, CUT), -_FARTHEST, _FARTHEST)


@triton.jit
def store_sums(
    score, entropy, energy, terms, first, total_rows, rows, lead,
    A: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr,
    GATHER: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The scores and entropies of a tile's rows, from its terms."""
    if SCORE:
        sums = tile.sum_rows(energy, A, COUNT, ROWS, OWN, GATHER, lead)
        tile.store_rows(score, first, -sums, total_rows, ROWS, OWN, WHOLE)
    if ENTROPY:
        sums = tile.sum_rows(terms, A, COUNT, ROWS, OWN, GATHER, lead)
        # An entropy has no sample dimensions: the rows of the first sample write it.
        tile.store_rows(entropy, first, sums, rows, ROWS, OWN, False)
