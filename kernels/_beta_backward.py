"""The gradients of a Beta's values, scores and entropies."""

import triton
import triton.language as tl

from fastprob.kernels import _beta_parts as parts
from fastprob.kernels import _math as m
from fastprob.kernels import _tile as tile
from fastprob.kernels._beta_draw import _GIVEN, _MEAN, _MODE, _RANDOM


@triton.jit
def _backward_tile(
    grad_value, grad_score, grad_entropy, conc1, conc0, value, by_conc1, by_conc0,
    grad_conc1, grad_conc0, grad_scored, low, high, lo, hi, start, left, rows,
    conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
    upstream_row, upstream_column,
    A: tl.constexpr, COUNT: tl.constexpr, CONC1: tl.constexpr, CONC0: tl.constexpr,
    VALUE: tl.constexpr, UPSTREAM: tl.constexpr, KIND: tl.constexpr, BY_VALUE: tl.constexpr,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr,
    CLAMP: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    a = tile.load(
        conc1, start, i, inside, 1.0, rows, conc1_row, conc1_column, A, COUNT, CONC1, WHOLE
    )
    b = tile.load(
        conc0, start, i, inside, 1.0, rows, conc0_row, conc0_column, A, COUNT, CONC0, WHOLE
    )
    total, by_a, by_b, by_total = parts.inverses(a, b, FAST)
    grad_a = tl.zeros([COUNT], tl.float32)
    grad_b = grad_a
    along = grad_a
    x = by_a
    y = by_b
    if BY_SCORE or KIND != _GIVEN:
        x = tile.load(
            value, start, i, inside, 0.5, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
        )
        y = 1.0 - x
    if BY_VALUE:
        along = tile.load(
            grad_value, start, i, inside, 0.0, rows, upstream_row, upstream_column,
            A, COUNT, UPSTREAM, WHOLE,
        )  # fmt: skip
        if CLAMP:
            # x is what was drawn. One that rounds to a bound is a bound, as in the value's dtype.
            bottom, top = tile.bounds(low, high, lo, hi, start, i, A, COUNT, CLAMP)
            kept = tile.clamp(x, bottom, top).to(value.dtype.element_ty).to(tl.float32) == x
            along = tl.where(kept, along, 0.0)
    if BY_SCORE:
        share_a, share_b, log_total = parts.shares(total, by_a, by_b, FAST)
        r_a, r_b, r_total = parts.digammas(
            a, b, total, by_a, by_b, by_total, share_a, share_b, log_total
        )
        y, log_x, log_y = parts.logs(total, total, x, True, FAST)
        by_row = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
        e = tl.fma(x, b, -(y * a))
        u = e * by_a
        v = -e * by_b
        ratio_a = tl.where(tl.abs(u) < 0.25, u - u * u * m.log1p_gap(u), log_x + share_a)
        ratio_b = tl.where(tl.abs(v) < 0.25, v - v * v * m.log1p_gap(v), log_y + share_b)
        grad_a = by_row * (ratio_a + (r_a - r_total))
        grad_b = by_row * (ratio_b + (r_b - r_total))
        if TO_VALUE or KIND != _GIVEN:
            # At an end the largest number in place of infinity, which `divide` does not bear.
            slope = m.divide(a - 1.0, tl.where(x == 0.0, 1.2e-38, x), FAST)
            slope -= m.divide(b - 1.0, tl.where(y == 0.0, 1.2e-38, y), FAST)
            if TO_VALUE:
                tile.store(grad_scored, start, by_row * slope, i, inside, COUNT, COUNT, WHOLE)
            elif KIND == _MODE:
                # 0 but for the rounding of x, whose share in the other terms it takes back. At an
                # end the mode stays where it is.
                along += tl.where(x * y > 0.0, by_row * slope, 0.0)
            else:
                along += by_row * slope
    if KIND == _RANDOM:
        if WHOLE:
            slope_a = tl.load(by_conc1 + start + i)
            slope_b = tl.load(by_conc0 + start + i)
        else:
            slope_a = tl.load(by_conc1 + start + i, mask=inside, other=0.0)
            slope_b = tl.load(by_conc0 + start + i, mask=inside, other=0.0)
        grad_a += along * (slope_a * y)
        grad_b -= along * (slope_b * x)
    elif KIND == _MEAN:
        grad_a += along * (y * by_total)
        grad_b -= along * (x * by_total)
    elif KIND == _MODE:
        inner = tl.maximum(a - 1.0, 0.0) + tl.maximum(b - 1.0, 0.0)
        rate = along * m.reciprocal(tl.where(inner > 0.0, inner, 1.0), FAST)
        grad_a += tl.where((inner > 0.0) & (a > 1.0), rate * y, 0.0)
        grad_b -= tl.where((inner > 0.0) & (b > 1.0), rate * x, 0.0)
    if BY_ENTROPY:
        # The entropy has no sample dimensions: its gradient goes to the first sample alone.
        per_row = tile.of_first_rows(grad_entropy, start, i, inside, rows, A, COUNT, WHOLE)
        s_a, s_b, s_total = parts.trigammas(a, b, total, by_a, by_b, by_total)
        shared = s_total - 2.0 * (1.0 + s_total) * by_total
        grad_a += per_row * (shared - s_a + (1.0 + s_a) * by_a)
        grad_b += per_row * (shared - s_b + (1.0 + s_b) * by_b)
    tile.store(grad_conc1, start, grad_a, i, inside, COUNT, COUNT, WHOLE)
    tile.store(grad_conc0, start, grad_b, i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["total", "rows"])
def backward_kernel(
    grad_value, grad_score, grad_entropy, conc1, conc0, value, by_conc1, by_conc0,
    grad_conc1, grad_conc0, grad_scored, low, high, lo, hi, total, rows,
    conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
    upstream_row, upstream_column,
    A: tl.constexpr, COUNT: tl.constexpr, CONC1: tl.constexpr, CONC0: tl.constexpr,
    VALUE: tl.constexpr, UPSTREAM: tl.constexpr, KIND: tl.constexpr, BY_VALUE: tl.constexpr,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr,
    CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of COUNT elements, of a value that is given or has derivatives by KIND."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _backward_tile(
            grad_value, grad_score, grad_entropy, conc1, conc0, value, by_conc1, by_conc0,
            grad_conc1, grad_conc0, grad_scored, low, high, lo, hi, start, COUNT, rows,
            conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
            upstream_row, upstream_column,
            A, COUNT, CONC1, CONC0, VALUE, UPSTREAM, KIND, BY_VALUE, BY_SCORE, BY_ENTROPY,
            TO_VALUE, CLAMP, FAST, True,
        )  # fmt: skip
    else:
        _backward_tile(
            grad_value, grad_score, grad_entropy, conc1, conc0, value, by_conc1, by_conc0,
            grad_conc1, grad_conc0, grad_scored, low, high, lo, hi, start,
            (total - start).to(tl.int32), rows,
            conc1_row, conc1_column, conc0_row, conc0_column, value_row, value_column,
            upstream_row, upstream_column,
            A, COUNT, CONC1, CONC0, VALUE, UPSTREAM, KIND, BY_VALUE, BY_SCORE, BY_ENTROPY,
            TO_VALUE, CLAMP, FAST, False,
        )  # fmt: skip
