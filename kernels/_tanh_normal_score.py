"""The kernel that scores given values of a TanhNormal."""

import triton
import triton.language as tl

from fastprob.kernels import _math as m
from fastprob.kernels import _tile as tile


@triton.jit
def unit(
    value, start, i, inside, rows, value_row, value_column, width, middle,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, SPAN: tl.constexpr,
    WHOLE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Given values as those of tanh, not limited."""
    y = tile.load(
        value, start, i, inside, 0.0, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
    )
    if SPAN:
        y = m.divide(y - middle, width, FAST)
        if not WHOLE:
            y = tl.where(inside, y, 0.0)
    return y


@triton.jit
def _score_tile(
    loc, scale, value, halves, mids, half, mid, log_half, start, left, rows,
    loc_row, loc_column, scale_row, scale_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    VALUE: tl.constexpr, SPAN: tl.constexpr, LIMIT: tl.constexpr, FAST: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    mu = tile.load(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
    sigma = tile.load(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    width, middle = tile.bounds(halves, mids, half, mid, start, i, A, COUNT, SPAN)
    y = unit(
        value, start, i, inside, rows, value_row, value_column, width, middle,
        A, COUNT, VALUE, SPAN, WHOLE, FAST,
    )  # fmt: skip
    y = tile.clamp(y, -LIMIT, LIMIT)
    z = m.divide(m.atanh(y, FAST) - mu, sigma, FAST)
    inner = sigma * ((1.0 - y) * (1.0 + y))
    if SPAN == 2:
        inner = inner * width
    constant = m.HALF_LOG_2PI
    if SPAN == 1:
        constant += log_half
    energy = m.log2(inner, FAST) * m.LN2 + constant + z * z * 0.5
    return energy


@triton.jit
def _score_rows(
    loc, scale, value, score, halves, mids, half, mid, log_half, program, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, VALUE: tl.constexpr, SPAN: tl.constexpr, LIMIT: tl.constexpr,
    FAST: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The scores of wide rows, as in `_draw_rows`."""
    THREADS: tl.constexpr = COUNT // 16
    start, skip, last, read, _ = tile.wide_rows(program, total_rows, A, OWN, UNIT, LAST)
    i = tl.arange(0, COUNT)
    energies = tl.zeros([THREADS], tl.float32)
    row = program * OWN
    end = skip + A
    for chunk in range(0, last, COUNT):
        energy = _score_tile(
            loc, scale, value, halves, mids, half, mid, log_half, start + chunk, read - chunk, rows,
            loc_row, loc_column, scale_row, scale_column, value_row, value_column,
            A, COUNT, LOC, SCALE, VALUE, SPAN, LIMIT, FAST, A % COUNT == 0,
        )  # fmt: skip
        if chunk < skip:
            energy = tl.where(i < skip, 0.0, energy)
        while end <= tl.minimum(chunk + COUNT, last):
            energies, energy = tile.ended(energies, energy, i, end - chunk, COUNT, THREADS, UNIT)
            sums = tile.sum_rows(energies, A, THREADS, 1, 1, False)
            tile.store_rows(score, row, -sums, total_rows, 1, 1, True)
            energies = tl.zeros([THREADS], tl.float32)
            row += 1
            end += A
        energies += tile.of_threads(energy, COUNT, THREADS, UNIT)


@triton.jit(do_not_specialize=["total_rows", "rows"])
def score_kernel(
    loc, scale, value, score, halves, mids, half, mid, log_half, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, VALUE: tl.constexpr, SPAN: tl.constexpr, LIMIT: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Scores of given values, of OWN rows; chunk by chunk where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    UNIT: tl.constexpr = tile.vector(
        loc.dtype.element_ty.primitive_bitwidth, value.dtype.element_ty.primitive_bitwidth
    )
    if WIDE:
        if A % UNIT == 0 or (program + 1) * OWN < total_rows:
            _score_rows(
                loc, scale, value, score, halves, mids, half, mid, log_half, program, total_rows,
                rows, loc_row, loc_column, scale_row, scale_column, value_row, value_column,
                A, COUNT, OWN, LOC, SCALE, VALUE, SPAN, LIMIT, FAST, UNIT, False,
            )  # fmt: skip
        else:
            _score_rows(
                loc, scale, value, score, halves, mids, half, mid, log_half, program, total_rows,
                rows, loc_row, loc_column, scale_row, scale_column, value_row, value_column,
                A, COUNT, OWN, LOC, SCALE, VALUE, SPAN, LIMIT, FAST, UNIT, True,
            )  # fmt: skip
    else:
        start, lead = tile.begin(program, TILE, UNIT)
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            energy = _score_tile(
                loc, scale, value, halves, mids, half, mid, log_half, start, COUNT, rows,
                loc_row, loc_column, scale_row, scale_column, value_row, value_column,
                A, COUNT, LOC, SCALE, VALUE, SPAN, LIMIT, FAST, True,
            )  # fmt: skip
            sums = tile.sum_rows(energy, A, COUNT, ROWS, OWN, GATHER, lead)
            tile.store_rows(score, program * OWN, -sums, total_rows, ROWS, OWN, True)
        else:
            energy = _score_tile(
                loc, scale, value, halves, mids, half, mid, log_half, start,
                tl.minimum(end - start, lead + TILE).to(tl.int32), rows,
                loc_row, loc_column, scale_row, scale_column, value_row, value_column,
                A, COUNT, LOC, SCALE, VALUE, SPAN, LIMIT, FAST, False,
            )  # fmt: skip
            sums = tile.sum_rows(energy, A, COUNT, ROWS, OWN, GATHER, lead)
            tile.store_rows(score, program * OWN, -sums, total_rows, ROWS, OWN, False)
