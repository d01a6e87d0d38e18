"""Rows that are longer than a tile: a program goes over one of them, chunk by chunk."""

import triton
import triton.language as tl

from fastprob.kernels import _categorical_rows as cat
from fastprob.kernels import _math as m


@triton.jit
def load(
    given, mask, row, k, rows, given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr,
    PROBS: tl.constexpr,
):  # fmt: skip
    """Categories k of one row: logits, -inf where masked and past the end, or weights, 0 there."""
    other: tl.constexpr = 0.0 if PROBS else float("-inf")
    at = given + cat.offsets(row, 0, k, rows, given_row, given_column, A, GIVEN)
    if A % COUNT == 0:
        x = tl.load(at).to(tl.float32)
    else:
        x = tl.load(at, mask=k < A, other=other).to(tl.float32)
    if MASK >= 0:
        at = mask + cat.offsets(row, 0, k, rows, mask_row, mask_column, A, MASK)
        if A % COUNT == 0:
            allowed = tl.load(at)
        else:
            allowed = tl.load(at, mask=k < A, other=0)
        x = cat.masked(x, allowed.to(tl.float32))
    return x


@triton.jit
def store(ptr, row, k, x, A: tl.constexpr, COUNT: tl.constexpr):
    """Stores categories k of one row, contiguous."""
    x = x.to(ptr.dtype.element_ty)
    if A % COUNT == 0:
        tl.store(ptr + row * A + k, x)
    else:
        tl.store(ptr + row * A + k, x, mask=k < A)


@triton.jit
def entropy(
    given, mask, row, rows, given_row, given_column, mask_row, mask_column, inverse,
    A: tl.constexpr, COUNT: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr,
    EPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The entropy of one row of weights, which are clamped after their sum is known."""
    made = tl.full([], 0.0, tl.float32)
    for c in range((A + COUNT - 1) // COUNT):
        k = c * COUNT + tl.arange(0, COUNT)
        x = load(
            given, mask, row, k, rows, given_row, given_column, mask_row, mask_column,
            A, COUNT, GIVEN, MASK, True,
        )  # fmt: skip
        clamped = cat.clamped(x * inverse, EPS)
        made -= tl.sum(tl.where(k < A, clamped * m.log(clamped, FAST), 0.0), 0)
    return made


@triton.jit
def sums(
    given, mask, row, rows, given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, GIVEN: tl.constexpr,
    MASK: tl.constexpr, PROBS: tl.constexpr, WEIGHTED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One pass over a row.

    Returns:
        maximum of the row and its first place, sum of e, of e d (where WEIGHTED), of e k, and the
        sums of the chunks, `[CHUNKS]`, all for the maximum of the whole row.
    """
    i = tl.arange(0, COUNT)
    chunk = tl.arange(0, CHUNKS)
    top = tl.full([], cat.LEAST, tl.float32)
    place = tl.full([], 0, tl.int32)
    total = tl.full([], 0.0, tl.float32)
    weighted = tl.full([], 0.0, tl.float32)
    moment = tl.full([], 0.0, tl.float32)
    sums = tl.zeros([CHUNKS], tl.float32)
    tops = tl.full([CHUNKS], cat.LEAST, tl.float32)
    for c in range((A + COUNT - 1) // COUNT):
        k = c * COUNT + i
        x = load(
            given, mask, row, k, rows, given_row, given_column, mask_row, mask_column,
            A, COUNT, GIVEN, MASK, PROBS,
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
