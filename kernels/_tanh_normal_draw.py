"""The kernel that draws values of a TanhNormal and scores them."""

import triton
import triton.language as tl

from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tanh_points as points
from fastprob.kernels import _tile as tile
from fastprob.kernels._scale import positive

# How a value is chosen.
RANDOM, MEDIAN, MEAN, MODE = range(4)
_RANDOM, _MEDIAN, _MEAN, _MODE = (tl.constexpr(kind) for kind in range(4))
# What the terms of a drawn value lack, to base 2, and 2 to the minus of that: log(2 pi) / 2 of the
# Normal, and log(4) of the Jacobian.
DRAWN = tl.constexpr(3.325748064736159)
UNDRAWN = tl.constexpr(0.09973557010035818)
HALF_LOG2E = tl.constexpr(0.7213475204444817)
TWO_LOG2E = tl.constexpr(2.8853900817779268)


@triton.jit
def _draw_tile(
    loc, scale, value, mapped, low, high, lo, hi, halves, mids, half, mid, log_half,
    bias, least, floor, seed, call, start, read, kept,
    rows, loc_row, loc_column, scale_row, scale_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, KIND: tl.constexpr, SCORE: tl.constexpr, SPAN: tl.constexpr,
    LIMIT: tl.constexpr, CLAMP: tl.constexpr, MAP: tl.constexpr, FAST: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes the values of one tile; gives minus their scores over log(2).

    Of a tile that is not WHOLE the first `read` elements are drawn; `kept` are stored.
    """
    UNIT: tl.constexpr = tile.vector(value.dtype.element_ty.primitive_bitwidth)
    i = tl.arange(0, COUNT)
    inside = i < read
    stored = i < kept
    mu = tile.load(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
    sigma = mu
    if KIND != _MEDIAN or SCORE or MAP:
        sigma = tile.load(
            scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
        )
    if MAP:
        sigma = positive(sigma, bias, least, floor, MAP, FAST)
        # Several samples have one scale, which the first of them writes.
        tile.store_first(
            mapped, start, sigma, i, stored, rows,
            A, COUNT, TILE, WHOLE and TILE % UNIT == 0, SCALE % 2 == 1,
        )  # fmt: skip
    z = tl.zeros([COUNT], tl.float32)
    x = mu
    jacobian = mu
    if KIND == _MEAN:
        y, rest = points.mean(mu, sigma, FAST)
        inner = sigma
        if SCORE:
            rest = tl.maximum(rest, 1.0 - LIMIT, propagate_nan=tl.PropagateNan.ALL)
            z = m.divide(points.before(y, rest, FAST) - tl.abs(mu), sigma, FAST)
            inner = sigma * (rest * (2.0 - rest))
        y = m.with_sign(y, mu)
    else:
        if KIND == _MODE:
            x, y, _ = points.mode(mu, sigma, FAST)
            z = 2.0 * sigma * y
            x = tl.where(mu < 0, -x, x)
            q = 0.5 * y + 0.5
        else:
            if KIND == _RANDOM:
                z = random.normals(seed, call, start, COUNT, FAST)
                x = mu + z * sigma
            # The constant is added where it costs no instruction, and taken out of t again.
            jacobian = tl.abs(x) * -TWO_LOG2E + DRAWN
            t = m.exp2(jacobian, FAST)
            q = m.reciprocal(1.0 + t * UNDRAWN, FAST)
            y = m.abs_tanh(x, (1.0 - t * UNDRAWN) * q)
        inner = sigma * q * q
        if LIMIT < 1.0:
            y = tl.minimum(y, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        y = m.with_sign(y, x)
    width, middle = tile.bounds(halves, mids, half, mid, start, i, A, COUNT, SPAN)
    if SPAN:
        y = y * width + middle
    if CLAMP:
        least, most = tile.bounds(low, high, lo, hi, start, i, A, COUNT, CLAMP)
        y = tile.clamp(y, least, most)
    tile.store(value, start, y, i, stored, COUNT, TILE, WHOLE and TILE % UNIT == 0)
    energy = z
    if SCORE:
        if SPAN == 2:
            inner = inner * width
        # To base 2 up to the sums. Constants here and not in these, which would grow beyond the
        # scores.
        energy = m.log2(inner, FAST)
        if KIND != _MEDIAN:
            energy += z * z * HALF_LOG2E
        if KIND == _MEAN:
            energy += m.HALF_LOG_2PI * m.LOG2E
        elif KIND == _MODE:
            energy += tl.abs(x) * -TWO_LOG2E + DRAWN
        else:
            energy += jacobian
        if SPAN == 1:
            energy += log_half * m.LOG2E
        if TILE < COUNT and not WHOLE:
            # No sum reads these; without it the assembler spills 8 bytes of the mean at A = 257.
            energy = tl.where(inside, energy, 0.0)
    return energy


@triton.jit
def _draw_rows(
    loc, scale, value, score, mapped, low, high, lo, hi, halves, mids, half, mid, log_half,
    bias, least, floor, seed, call, program, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, KIND: tl.constexpr, SCORE: tl.constexpr, SPAN: tl.constexpr,
    LIMIT: tl.constexpr, CLAMP: tl.constexpr, MAP: tl.constexpr, FAST: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """OWN wide rows chunk by chunk; UNIT and LAST as of `_tile.wide_rows`."""
    THREADS: tl.constexpr = COUNT // 16
    start, skip, last, read, kept = tile.wide_rows(program, total_rows, A, OWN, UNIT, LAST)
    i = tl.arange(0, COUNT)
    energies = tl.zeros([THREADS], tl.float32)
    row = program * OWN
    end = skip + A
    for chunk in range(0, last, COUNT):
        energy = _draw_tile(
            loc, scale, value, mapped, low, high, lo, hi, halves, mids, half, mid, log_half,
            bias, least, floor, seed, call, start + chunk, read - chunk, kept - chunk, rows,
            loc_row, loc_column, scale_row, scale_column,
            A, COUNT, COUNT, LOC, SCALE, KIND, SCORE, SPAN, LIMIT, CLAMP, MAP, FAST,
            A % COUNT == 0,
        )  # fmt: skip
        if chunk < skip:
            energy = tl.where(i < skip, 0.0, energy)
        while end <= tl.minimum(chunk + COUNT, last):
            energies, energy = tile.ended(energies, energy, i, end - chunk, COUNT, THREADS, UNIT)
            if SCORE:
                sums = tile.sum_rows(energies, A, THREADS, 1, 1, False)
                tile.store_rows(score, row, sums * -m.LN2, total_rows, 1, 1, True)
            energies = tl.zeros([THREADS], tl.float32)
            row += 1
            end += A
        energies += tile.of_threads(energy, COUNT, THREADS, UNIT)


@triton.jit(do_not_specialize=["seed", "call", "total_rows", "rows"])
def draw_kernel(
    loc, scale, value, score, mapped, low, high, lo, hi, halves, mids, half, mid, log_half,
    bias, least, floor, state, used, ticket, seed, call, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, KIND: tl.constexpr, SCORE: tl.constexpr, SPAN: tl.constexpr,
    LIMIT: tl.constexpr, CLAMP: tl.constexpr, MAP: tl.constexpr, HOST: tl.constexpr,
    ADVANCE: tl.constexpr, KEEP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Values and scores of OWN rows; chunk by chunk where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    if KIND == _RANDOM:
        seed, call = random.open_state(state, seed, call, HOST)
    UNIT: tl.constexpr = tile.vector(value.dtype.element_ty.primitive_bitwidth)
    if WIDE:
        if A % UNIT == 0 or (program + 1) * OWN < total_rows:
            _draw_rows(
                loc, scale, value, score, mapped, low, high, lo, hi, halves, mids, half, mid,
                log_half, bias, least, floor, seed, call, program, total_rows, rows,
                loc_row, loc_column, scale_row, scale_column,
                A, COUNT, OWN, LOC, SCALE, KIND, SCORE, SPAN, LIMIT, CLAMP, MAP, FAST, UNIT, False,
            )  # fmt: skip
        else:
            _draw_rows(
                loc, scale, value, score, mapped, low, high, lo, hi, halves, mids, half, mid,
                log_half, bias, least, floor, seed, call, program, total_rows, rows,
                loc_row, loc_column, scale_row, scale_column,
                A, COUNT, OWN, LOC, SCALE, KIND, SCORE, SPAN, LIMIT, CLAMP, MAP, FAST, UNIT, True,
            )  # fmt: skip
    else:
        start, lead = tile.begin(program, TILE, UNIT)
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            energy = _draw_tile(
                loc, scale, value, mapped, low, high, lo, hi, halves, mids, half, mid, log_half,
                bias, least, floor, seed, call, start, COUNT,
                tile.kept(lead, TILE, COUNT, UNIT), rows,
                loc_row, loc_column, scale_row, scale_column,
                A, COUNT, TILE, LOC, SCALE, KIND, SCORE, SPAN, LIMIT, CLAMP, MAP, FAST,
                True,
            )  # fmt: skip
            if SCORE:
                sums = tile.sum_rows(energy, A, COUNT, ROWS, OWN, GATHER, lead)
                tile.store_rows(score, program * OWN, sums * -m.LN2, total_rows, ROWS, OWN, True)
        else:
            left = tl.minimum(end - start, lead + TILE).to(tl.int32)
            energy = _draw_tile(
                loc, scale, value, mapped, low, high, lo, hi, halves, mids, half, mid, log_half,
                bias, least, floor, seed, call, start, left, left, rows,
                loc_row, loc_column, scale_row, scale_column,
                A, COUNT, TILE, LOC, SCALE, KIND, SCORE, SPAN, LIMIT, CLAMP, MAP, FAST,
                False,
            )  # fmt: skip
            if SCORE:
                sums = tile.sum_rows(energy, A, COUNT, ROWS, OWN, GATHER, lead)
                tile.store_rows(score, program * OWN, sums * -m.LN2, total_rows, ROWS, OWN, False)
    if KIND == _RANDOM:
        random.close_state(state, used, ticket, seed, call, ADVANCE, KEEP)
