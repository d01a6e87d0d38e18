"""The kernel of the gradient of draws, scores and entropies."""

import triton
import triton.language as tl

from fastprob.kernels import _categorical_rows as cat
from fastprob.kernels import _categorical_wide as wide
from fastprob.kernels import _math as m


@triton.jit
def _rate(
    q, k, chosen, by_value, by_score, by_entropy,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradient by the normalized weights q."""
    rate = by_value
    c = cat.clamped(q, EPS)
    free = c == q
    if BY_ENTROPY:
        rate -= tl.where(free, by_entropy * (m.log(c, FAST) + 1.0), 0.0)
    if BY_SCORE:
        rate += tl.where(free & (k == chosen), by_score * m.reciprocal(c, FAST), 0.0)
    return rate


@triton.jit
def _slope(
    p, d, k, chosen, by_value, by_score, by_entropy, mean, weighted,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr,
):  # fmt: skip
    """The gradient by the logits, from `mean = sum(p by_value)` and `weighted = sum(p d)`."""
    rate = by_value - mean
    if BY_SCORE:
        rate -= by_score
    if BY_ENTROPY:
        rate -= by_entropy * (cat.at_least(d) - weighted)
    slope = p * rate
    if BY_SCORE:
        slope += tl.where(k == chosen, by_score, 0.0)
    return slope


@triton.jit
def _backward_rows(
    grad_value, grad_score, grad_entropy, given, mask, index, grad, first, total_rows, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, VECTOR: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr,
    EPS: tl.constexpr,
    BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    shift = cat.shifts(first, total_rows, rows, A, ROWS, GIVEN, VECTOR)
    x = cat.load_given(
        given, mask, first, total_rows, rows, given_row, given_column, mask_row, mask_column, shift,
        A, COUNT, REP, ROWS, LANES, PIECE, OWN, VECTOR, GIVEN, MASK, PROBS,
    )  # fmt: skip
    k, inside = cat.columns(shift, A, REP, LANES, PIECE, VECTOR)
    r = tl.arange(0, ROWS)[None, :, None]
    if PIECE == 0:
        r = tl.minimum(r, (total_rows - 1 - first).to(tl.int32))
    exists = r < tl.minimum(total_rows - first, OWN).to(tl.int32)
    by_value = tl.zeros([REP, ROWS, LANES], tl.float32)
    by_score = 0.0
    by_entropy = 0.0
    chosen = 0
    if BY_VALUE == cat.PROBS_VALUE:
        by_value = cat.load(
            grad_value, first, total_rows, rows, value_row, value_column, 0.0, shift,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, cat.beside(VECTOR, GIVEN, VALUE), VALUE,
        )  # fmt: skip
    if BY_VALUE == cat.MEAN_INDEX:
        by_mean = tl.load(grad_value + first + r, mask=exists, other=0.0).to(tl.float32)
        by_value = by_mean * (k - shift).to(tl.float32)
    if BY_SCORE:
        chosen = tl.load(index + first + r, mask=exists, other=0)
        by_score = tl.load(grad_score + first + r, mask=exists, other=0.0).to(tl.float32)
        chosen = tl.minimum(tl.maximum(chosen, 0), A - 1).to(tl.int32)
        if MASK >= 0:
            # The score of a masked category is a constant.
            picked = cat.at_index(
                given, mask, first, r, chosen, exists, rows, given_row, given_column,
                mask_row, mask_column, A, GIVEN, MASK,
            )  # fmt: skip
            by_score = tl.where(picked == float("-inf"), 0.0, by_score)
        chosen += shift
    if BY_ENTROPY:
        # The entropy has no sample dimensions: its gradient goes to the first sample alone.
        of_first = r < (rows - first).to(tl.int32)
        by_entropy = tl.load(grad_entropy + first + r, mask=of_first, other=0.0).to(tl.float32)
    if PROBS:
        e = cat.padded(x, A, REP, LANES, PIECE, VECTOR)
        inverse = m.reciprocal(cat.over(e), FAST)
        q = e * inverse
        rate = _rate(q, k, chosen, by_value, by_score, by_entropy, BY_SCORE, BY_ENTROPY, EPS, FAST)
        slope = (rate - cat.over(tl.where(inside, q * rate, -0.0))) * inverse
    else:
        d = x - cat.highest(x, FAST)
        e = cat.padded(m.exp(d, FAST), A, REP, LANES, PIECE, VECTOR)
        p = e * m.reciprocal(cat.over(e), FAST)
        mean = 0.0
        weighted = 0.0
        if BY_VALUE:
            mean = cat.over(p * by_value)
        if BY_ENTROPY:
            weighted = cat.over(p * cat.at_least(d))
        slope = _slope(
            p, d, k, chosen, by_value, by_score, by_entropy, mean, weighted, BY_SCORE, BY_ENTROPY
        )
    cat.store(
        grad, slope, first, total_rows, shift,
        A, COUNT, REP, ROWS, LANES, PIECE, OWN, cat.beside(VECTOR, GIVEN, 0), True,
    )  # fmt: skip


@triton.jit
def _chunk_by_value(
    grad_value, row, c, shift, rows, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, VECTOR: tl.constexpr,
    BY_VALUE: tl.constexpr,
):  # fmt: skip
    """Gradient of the probabilities of chunk c of one row."""
    if BY_VALUE == cat.PROBS_VALUE:
        return wide.read(
            grad_value, row, c, shift, rows, value_row, value_column, 0.0, A, COUNT, VALUE, VECTOR
        )
    elif BY_VALUE == cat.MEAN_INDEX:
        k = wide.places(c, shift, COUNT)
        return tl.load(grad_value + row).to(tl.float32) * k.to(tl.float32)
    else:
        return tl.zeros([COUNT], tl.float32)


@triton.jit
def _backward_wide(
    grad_value, grad_score, grad_entropy, given, mask, index, grad, row, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr,
    EPS: tl.constexpr,
    BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    shift = wide.shift_of(row, rows, A, GIVEN, VECTOR)
    top, _, total, weighted, _, _ = wide.sums(
        given, mask, row, shift, rows, given_row, given_column, mask_row, mask_column,
        A, COUNT, CHUNKS, GIVEN, MASK, VECTOR, PROBS, BY_ENTROPY, FAST,
    )  # fmt: skip
    inverse = m.reciprocal(total, FAST)
    weighted *= inverse
    by_score = 0.0
    by_entropy = 0.0
    chosen = 0
    if BY_SCORE:
        chosen = tl.load(index + row)
        chosen = tl.minimum(tl.maximum(chosen, 0), A - 1).to(tl.int32)
        by_score = tl.load(grad_score + row).to(tl.float32)
        if MASK >= 0:
            picked = cat.at_index(
                given, mask, row, 0, chosen, row >= 0, rows, given_row, given_column,
                mask_row, mask_column, A, GIVEN, MASK,
            )  # fmt: skip
            by_score = tl.where(picked == float("-inf"), 0.0, by_score)
    if BY_ENTROPY:
        by_entropy = tl.load(grad_entropy + row, mask=row < rows, other=0.0).to(tl.float32)
    mean = tl.full([], 0.0, tl.float32)
    if PROBS or BY_VALUE:
        for c in range(wide.chunks(shift, A, COUNT, VECTOR)):
            k = wide.places(c, shift, COUNT)
            x = wide.load(
                given, mask, row, c, shift, rows, given_row, given_column, mask_row, mask_column,
                A, COUNT, GIVEN, MASK, VECTOR, PROBS,
            )  # fmt: skip
            by_value = _chunk_by_value(
                grad_value,
                row,
                c,
                shift,
                rows,
                value_row,
                value_column,
                A,
                COUNT,
                VALUE,
                cat.beside(VECTOR, GIVEN, VALUE),
                BY_VALUE,
            )
            if PROBS:
                q = x * inverse
                by_value = _rate(
                    q, k, chosen, by_value, by_score, by_entropy, BY_SCORE, BY_ENTROPY, EPS, FAST
                )
            else:
                q = m.exp(x - top, FAST) * inverse
            mean += tl.sum(q * by_value, 0)
    for c in range(wide.chunks(shift, A, COUNT, VECTOR)):
        k = wide.places(c, shift, COUNT)
        x = wide.load(
            given, mask, row, c, shift, rows, given_row, given_column, mask_row, mask_column,
            A, COUNT, GIVEN, MASK, VECTOR, PROBS,
        )  # fmt: skip
        by_value = _chunk_by_value(
            grad_value,
            row,
            c,
            shift,
            rows,
            value_row,
            value_column,
            A,
            COUNT,
            VALUE,
            cat.beside(VECTOR, GIVEN, VALUE),
            BY_VALUE,
        )
        if PROBS:
            rate = _rate(
                x * inverse, k, chosen, by_value, by_score, by_entropy,
                BY_SCORE, BY_ENTROPY, EPS, FAST,
            )  # fmt: skip
            slope = (rate - mean) * inverse
        else:
            d = x - top
            slope = _slope(
                m.exp(d, FAST) * inverse, d, k, chosen, by_value, by_score, by_entropy,
                mean, weighted, BY_SCORE, BY_ENTROPY,
            )  # fmt: skip
        wide.store(grad, row, c, shift, slope, A, COUNT, cat.beside(VECTOR, GIVEN, 0))


@triton.jit(do_not_specialize=["total_rows", "rows"])
def backward_kernel(
    grad_value, grad_score, grad_entropy, given, mask, index, grad, total_rows, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr,
    EPS: tl.constexpr, BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of OWN rows; what the forward pass has summed is summed again."""
    program = tl.program_id(0).to(tl.int64)
    if CHUNKS > 0:
        _backward_wide(
            grad_value, grad_score, grad_entropy, given, mask, index, grad, program, rows,
            given_row, given_column, mask_row, mask_column, value_row, value_column,
            A, COUNT, CHUNKS, VECTOR,
            GIVEN, MASK, VALUE, PROBS, EPS, BY_VALUE, BY_SCORE, BY_ENTROPY, FAST,
        )  # fmt: skip
    else:
        _backward_rows(
            grad_value, grad_score, grad_entropy, given, mask, index, grad,
            program * OWN, total_rows, rows,
            given_row, given_column, mask_row, mask_column, value_row, value_column,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, VECTOR,
            GIVEN, MASK, VALUE, PROBS, EPS, BY_VALUE, BY_SCORE, BY_ENTROPY, FAST,
        )  # fmt: skip
