"""The gradients of the scores of a TanhNormal's given values."""

import triton
import triton.language as tl

from fastprob.kernels import _math as m
from fastprob.kernels import _tile as tile
from fastprob.kernels._tanh_normal_score import unit


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
    given = unit(
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
