"""The kernel of the gradients of what is drawn from a TruncatedNormal."""

import triton
import triton.language as tl

from fastprob.kernels import _halves as halves
from fastprob.kernels import _math as m
from fastprob.kernels import _tile as tile
from fastprob.kernels import _truncated_normal_parts as tn
from fastprob.kernels._truncated_normal_draw import _MODE, _RANDOM


@triton.jit
def _combined(
    x, z, lean, spread, shift, stretch, by_loc, by_scale, least, most, flip, inverse,
    along, by_row, rate, bottom, top,
    PATHWISE: tl.constexpr, BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """The gradients by loc and scale, from the derivatives and the gradients of all results."""
    to_loc = z * 0.0
    to_scale = to_loc
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
def _with_outer_slopes(
    to_loc, to_scale, outer, a, w, step, sigma, inverse, least, most, flip,
    along, by_row, rate, bottom, top,
    COUNT: tl.constexpr, TENSORS: tl.constexpr, KIND: tl.constexpr, PATHWISE: tl.constexpr,
    BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr,
    CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradients, of outer elements by their own formulas and of others as they are.

    One element of a thread after the other: these formulas take the most registers of all.
    """
    PART: tl.constexpr = COUNT // 4
    MOVED: tl.constexpr = BY_VALUE and PATHWISE
    a0, a1, a2, a3 = halves.quarters(a, COUNT)
    w0, w1, w2, w3 = halves.quarters(w, COUNT)
    step0, step1, step2, step3 = halves.quarters(step, COUNT, KIND == _RANDOM)
    sigma0, sigma1, sigma2, sigma3 = halves.quarters(sigma, COUNT)
    inverse0, inverse1, inverse2, inverse3 = halves.quarters(inverse, COUNT)
    # Which formulas an element takes, and to which side; in one register.
    side = tl.where(outer, tl.where(flip, -1.0, 1.0), 0.0)
    side0, side1, side2, side3 = halves.quarters(side, COUNT)
    least0, least1, least2, least3 = halves.quarters(least, COUNT, TENSORS)
    most0, most1, most2, most3 = halves.quarters(most, COUNT, TENSORS)
    along0, along1, along2, along3 = halves.quarters(along, COUNT, MOVED)
    by_row0, by_row1, by_row2, by_row3 = halves.quarters(by_row, COUNT, BY_SCORE)
    rate0, rate1, rate2, rate3 = halves.quarters(rate, COUNT, BY_ENTROPY)
    bottom0, bottom1, bottom2, bottom3 = halves.quarters(bottom, COUNT, MOVED and CLAMP == 2)
    top0, top1, top2, top3 = halves.quarters(top, COUNT, MOVED and CLAMP == 2)
    loc0, loc1, loc2, loc3 = halves.quarters(to_loc, COUNT)
    scale0, scale1, scale2, scale3 = halves.quarters(to_scale, COUNT)
    for _ in range(4):
        p, q = tn.probability(step0, PART, KIND == _RANDOM)
        k_a, h_a, k_b, r, rest = tn.outer(a0, w0, FAST)
        first, second = tn.outer_moments(a0, w0, k_a, k_b, r, rest, FAST)
        shift = first
        stretch = first
        if BY_ENTROPY:
            shift, widen = tn.outer_entropy_slopes(
                a0, w0, k_a, h_a, k_b, r, rest, first, second, FAST
            )
            stretch = 1.0 - a0 * shift - w0 * widen
        if KIND == _MODE:
            u = tl.maximum(-a0, 0.0)
            by_loc = tl.where(a0 < 0, 1.0, 0.0)
            by_scale = tl.zeros([PART], tl.float32)
        else:
            u = tn.outer_quantile(p, q, a0, w0, k_a, h_a, r, rest, FAST)
            by_loc, by_scale = tn.outer_slopes(p, q, a0, w0, u, k_a, h_a, k_b, r, FAST)
        flipped = side0 < 0
        x = tl.where(flipped, most0 - u * sigma0, least0 + u * sigma0)
        outer_loc, outer_scale = _combined(
            x, a0 + u, u - first, u * (u + 2.0 * a0) - second, shift, stretch, by_loc, by_scale,
            least0, most0, flipped, inverse0, along0, by_row0, rate0, bottom0, top0,
            PATHWISE, BY_VALUE, BY_SCORE, BY_ENTROPY, CLAMP,
        )  # fmt: skip
        outer_loc = tl.where(side0 == 0, loc0, outer_loc)
        outer_scale = tl.where(side0 == 0, scale0, outer_scale)
        loc0, loc1, loc2, loc3 = loc1, loc2, loc3, outer_loc
        scale0, scale1, scale2, scale3 = scale1, scale2, scale3, outer_scale
        a0, a1, a2, a3 = a1, a2, a3, a0
        w0, w1, w2, w3 = w1, w2, w3, w0
        step0, step1, step2, step3 = step1, step2, step3, step0
        sigma0, sigma1, sigma2, sigma3 = sigma1, sigma2, sigma3, sigma0
        inverse0, inverse1, inverse2, inverse3 = inverse1, inverse2, inverse3, inverse0
        side0, side1, side2, side3 = side1, side2, side3, side0
        least0, least1, least2, least3 = least1, least2, least3, least0
        most0, most1, most2, most3 = most1, most2, most3, most0
        along0, along1, along2, along3 = along1, along2, along3, along0
        by_row0, by_row1, by_row2, by_row3 = by_row1, by_row2, by_row3, by_row0
        rate0, rate1, rate2, rate3 = rate1, rate2, rate3, rate0
        bottom0, bottom1, bottom2, bottom3 = bottom1, bottom2, bottom3, bottom0
        top0, top1, top2, top3 = top1, top2, top3, top0
    all_loc = halves.joined_quarters(loc0, loc1, loc2, loc3, COUNT)
    return all_loc, halves.joined_quarters(scale0, scale1, scale2, scale3, COUNT)


@triton.jit
def _slopes(
    mu, sigma, least, most, along, by_row, rate, bottom, top, step,
    COUNT: tl.constexpr, TENSORS: tl.constexpr, KIND: tl.constexpr, PATHWISE: tl.constexpr,
    BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr,
    CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradients of COUNT elements by loc and scale, from those of all results."""
    a, b, flip, outer = tn.standardize(mu, sigma, least, most, FAST)
    step = tn.mirrored(step, flip, KIND == _RANDOM)
    p, q = tn.probability(step, COUNT, KIND == _RANDOM)
    density_a, density_b, below, above, mass = tn.masses(a, b, FAST)
    first, second, shift, stretch = tn.central_slopes(a, b, density_a, density_b, mass, FAST)
    if KIND == _MODE:
        z = tl.maximum(a, 0.0)
        by_loc = tl.where(a < 0, 1.0, 0.0)
        by_scale = tl.zeros([COUNT], tl.float32)
    else:
        z = tn.central_quantile(p, q, below, above, mass, FAST)
        near = tl.maximum(a, -tn.FAR)
        far = tl.minimum(b, tn.FAR)
        at_a = q * m.exp(0.5 * (z - near) * (z + near), FAST)
        at_b = p * m.exp(0.5 * (z - far) * (z + far), FAST)
        by_loc = 1.0 - at_a - at_b
        by_scale = z - near * at_a - far * at_b
    x = mu + tl.where(flip, -z, z) * sigma
    inverse = m.reciprocal(sigma, FAST)
    to_loc, to_scale = _combined(
        x, z, z - first, z * z - second, shift, stretch, by_loc, by_scale, least, most, flip,
        inverse, along, by_row, rate, bottom, top, PATHWISE, BY_VALUE, BY_SCORE, BY_ENTROPY, CLAMP,
    )  # fmt: skip
    # Behind all of the central ones, of which two results alone wait.
    if tl.max(outer.to(tl.int32), 0) > 0:
        a, w = tn.outer_interval(a, sigma, least, most, outer, FAST)
        to_loc, to_scale = _with_outer_slopes(
            to_loc, to_scale, outer, a, w, step, sigma, inverse, least, most, flip,
            along, by_row, rate, bottom, top,
            COUNT, TENSORS, KIND, PATHWISE, BY_VALUE, BY_SCORE, BY_ENTROPY, CLAMP, FAST,
        )  # fmt: skip
    return to_loc, to_scale


@triton.jit
def _tile(
    grad_value, grad_score, grad_entropy, loc, scale, low, high, grad_loc, grad_scale, lo, hi,
    clamp_low, clamp_high, clamp_lo, clamp_hi, used, start, left, rows,
    value_row, value_column, loc_row, loc_column, scale_row, scale_column,
    low_row, low_column, high_row, high_column,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    PATHWISE: tl.constexpr, BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
    CUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = COUNT // 2 if CUT else COUNT
    TURNS: tl.constexpr = 2 if CUT else 1
    MOVED: tl.constexpr = BY_VALUE and PATHWISE
    i = tl.arange(0, COUNT)
    inside = i < left
    mu = tn.raw(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
    sigma = tn.raw(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    least = tn.raw(low, start, i, inside, -1.0, rows, low_row, low_column, A, COUNT, LOW, WHOLE)
    most = tn.raw(high, start, i, inside, 1.0, rows, high_row, high_column, A, COUNT, HIGH, WHOLE)
    step0, step1 = 0, 0
    if KIND == _RANDOM:
        step0, step1 = tn.steps(tl.load(used), tl.load(used + 1), start, COUNT, CUT)
    # What nothing asks for is a 0.
    along = 0.0
    bottom, top = 0.0, 0.0
    of_scores = 0.0
    of_entropies = 0.0
    if MOVED:
        along = tn.raw(
            grad_value, start, i, inside, 0.0, rows, value_row, value_column,
            A, COUNT, VALUE, WHOLE,
        )  # fmt: skip
        bottom, top = tile.bounds(
            clamp_low, clamp_high, clamp_lo, clamp_hi, start, i, A, COUNT, CLAMP
        )
    if BY_SCORE:
        of_scores = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
        of_scores = of_scores.to(grad_score.dtype.element_ty)
    if BY_ENTROPY:
        # The entropy has no sample dimensions: its gradient goes to the first sample alone.
        of_entropies = tile.of_first_rows(grad_entropy, start, i, inside, rows, A, COUNT, WHOLE)
        of_entropies = of_entropies.to(grad_entropy.dtype.element_ty)
    mu0, mu1 = halves.cut(mu, COUNT, CUT)
    sigma0, sigma1 = halves.cut(sigma, COUNT, CUT)
    least0, least1 = halves.cut(least, COUNT, CUT, LOW >= 0)
    most0, most1 = halves.cut(most, COUNT, CUT, HIGH >= 0)
    along0, along1 = halves.cut(along, COUNT, CUT, MOVED)
    bottom0, bottom1 = halves.cut(bottom, COUNT, CUT, MOVED and CLAMP == 2)
    top0, top1 = halves.cut(top, COUNT, CUT, MOVED and CLAMP == 2)
    score0, score1 = halves.cut(of_scores, COUNT, CUT, BY_SCORE)
    entropy0, entropy1 = halves.cut(of_entropies, COUNT, CUT, BY_ENTROPY)
    loc0, loc1 = mu0, mu1
    scale0, scale1 = sigma0, sigma1
    for _ in range(TURNS):
        below, above = tn.interval(least0, most0, low, high, lo, hi, COUNT, LOW, CUT)
        to_loc, to_scale = _slopes(
            halves.widened(mu0, loc, COUNT, CUT), halves.widened(sigma0, scale, COUNT, CUT),
            below, above,
            halves.widened(along0, grad_value, COUNT, CUT, MOVED),
            halves.widened(score0, grad_score, COUNT, CUT, BY_SCORE),
            halves.widened(entropy0, grad_entropy, COUNT, CUT, BY_ENTROPY),
            bottom0, top0, step0,
            SIZE, LOW >= 0, KIND, PATHWISE, BY_VALUE, BY_SCORE, BY_ENTROPY, CLAMP, FAST,
        )  # fmt: skip
        loc0, loc1 = loc1, halves.packed(to_loc, grad_loc, COUNT, CUT)
        scale0, scale1 = scale1, halves.packed(to_scale, grad_scale, COUNT, CUT)
        mu0, sigma0, least0, most0, step0 = mu1, sigma1, least1, most1, step1
        along0, score0, entropy0, bottom0, top0 = along1, score1, entropy1, bottom1, top1
    all_loc = halves.joined(loc0, loc1, grad_loc, COUNT, CUT)
    all_scale = halves.joined(scale0, scale1, grad_scale, COUNT, CUT)
    tile.store(grad_loc, start, all_loc, i, inside, COUNT, COUNT, WHOLE)
    tile.store(grad_scale, start, all_scale, i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["total", "rows"])
def draw_backward_kernel(
    grad_value, grad_score, grad_entropy, loc, scale, low, high, grad_loc, grad_scale, lo, hi,
    clamp_low, clamp_high, clamp_lo, clamp_hi, used, total, rows,
    value_row, value_column, loc_row, loc_column, scale_row, scale_column,
    low_row, low_column, high_row, high_column,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    PATHWISE: tl.constexpr, BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Gradients of COUNT elements, the noise drawn anew from the state that the draw has used."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _tile(
            grad_value, grad_score, grad_entropy, loc, scale, low, high, grad_loc, grad_scale,
            lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi, used, start, COUNT, rows,
            value_row, value_column, loc_row, loc_column, scale_row, scale_column,
            low_row, low_column, high_row, high_column,
            A, COUNT, VALUE, LOC, SCALE, LOW, HIGH, KIND, PATHWISE, BY_VALUE, BY_SCORE,
            BY_ENTROPY, CLAMP, FAST, CUT, True,
        )  # fmt: skip
    else:
        _tile(
            grad_value, grad_score, grad_entropy, loc, scale, low, high, grad_loc, grad_scale,
            lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi, used, start,
            (total - start).to(tl.int32), rows,
            value_row, value_column, loc_row, loc_column, scale_row, scale_column,
            low_row, low_column, high_row, high_column,
            A, COUNT, VALUE, LOC, SCALE, LOW, HIGH, KIND, PATHWISE, BY_VALUE, BY_SCORE,
            BY_ENTROPY, CLAMP, FAST, CUT, False,
        )  # fmt: skip
