"""The kernel that scores given categories and gives entropies."""

import triton
import triton.language as tl

from fastprob.kernels import _categorical_rows as cat
from fastprob.kernels import _categorical_wide as wide
from fastprob.kernels import _math as m


@triton.jit
def _score_rows(
    given, mask, value, index, score, entropy, neg_inf, first, total_rows, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, VECTOR: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr,
    EPS: tl.constexpr,
    HOT: tl.constexpr, INDEX: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    shift = cat.shifts(first, total_rows, rows, A, ROWS, GIVEN, VECTOR)
    x = cat.load_given(
        given, mask, first, total_rows, rows, given_row, given_column, mask_row, mask_column, shift,
        A, COUNT, REP, ROWS, LANES, PIECE, OWN, VECTOR, GIVEN, MASK, PROBS,
    )  # fmt: skip
    k, inside = cat.columns(shift, A, REP, LANES, PIECE, VECTOR)
    r = tl.arange(0, ROWS)[None, :, None]
    exists = r < tl.minimum(total_rows - first, OWN).to(tl.int32)
    top = 0.0
    e = x
    d = x
    if not PROBS:
        top = cat.highest(x, FAST)
        d = x - top
        e = m.exp(d, FAST)
    e = cat.padded(e, A, REP, LANES, PIECE, VECTOR)
    total = cat.over(e)
    inverse = m.reciprocal(total, FAST)
    log_sum = m.log(total, FAST)
    if SCORE:
        if HOT:
            y = cat.load(
                value, first, total_rows, rows, value_row, value_column, float("-inf"), shift,
                A, COUNT, REP, ROWS, LANES, PIECE, OWN, cat.beside(VECTOR, GIVEN, VALUE), VALUE,
            )  # fmt: skip
            chosen = tl.where((y == cat.highest(y, FAST)) & inside, k, cat.LATEST)
            chosen = tl.min(tl.min(chosen, 0, keep_dims=True), 2, keep_dims=True)
            chosen = tl.minimum(chosen - shift, A - 1)
            real = chosen >= 0
            if INDEX:
                tl.store(index + first + r, chosen.to(tl.int64), mask=exists)
        else:
            asked = tl.load(value + first + r, mask=exists, other=0).to(tl.int64)
            real = (asked >= 0) & (asked < A)
            chosen = tl.where(real, asked, 0).to(tl.int32)
        picked = cat.at_index(
            given, mask, first, r, chosen, exists, rows, given_row, given_column,
            mask_row, mask_column, A, GIVEN, MASK,
        )  # fmt: skip
        scores = cat.score_of(picked, top, log_sum, inverse, PROBS, EPS, FAST)
        if MASK >= 0:
            scores = tl.where(picked == float("-inf"), neg_inf, scores)
        # An index that names no category is an error that a kernel cannot raise.
        scores = tl.where(real, scores, float("nan"))
        tl.store(score + first + r, scores.to(score.dtype.element_ty), mask=exists)
    if ENTROPY:
        cat.store_entropy(
            entropy, e, d, inverse, log_sum, first, r, rows, inside, OWN, PROBS, EPS, FAST
        )


@triton.jit
def _score_wide(
    given, mask, value, index, score, entropy, neg_inf, row, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, VECTOR: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr,
    EPS: tl.constexpr,
    HOT: tl.constexpr, INDEX: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    shift = wide.shift_of(row, rows, A, GIVEN, VECTOR)
    top, _, total, weighted, _, _ = wide.sums(
        given, mask, row, shift, rows, given_row, given_column, mask_row, mask_column,
        A, COUNT, CHUNKS, GIVEN, MASK, VECTOR, PROBS, ENTROPY, FAST,
    )  # fmt: skip
    inverse = m.reciprocal(total, FAST)
    log_sum = m.log(total, FAST)
    if SCORE:
        if HOT:
            most = tl.full([], float("-inf"), tl.float32)
            chosen = tl.full([], 0, tl.int32)
            # Of the value's own kind: the ways through `read` must end with one.
            OTHER: tl.constexpr = (
                float("-inf") if value.dtype.element_ty.is_floating() else -(1 << 30)
            )
            for c in range(wide.chunks(shift, A, COUNT, VECTOR)):
                k = wide.places(c, shift, COUNT)
                y = wide.read(
                    value, row, c, shift, rows, value_row, value_column, OTHER,
                    A, COUNT, VALUE, cat.beside(VECTOR, GIVEN, VALUE),
                ).to(tl.float32)  # fmt: skip
                high = tl.max(y, 0)
                here = tl.min(tl.where(y == high, k, A - 1), 0)
                chosen = tl.where(high > most, here, chosen)
                most = tl.maximum(most, high)
            real = chosen >= 0
            if INDEX:
                tl.store(index + row, chosen.to(tl.int64))
        else:
            asked = tl.load(value + row).to(tl.int64)
            real = (asked >= 0) & (asked < A)
            chosen = tl.where(real, asked, 0).to(tl.int32)
        picked = cat.at_index(
            given, mask, row, 0, chosen, row >= 0, rows, given_row, given_column,
            mask_row, mask_column, A, GIVEN, MASK,
        )  # fmt: skip
        scores = cat.score_of(picked, top, log_sum, inverse, PROBS, EPS, FAST)
        if MASK >= 0:
            scores = tl.where(picked == float("-inf"), neg_inf, scores)
        scores = tl.where(real, scores, float("nan"))
        tl.store(score + row, scores.to(score.dtype.element_ty))
    if ENTROPY:
        if PROBS:
            entropies = wide.entropy(
                given, mask, row, shift, rows, given_row, given_column, mask_row, mask_column,
                inverse, A, COUNT, GIVEN, MASK, VECTOR, EPS, FAST,
            )  # fmt: skip
        else:
            entropies = log_sum - weighted * inverse
        tl.store(entropy + row, entropies.to(entropy.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["neg_inf", "total_rows", "rows"])
def score_kernel(
    given, mask, value, index, score, entropy, neg_inf, total_rows, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, VECTOR: tl.constexpr,
    CHUNKS: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr,
    EPS: tl.constexpr, HOT: tl.constexpr, INDEX: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scores of given indices, or of one-hot vectors where HOT, and entropies, of OWN rows."""
    program = tl.program_id(0).to(tl.int64)
    if CHUNKS > 0:
        _score_wide(
            given, mask, value, index, score, entropy, neg_inf, program, rows,
            given_row, given_column, mask_row, mask_column, value_row, value_column,
            A, COUNT, CHUNKS, VECTOR,
            GIVEN, MASK, VALUE, PROBS, EPS, HOT, INDEX, SCORE, ENTROPY, FAST,
        )  # fmt: skip
    else:
        _score_rows(
            given, mask, value, index, score, entropy, neg_inf, program * OWN, total_rows, rows,
            given_row, given_column, mask_row, mask_column, value_row, value_column,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, VECTOR,
            GIVEN, MASK, VALUE, PROBS, EPS, HOT, INDEX, SCORE, ENTROPY, FAST,
        )  # fmt: skip
