"""Normal with independent elements: sample, score, entropy and clamp in one pass, and backward.

With z = (x - loc) / scale, summed over a row of A elements:

    log p(x) = -sum(z^2 / 2 + log(scale)) - A log(2 pi) / 2
    H        =  sum(log(scale)) + A (1 + log(2 pi)) / 2

A drawn value is x = loc + noise * scale, so its z is the noise. With g the gradient of the value,
gl that of its score and gh that of the entropy:

    drawn:     dloc = g               dscale = g noise + (gh - gl) / scale
    detached:  dloc = gl z / scale    dscale = (gl (z^2 - 1) + gh) / scale
    given:     the same               dvalue = -dloc

Source: the density and entropy of the normal distribution; Kingma and Welling 2013 for the
gradient of a draw.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tile as tile
from fastprob.kernels._launch import (
    FLAT,
    NO_MAPPING,
    NO_STATE,
    Grid,
    Mapping,
    State,
    bounds_of,
    event_numel,
    fast,
    flat_grid,
    fold,
    forward_grid,
    gradients,
    launching,
    limited,
    parameter,
    strided_rows,
    tail,
    vector_of,
)
from fastprob.kernels._scale import positive, slope


@triton.jit
def _draw_tile(
    loc, scale, value, mapped, low, high, lo, hi, bias, least, floor, seed, call, start, read,
    kept, rows, loc_row, loc_column, scale_row, scale_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, RANDOM: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    CLAMP: tl.constexpr, MAP: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes the values of one tile; gives z^2 / 2 + log(scale) and log(scale).

    Of a tile that is not WHOLE the first `read` elements are drawn; `kept` are stored.
    """
    UNIT: tl.constexpr = tile.vector(value.dtype.element_ty.primitive_bitwidth)
    i = tl.arange(0, COUNT)
    inside = i < read
    stored = i < kept
    mu = tile.load(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
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
        if not WHOLE:
            sigma = tl.where(inside, sigma, 1.0)
    z = tl.zeros([COUNT], tl.float32)
    x = mu
    if RANDOM:
        z = random.normals(seed, call, start, COUNT, FAST)
        x = mu + z * sigma
    if CLAMP:
        least, most = tile.bounds(low, high, lo, hi, start, i, A, COUNT, CLAMP)
        x = tile.clamp(x, least, most)
    tile.store(value, start, x, i, stored, COUNT, TILE, WHOLE and TILE % UNIT == 0)
    log_sigma = z
    if SCORE or ENTROPY:
        log_sigma = m.log(sigma, FAST)
    energy = log_sigma
    if RANDOM and SCORE:
        energy = log_sigma + z * z * 0.5
    return energy, log_sigma


@triton.jit
def _store_sums(
    score, entropy, energy, log_sigma, first, total_rows, rows, lead,
    A: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr,
    GATHER: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The scores and entropies of a tile's rows, from its terms."""
    if SCORE:
        sums = tile.sum_rows(energy, A, COUNT, ROWS, OWN, GATHER, lead)
        tile.store_rows(score, first, -sums - A * m.HALF_LOG_2PI, total_rows, ROWS, OWN, WHOLE)
    if ENTROPY:
        sums = tile.sum_rows(log_sigma, A, COUNT, ROWS, OWN, GATHER, lead)
        # An entropy has no sample dimensions: the rows of the first sample write it.
        tile.store_rows(entropy, first, sums + A * (0.5 + m.HALF_LOG_2PI), rows, ROWS, OWN, False)


@triton.jit
def _draw_rows(
    loc, scale, value, score, entropy, mapped, low, high, lo, hi, bias, least, floor, seed, call,
    program, total_rows, rows, loc_row, loc_column, scale_row, scale_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, RANDOM: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    CLAMP: tl.constexpr, MAP: tl.constexpr, FAST: tl.constexpr, UNIT: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """OWN wide rows chunk by chunk; UNIT and LAST as of `_tile.wide_rows`."""
    THREADS: tl.constexpr = COUNT // 16
    start, skip, last, read, kept = tile.wide_rows(program, total_rows, A, OWN, UNIT, LAST)
    i = tl.arange(0, COUNT)
    energies = tl.zeros([THREADS], tl.float32)
    logs = tl.zeros([THREADS], tl.float32)
    row = program * OWN
    end = skip + A
    for chunk in range(0, last, COUNT):
        energy, log_sigma = _draw_tile(
            loc, scale, value, mapped, low, high, lo, hi, bias, least, floor, seed, call,
            start + chunk, read - chunk, kept - chunk, rows,
            loc_row, loc_column, scale_row, scale_column,
            A, COUNT, COUNT, LOC, SCALE, RANDOM, SCORE, ENTROPY, CLAMP, MAP, FAST,
            A % COUNT == 0,
        )  # fmt: skip
        if chunk < skip:
            energy = tl.where(i < skip, 0.0, energy)
            log_sigma = tl.where(i < skip, 0.0, log_sigma)
        while end <= tl.minimum(chunk + COUNT, last):
            energies, energy = tile.ended(energies, energy, i, end - chunk, COUNT, THREADS, UNIT)
            logs, log_sigma = tile.ended(logs, log_sigma, i, end - chunk, COUNT, THREADS, UNIT)
            _store_sums(
                score, entropy, energies, logs, row, total_rows, rows, 0,
                A, THREADS, 1, 1, False, SCORE, ENTROPY, True,
            )  # fmt: skip
            energies = tl.zeros([THREADS], tl.float32)
            logs = tl.zeros([THREADS], tl.float32)
            row += 1
            end += A
        energies += tile.of_threads(energy, COUNT, THREADS, UNIT)
        logs += tile.of_threads(log_sigma, COUNT, THREADS, UNIT)


@triton.jit(do_not_specialize=["seed", "call", "total_rows", "rows"])
def draw_kernel(
    loc, scale, value, score, entropy, mapped, low, high, lo, hi, bias, least, floor,
    state, used, ticket, seed, call, total_rows, rows, loc_row, loc_column, scale_row, scale_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, RANDOM: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    CLAMP: tl.constexpr, MAP: tl.constexpr, HOST: tl.constexpr, ADVANCE: tl.constexpr,
    KEEP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Values, scores and entropies of OWN rows; chunk by chunk where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    if RANDOM:
        seed, call = random.open_state(state, seed, call, HOST)
    UNIT: tl.constexpr = tile.vector(value.dtype.element_ty.primitive_bitwidth)
    if WIDE:
        if A % UNIT == 0 or (program + 1) * OWN < total_rows:
            _draw_rows(
                loc, scale, value, score, entropy, mapped, low, high, lo, hi, bias, least, floor,
                seed, call, program, total_rows, rows,
                loc_row, loc_column, scale_row, scale_column,
                A, COUNT, OWN, LOC, SCALE, RANDOM, SCORE, ENTROPY, CLAMP, MAP, FAST, UNIT, False,
            )  # fmt: skip
        else:
            _draw_rows(
                loc, scale, value, score, entropy, mapped, low, high, lo, hi, bias, least, floor,
                seed, call, program, total_rows, rows,
                loc_row, loc_column, scale_row, scale_column,
                A, COUNT, OWN, LOC, SCALE, RANDOM, SCORE, ENTROPY, CLAMP, MAP, FAST, UNIT, True,
            )  # fmt: skip
    else:
        first = program * OWN
        start, lead = tile.begin(program, TILE, UNIT)
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            energy, log_sigma = _draw_tile(
                loc, scale, value, mapped, low, high, lo, hi, bias, least, floor, seed, call,
                start, COUNT, tile.kept(lead, TILE, COUNT, UNIT), rows,
                loc_row, loc_column, scale_row, scale_column,
                A, COUNT, TILE, LOC, SCALE, RANDOM, SCORE, ENTROPY, CLAMP, MAP, FAST,
                True,
            )  # fmt: skip
            _store_sums(
                score, entropy, energy, log_sigma, first, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, True,
            )  # fmt: skip
        else:
            left = tl.minimum(end - start, lead + TILE).to(tl.int32)
            energy, log_sigma = _draw_tile(
                loc, scale, value, mapped, low, high, lo, hi, bias, least, floor, seed, call,
                start, left, left, rows,
                loc_row, loc_column, scale_row, scale_column,
                A, COUNT, TILE, LOC, SCALE, RANDOM, SCORE, ENTROPY, CLAMP, MAP, FAST,
                False,
            )  # fmt: skip
            _store_sums(
                score, entropy, energy, log_sigma, first, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip
    if RANDOM:
        random.close_state(state, used, ticket, seed, call, ADVANCE, KEEP)


@triton.jit
def _draw_backward_tile(
    grad_value, grad_score, grad_entropy, grad_mapped, loc, scale, grad_loc, grad_scale,
    low, high, lo, hi, bias, least, floor, used, start, left, rows, value_row, value_column,
    loc_row, loc_column, scale_row, scale_column, mapped_row, mapped_column, out_row,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, RANDOM: tl.constexpr, PATHWISE: tl.constexpr, BY_VALUE: tl.constexpr,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, CLAMP: tl.constexpr, MAP: tl.constexpr,
    MAPPED: tl.constexpr, OUT: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    sigma = tile.load(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    rise = sigma
    if MAP:
        sigma, rise = slope(sigma, bias, least, floor, MAP, FAST)
    z = tl.zeros([COUNT], tl.float32)
    if RANDOM:
        z = random.normals(tl.load(used), tl.load(used + 1), start, COUNT, FAST)
    by_loc = tl.zeros([COUNT], tl.float32)
    by_scale = tl.zeros([COUNT], tl.float32)
    if BY_VALUE and PATHWISE:
        by_loc = tile.load(
            grad_value, start, i, inside, 0.0, rows, value_row, value_column,
            A, COUNT, VALUE, WHOLE,
        )  # fmt: skip
        if CLAMP:
            x = z * sigma + tile.load(
                loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE
            )
            least, most = tile.bounds(low, high, lo, hi, start, i, A, COUNT, CLAMP)
            by_loc = tl.where((x >= least) & (x <= most), by_loc, 0.0)
        by_scale = by_loc * z
    rate = tl.zeros([COUNT], tl.float32)
    if BY_SCORE or BY_ENTROPY:
        inverse = m.reciprocal(sigma, FAST)
        if BY_SCORE:
            by_row = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
            if PATHWISE:
                rate = -by_row
            else:
                by_loc = by_row * z * inverse
                rate = by_row * (z * z - 1.0)
        if BY_ENTROPY:
            # The entropy has no sample dimensions: its gradient goes to the first sample alone.
            rate += tile.of_first_rows(grad_entropy, start, i, inside, rows, A, COUNT, WHOLE)
        by_scale += rate * inverse
    if MAP:
        if MAPPED >= 0:
            # The scale has no sample dimensions: its gradient goes to the first sample alone.
            by_scale += tile.load_first(
                grad_mapped, start, i, inside, rows, mapped_row, mapped_column,
                A, COUNT, MAPPED, WHOLE, SCALE % 2 == 1,
            )  # fmt: skip
        by_scale *= rise
    tile.store_at(grad_loc, start, by_loc, i, inside, rows, out_row, A, COUNT, OUT, WHOLE)
    tile.store_at(grad_scale, start, by_scale, i, inside, rows, out_row, A, COUNT, OUT, WHOLE)


@triton.jit(do_not_specialize=["total", "rows"])
def draw_backward_kernel(
    grad_value, grad_score, grad_entropy, grad_mapped, loc, scale, grad_loc, grad_scale,
    low, high, lo, hi, bias, least, floor, used, total, rows, value_row, value_column,
    loc_row, loc_column, scale_row, scale_column, mapped_row, mapped_column, out_row,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, RANDOM: tl.constexpr, PATHWISE: tl.constexpr, BY_VALUE: tl.constexpr,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, CLAMP: tl.constexpr, MAP: tl.constexpr,
    MAPPED: tl.constexpr, OUT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of COUNT elements, the noise drawn anew from the state that the draw has used."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _draw_backward_tile(
            grad_value, grad_score, grad_entropy, grad_mapped, loc, scale, grad_loc, grad_scale,
            low, high, lo, hi, bias, least, floor, used, start, COUNT, rows, value_row,
            value_column, loc_row, loc_column, scale_row, scale_column, mapped_row,
            mapped_column, out_row,
            A, COUNT, VALUE, LOC, SCALE, RANDOM, PATHWISE, BY_VALUE, BY_SCORE, BY_ENTROPY, CLAMP,
            MAP, MAPPED, OUT, FAST, True,
        )  # fmt: skip
    else:
        _draw_backward_tile(
            grad_value, grad_score, grad_entropy, grad_mapped, loc, scale, grad_loc, grad_scale,
            low, high, lo, hi, bias, least, floor, used, start, (total - start).to(tl.int32), rows,
            value_row, value_column, loc_row, loc_column, scale_row, scale_column, mapped_row,
            mapped_column, out_row,
            A, COUNT, VALUE, LOC, SCALE, RANDOM, PATHWISE, BY_VALUE, BY_SCORE, BY_ENTROPY, CLAMP,
            MAP, MAPPED, OUT, FAST, False,
        )  # fmt: skip


@triton.jit
def _score_tile(
    loc, scale, value, start, read, rows, loc_row, loc_column, scale_row, scale_column,
    value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    VALUE: tl.constexpr, SCORE: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < read
    sigma = tile.load(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    log_sigma = m.log(sigma, FAST)
    energy = log_sigma
    if SCORE:
        mu = tile.load(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
        x = tile.load(
            value, start, i, inside, 0.0, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
        )
        z = (x - mu) * m.reciprocal(sigma, FAST)
        energy = log_sigma + z * z * 0.5
    return energy, log_sigma


@triton.jit
def _score_rows(
    loc, scale, value, score, entropy, program, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The scores and entropies of wide rows, as in `_draw_rows`."""
    THREADS: tl.constexpr = COUNT // 16
    start, skip, last, read, _ = tile.wide_rows(program, total_rows, A, OWN, UNIT, LAST)
    i = tl.arange(0, COUNT)
    energies = tl.zeros([THREADS], tl.float32)
    logs = tl.zeros([THREADS], tl.float32)
    row = program * OWN
    end = skip + A
    for chunk in range(0, last, COUNT):
        energy, log_sigma = _score_tile(
            loc, scale, value, start + chunk, read - chunk, rows,
            loc_row, loc_column, scale_row, scale_column, value_row, value_column,
            A, COUNT, LOC, SCALE, VALUE, SCORE, FAST, A % COUNT == 0,
        )  # fmt: skip
        if chunk < skip:
            energy = tl.where(i < skip, 0.0, energy)
            log_sigma = tl.where(i < skip, 0.0, log_sigma)
        while end <= tl.minimum(chunk + COUNT, last):
            energies, energy = tile.ended(energies, energy, i, end - chunk, COUNT, THREADS, UNIT)
            logs, log_sigma = tile.ended(logs, log_sigma, i, end - chunk, COUNT, THREADS, UNIT)
            _store_sums(
                score, entropy, energies, logs, row, total_rows, rows, 0,
                A, THREADS, 1, 1, False, SCORE, ENTROPY, True,
            )  # fmt: skip
            energies = tl.zeros([THREADS], tl.float32)
            logs = tl.zeros([THREADS], tl.float32)
            row += 1
            end += A
        energies += tile.of_threads(energy, COUNT, THREADS, UNIT)
        logs += tile.of_threads(log_sigma, COUNT, THREADS, UNIT)


@triton.jit(do_not_specialize=["total_rows", "rows"])
def score_kernel(
    loc, scale, value, score, entropy, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Scores of given values, and entropies, of OWN rows; chunk by chunk where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    UNIT: tl.constexpr = tile.vector(
        loc.dtype.element_ty.primitive_bitwidth, value.dtype.element_ty.primitive_bitwidth
    )
    if WIDE:
        if A % UNIT == 0 or (program + 1) * OWN < total_rows:
            _score_rows(
                loc, scale, value, score, entropy, program, total_rows, rows,
                loc_row, loc_column, scale_row, scale_column, value_row, value_column,
                A, COUNT, OWN, LOC, SCALE, VALUE, SCORE, ENTROPY, FAST, UNIT, False,
            )  # fmt: skip
        else:
            _score_rows(
                loc, scale, value, score, entropy, program, total_rows, rows,
                loc_row, loc_column, scale_row, scale_column, value_row, value_column,
                A, COUNT, OWN, LOC, SCALE, VALUE, SCORE, ENTROPY, FAST, UNIT, True,
            )  # fmt: skip
    else:
        start, lead = tile.begin(program, TILE, UNIT)
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            energy, log_sigma = _score_tile(
                loc, scale, value, start, COUNT, rows,
                loc_row, loc_column, scale_row, scale_column, value_row, value_column,
                A, COUNT, LOC, SCALE, VALUE, SCORE, FAST, True,
            )  # fmt: skip
            _store_sums(
                score, entropy, energy, log_sigma, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, True,
            )  # fmt: skip
        else:
            energy, log_sigma = _score_tile(
                loc, scale, value, start,
                tl.minimum(end - start, lead + TILE).to(tl.int32), rows,
                loc_row, loc_column, scale_row, scale_column, value_row, value_column,
                A, COUNT, LOC, SCALE, VALUE, SCORE, FAST, False,
            )  # fmt: skip
            _store_sums(
                score, entropy, energy, log_sigma, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip


@triton.jit
def _score_backward_tile(
    grad_score, grad_entropy, loc, scale, value, grad_loc, grad_scale, grad_value, start, left,
    rows, loc_row, loc_column, scale_row, scale_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    VALUE: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr,
    FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    sigma = tile.load(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    inverse = m.reciprocal(sigma, FAST)
    by_loc = tl.zeros([COUNT], tl.float32)
    rate = tl.zeros([COUNT], tl.float32)
    if BY_SCORE:
        mu = tile.load(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
        x = tile.load(
            value, start, i, inside, 0.0, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
        )
        z = m.divide(x - mu, sigma, FAST)
        by_row = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
        by_loc = by_row * z * inverse
        rate = by_row * (z * z - 1.0)
    if BY_ENTROPY:
        rate += tile.of_first_rows(grad_entropy, start, i, inside, rows, A, COUNT, WHOLE)
    tile.store(grad_loc, start, by_loc, i, inside, COUNT, COUNT, WHOLE)
    tile.store(grad_scale, start, rate * inverse, i, inside, COUNT, COUNT, WHOLE)
    if TO_VALUE:
        tile.store(grad_value, start, -by_loc, i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["total", "rows"])
def score_backward_kernel(
    grad_score, grad_entropy, loc, scale, value, grad_loc, grad_scale, grad_value, total, rows,
    loc_row, loc_column, scale_row, scale_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    VALUE: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the score of given values and of the entropy, of COUNT elements."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _score_backward_tile(
            grad_score, grad_entropy, loc, scale, value, grad_loc, grad_scale, grad_value, start,
            COUNT, rows, loc_row, loc_column, scale_row, scale_column,
            value_row, value_column,
            A, COUNT, LOC, SCALE, VALUE, BY_SCORE, BY_ENTROPY, TO_VALUE, FAST, True,
        )  # fmt: skip
    else:
        _score_backward_tile(
            grad_score, grad_entropy, loc, scale, value, grad_loc, grad_scale, grad_value, start,
            (total - start).to(tl.int32), rows, loc_row, loc_column, scale_row, scale_column,
            value_row, value_column,
            A, COUNT, LOC, SCALE, VALUE, BY_SCORE, BY_ENTROPY, TO_VALUE, FAST, False,
        )  # fmt: skip


def most_registers(grid: Grid, apart: bool) -> int | None:
    """The most registers of a draw on NVIDIA's GPUs, None for the assembler's own choice.

    That is 128 on sm_100 for several samples in chunks, clamped, with what a gradient needs, and 16
    bytes of stack at A = 1025 in fp32; told 168, none.

    Args:
        grid: the tiles.
        apart: whether parameters lie otherwise than the value does.
    """
    return 168 if grid.wide and apart else None


def draw(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    shape: torch.Size,
    ndims: int,
    *,
    state: State | None,
    score: bool = True,
    entropy: bool = False,
    clamp: Any = None,
    keep: bool = False,
    raw: Mapping = NO_MAPPING,
    mapped: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """A value, its score, the entropy and the state that was used, in one launch.

    Args:
        loc: mean; of one shape, dtype and device with `scale`.
        scale: standard deviation.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions, summed over.
        state: where the noise comes from; None for the mean itself.
        score: whether the log-density is wanted.
        entropy: whether the entropy is wanted.
        clamp: the `Bounds` that the value is projected onto, after it was scored.
        keep: whether the backward pass needs the state.
        raw: how the standard deviation is mapped from `scale`, if that is a raw value.
        mapped: gets the standard deviation then, `[*batch, *event]`, contiguous. Nothing is written
            to it where there is no sample.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`, entropy `[*batch]`, and
        an int64 pair; None for what was not wanted.
    """
    full = shape + loc.shape
    batch = loc.shape[: loc.dim() - ndims]
    a = event_numel(loc.shape, ndims)
    value = torch.empty(full, dtype=loc.dtype, device=loc.device)
    scores = torch.empty(shape + batch, dtype=loc.dtype, device=loc.device) if score else None
    entropies = torch.empty(batch, dtype=loc.dtype, device=loc.device) if entropy else None
    used = torch.empty(2, dtype=torch.int64, device=loc.device) if keep and state else None
    total = value.numel()
    if total == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return value, scores, entropies, used if used is None else used.zero_()
    rows, total_rows = loc.numel() // a, total // a
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    kind, lo, hi, low, high = bounds_of(clamp)
    source = state or NO_STATE
    grid = forward_grid(total_rows, a, vector_of(loc.dtype))
    registers = most_registers(grid, (mu.layout, sigma.layout) != (FLAT, FLAT))
    with launching(loc):
        draw_kernel[(grid.programs,)](
            mu.tensor, sigma.tensor, value, scores, entropies, mapped, low, high, lo, hi,
            *raw.numbers, source.pair, used, source.ticket, source.seed, source.call,
            total_rows, rows, mu.row, mu.column, sigma.row, sigma.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, LOC=mu.layout, SCALE=sigma.layout,
            RANDOM=state is not None, SCORE=score, ENTROPY=entropy,
            CLAMP=kind, MAP=raw.kind, HOST=source.pair is None,
            ADVANCE=source.ticket is not None, KEEP=used is not None, FAST=fast(loc),
            num_warps=grid.warps, **limited(loc, registers),
        )  # fmt: skip
    return value, scores, entropies, used


def draw_backward(
    grad_value: Tensor | None,  # [*sample, *batch, *event]
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    used: Tensor | None,
    shape: torch.Size,
    ndims: int,
    *,
    pathwise: bool = True,
    clamp: Any = None,
    raw: Mapping = NO_MAPPING,
    grad_mapped: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `draw` by loc and scale, `[*batch, *event]`.

    Args:
        grad_value: gradient of the value, None for none.
        grad_score: gradient of the log-density, None for none.
        grad_entropy: gradient of the entropy, None for none.
        loc: as in `draw`.
        scale: as in `draw`.
        used: what `draw` has kept; None for the mean itself.
        shape: as in `draw`.
        ndims: as in `draw`.
        pathwise: whether gradients flow through the value; if not, it is a constant.
        clamp: as in `draw`.
        raw: as in `draw`.
        grad_mapped: gradient of the standard deviation itself, None for none.
        into: `[*sample, *batch, 2 A]`, contiguous, gets both gradients side by side. Those of the
            samples are left to the caller to add up, in one sum in place of two.

    Returns:
        both; with `into` its halves, `[*sample, *batch, *event]`.
    """
    a = event_numel(loc.shape, ndims)
    out, out_row = FLAT, 0
    if into is None:
        grad_loc, grad_scale = gradients(shape, loc), gradients(shape, scale)
    else:
        grad_loc, grad_scale = into.chunk(2, -1)
        out, out_row = strided_rows(2 * a, into.dtype)
    total = grad_loc.numel()
    if total == 0:
        return torch.zeros_like(loc), torch.zeros_like(scale)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    upstream = parameter(grad_value if grad_value is not None else loc, ndims, False)
    further = parameter(grad_mapped if grad_mapped is not None else loc, ndims, False)
    kind, lo, hi, low, high = bounds_of(clamp)
    programs, count, warps = flat_grid(total)
    with launching(loc):
        draw_backward_kernel[(programs,)](
            upstream.tensor, tail(grad_score), tail(grad_entropy), further.tensor, mu.tensor,
            sigma.tensor, grad_loc, grad_scale, low, high, lo, hi, *raw.numbers, used,
            total, loc.numel() // a, upstream.row, upstream.column, mu.row, mu.column,
            sigma.row, sigma.column, further.row, further.column, out_row,
            A=a, COUNT=count, VALUE=upstream.layout, LOC=mu.layout, SCALE=sigma.layout,
            RANDOM=used is not None, PATHWISE=pathwise, BY_VALUE=grad_value is not None,
            BY_SCORE=grad_score is not None, BY_ENTROPY=grad_entropy is not None,
            CLAMP=kind, MAP=raw.kind, MAPPED=further.layout if grad_mapped is not None else -1,
            OUT=out, FAST=fast(loc), num_warps=warps,
        )  # fmt: skip
    if into is not None:
        return grad_loc, grad_scale
    return fold(grad_loc, loc), fold(grad_scale, scale)


def score(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    *,
    entropy: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The log-density of a given value and the entropy, in one launch.

    Args:
        loc: mean; of one shape, dtype and device with `scale`.
        scale: standard deviation.
        value: what is scored; None for the entropy alone.
        ndims: number of event dimensions, summed over.
        entropy: whether the entropy is wanted.

    Returns:
        log-density `[*sample, *batch]`, of the dtype that loc and value promote to, and entropy
        `[*batch]`, of that of loc.
    """
    shape = torch.Size() if value is None else value.shape[: value.dim() - loc.dim()]
    batch = loc.shape[: loc.dim() - ndims]
    a = event_numel(loc.shape, ndims)
    dtype = loc.dtype if value is None else torch.promote_types(loc.dtype, value.dtype)
    scores = None if value is None else torch.empty(shape + batch, dtype=dtype, device=loc.device)
    entropies = torch.empty(batch, dtype=loc.dtype, device=loc.device) if entropy else None
    rows = loc.numel() // a if a else 0
    total_rows = rows * shape.numel()
    if total_rows == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return scores, entropies
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    given = mu if value is None else parameter(value, ndims, False)
    grid = forward_grid(total_rows, a, vector_of(loc.dtype, given.tensor.dtype))
    with launching(loc):
        score_kernel[(grid.programs,)](
            mu.tensor, sigma.tensor, given.tensor, scores, entropies, total_rows, rows,
            mu.row, mu.column, sigma.row, sigma.column, given.row, given.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, LOC=mu.layout, SCALE=sigma.layout,
            VALUE=given.layout, SCORE=value is not None, ENTROPY=entropy, FAST=fast(loc),
            num_warps=grid.warps,
        )  # fmt: skip
    return scores, entropies


def score_backward(
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    *,
    to_value: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `score` by loc, scale and value, of the shapes of these.

    Args:
        grad_score: gradient of the log-density, None for none.
        grad_entropy: gradient of the entropy, None for none.
        loc: as in `score`.
        scale: as in `score`.
        value: as in `score`.
        ndims: as in `score`.
        to_value: whether the gradient of the value is wanted.
    """
    shape = torch.Size() if value is None else value.shape[: value.dim() - loc.dim()]
    a = event_numel(loc.shape, ndims)
    grad_loc, grad_scale = gradients(shape, loc), gradients(shape, scale)
    grad_value = (
        torch.empty(value.shape, dtype=value.dtype, device=loc.device)
        if to_value and value is not None
        else None
    )
    total = grad_loc.numel()
    if total == 0:
        return torch.zeros_like(loc), torch.zeros_like(scale), grad_value
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    given = mu if value is None else parameter(value, ndims, False)
    programs, count, warps = flat_grid(total)
    with launching(loc):
        score_backward_kernel[(programs,)](
            tail(grad_score), tail(grad_entropy), mu.tensor, sigma.tensor, given.tensor,
            grad_loc, grad_scale, grad_value, total, loc.numel() // a,
            mu.row, mu.column, sigma.row, sigma.column, given.row, given.column,
            A=a, COUNT=count, LOC=mu.layout, SCALE=sigma.layout, VALUE=given.layout,
            BY_SCORE=grad_score is not None, BY_ENTROPY=grad_entropy is not None,
            TO_VALUE=grad_value is not None, FAST=fast(loc), num_warps=warps,
        )  # fmt: skip
    return fold(grad_loc, loc), fold(grad_scale, scale), grad_value
