"""What the categorical kernels share: how rows lie in a tile, and what is summed over them.

`categorical` tells of the layouts and gives the formulas.
"""

import triton
import triton.language as tl

from fastprob.kernels import _math as m
from fastprob.kernels import _tile as tile

# How a value is chosen.
RANDOM = tl.constexpr(0)
MEDIAN = tl.constexpr(1)
MODE = tl.constexpr(2)
MEAN = tl.constexpr(3)

# What is written as the value, next to the index.
NO_VALUE = tl.constexpr(0)
MEAN_INDEX = tl.constexpr(1)
ONE_HOT = tl.constexpr(2)
PROBS_VALUE = tl.constexpr(3)

# exp(-1e30) is 0, and 0 * -1e30 is no NaN, as 0 * -inf is.
LEAST = tl.constexpr(-1.0e30)


@triton.jit
def columns(A: tl.constexpr, REP: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr):
    """The category at each place of a tile, `[REP, 1, LANES]`, and whether the place has one."""
    rep = tl.arange(0, REP)[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    if PIECE > 0:
        k = lane * PIECE + rep
        # Only the last lane may end early: for all but a few rep this is settled when compiled.
        return k, (rep < PIECE) & ((rep < A - (LANES - 1) * PIECE) | (k < A))
    else:
        return rep * LANES + lane, rep < REP


@triton.jit
def offsets(first, r, k, rows, row_stride, column_stride, A: tl.constexpr, LAYOUT: tl.constexpr):
    """Offsets of categories k of the rows first + r, by the layouts of `_tile.pointers`.

    Args:
        first: int64 scalar, the first row of a tile.
        r: int32, rows from there.
        k: int32.
        rows: number of rows of the parameter, which begins anew after them.
        row_stride: in units of 4 elements where 4 was added to LAYOUT.
        column_stride: in elements.
        A: size of a row.
        LAYOUT: as there.
    """
    if LAYOUT == 0:
        return first * A + (r * A + k)
    else:
        row = first + r
        if LAYOUT % 2 == 1:
            row = row % rows
        if LAYOUT == 1:
            return row * A + k
        elif LAYOUT >= 4:
            return row * (row_stride * 4) + k * column_stride
        else:
            return row * row_stride + k * column_stride


@triton.jit
def load(
    ptr, first, total_rows, rows, row_stride, column_stride, other, past,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A tile `[REP, ROWS, LANES]` of the rows from `first` on, in fp32.

    `other` stands outside a row, and `past` in the rows past the end where they are GATHER.
    """
    k, inside = columns(A, REP, LANES, PIECE)
    r = tl.arange(0, ROWS)[None, :, None]
    if PIECE > 0:
        i = tl.arange(0, COUNT)
        start = first * A
        end = total_rows.to(tl.int64) * A
        NEEDED: tl.constexpr = OWN * A
        # A mask stops vectorized access, but for one of a constant multiple of 4 elements. That
        # leaves the rows of the next tile to it, where less than COUNT elements are a tile's own.
        if start + COUNT <= end:
            x = tile.load(
                ptr, start, i, i < NEEDED, past, rows, row_stride, column_stride,
                A, COUNT, LAYOUT, NEEDED >= COUNT,
            )  # fmt: skip
        else:
            x = tile.load(
                ptr, start, i, i < (end - start).to(tl.int32), past, rows,
                row_stride, column_stride, A, COUNT, LAYOUT, False,
            )  # fmt: skip
        # COUNT has room for what the last lane of the last row reads past its end.
        source = tl.where(k < LANES * PIECE, tl.minimum(r, OWN - 1) * A + k, 0)
        taken = tl.gather(x, tl.reshape(source, [REP * ROWS * LANES]), 0)
        return tl.where(inside, tl.reshape(taken, [REP, ROWS, LANES]), other)
    else:
        # Rows past the end read the last one again: a mask takes 16 instructions for 32 elements.
        r = tl.minimum(r, (total_rows - 1 - first).to(tl.int32))
        at = ptr + offsets(first, r, k, rows, row_stride, column_stride, A, LAYOUT)
        return tl.load(at).to(tl.float32)


@triton.jit
def store(
    ptr, x, first, total_rows,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Stores a tile `[REP, ROWS, LANES]` of the rows from `first` on, contiguous.

    SAME: whether rows past the end hold what the last one does, so that no mask is needed.
    """
    start = first * A
    if PIECE > 0:
        i = tl.arange(0, COUNT)
        row = tl.minimum(i // A, ROWS - 1)
        if LANES == 1:
            source = (i % A) * ROWS + row
        else:
            k = i % A
            source = ((k % PIECE) * ROWS + row) * LANES + k // PIECE
        flat = tl.gather(tl.reshape(x, [REP * ROWS * LANES]), source, 0)
        end = total_rows.to(tl.int64) * A
        left = tl.minimum(end - start, OWN * A).to(tl.int32)
        if start + OWN * A <= end:
            tile.store(ptr, start, flat, i, i < left, COUNT, OWN * A, True)
        else:
            tile.store(ptr, start, flat, i, i < left, COUNT, OWN * A, False)
    else:
        k, _ = columns(A, REP, LANES, PIECE)
        r = tl.arange(0, ROWS)[None, :, None]
        x = tl.broadcast_to(x, [REP, ROWS, LANES]).to(ptr.dtype.element_ty)
        last = (total_rows - 1 - first).to(tl.int32)
        if SAME:
            tl.store(ptr + start + (tl.minimum(r, last) * A + k), x)
        else:
            tl.store(ptr + start + (r * A + k), x, mask=r <= last)


@triton.jit
def over(x):
    """The sum of each row, `[1, ROWS, 1]`.

    Here and below values of rows keep their dimensions: so they stay in the layout of the tile, and
    in registers. As `[ROWS]` they went through shared memory, 28 times in one kernel.
    """
    return tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def highest(x, FAST: tl.constexpr):
    """The largest of each row, NaN where one of it is: `tl.max` passes it over."""
    if FAST:
        return tl.reduce(tl.reduce(x, 0, larger, keep_dims=True), 2, larger, keep_dims=True)
    else:
        # The interpreter goes through a reduction of one's own element by element.
        top = tl.max(tl.max(x, 0, keep_dims=True), 2, keep_dims=True)
        return top + over(tl.where(x != x, x, 0.0))


@triton.jit
def at_least(d):
    """No -inf; a NaN stays one."""
    return tl.maximum(d, LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def padded(x, REP: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr, A: tl.constexpr):
    """Terms of a sum, -0 at the places of a tile that have no category.

    A compiler leaves out the addition of -0 and not that of 0: rows of 18 cost no more than that.
    """
    if PIECE > 0:
        _, inside = columns(A, REP, LANES, PIECE)
        return tl.where(inside, x, -0.0)
    else:
        return x


@triton.jit
def clamped(q, EPS: tl.constexpr):
    return tile.clamp(q, EPS, 1.0 - EPS)


@triton.jit
def score_of(x, top, log_sum, inverse, PROBS: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr):
    """Log-probability of the category with logit or weight x."""
    if PROBS:
        return m.log(clamped(x * inverse, EPS), FAST)
    else:
        return (x - top) - log_sum


@triton.jit
def masked(x, allowed):
    return tl.where(allowed != 0.0, x, float("-inf"))


@triton.jit
def load_given(
    given, mask, first, total_rows, rows, given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, GIVEN: tl.constexpr,
    MASK: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    """A tile of logits, -inf where masked, or of weights."""
    x = load(
        given, first, total_rows, rows, given_row, given_column,
        0.0 if PROBS else float("-inf"), 1.0, A, COUNT, REP, ROWS, LANES, PIECE, OWN, GIVEN,
    )  # fmt: skip
    if MASK >= 0:
        allowed = load(
            mask, first, total_rows, rows, mask_row, mask_column, 0.0, 1.0,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, MASK,
        )  # fmt: skip
        x = masked(x, allowed)
    return x


@triton.jit
def at_index(
    given, mask, first, r, index, exists, rows, given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The logit or weight of one category of each row: read again, from a cache."""
    at = given + offsets(first, r, index, rows, given_row, given_column, A, GIVEN)
    x = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    if MASK >= 0:
        at = mask + offsets(first, r, index, rows, mask_row, mask_column, A, MASK)
        x = masked(x, tl.load(at, mask=exists, other=1).to(tl.float32))
    return x


@triton.jit
def store_entropy(
    entropy, e, d, inverse, log_sum, first, r, rows,
    A: tl.constexpr, REP: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr,
    OWN: tl.constexpr, PROBS: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Entropies of a tile; they have no sample dimensions, the rows of the first sample write."""
    if PROBS:
        c = clamped(e * inverse, EPS)
        made = -over(padded(c * m.log(c, FAST), REP, LANES, PIECE, A))
    else:
        made = log_sum - over(e * at_least(d)) * inverse
    exists = r < tl.minimum(rows - first, OWN).to(tl.int32)
    tl.store(entropy + first + r, made.to(entropy.dtype.element_ty), mask=exists)
