"""The kernel that draws values of a Beta, scores them and gives entropies."""

import triton
import triton.language as tl

from fastprob.kernels import _beta_parts as parts
from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tile as tile

# How a value is chosen. GIVEN is for gradients of a value that does not depend on the parameters.
RANDOM, MEAN, MODE, GIVEN = range(4)
_RANDOM, _MEAN, _MODE, _GIVEN = (tl.constexpr(kind) for kind in range(4))


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
        x = parts.drawn(a, b, seed, call, start, i, LEAST, MOST, FAST)
    elif KIND == _MODE:
        x = parts.mode(a, b)
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
        score, entropy = parts.scored_by(a, b, x, COUNT, SCORE, ENTROPY, KIND != _RANDOM, FAST, CUT)
    return score, entropy


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
            parts.store_sums(
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
            parts.store_sums(
                score, entropy, scores, entropies, program * OWN, total_rows, rows,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip
    if KIND == _RANDOM:
        if not FAST:
            # Read again, which costs less than scalar registers all the way.
            seed, call = random.open_state(state, seed, call, HOST)
        random.close_state(state, used, ticket, seed, call, ADVANCE, False)
