"""The kernel of the gradients of scores of given values of a TruncatedNormal, and of entropies."""

import triton
import triton.language as tl

from fastprob.kernels import _halves as halves
from fastprob.kernels import _math as m
from fastprob.kernels import _tile as tile
from fastprob.kernels import _truncated_normal_parts as tn


@triton.jit
def _combined(
    z, lean, spread, shift, stretch, flip, by_row, rate,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr,
):  # fmt: skip
    """The gradients by loc, scale and value, from the derivatives and the gradients, over scale."""
    to_loc = lean * 0.0
    to_scale = to_loc
    by_value = to_loc
    if BY_SCORE:
        to_loc = by_row * lean
        to_scale = by_row * spread
        if TO_VALUE:
            by_value = by_row * z
            by_value = tl.where(flip, by_value, -by_value)
    if BY_ENTROPY:
        to_loc -= rate * shift
        to_scale += rate * stretch
    return tl.where(flip, -to_loc, to_loc), to_scale, by_value


@triton.jit
def _with_outer_slopes(
    to_loc, to_scale, side, a, w, u, by_row, rate,
    COUNT: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradients, of outer elements by their own formulas and of others, of side 0, as they are.

    One element of a thread after the other: these formulas take the most registers of all.
    """
    side0, side1, side2, side3 = halves.quarters(side, COUNT)
    a0, a1, a2, a3 = halves.quarters(a, COUNT)
    w0, w1, w2, w3 = halves.quarters(w, COUNT)
    u0, u1, u2, u3 = halves.quarters(u, COUNT)
    by_row0, by_row1, by_row2, by_row3 = halves.quarters(by_row, COUNT, BY_SCORE)
    rate0, rate1, rate2, rate3 = halves.quarters(rate, COUNT, BY_ENTROPY)
    loc0, loc1, loc2, loc3 = halves.quarters(to_loc, COUNT)
    scale0, scale1, scale2, scale3 = halves.quarters(to_scale, COUNT)
    for _ in range(4):
        k_a, h_a, k_b, r, rest = tn.outer(a0, w0, FAST)
        first, second = tn.outer_moments(a0, w0, k_a, k_b, r, rest, FAST)
        shift = first
        stretch = first
        if BY_ENTROPY:
            shift, widen = tn.outer_entropy_slopes(
                a0, w0, k_a, h_a, k_b, r, rest, first, second, FAST
            )
            stretch = 1.0 - a0 * shift - w0 * widen
        outer_loc, outer_scale, _ = _combined(
            u0, u0 - first, u0 * (u0 + 2.0 * a0) - second, shift, stretch, side0 < 0, by_row0,
            rate0, BY_SCORE, BY_ENTROPY, False,
        )  # fmt: skip
        outer_loc = tl.where(side0 == 0, loc0, outer_loc)
        outer_scale = tl.where(side0 == 0, scale0, outer_scale)
        loc0, loc1, loc2, loc3 = loc1, loc2, loc3, outer_loc
        scale0, scale1, scale2, scale3 = scale1, scale2, scale3, outer_scale
        side0, side1, side2, side3 = side1, side2, side3, side0
        a0, a1, a2, a3 = a1, a2, a3, a0
        w0, w1, w2, w3 = w1, w2, w3, w0
        u0, u1, u2, u3 = u1, u2, u3, u0
        by_row0, by_row1, by_row2, by_row3 = by_row1, by_row2, by_row3, by_row0
        rate0, rate1, rate2, rate3 = rate1, rate2, rate3, rate0
    all_loc = halves.joined_quarters(loc0, loc1, loc2, loc3, COUNT)
    return all_loc, halves.joined_quarters(scale0, scale1, scale2, scale3, COUNT)


@triton.jit
def _slopes(
    mu, sigma, x, least, most, by_row, found, rate,
    COUNT: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """The gradients by loc, scale and x, of whose rows the scores `found` are."""
    a, b, flip, outer = tn.standardize(mu, sigma, least, most, FAST)
    density_a, density_b, _, _, mass = tn.masses(a, b, FAST)
    first, second, shift, stretch = tn.central_slopes(a, b, density_a, density_b, mass, FAST)
    inverse = m.reciprocal(sigma, FAST)
    z = first
    if BY_SCORE:
        z = m.divide(tl.where(flip, mu - x, x - mu), sigma, FAST)
        # Outside of the bounds the score is -inf whatever the parameters.
        by_row = tl.where(found == float("-inf"), 0.0, by_row) * inverse
    if BY_ENTROPY:
        rate *= inverse
    to_loc, to_scale, by_value = _combined(
        z, z - first, z * z - second, shift, stretch, flip, by_row, rate,
        BY_SCORE, BY_ENTROPY, TO_VALUE,
    )  # fmt: skip
    # Behind all of the central ones, so that these results alone wait while it is computed.
    if tl.max(outer.to(tl.int32), 0) > 0:
        a, w = tn.outer_interval(a, sigma, least, most, outer, FAST)
        u = a
        if BY_SCORE:
            u = m.divide(tl.where(flip, most - x, x - least), sigma, FAST)
        side = tl.where(outer, tl.where(flip, -1.0, 1.0), 0.0)
        to_loc, to_scale = _with_outer_slopes(
            to_loc, to_scale, side, a, w, u, by_row, rate, COUNT, BY_SCORE, BY_ENTROPY, FAST
        )
    return to_loc, to_scale, by_value


@triton.jit
def _tile(
    grad_score, grad_entropy, loc, scale, low, high, value, score,
    grad_loc, grad_scale, grad_value, lo, hi, start, left, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr, FAST: tl.constexpr, CUT: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    TURNS: tl.constexpr = 2 if CUT else 1
    i = tl.arange(0, COUNT)
    inside = i < left
    mu = tn.raw(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
    sigma = tn.raw(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    least = tn.raw(low, start, i, inside, -1.0, rows, low_row, low_column, A, COUNT, LOW, WHOLE)
    most = tn.raw(high, start, i, inside, 1.0, rows, high_row, high_column, A, COUNT, HIGH, WHOLE)
    # What nothing asks for is a 0.
    x = 0.0
    of_scores = 0.0
    found = 0.0
    of_entropies = 0.0
    if BY_SCORE:
        x = tn.raw(
            value, start, i, inside, 0.0, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
        )
        of_scores = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
        of_scores = of_scores.to(grad_score.dtype.element_ty)
        found = tile.of_rows(score, start, i, inside, A, COUNT, WHOLE)
        found = found.to(score.dtype.element_ty)
    if BY_ENTROPY:
        of_entropies = tile.of_first_rows(grad_entropy, start, i, inside, rows, A, COUNT, WHOLE)
        of_entropies = of_entropies.to(grad_entropy.dtype.element_ty)
    mu0, mu1 = halves.cut(mu, COUNT, CUT)
    sigma0, sigma1 = halves.cut(sigma, COUNT, CUT)
    least0, least1 = halves.cut(least, COUNT, CUT, LOW >= 0)
    most0, most1 = halves.cut(most, COUNT, CUT, HIGH >= 0)
    x0, x1 = halves.cut(x, COUNT, CUT, BY_SCORE)
    score0, score1 = halves.cut(of_scores, COUNT, CUT, BY_SCORE)
    found0, found1 = halves.cut(found, COUNT, CUT, BY_SCORE)
    entropy0, entropy1 = halves.cut(of_entropies, COUNT, CUT, BY_ENTROPY)
    loc0, loc1 = mu0, mu1
    scale0, scale1 = sigma0, sigma1
    value0, value1 = x0, x1
    for _ in range(TURNS):
        below, above = tn.interval(least0, most0, low, high, lo, hi, COUNT, LOW, CUT)
        to_loc, to_scale, to_x = _slopes(
            halves.widened(mu0, loc, COUNT, CUT), halves.widened(sigma0, scale, COUNT, CUT),
            halves.widened(x0, value, COUNT, CUT, BY_SCORE), below, above,
            halves.widened(score0, grad_score, COUNT, CUT, BY_SCORE),
            halves.widened(found0, score, COUNT, CUT, BY_SCORE),
            halves.widened(entropy0, grad_entropy, COUNT, CUT, BY_ENTROPY),
            COUNT // TURNS, BY_SCORE, BY_ENTROPY, TO_VALUE, FAST,
        )  # fmt: skip
        loc0, loc1 = loc1, halves.packed(to_loc, grad_loc, COUNT, CUT)
        scale0, scale1 = scale1, halves.packed(to_scale, grad_scale, COUNT, CUT)
        if TO_VALUE:
            value0, value1 = value1, halves.packed(to_x, grad_value, COUNT, CUT)
        mu0, sigma0, least0, most0, x0 = mu1, sigma1, least1, most1, x1
        score0, found0, entropy0 = score1, found1, entropy1
    all_loc = halves.joined(loc0, loc1, grad_loc, COUNT, CUT)
    all_scale = halves.joined(scale0, scale1, grad_scale, COUNT, CUT)
    tile.store(grad_loc, start, all_loc, i, inside, COUNT, COUNT, WHOLE)
    tile.store(grad_scale, start, all_scale, i, inside, COUNT, COUNT, WHOLE)
    if TO_VALUE:
        all_value = halves.joined(value0, value1, grad_value, COUNT, CUT)
        tile.store(grad_value, start, all_value, i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["total", "rows"])
def score_backward_kernel(
    grad_score, grad_entropy, loc, scale, low, high, value, score,
    grad_loc, grad_scale, grad_value, lo, hi, total, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr, FAST: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Gradients of the score of given values and of the entropy, of COUNT elements."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _tile(
            grad_score, grad_entropy, loc, scale, low, high, value, score,
            grad_loc, grad_scale, grad_value, lo, hi, start, COUNT, rows,
            loc_row, loc_column, scale_row, scale_column,
            low_row, low_column, high_row, high_column, value_row, value_column,
            A, COUNT, LOC, SCALE, LOW, HIGH, VALUE, BY_SCORE, BY_ENTROPY, TO_VALUE, FAST,
            CUT, True,
        )  # fmt: skip
    else:
        _tile(
            grad_score, grad_entropy, loc, scale, low, high, value, score,
            grad_loc, grad_scale, grad_value, lo, hi, start, (total - start).to(tl.int32), rows,
            loc_row, loc_column, scale_row, scale_column,
            low_row, low_column, high_row, high_column, value_row, value_column,
            A, COUNT, LOC, SCALE, LOW, HIGH, VALUE, BY_SCORE, BY_ENTROPY, TO_VALUE, FAST,
            CUT, False,
        )  # fmt: skip
