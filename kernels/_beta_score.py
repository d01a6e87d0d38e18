"""The kernel that scores given values of a Beta and gives entropies."""

import triton
import triton.language as tl

from fastprob.kernels import _beta_parts as parts
from fastprob.kernels import _tile as tile


@triton.jit
def _score_tile(
    conc1, conc0, value, start, read, rows,
    conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, CONC1: tl.constexpr, CONC0: tl.constexpr,
    VALUE: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr, FAST: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores and entropies of the elements of one tile; `read` as of `_beta_draw`."""
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
    return parts.scored(a, b, x, SCORE, ENTROPY, True, FAST)


@triton.jit
def _score_rows(
    conc1, conc0, value, score, entropy, program, total_rows, rows,
    conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, CONC1: tl.constexpr,
    CONC0: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The scores and entropies of wide rows, as in `_beta_draw`."""
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
            parts.store_sums(
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
            parts.store_sums(
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
            parts.store_sums(
                score, entropy, scores, entropies, program * OWN, total_rows, rows,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip
