"""The gradients of a TanhNormal's draws: values and their scores."""

import triton
import triton.language as tl

from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tanh_points as points
from fastprob.kernels import _tile as tile
from fastprob.kernels._scale import slope as slope_of
from fastprob.kernels._tanh_normal_draw import _MEAN, _MODE, _RANDOM


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
