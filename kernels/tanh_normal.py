"""TanhNormal with independent elements: sample, score and clamp in one pass, and backward.

y = mid + half tanh(x) with x ~ Normal(loc, scale), z = (x - loc) / scale, over a row of A elements:

    log p(y) = -sum(z^2 / 2 + log(scale) + log(1 - tanh(x)^2) + log(half)) - A log(2 pi) / 2

With t = exp(-2 |x|) and q = 1 / (1 + t):

    tanh(x) = +-(1 - t) q               1 - tanh(x)^2 = 4 t q^2
    log(scale) + log(1 - tanh(x)^2) = log(scale q^2) - 2 |x| + log(4)

which is one logarithm, exact where tanh saturates: a drawn value is scored at the x that was drawn,
never through atanh. With g the gradient of the value, gl that of its score, u = (y - mid) / half:

    drawn:     e = g half (1 - tanh(x)^2) + 2 tanh(x) gl
               dloc = e                 dscale = e noise - gl / scale
    detached:  that of the Normal before tanh, at x
    given:     x = atanh(u)             dloc = gl z / scale       dscale = gl (z^2 - 1) / scale
               dvalue = gl (2 u - z / scale) / (half (1 - u^2))

Where tanh is limited to 1 - resolution, the value's gradient takes 1 - tanh(x)^2 at that limit.

The mode and the mean of y are found in registers, see `_tanh_points`. At the mode the score does
not change with x, and z / scale = 2 tanh(x), so that

    dx/dloc = 1 / (1 - 2 scale^2 (1 - tanh(x)^2))         dx/dscale = 4 scale tanh(x) dx/dloc
    dl/dloc = 2 tanh(x)                                   dl/dscale = (z^2 - 1) / scale

A mean is scored as a given value, and its score's gradient goes through it.

Source: Haarnoja et al. 2018, "Soft actor-critic", appendix C; a draw's gradient as in `normal`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tanh_points as points
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
from fastprob.kernels._scale import positive
from fastprob.kernels._scale import slope as slope_of

# How a value is chosen.
RANDOM, MEDIAN, MEAN, MODE = range(4)
_RANDOM, _MEDIAN, _MEAN, _MODE = (tl.constexpr(kind) for kind in range(4))
# What the terms of a drawn value lack, to base 2, and 2 to the minus of that: log(2 pi) / 2 of the
# Normal, and log(4) of the Jacobian.
DRAWN = tl.constexpr(3.325748064736159)
UNDRAWN = tl.constexpr(0.09973557010035818)
HALF_LOG2E = tl.constexpr(0.7213475204444817)
TWO_LOG2E = tl.constexpr(2.8853900817779268)
# 1 minus the resolution of the dtype, rounded to it: the largest |tanh| that is let through.
LIMITS = {
    dtype: torch.tensor(1.0 - torch.finfo(dtype).resolution, dtype=dtype, device="cpu").item()
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
}


def _span(bounds: Any) -> tuple[int, Any, Any, Any, Any, Any]:
    """How a kernel reads the interval: numbers and tensors, of which it takes what it needs.

    Args:
        bounds: the operators' `Bounds`: half the width, middle and logarithm of the half, numbers
            or contiguous tensors of an event.

    Returns:
        0 for (-1, 1), 1 for numbers, 2 for tensors; half, middle and logarithm of the half as
        numbers; half and middle as tensors.
    """
    if isinstance(bounds.half, Tensor):
        return 2, None, None, None, bounds.half, bounds.mid
    if bounds.half == 1.0 and bounds.mid == 0.0:
        return 0, None, None, None, None, None
    return 1, bounds.half, bounds.mid, bounds.log_half, None, None


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


@triton.jit
def _mean_gradients(
    grad_value, grad_score, mu, sigma, low, high, lo, hi, halves, mids, half, mid,
    start, i, inside, rows, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, BY_VALUE: tl.constexpr,
    BY_SCORE: tl.constexpr, SPAN: tl.constexpr, LIMIT: tl.constexpr, CLAMP: tl.constexpr,
    FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients by loc and scale of a tile of means."""
    y, rest, by_mu, by_sigma = points.mean_slopes(mu, sigma, FAST)
    # From here on as if loc were not negative.
    negative = mu < 0
    to_mean = tl.zeros([COUNT], tl.float32)
    to_loc = tl.zeros([COUNT], tl.float32)
    to_scale = tl.zeros([COUNT], tl.float32)
    if BY_SCORE:
        by_row = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
        # Beyond the limit a value is scored as the limit, whatever it is.
        limited = rest < 1.0 - LIMIT
        rest = tl.maximum(rest, 1.0 - LIMIT, propagate_nan=tl.PropagateNan.ALL)
        inverse = m.reciprocal(sigma, FAST)
        z = m.divide(points.before(y, rest, FAST) - tl.abs(mu), sigma, FAST)
        rate = by_row * inverse
        to_loc = rate * z
        to_scale = rate * (z * z - 1.0)
        through = by_row * (2.0 - 2.0 * rest - z * inverse)
        through = through * m.reciprocal(rest * (2.0 - rest), FAST)
        to_mean += tl.where(limited, 0.0, through)
    if BY_VALUE:
        along = tile.load(
            grad_value, start, i, inside, 0.0, rows, value_row, value_column,
            A, COUNT, VALUE, WHOLE,
        )  # fmt: skip
        width, middle = tile.bounds(halves, mids, half, mid, start, i, A, COUNT, SPAN)
        if CLAMP:
            value = m.with_sign(y, mu)
            if SPAN:
                value = value * width + middle
            least, most = tile.bounds(low, high, lo, hi, start, i, A, COUNT, CLAMP)
            along = tl.where((value >= least) & (value <= most), along, 0.0)
        if SPAN:
            along = along * width
        to_mean += tl.where(negative, -along, along)
    to_loc += to_mean * by_mu
    return tl.where(negative, -to_loc, to_loc), to_scale + to_mean * by_sigma


@triton.jit
def _draw_backward_tile(
    grad_value, grad_score, grad_mapped, loc, scale, grad_loc, grad_scale,
    low, high, lo, hi, halves, mids, half, mid, bias, least, floor, used, start, left, rows,
    value_row, value_column, loc_row, loc_column, scale_row, scale_column,
    mapped_row, mapped_column, out_row,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, KIND: tl.constexpr, BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    SPAN: tl.constexpr, LIMIT: tl.constexpr, CLAMP: tl.constexpr, MAP: tl.constexpr,
    MAPPED: tl.constexpr, OUT: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile."""
    i = tl.arange(0, COUNT)
    inside = i < left
    x = tile.load(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
    sigma = tile.load(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    rise = sigma
    if MAP:
        sigma, rise = slope_of(sigma, bias, least, floor, MAP, FAST)
    if KIND == _MEAN:
        by_loc, by_scale = _mean_gradients(
            grad_value, grad_score, x, sigma, low, high, lo, hi, halves, mids, half, mid,
            start, i, inside, rows, value_row, value_column,
            A, COUNT, VALUE, BY_VALUE, BY_SCORE, SPAN, LIMIT, CLAMP, FAST, WHOLE,
        )  # fmt: skip
    else:
        z = tl.zeros([COUNT], tl.float32)
        if KIND == _RANDOM:
            z = random.normals(tl.load(used), tl.load(used + 1), start, COUNT, FAST)
            x = x + z * sigma
        rest = x
        size = x
        if KIND == _MODE:
            negative = x < 0
            x, size, rest = points.mode(x, sigma, FAST)
            x = tl.where(negative, -x, x)
        # 4 t and q of `tanh_parts`, and |tanh(x)| as 2 q - 1: three slots fewer.
        four_t = m.exp2(tl.abs(x) * -2.8853900817779268 + 2.0, FAST)
        q = m.reciprocal(four_t * 0.25 + 1.0, FAST)
        if KIND != _MODE:
            size = m.abs_tanh(x, q * 2.0 - 1.0)
        signed = m.with_sign(size, x)
        if KIND == _MODE:
            z = 2.0 * sigma * signed
        by_loc = tl.zeros([COUNT], tl.float32)
        if BY_VALUE:
            by_loc = tile.load(
                grad_value, start, i, inside, 0.0, rows, value_row, value_column,
                A, COUNT, VALUE, WHOLE,
            )  # fmt: skip
            width, middle = tile.bounds(halves, mids, half, mid, start, i, A, COUNT, SPAN)
            slope = four_t * q * q
            if LIMIT < 1.0:
                # The gradient of a limited tanh is that of its value, as upstream's.
                slope = tl.maximum(slope, 1.0 - LIMIT * LIMIT, propagate_nan=tl.PropagateNan.ALL)
            if SPAN:
                slope = slope * width
            if CLAMP:
                y = size
                if LIMIT < 1.0:
                    y = tl.minimum(y, LIMIT, propagate_nan=tl.PropagateNan.ALL)
                y = m.with_sign(y, x)
                if SPAN:
                    y = y * width + middle
                least, most = tile.bounds(low, high, lo, hi, start, i, A, COUNT, CLAMP)
                by_loc = tl.where((y >= least) & (y <= most), by_loc, 0.0)
            by_loc = by_loc * slope
        if KIND == _MODE:
            # 0 where three roots meet, which would make a NaN of a gradient of 0.
            steep = tl.maximum(rest + 2.0 * sigma * sigma * size * size, 1.1920929e-07)
            by_loc = by_loc * m.reciprocal(steep, FAST)
            by_scale = by_loc * 2.0 * z
        else:
            by_scale = by_loc * z
        if BY_SCORE:
            by_row = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
            by_loc += by_row * 2.0 * signed
            if KIND == _MODE:
                by_scale += by_row * 2.0 * signed * z
            else:
                by_scale = by_loc * z
            by_scale -= by_row * m.reciprocal(sigma, FAST)
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
    grad_value, grad_score, grad_mapped, loc, scale, grad_loc, grad_scale,
    low, high, lo, hi, halves, mids, half, mid, bias, least, floor, used, total, rows,
    value_row, value_column, loc_row, loc_column, scale_row, scale_column,
    mapped_row, mapped_column, out_row,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, KIND: tl.constexpr, BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    SPAN: tl.constexpr, LIMIT: tl.constexpr, CLAMP: tl.constexpr, MAP: tl.constexpr,
    MAPPED: tl.constexpr, OUT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of COUNT elements, the noise drawn anew from the state that the draw has used."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _draw_backward_tile(
            grad_value, grad_score, grad_mapped, loc, scale, grad_loc, grad_scale,
            low, high, lo, hi, halves, mids, half, mid, bias, least, floor, used, start, COUNT,
            rows, value_row, value_column, loc_row, loc_column, scale_row, scale_column,
            mapped_row, mapped_column, out_row,
            A, COUNT, VALUE, LOC, SCALE, KIND, BY_VALUE, BY_SCORE, SPAN, LIMIT, CLAMP,
            MAP, MAPPED, OUT, FAST, True,
        )  # fmt: skip
    else:
        _draw_backward_tile(
            grad_value, grad_score, grad_mapped, loc, scale, grad_loc, grad_scale,
            low, high, lo, hi, halves, mids, half, mid, bias, least, floor, used, start,
            (total - start).to(tl.int32),
            rows, value_row, value_column, loc_row, loc_column, scale_row, scale_column,
            mapped_row, mapped_column, out_row,
            A, COUNT, VALUE, LOC, SCALE, KIND, BY_VALUE, BY_SCORE, SPAN, LIMIT, CLAMP,
            MAP, MAPPED, OUT, FAST, False,
        )  # fmt: skip


@triton.jit
def _unit(
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
    y = _unit(
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


@triton.jit
def _score_backward_tile(
    grad_score, loc, scale, value, grad_loc, grad_scale, grad_value, halves, mids, half, mid,
    start, left, rows, loc_row, loc_column, scale_row, scale_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    VALUE: tl.constexpr, TO_VALUE: tl.constexpr, SPAN: tl.constexpr, LIMIT: tl.constexpr,
    FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    mu = tile.load(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
    sigma = tile.load(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    width, middle = tile.bounds(halves, mids, half, mid, start, i, A, COUNT, SPAN)
    given = _unit(
        value, start, i, inside, rows, value_row, value_column, width, middle,
        A, COUNT, VALUE, SPAN, WHOLE, FAST,
    )  # fmt: skip
    y = tile.clamp(given, -LIMIT, LIMIT)
    inverse = m.reciprocal(sigma, FAST)
    z = m.divide(m.atanh(y, FAST) - mu, sigma, FAST)
    by_row = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
    rate = by_row * inverse
    tile.store(grad_loc, start, rate * z, i, inside, COUNT, COUNT, WHOLE)
    tile.store(grad_scale, start, rate * (z * z - 1.0), i, inside, COUNT, COUNT, WHOLE)
    if TO_VALUE:
        slope = (1.0 - y) * (1.0 + y)
        if SPAN:
            slope = slope * width
        by_value = by_row * (2.0 * y - z * inverse) * m.reciprocal(slope, FAST)
        # Beyond the limit a value is scored as the limit, whatever it is.
        by_value = tl.where(tl.abs(given) <= LIMIT, by_value, 0.0)
        tile.store(grad_value, start, by_value, i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["total", "rows"])
def score_backward_kernel(
    grad_score, loc, scale, value, grad_loc, grad_scale, grad_value, halves, mids, half, mid,
    total, rows, loc_row, loc_column, scale_row, scale_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    VALUE: tl.constexpr, TO_VALUE: tl.constexpr, SPAN: tl.constexpr, LIMIT: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of the score of given values, of COUNT elements."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _score_backward_tile(
            grad_score, loc, scale, value, grad_loc, grad_scale, grad_value,
            halves, mids, half, mid, start, COUNT, rows,
            loc_row, loc_column, scale_row, scale_column, value_row, value_column,
            A, COUNT, LOC, SCALE, VALUE, TO_VALUE, SPAN, LIMIT, FAST, True,
        )  # fmt: skip
    else:
        _score_backward_tile(
            grad_score, loc, scale, value, grad_loc, grad_scale, grad_value,
            halves, mids, half, mid, start, (total - start).to(tl.int32), rows,
            loc_row, loc_column, scale_row, scale_column, value_row, value_column,
            A, COUNT, LOC, SCALE, VALUE, TO_VALUE, SPAN, LIMIT, FAST, False,
        )  # fmt: skip


def _limit(x: Tensor, safe: bool) -> float:
    return LIMITS[x.dtype] if safe else 1.0


def most_registers(grid: Grid, a: int, kind: int, raw: bool, spanned: bool) -> int | None:
    """The most registers of a draw on NVIDIA's GPUs, None for the assembler's own choice.

    That is 96 on sm_100 for a mean at A = 17 in fp32, and 8 bytes of stack; told 168, none. 128 for
    a mode between bounds of each element on sm_80, at A = 8 in bf16, likewise. And 168 on sm_90 for
    draws from a raw output in chunks, at A = 1025, with as many; told 200, none.

    Args:
        grid: the tiles.
        a: size of a row.
        kind: how the value is chosen.
        raw: whether the scale is mapped.
        spanned: whether bounds are tensors.
    """
    if grid.wide:
        return 200 if raw and a % 4 else None
    return 168 if (kind == MEAN and grid.gather) or (kind == MODE and spanned) else None


def draw(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    bounds: Any,
    shape: torch.Size,
    ndims: int,
    *,
    state: State | None,
    point: int = MEDIAN,
    score: bool = True,
    clamp: Any = None,
    keep: bool = False,
    raw: Mapping = NO_MAPPING,
    mapped: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A value, its score and the state that was used, in one launch.

    Args:
        loc: mean before tanh; of one shape, dtype and device with `scale`.
        scale: standard deviation before tanh.
        bounds: the `Bounds` where the values lie, and whether |tanh| is limited.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions, summed over.
        state: where the noise comes from; None for a value that is not drawn.
        point: which value that is: MEDIAN, the squashed mean, or MEAN or MODE of what is squashed.
        score: whether the log-density is wanted.
        clamp: the `Bounds` that the value is projected onto, after it was scored.
        keep: whether the backward pass needs the state.
        raw: how the standard deviation is mapped from `scale`, if that is a raw value.
        mapped: gets the standard deviation then, `[*batch, *event]`, contiguous. Nothing is written
            to it where there is no sample.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]` and an int64 pair; None
        for what was not wanted.
    """
    full = shape + loc.shape
    a = event_numel(loc.shape, ndims)
    batch = loc.shape[: loc.dim() - ndims]
    value = torch.empty(full, dtype=loc.dtype, device=loc.device)
    scores = torch.empty(shape + batch, dtype=loc.dtype, device=loc.device) if score else None
    used = torch.empty(2, dtype=torch.int64, device=loc.device) if keep and state else None
    total = value.numel()
    if total == 0:
        if scores is not None:
            scores.zero_()
        return value, scores, used if used is None else used.zero_()
    rows, total_rows = loc.numel() // a, total // a
    span, half, mid, log_half, halves, mids = _span(bounds)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    kind, lo, hi, low, high = bounds_of(clamp)
    source = state or NO_STATE
    grid = forward_grid(total_rows, a, vector_of(loc.dtype))
    how = point if state is None else RANDOM
    with launching(loc):
        draw_kernel[(grid.programs,)](
            mu.tensor, sigma.tensor, value, scores, mapped, low, high, lo, hi,
            halves, mids, half, mid, log_half, *raw.numbers,
            source.pair, used, source.ticket, source.seed, source.call,
            total_rows, rows, mu.row, mu.column, sigma.row, sigma.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, LOC=mu.layout, SCALE=sigma.layout,
            KIND=how, SCORE=score, SPAN=span, LIMIT=_limit(loc, bounds.safe), CLAMP=kind,
            MAP=raw.kind, HOST=source.pair is None, ADVANCE=source.ticket is not None,
            KEEP=used is not None, FAST=fast(loc), num_warps=grid.warps,
            **limited(loc, most_registers(grid, a, how, raw.kind > 0, span == 2)),
        )  # fmt: skip
    return value, scores, used


def threads(kind: int, span: int, size: int) -> int:
    """Times the warps of `_launch`'s tiles that a gradient of a draw has.

    A mean between bounds of each element has 4 elements a thread in fp32, one vector: 62 registers
    at A = 17 on sm_90, where 8 took 128 and 8 bytes of stack, at 288 issue slots each.

    Args:
        kind: how the value is chosen.
        span: 2 where bounds are tensors.
        size: bytes of an element.
    """
    return 2 if kind == MEAN and span == 2 and size == 4 else 1


def draw_backward(
    grad_value: Tensor | None,  # [*sample, *batch, *event]
    grad_score: Tensor | None,  # [*sample, *batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    bounds: Any,
    used: Tensor | None,
    shape: torch.Size,
    ndims: int,
    *,
    point: int = MEDIAN,
    clamp: Any = None,
    raw: Mapping = NO_MAPPING,
    grad_mapped: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `draw` by loc and scale, `[*batch, *event]`.

    Where no gradient flows through the value, that of its score is the Normal's before tanh:
    `normal.draw_backward` with `pathwise=False`.

    Args:
        grad_value: gradient of the value, None for none.
        grad_score: gradient of the log-density, None for none.
        loc: as in `draw`.
        scale: as in `draw`.
        bounds: as in `draw`.
        used: what `draw` has kept; None for a value that is not drawn.
        shape: as in `draw`.
        ndims: as in `draw`.
        point: as in `draw`.
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
    span, half, mid, _, halves, mids = _span(bounds)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    upstream = parameter(grad_value if grad_value is not None else loc, ndims, False)
    further = parameter(grad_mapped if grad_mapped is not None else loc, ndims, False)
    kind, lo, hi, low, high = bounds_of(clamp)
    how = point if used is None else RANDOM
    programs, count, warps = flat_grid(total)
    warps *= threads(how, span, loc.element_size())
    with launching(loc):
        draw_backward_kernel[(programs,)](
            upstream.tensor, tail(grad_score), further.tensor, mu.tensor, sigma.tensor,
            grad_loc, grad_scale, low, high, lo, hi,
            halves, mids, half, mid, *raw.numbers, used,
            total, loc.numel() // a, upstream.row, upstream.column, mu.row, mu.column,
            sigma.row, sigma.column, further.row, further.column, out_row,
            A=a, COUNT=count, VALUE=upstream.layout, LOC=mu.layout, SCALE=sigma.layout,
            KIND=how, BY_VALUE=grad_value is not None,
            BY_SCORE=grad_score is not None, SPAN=span, LIMIT=_limit(loc, bounds.safe),
            CLAMP=kind, MAP=raw.kind, MAPPED=further.layout if grad_mapped is not None else -1,
            OUT=out, FAST=fast(loc), num_warps=warps,
        )  # fmt: skip
    if into is not None:
        return grad_loc, grad_scale
    return fold(grad_loc, loc), fold(grad_scale, scale)


def score(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event]
    bounds: Any,
    ndims: int,
) -> Tensor:
    """The log-density of a given value, `[*sample, *batch]`, of the dtype that both promote to.

    Args:
        loc: mean before tanh; of one shape, dtype and device with `scale`.
        scale: standard deviation before tanh.
        value: what is scored; on or outside of the bounds as if just inside.
        bounds: the `Bounds` where the values lie, and whether |tanh| is limited.
        ndims: number of event dimensions, summed over.
    """
    shape = value.shape[: value.dim() - loc.dim()]
    batch = loc.shape[: loc.dim() - ndims]
    a = event_numel(loc.shape, ndims)
    dtype = torch.promote_types(loc.dtype, value.dtype)
    scores = torch.empty(shape + batch, dtype=dtype, device=loc.device)
    rows = loc.numel() // a if a else 0
    total_rows = rows * shape.numel()
    if total_rows == 0:
        return scores.zero_()
    span, half, mid, log_half, halves, mids = _span(bounds)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    given = parameter(value, ndims, False)
    grid = forward_grid(total_rows, a, vector_of(loc.dtype, value.dtype))
    with launching(loc):
        score_kernel[(grid.programs,)](
            mu.tensor, sigma.tensor, given.tensor, scores,
            halves, mids, half, mid, log_half,
            total_rows, rows, mu.row, mu.column, sigma.row, sigma.column, given.row, given.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, LOC=mu.layout, SCALE=sigma.layout,
            VALUE=given.layout, SPAN=span, LIMIT=_limit(loc, bounds.safe), FAST=fast(loc),
            num_warps=grid.warps,
        )  # fmt: skip
    return scores


def score_backward(
    grad_score: Tensor,  # [*sample, *batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event]
    bounds: Any,
    ndims: int,
    *,
    to_value: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `score` by loc, scale and value, of the shapes of these.

    Args:
        grad_score: gradient of the log-density.
        loc: as in `score`.
        scale: as in `score`.
        value: as in `score`.
        bounds: as in `score`.
        ndims: as in `score`.
        to_value: whether the gradient of the value is wanted.
    """
    shape = value.shape[: value.dim() - loc.dim()]
    a = event_numel(loc.shape, ndims)
    grad_loc, grad_scale = gradients(shape, loc), gradients(shape, scale)
    grad_value = (
        torch.empty(value.shape, dtype=value.dtype, device=loc.device) if to_value else None
    )
    total = grad_loc.numel()
    if total == 0:
        return torch.zeros_like(loc), torch.zeros_like(scale), grad_value
    span, half, mid, _, halves, mids = _span(bounds)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    given = parameter(value, ndims, False)
    programs, count, warps = flat_grid(total)
    with launching(loc):
        score_backward_kernel[(programs,)](
            tail(grad_score), mu.tensor, sigma.tensor, given.tensor, grad_loc, grad_scale,
            grad_value, halves, mids, half, mid,
            total, loc.numel() // a, mu.row, mu.column, sigma.row, sigma.column,
            given.row, given.column,
            A=a, COUNT=count, LOC=mu.layout, SCALE=sigma.layout, VALUE=given.layout,
            TO_VALUE=to_value, SPAN=span, LIMIT=_limit(loc, bounds.safe), FAST=fast(loc),
            num_warps=warps,
        )  # fmt: skip
    return fold(grad_loc, loc), fold(grad_scale, scale), grad_value
