"""Rows that are longer than a tile: a program goes over one of them, chunk by chunk."""

import triton
import triton.language as tl

from fastprob.kernels import _categorical_rows as cat
from fastprob.kernels import _math as m


@triton.jit
def chunks(shift, A: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr):
    """Number of chunks of a row that begins at place `shift` of the first one."""
    if VECTOR == 0:
        return (A + COUNT - 1) // COUNT
    else:
        return (A + shift + (COUNT - 1)) // COUNT


@triton.jit
def shift_of(row, rows, A: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr):
    """Where in a vector of VECTOR elements a row of a parameter begins, int32."""
    if VECTOR == 0:
        return 0
    elif LAYOUT % 2 == 0:
        return (row * A % VECTOR).to(tl.int32)
    else:
        return (row % rows * A % VECTOR).to(tl.int32)


@triton.jit
def places(c, shift, COUNT: tl.constexpr):
    """The categories of chunk c, of which those are in the row that `within` says."""
    return c * COUNT + tl.arange(0, COUNT) - shift


@triton.jit
def within(k, A: tl.constexpr, VECTOR: tl.constexpr):
    if VECTOR == 0:
        return k < A
    else:
        # One comparison for both ends.
        return k.to(tl.uint32, bitcast=True) < A


@triton.jit
def read(
    ptr, row, c, shift, rows, row_stride, column_stride, other,
    A: tl.constexpr, COUNT: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Chunk c of one row, in fp32, int32 or int64; `other`, of that kind, past its ends."""
    k = places(c, shift, COUNT)
    inside = within(k, A, VECTOR)
    if VECTOR > 1 and LAYOUT < 2:
        place = c * COUNT + tl.arange(0, COUNT)
        at = ptr + cat.aligned(row, 0, place, rows, A, LAYOUT, VECTOR)
        last = row % rows if LAYOUT == 1 else row
        if (c > 0) & ((c + 1) * COUNT <= A):
            x = cat.widened(tl.load(at))
        elif last < rows - 1:
            # Whole vectors reach into the rows beside, but for the last one.
            end = (A + shift + (VECTOR - 1)) // VECTOR * VECTOR
            x = tl.where(inside, cat.widened(tl.load(at, mask=place < end)), other)
        else:
            x = tl.where(inside, cat.widened(tl.load(at, mask=inside, other=0)), other)
        return x
    else:
        at = ptr + cat.offsets(row, 0, k, rows, row_stride, column_stride, A, LAYOUT)
        if A % COUNT == 0 and VECTOR == 0:
            return cat.widened(tl.load(at))
        else:
            return tl.where(inside, cat.widened(tl.load(at, mask=inside)), other)


@triton.jit
def load(
    given, mask, row, c, shift, rows, given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr,
    VECTOR: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    """Chunk c of one row: logits, -inf where masked and past its ends, or weights, 0 there."""
    x = read(
        given, row, c, shift, rows, given_row, given_column, 0.0 if PROBS else float("-inf"),
        A, COUNT, GIVEN, VECTOR,
    )  # fmt: skip
    if MASK >= 0:
        allowed = read(
            mask, row, c, shift, rows, mask_row, mask_column, 0,
            A, COUNT, MASK, cat.beside(VECTOR, GIVEN, MASK),
        )  # fmt: skip
        x = cat.masked(x, allowed)
    return x


@triton.jit
def store(ptr, row, c, shift, x, A: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr):
    """Stores chunk c of one row, contiguous."""
    k = places(c, shift, COUNT)
    inside = within(k, A, VECTOR)
    x = x.to(ptr.dtype.element_ty)
    if VECTOR > 1:
        at = ptr + cat.aligned(row, 0, c * COUNT + tl.arange(0, COUNT), 1, A, 0, VECTOR)
        if (c > 0) & ((c + 1) * COUNT <= A):
            tl.store(at, x)
        else:
            tl.store(at, x, mask=inside)
    elif A % COUNT == 0 and VECTOR == 0:
        tl.store(ptr + row * A + k, x)
    else:
        tl.store(ptr + row * A + k, x, mask=inside)


@triton.jit
def entropy(
    given, mask, row, shift, rows, given_row, given_column, mask_row, mask_column, inverse,
    A: tl.constexpr, COUNT: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr,
    VECTOR: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The entropy of one row of weights, which are clamped after their sum is known."""
    made = tl.full([], 0.0, tl.float32)
    for c in range(chunks(shift, A, COUNT, VECTOR)):
        x = load(
            given, mask, row, c, shift, rows, given_row, given_column, mask_row, mask_column,
            A, COUNT, GIVEN, MASK, VECTOR, True,
        )  # fmt: skip
        clamped = cat.clamped(x * inverse, EPS)
        made -= tl.sum(
            tl.where(
                within(places(c, shift, COUNT), A, VECTOR), clamped * m.log(clamped, FAST), 0.0
            ),
            0,
        )
    return made


@triton.jit
def sums(
    given, mask, row, shift, rows, given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, GIVEN: tl.constexpr,
    MASK: tl.constexpr, VECTOR: tl.constexpr, PROBS: tl.constexpr, WEIGHTED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """One pass over a row.

    Returns:
        maximum of the row and its first place, sum of e, of e d (where WEIGHTED), of e k, and the
        sums of the chunks, `[CHUNKS]`, all for the maximum of the whole row.
    """
    chunk = tl.arange(0, CHUNKS)
    top = tl.full([], cat.LEAST, tl.float32)
    place = tl.full([], 0, tl.int32)
    total = tl.full([], 0.0, tl.float32)
    weighted = tl.full([], 0.0, tl.float32)
    moment = tl.full([], 0.0, tl.float32)
    sums = tl.zeros([CHUNKS], tl.float32)
    tops = tl.full([CHUNKS], cat.LEAST, tl.float32)
    for c in range(chunks(shift, A, COUNT, VECTOR)):
        k = places(c, shift, COUNT)
        x = load(
            given, mask, row, c, shift, rows, given_row, given_column, mask_row, mask_column,
            A, COUNT, GIVEN, MASK, VECTOR, PROBS,
        )  # fmt: skip
        high = tl.max(x, 0)
        place = tl.where(high > top, tl.min(tl.where(x == high, k, A - 1), 0), place)
        new = tl.maximum(top, high)
        if PROBS:
            e = x
            part = tl.sum(e, 0)
        else:
            d = x - new
            e = m.exp(d, FAST)
            part = tl.sum(e, 0)
            scale = m.exp(top - new, FAST)
            if WEIGHTED:
                weighted = (weighted + (top - new) * total) * scale + tl.sum(e * cat.at_least(d), 0)
            total *= scale
            moment *= scale
        total += part
        moment += tl.sum(e * k.to(tl.float32), 0)
        top = new
        sums = tl.where(chunk == c, part, sums)
        tops = tl.where(chunk == c, top, tops)
    if not PROBS:
        sums *= m.exp(tops - top, FAST)
    return top, place, total, weighted, moment, sums
