"""Categorical and OneHotCategorical: sample by inverse CDF, score and entropy in one pass.

With logits x, d_k = x_k - max(x), e_k = exp(d_k) and S = sum(e), over a row of A categories:

    log p(k) = d_k - log(S)            H = log(S) - sum(e d) / S

A draw is the first k whose running sum of e exceeds u S, with u uniform in (0, 1): one uniform for
a row, where a Gumbel or exponential race takes one for each category. Rows of weights are drawn the
same way from q = w / S, and scored by log(c) with c = clamp(q, EPS, 1 - EPS), as torch does it.

With the gradients gl of the score, gh of the entropy and g of the value's probabilities:

    logits:   dx_k = p_k (g_k - sum(p g) - gl - gh (d_k - sum(p d))) + gl [k drawn]
    weights:  dw_k = (r_k - sum(q r)) / S,   r_k = g_k - gh (log(c_k) + 1) + gl [k drawn] / q_k,
              the last two where q_k was not clamped

Rows lie in one of three ways, chosen at launch:

- SPLIT, A a power of two up to 2048: `[REP, ROWS, LANES]` with category rep LANES + lane, so that
  loads are vectors of neighbours and sums go over REP within a thread.
- GATHER, any other A up to 1024: loaded flat and gathered to `[REP, ROWS, LANES]` with category
  lane PIECE + rep: a thread has a piece of a row, in order, in its registers, and for A <= 32 a
  whole row, so that sums and the search need no exchange between threads.
- WIDE: a program goes over one row chunk by chunk, in one pass with a running maximum; a table of
  the chunks' sums says which one the draw is in, and only that is read again.

Source: Devroye 1986, "Non-Uniform Random Variate Generation", section III.2, for the inverse CDF;
Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, for the running maximum.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tile as tile
from fastprob.kernels._launch import (
    NO_STATE,
    State,
    fast,
    launching,
    parameter,
    tail,
)

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
# A running sum that rounding leaves just below 1/2 counts as having reached it.
HALF = tl.constexpr(0.5 - 4 * 2.0**-23)
# More than twice the largest index in a chunk or a tile.
LATE = tl.constexpr(2**30)


@triton.jit
def _columns(A: tl.constexpr, REP: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr):
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
def _at(first, r, k, rows, row_stride, column_stride, A: tl.constexpr, LAYOUT: tl.constexpr):
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
def _load(
    ptr, first, total_rows, rows, row_stride, column_stride, other, past,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A tile `[REP, ROWS, LANES]` of the rows from `first` on, in fp32.

    `other` stands outside a row, and `past` in the rows past the end where they are GATHER.
    """
    k, inside = _columns(A, REP, LANES, PIECE)
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
        at = ptr + _at(first, r, k, rows, row_stride, column_stride, A, LAYOUT)
        return tl.load(at).to(tl.float32)


@triton.jit
def _store(
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
        k, _ = _columns(A, REP, LANES, PIECE)
        r = tl.arange(0, ROWS)[None, :, None]
        x = tl.broadcast_to(x, [REP, ROWS, LANES]).to(ptr.dtype.element_ty)
        last = (total_rows - 1 - first).to(tl.int32)
        if SAME:
            tl.store(ptr + start + (tl.minimum(r, last) * A + k), x)
        else:
            tl.store(ptr + start + (r * A + k), x, mask=r <= last)


@triton.jit
def _over(x):
    """The sum of each row, `[1, ROWS, 1]`.

    Here and below values of rows keep their dimensions: so they stay in the layout of the tile, and
    in registers. As `[ROWS]` they went through shared memory, 28 times in one kernel.
    """
    return tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _highest(x, FAST: tl.constexpr):
    """The largest of each row, NaN where one of it is: `tl.max` passes it over."""
    if FAST:
        return tl.reduce(tl.reduce(x, 0, _larger, keep_dims=True), 2, _larger, keep_dims=True)
    else:
        # The interpreter goes through a reduction of one's own element by element.
        top = tl.max(tl.max(x, 0, keep_dims=True), 2, keep_dims=True)
        return top + _over(tl.where(x != x, x, 0.0))


@triton.jit
def _at_least(d):
    """No -inf; a NaN stays one."""
    return tl.maximum(d, LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _padded(x, REP: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr, A: tl.constexpr):
    """Terms of a sum, -0 at the places of a tile that have no category.

    A compiler leaves out the addition of -0 and not that of 0: rows of 18 cost no more than that.
    """
    if PIECE > 0:
        _, inside = _columns(A, REP, LANES, PIECE)
        return tl.where(inside, x, -0.0)
    else:
        return x


@triton.jit
def _clamped(q, EPS: tl.constexpr):
    return tile.clamp(q, EPS, 1.0 - EPS)


@triton.jit
def _score_of(x, top, log_sum, inverse, PROBS: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr):
    """Log-probability of the category with logit or weight x."""
    if PROBS:
        return m.log(_clamped(x * inverse, EPS), FAST)
    else:
        return (x - top) - log_sum


@triton.jit
def _first_beyond(running, e, k, t, AXIS: tl.constexpr):
    """The first k of positive e whose running sum exceeds t; the last such k where none does.

    Rounding of a running sum that is put together from parts may let it rise at an e of 0, or end
    below t. Neither gives a category of probability 0. One reduction for both: a k that counts only
    where there is no other is turned around and put behind the others.
    """
    key = tl.where(running > t, k, -k + LATE)
    key = tl.min(tl.where(e > 0.0, key, LATE), AXIS, keep_dims=True)
    return tl.minimum(key, -key + LATE)


@triton.jit
def _uniform_of(seed, call, group, row):
    """One uniform in (0, 1) for each row: word row % 4 of the group."""
    a, b, c, d = random.philox(seed, call, group)
    word = row & 3
    low = tl.where(word == 0, a, b)
    high = tl.where(word == 2, c, d)
    return random.unit(tl.where(word < 2, low, high))


@triton.jit
def _search_pieces(e, u, LANES: tl.constexpr, PIECE: tl.constexpr):
    """Category and sum of each row of a GATHER tile, `[1, ROWS, 1]`.

    A thread's running sum is made term by term: it rises where e is positive and nowhere else.
    """
    running = tl.cumsum(e, 0)
    piece = tl.max(running, 0, keep_dims=True)
    if LANES == 1:
        t = piece * u
        return tl.sum((running <= t).to(tl.int32), 0, keep_dims=True), piece
    else:
        lane = tl.arange(0, LANES)[None, None, :]
        ends = tl.cumsum(piece, 2)
        total = tl.max(ends, 2, keep_dims=True)
        t = total * u
        chosen = _first_beyond(ends, piece, lane, t, 2)
        # Kept inside of the piece, whatever rounding has done.
        left = tl.minimum(tl.maximum(t - (ends - piece), 0.0), piece * 0.99999988)
        place = tl.sum((running <= left).to(tl.int32), 0, keep_dims=True) + lane * PIECE
        return tl.sum(tl.where(lane == chosen, place, 0), 2, keep_dims=True), total


@triton.jit
def _search_segments(e, u, REP: tl.constexpr):
    """The LANES categories that each row's draw lies among.

    Returns:
        their number int32, what is left of the threshold, and the sum of the row, `[1, ROWS, 1]`.
    """
    if REP == 1:
        total = _over(e)
        return tl.zeros(total.shape, tl.int32), total * u, total
    else:
        running = tl.cumsum(tl.sum(e, 2, keep_dims=True), 0)
        total = tl.max(running, 0, keep_dims=True)
        t = total * u
        below = running <= t
        segment = tl.sum(below.to(tl.int32), 0, keep_dims=True)
        before = tl.max(tl.where(below, running, 0.0), 0, keep_dims=True)
        return tl.minimum(segment, REP - 1), t - before, total


@triton.jit
def _masked(x, allowed):
    return tl.where(allowed != 0.0, x, float("-inf"))


@triton.jit
def _load_given(
    given, mask, first, total_rows, rows, given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, GIVEN: tl.constexpr,
    MASK: tl.constexpr, PROBS: tl.constexpr,
):  # fmt: skip
    """A tile of logits, -inf where masked, or of weights."""
    x = _load(
        given, first, total_rows, rows, given_row, given_column,
        0.0 if PROBS else float("-inf"), 1.0, A, COUNT, REP, ROWS, LANES, PIECE, OWN, GIVEN,
    )  # fmt: skip
    if MASK >= 0:
        allowed = _load(
            mask, first, total_rows, rows, mask_row, mask_column, 0.0, 1.0,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, MASK,
        )  # fmt: skip
        x = _masked(x, allowed)
    return x


@triton.jit
def _at_index(
    given, mask, first, r, index, exists, rows, given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """The logit or weight of one category of each row: read again, from a cache."""
    at = given + _at(first, r, index, rows, given_row, given_column, A, GIVEN)
    x = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    if MASK >= 0:
        at = mask + _at(first, r, index, rows, mask_row, mask_column, A, MASK)
        x = _masked(x, tl.load(at, mask=exists, other=1).to(tl.float32))
    return x


@triton.jit
def _store_entropy(
    entropy, e, d, inverse, log_sum, first, r, rows,
    A: tl.constexpr, REP: tl.constexpr, LANES: tl.constexpr, PIECE: tl.constexpr,
    OWN: tl.constexpr, PROBS: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Entropies of a tile; they have no sample dimensions, the rows of the first sample write."""
    if PROBS:
        c = _clamped(e * inverse, EPS)
        made = -_over(_padded(c * m.log(c, FAST), REP, LANES, PIECE, A))
    else:
        made = log_sum - _over(e * _at_least(d)) * inverse
    exists = r < tl.minimum(rows - first, OWN).to(tl.int32)
    tl.store(entropy + first + r, made.to(entropy.dtype.element_ty), mask=exists)


@triton.jit
def _draw_rows(
    given, mask, index, value, score, entropy, seed, call, first, total_rows, rows,
    given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, SHARED: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, PROBS: tl.constexpr, EPS: tl.constexpr,
    KIND: tl.constexpr, INDEX: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Values, scores and entropies of the OWN rows of a tile."""
    x = _load_given(
        given, mask, first, total_rows, rows, given_row, given_column, mask_row, mask_column,
        A, COUNT, REP, ROWS, LANES, PIECE, OWN, GIVEN, MASK, PROBS,
    )  # fmt: skip
    k, inside = _columns(A, REP, LANES, PIECE)
    r = tl.arange(0, ROWS)[None, :, None]
    exists = r < tl.minimum(total_rows - first, OWN).to(tl.int32)
    top = 0.0
    e = x
    d = x
    if not PROBS:
        top = _highest(x, FAST)
        d = x - top
        e = m.exp(d, FAST)
    e = _padded(e, REP, LANES, PIECE, A)
    if KIND <= MEDIAN:
        u = HALF
        if KIND == RANDOM:
            if SHARED:
                u = tl.reshape(random.uniforms(seed, call, first, ROWS), [1, ROWS, 1])
            else:
                # Few rows: each thread works its own out, and none is handed to another.
                if OWN % 4 == 0:
                    u = _uniform_of(seed, call, first // 4 + (r >> 2), r)
                else:
                    u = _uniform_of(seed, call, (first + r) >> 2, (first + r).to(tl.int32))
        if PIECE > 0:
            chosen, total = _search_pieces(e, u, LANES, PIECE)
        else:
            segment, left, total = _search_segments(e, u, REP)
            near = e
            lane = tl.arange(0, LANES)[None, None, :]
            if REP > 1:
                near = _at_index(
                    given, mask, first, r, segment * LANES + lane, exists, rows,
                    given_row, given_column, mask_row, mask_column, A, GIVEN, MASK,
                )  # fmt: skip
                if not PROBS:
                    near = m.exp(near - top, FAST)
            chosen = segment * LANES + _first_beyond(tl.cumsum(near, 2), near, lane, left, 2)
    else:
        total = _over(e)
        chosen = tl.zeros(total.shape, tl.int32)
        if KIND == MODE:
            hit = (x == _highest(x, FAST)) & inside
            chosen = tl.where(hit, k, A - 1)
            chosen = tl.min(tl.min(chosen, 0, keep_dims=True), 2, keep_dims=True)
    # In range whatever the parameters are, for the read below.
    chosen = tl.minimum(tl.maximum(chosen, 0), A - 1)
    if PROBS:
        # The search has passed a NaN over; of logits the largest has it.
        total = _over(e)
    inverse = m.reciprocal(total, FAST)
    log_sum = m.log(total, FAST)
    if INDEX:
        tl.store(index + first + r, chosen.to(tl.int64), mask=exists)
    if SCORE:
        picked = _at_index(
            given, mask, first, r, chosen, exists, rows, given_row, given_column,
            mask_row, mask_column, A, GIVEN, MASK,
        )  # fmt: skip
        scores = _score_of(picked, top, log_sum, inverse, PROBS, EPS, FAST)
        tl.store(score + first + r, scores.to(score.dtype.element_ty), mask=exists)
    if ENTROPY:
        _store_entropy(
            entropy, e, d, inverse, log_sum, first, r, rows,
            A, REP, LANES, PIECE, OWN, PROBS, EPS, FAST,
        )  # fmt: skip
    if VALUE == ONE_HOT:
        hot = (k == chosen).to(tl.float32)
        _store(value, hot, first, total_rows, A, COUNT, REP, ROWS, LANES, PIECE, OWN, False)
    elif VALUE == PROBS_VALUE:
        _store(
            value, e * inverse, first, total_rows,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, False,
        )  # fmt: skip
    elif VALUE == MEAN_INDEX:
        mean = _over(e * k.to(tl.float32)) * inverse
        tl.store(value + first + r, mean.to(value.dtype.element_ty), mask=exists)


@triton.jit
def _load_chunk(
    given, mask, row, k, rows, given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr,
    PROBS: tl.constexpr,
):  # fmt: skip
    """Categories k of one row: logits, -inf where masked and past the end, or weights, 0 there."""
    other: tl.constexpr = 0.0 if PROBS else float("-inf")
    at = given + _at(row, 0, k, rows, given_row, given_column, A, GIVEN)
    if A % COUNT == 0:
        x = tl.load(at).to(tl.float32)
    else:
        x = tl.load(at, mask=k < A, other=other).to(tl.float32)
    if MASK >= 0:
        at = mask + _at(row, 0, k, rows, mask_row, mask_column, A, MASK)
        if A % COUNT == 0:
            allowed = tl.load(at)
        else:
            allowed = tl.load(at, mask=k < A, other=0)
        x = _masked(x, allowed.to(tl.float32))
    return x


@triton.jit
def _store_chunk(ptr, row, k, x, A: tl.constexpr, COUNT: tl.constexpr):
    """Stores categories k of one row, contiguous."""
    x = x.to(ptr.dtype.element_ty)
    if A % COUNT == 0:
        tl.store(ptr + row * A + k, x)
    else:
        tl.store(ptr + row * A + k, x, mask=k < A)


@triton.jit
def _wide_entropy(
    given, mask, row, rows, given_row, given_column, mask_row, mask_column, inverse,
    A: tl.constexpr, COUNT: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr,
    EPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The entropy of one row of weights, which are clamped after their sum is known."""
    made = tl.full([], 0.0, tl.float32)
    for c in range((A + COUNT - 1) // COUNT):
        k = c * COUNT + tl.arange(0, COUNT)
        x = _load_chunk(
            given, mask, row, k, rows, given_row, given_column, mask_row, mask_column,
            A, COUNT, GIVEN, MASK, True,
        )  # fmt: skip
        clamped = _clamped(x * inverse, EPS)
        made -= tl.sum(tl.where(k < A, clamped * m.log(clamped, FAST), 0.0), 0)
    return made


@triton.jit
def _wide_sums(
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
    top = tl.full([], LEAST, tl.float32)
    place = tl.full([], 0, tl.int32)
    total = tl.full([], 0.0, tl.float32)
    weighted = tl.full([], 0.0, tl.float32)
    moment = tl.full([], 0.0, tl.float32)
    sums = tl.zeros([CHUNKS], tl.float32)
    tops = tl.full([CHUNKS], LEAST, tl.float32)
    for c in range((A + COUNT - 1) // COUNT):
        k = c * COUNT + i
        x = _load_chunk(
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
                weighted = (weighted + (top - new) * total) * scale + tl.sum(e * _at_least(d), 0)
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


@triton.jit
def _draw_wide(
    given, mask, index, value, score, entropy, seed, call, row, rows,
    given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, PROBS: tl.constexpr, EPS: tl.constexpr,
    KIND: tl.constexpr, INDEX: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Value, score and entropy of one row that is longer than a tile."""
    i = tl.arange(0, COUNT)
    top, place, total, weighted, moment, sums = _wide_sums(
        given, mask, row, rows, given_row, given_column, mask_row, mask_column,
        A, COUNT, CHUNKS, GIVEN, MASK, PROBS, ENTROPY, FAST,
    )  # fmt: skip
    chosen = place
    if KIND <= MEDIAN:
        if KIND == MEDIAN:
            u = HALF
        else:
            u = _uniform_of(seed, call, row >> 2, row.to(tl.int32))
        chunk = tl.arange(0, CHUNKS)
        running = tl.cumsum(sums, 0)
        t = tl.max(running, 0) * u
        c = tl.sum(_first_beyond(running, sums, chunk, t, 0), 0)
        left = t - tl.max(tl.where(chunk < c, running, 0.0), 0)
        k = c * COUNT + i
        e = _load_chunk(
            given, mask, row, k, rows, given_row, given_column, mask_row, mask_column,
            A, COUNT, GIVEN, MASK, PROBS,
        )  # fmt: skip
        if not PROBS:
            e = m.exp(e - top, FAST)
        chosen = tl.sum(_first_beyond(tl.cumsum(e, 0), e, k, left, 0), 0)
    chosen = tl.minimum(tl.maximum(chosen, 0), A - 1)
    inverse = m.reciprocal(total, FAST)
    log_sum = m.log(total, FAST)
    if INDEX:
        tl.store(index + row, chosen.to(tl.int64))
    if SCORE:
        picked = _at_index(
            given, mask, row, 0, chosen, row >= 0, rows, given_row, given_column,
            mask_row, mask_column, A, GIVEN, MASK,
        )  # fmt: skip
        scores = _score_of(picked, top, log_sum, inverse, PROBS, EPS, FAST)
        tl.store(score + row, scores.to(score.dtype.element_ty))
    if VALUE == MEAN_INDEX:
        tl.store(value + row, (moment * inverse).to(value.dtype.element_ty))
    if ENTROPY:
        if PROBS:
            entropies = _wide_entropy(
                given, mask, row, rows, given_row, given_column, mask_row, mask_column, inverse,
                A, COUNT, GIVEN, MASK, EPS, FAST,
            )  # fmt: skip
        else:
            entropies = log_sum - weighted * inverse
        tl.store(entropy + row, entropies.to(entropy.dtype.element_ty), mask=row < rows)
    if VALUE >= ONE_HOT:
        for c in range((A + COUNT - 1) // COUNT):
            k = c * COUNT + i
            if VALUE == ONE_HOT:
                y = k == chosen
            else:
                y = _load_chunk(
                    given, mask, row, k, rows, given_row, given_column, mask_row, mask_column,
                    A, COUNT, GIVEN, MASK, PROBS,
                )  # fmt: skip
                if not PROBS:
                    y = m.exp(y - top, FAST)
                y = y * inverse
            _store_chunk(value, row, k, y, A, COUNT)


@triton.jit(do_not_specialize=["seed", "call", "total_rows", "rows"])
def draw_kernel(
    given, mask, index, value, score, entropy, state, used, ticket, seed, call, total_rows, rows,
    given_row, given_column, mask_row, mask_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, SHARED: tl.constexpr,
    CHUNKS: tl.constexpr, GIVEN: tl.constexpr, MASK: tl.constexpr, PROBS: tl.constexpr,
    EPS: tl.constexpr, KIND: tl.constexpr, INDEX: tl.constexpr, VALUE: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, HOST: tl.constexpr, ADVANCE: tl.constexpr,
    KEEP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Indices, values, scores and entropies of OWN rows; of one row, chunk by chunk, where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    if KIND == RANDOM:
        seed, call = random.open_state(state, seed, call, HOST)
    if CHUNKS > 0:
        _draw_wide(
            given, mask, index, value, score, entropy, seed, call, program, rows,
            given_row, given_column, mask_row, mask_column, A, COUNT, CHUNKS,
            GIVEN, MASK, PROBS, EPS, KIND, INDEX, VALUE, SCORE, ENTROPY, FAST,
        )  # fmt: skip
    else:
        _draw_rows(
            given, mask, index, value, score, entropy, seed, call, program * OWN, total_rows, rows,
            given_row, given_column, mask_row, mask_column,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, SHARED,
            GIVEN, MASK, PROBS, EPS, KIND, INDEX, VALUE, SCORE, ENTROPY, FAST,
        )  # fmt: skip
    if KIND == RANDOM:
        random.close_state(state, used, ticket, seed, call, ADVANCE, KEEP)


@triton.jit
def _score_rows(
    given, mask, value, index, score, entropy, neg_inf, first, total_rows, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, GIVEN: tl.constexpr,
    MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr, EPS: tl.constexpr,
    HOT: tl.constexpr, INDEX: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    x = _load_given(
        given, mask, first, total_rows, rows, given_row, given_column, mask_row, mask_column,
        A, COUNT, REP, ROWS, LANES, PIECE, OWN, GIVEN, MASK, PROBS,
    )  # fmt: skip
    k, inside = _columns(A, REP, LANES, PIECE)
    r = tl.arange(0, ROWS)[None, :, None]
    exists = r < tl.minimum(total_rows - first, OWN).to(tl.int32)
    top = 0.0
    e = x
    d = x
    if not PROBS:
        top = _highest(x, FAST)
        d = x - top
        e = m.exp(d, FAST)
    e = _padded(e, REP, LANES, PIECE, A)
    total = _over(e)
    inverse = m.reciprocal(total, FAST)
    log_sum = m.log(total, FAST)
    if SCORE:
        if HOT:
            y = _load(
                value, first, total_rows, rows, value_row, value_column, float("-inf"), 0.0,
                A, COUNT, REP, ROWS, LANES, PIECE, OWN, VALUE,
            )  # fmt: skip
            chosen = tl.where((y == _highest(y, FAST)) & inside, k, A - 1)
            chosen = tl.min(tl.min(chosen, 0, keep_dims=True), 2, keep_dims=True)
            real = chosen >= 0
            if INDEX:
                tl.store(index + first + r, chosen.to(tl.int64), mask=exists)
        else:
            asked = tl.load(value + first + r, mask=exists, other=0).to(tl.int64)
            real = (asked >= 0) & (asked < A)
            chosen = tl.where(real, asked, 0).to(tl.int32)
        picked = _at_index(
            given, mask, first, r, chosen, exists, rows, given_row, given_column,
            mask_row, mask_column, A, GIVEN, MASK,
        )  # fmt: skip
        scores = _score_of(picked, top, log_sum, inverse, PROBS, EPS, FAST)
        if MASK >= 0:
            scores = tl.where(picked == float("-inf"), neg_inf, scores)
        # An index that names no category is an error that a kernel cannot raise.
        scores = tl.where(real, scores, float("nan"))
        tl.store(score + first + r, scores.to(score.dtype.element_ty), mask=exists)
    if ENTROPY:
        _store_entropy(
            entropy, e, d, inverse, log_sum, first, r, rows,
            A, REP, LANES, PIECE, OWN, PROBS, EPS, FAST,
        )  # fmt: skip


@triton.jit
def _score_wide(
    given, mask, value, index, score, entropy, neg_inf, row, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, GIVEN: tl.constexpr,
    MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr, EPS: tl.constexpr,
    HOT: tl.constexpr, INDEX: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    top, _, total, weighted, _, _ = _wide_sums(
        given, mask, row, rows, given_row, given_column, mask_row, mask_column,
        A, COUNT, CHUNKS, GIVEN, MASK, PROBS, ENTROPY, FAST,
    )  # fmt: skip
    inverse = m.reciprocal(total, FAST)
    log_sum = m.log(total, FAST)
    if SCORE:
        if HOT:
            most = tl.full([], float("-inf"), tl.float32)
            chosen = tl.full([], 0, tl.int32)
            for c in range((A + COUNT - 1) // COUNT):
                k = c * COUNT + tl.arange(0, COUNT)
                at = value + _at(row, 0, k, rows, value_row, value_column, A, VALUE)
                if A % COUNT == 0:
                    y = tl.load(at).to(tl.float32)
                else:
                    y = tl.load(at, mask=k < A, other=0).to(tl.float32)
                    y = tl.where(k < A, y, float("-inf"))
                high = tl.max(y, 0)
                here = tl.min(tl.where(y == high, k, A - 1), 0)
                chosen = tl.where(high > most, here, chosen)
                most = tl.maximum(most, high)
            real = chosen >= 0
            if INDEX:
                tl.store(index + row, chosen.to(tl.int64))
        else:
            asked = tl.load(value + row).to(tl.int64)
            real = (asked >= 0) & (asked < A)
            chosen = tl.where(real, asked, 0).to(tl.int32)
        picked = _at_index(
            given, mask, row, 0, chosen, row >= 0, rows, given_row, given_column,
            mask_row, mask_column, A, GIVEN, MASK,
        )  # fmt: skip
        scores = _score_of(picked, top, log_sum, inverse, PROBS, EPS, FAST)
        if MASK >= 0:
            scores = tl.where(picked == float("-inf"), neg_inf, scores)
        scores = tl.where(real, scores, float("nan"))
        tl.store(score + row, scores.to(score.dtype.element_ty))
    if ENTROPY:
        if PROBS:
            entropies = _wide_entropy(
                given, mask, row, rows, given_row, given_column, mask_row, mask_column, inverse,
                A, COUNT, GIVEN, MASK, EPS, FAST,
            )  # fmt: skip
        else:
            entropies = log_sum - weighted * inverse
        tl.store(entropy + row, entropies.to(entropy.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["neg_inf", "total_rows", "rows"])
def score_kernel(
    given, mask, value, index, score, entropy, neg_inf, total_rows, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, CHUNKS: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr,
    EPS: tl.constexpr, HOT: tl.constexpr, INDEX: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scores of given indices, or of one-hot vectors where HOT, and entropies, of OWN rows."""
    program = tl.program_id(0).to(tl.int64)
    if CHUNKS > 0:
        _score_wide(
            given, mask, value, index, score, entropy, neg_inf, program, rows,
            given_row, given_column, mask_row, mask_column, value_row, value_column,
            A, COUNT, CHUNKS, GIVEN, MASK, VALUE, PROBS, EPS, HOT, INDEX, SCORE, ENTROPY, FAST,
        )  # fmt: skip
    else:
        _score_rows(
            given, mask, value, index, score, entropy, neg_inf, program * OWN, total_rows, rows,
            given_row, given_column, mask_row, mask_column, value_row, value_column,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN,
            GIVEN, MASK, VALUE, PROBS, EPS, HOT, INDEX, SCORE, ENTROPY, FAST,
        )  # fmt: skip


@triton.jit
def _rate(
    q, k, chosen, by_value, by_score, by_entropy,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradient by the normalized weights q."""
    rate = by_value
    c = _clamped(q, EPS)
    free = c == q
    if BY_ENTROPY:
        rate -= tl.where(free, by_entropy * (m.log(c, FAST) + 1.0), 0.0)
    if BY_SCORE:
        rate += tl.where(free & (k == chosen), by_score * m.reciprocal(c, FAST), 0.0)
    return rate


@triton.jit
def _slope(
    p, d, k, chosen, by_value, by_score, by_entropy, mean, weighted,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr,
):  # fmt: skip
    """The gradient by the logits, from `mean = sum(p by_value)` and `weighted = sum(p d)`."""
    rate = by_value - mean
    if BY_SCORE:
        rate -= by_score
    if BY_ENTROPY:
        rate -= by_entropy * (_at_least(d) - weighted)
    slope = p * rate
    if BY_SCORE:
        slope += tl.where(k == chosen, by_score, 0.0)
    return slope


@triton.jit
def _backward_rows(
    grad_value, grad_score, grad_entropy, given, mask, index, grad, first, total_rows, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, GIVEN: tl.constexpr,
    MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr, EPS: tl.constexpr,
    BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    x = _load_given(
        given, mask, first, total_rows, rows, given_row, given_column, mask_row, mask_column,
        A, COUNT, REP, ROWS, LANES, PIECE, OWN, GIVEN, MASK, PROBS,
    )  # fmt: skip
    k, _ = _columns(A, REP, LANES, PIECE)
    r = tl.arange(0, ROWS)[None, :, None]
    if PIECE == 0:
        r = tl.minimum(r, (total_rows - 1 - first).to(tl.int32))
    exists = r < tl.minimum(total_rows - first, OWN).to(tl.int32)
    by_value = tl.zeros([REP, ROWS, LANES], tl.float32)
    by_score = 0.0
    by_entropy = 0.0
    chosen = 0
    if BY_VALUE == PROBS_VALUE:
        by_value = _load(
            grad_value, first, total_rows, rows, value_row, value_column, 0.0, 0.0,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN, VALUE,
        )  # fmt: skip
    if BY_VALUE == MEAN_INDEX:
        by_mean = tl.load(grad_value + first + r, mask=exists, other=0.0).to(tl.float32)
        by_value = by_mean * k.to(tl.float32)
    if BY_SCORE:
        chosen = tl.load(index + first + r, mask=exists, other=0)
        by_score = tl.load(grad_score + first + r, mask=exists, other=0.0).to(tl.float32)
        chosen = tl.minimum(tl.maximum(chosen, 0), A - 1).to(tl.int32)
        if MASK >= 0:
            # The score of a masked category is a constant.
            picked = _at_index(
                given, mask, first, r, chosen, exists, rows, given_row, given_column,
                mask_row, mask_column, A, GIVEN, MASK,
            )  # fmt: skip
            by_score = tl.where(picked == float("-inf"), 0.0, by_score)
    if BY_ENTROPY:
        # The entropy has no sample dimensions: its gradient goes to the first sample alone.
        of_first = r < (rows - first).to(tl.int32)
        by_entropy = tl.load(grad_entropy + first + r, mask=of_first, other=0.0).to(tl.float32)
    if PROBS:
        e = _padded(x, REP, LANES, PIECE, A)
        inverse = m.reciprocal(_over(e), FAST)
        q = e * inverse
        rate = _rate(q, k, chosen, by_value, by_score, by_entropy, BY_SCORE, BY_ENTROPY, EPS, FAST)
        slope = (rate - _over(_padded(q * rate, REP, LANES, PIECE, A))) * inverse
    else:
        d = x - _highest(x, FAST)
        e = _padded(m.exp(d, FAST), REP, LANES, PIECE, A)
        p = e * m.reciprocal(_over(e), FAST)
        mean = 0.0
        weighted = 0.0
        if BY_VALUE:
            mean = _over(p * by_value)
        if BY_ENTROPY:
            weighted = _over(p * _at_least(d))
        slope = _slope(
            p, d, k, chosen, by_value, by_score, by_entropy, mean, weighted, BY_SCORE, BY_ENTROPY
        )
    _store(grad, slope, first, total_rows, A, COUNT, REP, ROWS, LANES, PIECE, OWN, True)


@triton.jit
def _chunk_by_value(
    grad_value, row, k, rows, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, BY_VALUE: tl.constexpr,
):  # fmt: skip
    """Gradient of the probabilities of categories k of one row."""
    if BY_VALUE == PROBS_VALUE:
        at = grad_value + _at(row, 0, k, rows, value_row, value_column, A, VALUE)
        if A % COUNT == 0:
            return tl.load(at).to(tl.float32)
        else:
            return tl.load(at, mask=k < A, other=0.0).to(tl.float32)
    elif BY_VALUE == MEAN_INDEX:
        return tl.load(grad_value + row).to(tl.float32) * k.to(tl.float32)
    else:
        return tl.zeros([COUNT], tl.float32)


@triton.jit
def _backward_wide(
    grad_value, grad_score, grad_entropy, given, mask, index, grad, row, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, CHUNKS: tl.constexpr, GIVEN: tl.constexpr,
    MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr, EPS: tl.constexpr,
    BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    top, _, total, weighted, _, _ = _wide_sums(
        given, mask, row, rows, given_row, given_column, mask_row, mask_column,
        A, COUNT, CHUNKS, GIVEN, MASK, PROBS, BY_ENTROPY, FAST,
    )  # fmt: skip
    inverse = m.reciprocal(total, FAST)
    weighted *= inverse
    by_score = 0.0
    by_entropy = 0.0
    chosen = 0
    if BY_SCORE:
        chosen = tl.load(index + row)
        chosen = tl.minimum(tl.maximum(chosen, 0), A - 1).to(tl.int32)
        by_score = tl.load(grad_score + row).to(tl.float32)
        if MASK >= 0:
            picked = _at_index(
                given, mask, row, 0, chosen, row >= 0, rows, given_row, given_column,
                mask_row, mask_column, A, GIVEN, MASK,
            )  # fmt: skip
            by_score = tl.where(picked == float("-inf"), 0.0, by_score)
    if BY_ENTROPY:
        by_entropy = tl.load(grad_entropy + row, mask=row < rows, other=0.0).to(tl.float32)
    mean = tl.full([], 0.0, tl.float32)
    if PROBS or BY_VALUE:
        for c in range((A + COUNT - 1) // COUNT):
            k = c * COUNT + tl.arange(0, COUNT)
            x = _load_chunk(
                given, mask, row, k, rows, given_row, given_column, mask_row, mask_column,
                A, COUNT, GIVEN, MASK, PROBS,
            )  # fmt: skip
            by_value = _chunk_by_value(
                grad_value, row, k, rows, value_row, value_column, A, COUNT, VALUE, BY_VALUE
            )
            if PROBS:
                q = x * inverse
                by_value = _rate(
                    q, k, chosen, by_value, by_score, by_entropy, BY_SCORE, BY_ENTROPY, EPS, FAST
                )
            else:
                q = m.exp(x - top, FAST) * inverse
            mean += tl.sum(q * by_value, 0)
    for c in range((A + COUNT - 1) // COUNT):
        k = c * COUNT + tl.arange(0, COUNT)
        x = _load_chunk(
            given, mask, row, k, rows, given_row, given_column, mask_row, mask_column,
            A, COUNT, GIVEN, MASK, PROBS,
        )  # fmt: skip
        by_value = _chunk_by_value(
            grad_value, row, k, rows, value_row, value_column, A, COUNT, VALUE, BY_VALUE
        )
        if PROBS:
            rate = _rate(
                x * inverse, k, chosen, by_value, by_score, by_entropy,
                BY_SCORE, BY_ENTROPY, EPS, FAST,
            )  # fmt: skip
            slope = (rate - mean) * inverse
        else:
            d = x - top
            slope = _slope(
                m.exp(d, FAST) * inverse, d, k, chosen, by_value, by_score, by_entropy,
                mean, weighted, BY_SCORE, BY_ENTROPY,
            )  # fmt: skip
        _store_chunk(grad, row, k, slope, A, COUNT)


@triton.jit(do_not_specialize=["total_rows", "rows"])
def backward_kernel(
    grad_value, grad_score, grad_entropy, given, mask, index, grad, total_rows, rows,
    given_row, given_column, mask_row, mask_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, REP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, PIECE: tl.constexpr, OWN: tl.constexpr, CHUNKS: tl.constexpr,
    GIVEN: tl.constexpr, MASK: tl.constexpr, VALUE: tl.constexpr, PROBS: tl.constexpr,
    EPS: tl.constexpr, BY_VALUE: tl.constexpr, BY_SCORE: tl.constexpr,
    BY_ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of OWN rows; what the forward pass has summed is summed again."""
    program = tl.program_id(0).to(tl.int64)
    if CHUNKS > 0:
        _backward_wide(
            grad_value, grad_score, grad_entropy, given, mask, index, grad, program, rows,
            given_row, given_column, mask_row, mask_column, value_row, value_column,
            A, COUNT, CHUNKS, GIVEN, MASK, VALUE, PROBS, EPS, BY_VALUE, BY_SCORE, BY_ENTROPY, FAST,
        )  # fmt: skip
    else:
        _backward_rows(
            grad_value, grad_score, grad_entropy, given, mask, index, grad,
            program * OWN, total_rows, rows,
            given_row, given_column, mask_row, mask_column, value_row, value_column,
            A, COUNT, REP, ROWS, LANES, PIECE, OWN,
            GIVEN, MASK, VALUE, PROBS, EPS, BY_VALUE, BY_SCORE, BY_ENTROPY, FAST,
        )  # fmt: skip


class Tile(NamedTuple):
    """The rows of a program; see the head of this file.

    Attributes:
        programs: number of programs.
        count: elements of a flat tile (GATHER) or of a chunk (WIDE).
        rep: places of a row in a thread, or in front of one another.
        rows: rows of a tile, a power of two.
        lanes: places of a row beside one another.
        piece: categories of a lane for GATHER, else 0.
        own: rows of a tile that are its own.
        shared: whether the uniforms of a tile are drawn four rows at a time.
        chunks: chunks of a row for WIDE, to the next power of two; else 0.
        warps: warps of a program.
    """

    programs: int
    count: int
    rep: int
    rows: int
    lanes: int
    piece: int
    own: int
    shared: bool
    chunks: int
    warps: int


# Longest rows of a tile: of a power of two, and of any other size.
SPLIT_MOST = 2048
GATHER_MOST = 1024
# Elements of a row in the registers of a thread, for a backward pass.
HELD_BACKWARD = 32
# A chunk of a longer row and the warps of its program: 32 elements of a thread. 16 take 17.8 issue
# slots an element in place of 13.1 at A = 32768. Fewer rows than these get more warps each.
CHUNK = (4096, 4)
CHUNK_OF_FEW = (16384, 16)
FEW_WIDE = 528


@functools.lru_cache(maxsize=4096)
def tiling(rows: int, a: int, itemsize: int, held: int = 64, tight: bool = False) -> Tile:
    """The tiles for `rows` rows of `a` categories of `itemsize` bytes.

    Args:
        rows: number of rows.
        a: categories.
        itemsize: bytes of one.
        held: elements of a row in the registers of a thread, at the most: 64 are 80 registers for a
            draw and 255 for a backward pass, which spills some.
        tight: whether a GATHER tile is to be full rather than its threads busy. Without a store of
            a tile's elements busy threads take fewer issue slots: 25.0 and 31.1 at A = 18; with
            one, full tiles do.
    """
    power = a & (a - 1) == 0
    if a > (SPLIT_MOST if power else GATHER_MOST):
        count, warps = CHUNK if rows >= FEW_WIDE else CHUNK_OF_FEW
        count = count * held // 64
        chunks = triton.next_power_of_2(-(-a // count))
        return Tile(rows, count, 1, 1, 1, 0, 1, False, chunks, warps)
    if power:
        vector = 16 // itemsize
        # A thread of its own for each row of up to 64 bytes, 64 elements of a row at the most.
        beside = 1 if a * itemsize <= 64 else 2
        lanes = min(a, max(vector * beside, a * vector // held))
        threads = max(1, lanes // vector)
        piece = 0
    else:
        # Odd, so that threads read different banks of shared memory.
        threads = lanes = triton.next_power_of_2(-(-a * 4 // (held * 3)))
        piece = -(-a // lanes) if lanes == 1 else -(-a // lanes) | 1
    rep = triton.next_power_of_2(piece) if piece else a // lanes
    # Rows of a warp: one for each thread, and of short rows several.
    many = max(1, min(4, 32 * threads // a)) if a < 32 else 1
    in_warp = max(1, 32 // threads) * triton.next_power_of_2(many)
    warps = 4 if rows > 264 * 4 * in_warp else 1
    if threads > 32 * warps:
        warps = threads // 32
    tile_rows = max(1, in_warp * warps // max(1, threads // 32))
    shared = tile_rows > 32 * warps
    count, own = 0, tile_rows
    if piece:
        # Elements that are loaded flat: room for all rows, or half of it.
        over = lanes * piece - a
        count = triton.next_power_of_2(tile_rows * a + over)
        fitting = (count // 2 - over) // a
        fitting = fitting // 4 * 4 if tile_rows % 4 == 0 else fitting
        if tight and fitting * 8 >= tile_rows * 7:
            count, own = count // 2, fitting
    return Tile(-(-rows // own), count, rep, tile_rows, lanes, piece, own, shared, 0, warps)


class Form(NamedTuple):
    """What is asked of a draw.

    Attributes:
        kind: RANDOM, MODE, MEDIAN or MEAN, as numbers.
        index: whether the index is wanted.
        value: NO_VALUE, ONE_HOT, PROBS_VALUE or MEAN_INDEX, as numbers.
        dtype: of the value.
    """

    kind: int
    index: bool
    value: int
    dtype: torch.dtype


def _mask_parameter(mask: Tensor | None, given: Tensor, repeated: bool):
    """The mask as the kernels read it, and its layout, -1 for none."""
    if mask is None:
        return None, -1, 0, 0
    read = parameter(mask.expand(given.shape).view(torch.uint8), 1, repeated)
    return read.tensor, read.layout, read.row, read.column


def _of_weights(given: Tensor) -> float:
    return torch.finfo(given.dtype).eps


def draw(
    given: Tensor,  # [*batch, K]
    mask: Tensor | None,  # bool, broadcastable to [*batch, K]
    shape: torch.Size,
    form: Form,
    *,
    state: State | None = None,
    probs: bool = False,
    score: bool = True,
    entropy: bool = False,
    keep: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Index, value, score, entropy and the state that was used, in one launch.

    Args:
        given: logits, or weights where `probs`.
        mask: True where a category may be drawn; None for everywhere. Logits only.
        shape: sample dimensions in front of the value.
        form: how the value is chosen, and what is written.
        state: where the noise comes from, for a random kind.
        probs: whether `given` holds weights.
        score: whether the log-probability is wanted.
        entropy: whether the entropy is wanted.
        keep: whether the state that was used is wanted.

    Returns:
        index int64 `[*sample, *batch]`; value `[*sample, *batch, K]`, or for MEAN_INDEX
        `[*sample, *batch]`; log-probability `[*sample, *batch]`; entropy `[*batch]`; an int64
        pair. None for what was not wanted.
    """
    batch = given.shape[:-1]
    a = given.shape[-1]
    device, dtype = given.device, given.dtype
    size = shape + batch
    index = torch.empty(size, dtype=torch.int64, device=device) if form.index else None
    value = None
    if form.value != NO_VALUE.value:
        full = size if form.value == MEAN_INDEX.value else (*size, a)
        value = torch.empty(full, dtype=form.dtype, device=device)
    scores = torch.empty(size, dtype=dtype, device=device) if score else None
    entropies = torch.empty(batch, dtype=dtype, device=device) if entropy else None
    used = torch.empty(2, dtype=torch.int64, device=device) if keep and state else None
    total_rows = size.numel()
    if total_rows == 0 or a == 0:
        return index, value, scores, entropies, used if used is None else used.zero_()
    read = parameter(given, 1, bool(shape))
    allowed, layout, mask_row, mask_column = _mask_parameter(mask, given, bool(shape))
    source = state or NO_STATE
    tight = form.value >= ONE_HOT.value
    tiles = tiling(total_rows, a, given.element_size(), tight=tight)
    with launching(given):
        draw_kernel[(tiles.programs,)](
            read.tensor, allowed, index, value, scores, entropies,
            source.pair, used, source.ticket, source.seed, source.call,
            total_rows, batch.numel(), read.row, read.column, mask_row, mask_column,
            A=a, COUNT=tiles.count, REP=tiles.rep, ROWS=tiles.rows, LANES=tiles.lanes,
            PIECE=tiles.piece, OWN=tiles.own, SHARED=tiles.shared, CHUNKS=tiles.chunks,
            GIVEN=read.layout, MASK=layout, PROBS=probs, EPS=_of_weights(given),
            KIND=form.kind, INDEX=form.index, VALUE=form.value, SCORE=score, ENTROPY=entropy,
            HOST=source.pair is None, ADVANCE=source.ticket is not None, KEEP=used is not None,
            FAST=fast(given), num_warps=tiles.warps,
        )  # fmt: skip
    return index, value, scores, entropies, used


def score(
    given: Tensor,  # [*batch, K]
    mask: Tensor | None,  # bool, broadcastable to [*batch, K]
    value: Tensor | None,  # [*sample, *batch], or [*sample, *batch, K] where hot
    *,
    hot: bool = False,
    probs: bool = False,
    neg_inf: float = float("-inf"),
    entropy: bool = False,
    keep: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The log-probability of given indices or one-hot vectors, and the entropy, in one launch.

    Args:
        given: as in `draw`.
        mask: as in `draw`.
        value: what is scored, of any dtype; None for the entropy alone. An index that names no
            category scores NaN.
        hot: whether `value` holds vectors, whose largest element counts.
        probs: as in `draw`.
        neg_inf: log-probability of masked categories.
        entropy: whether the entropy is wanted.
        keep: whether the indices of one-hot vectors are wanted.

    Returns:
        log-probability `[*sample, *batch]`, entropy `[*batch]`, index int64 `[*sample, *batch]`;
        None for what was not wanted.
    """
    batch = given.shape[:-1]
    a = given.shape[-1]
    size = batch if value is None else (value.shape[:-1] if hot else value.shape)
    scores = index = entropies = None
    if value is not None:
        scores = torch.empty(size, dtype=given.dtype, device=given.device)
        if hot and keep:
            index = torch.empty(size, dtype=torch.int64, device=given.device)
    if entropy:
        entropies = torch.empty(batch, dtype=given.dtype, device=given.device)
    total_rows = size.numel()
    if total_rows == 0 or a == 0:
        return scores, entropies, index
    repeated = len(size) > len(batch)
    read = parameter(given, 1, repeated)
    allowed, layout, mask_row, mask_column = _mask_parameter(mask, given, repeated)
    if hot and value is not None:
        asked = parameter(value, 1, False)
    else:
        asked = read if value is None else parameter(value.contiguous(), 0, False)
    tiles = tiling(total_rows, a, given.element_size())
    with launching(given):
        score_kernel[(tiles.programs,)](
            read.tensor, allowed, asked.tensor, index, scores, entropies, neg_inf,
            total_rows, batch.numel(), read.row, read.column, mask_row, mask_column,
            asked.row, asked.column,
            A=a, COUNT=tiles.count, REP=tiles.rep, ROWS=tiles.rows, LANES=tiles.lanes,
            PIECE=tiles.piece, OWN=tiles.own, CHUNKS=tiles.chunks, GIVEN=read.layout,
            MASK=layout, VALUE=asked.layout, PROBS=probs, EPS=_of_weights(given), HOT=hot,
            INDEX=index is not None, SCORE=value is not None, ENTROPY=entropy, FAST=fast(given),
            num_warps=tiles.warps,
        )  # fmt: skip
    return scores, entropies, index


def backward(
    grad_value: Tensor | None,  # [*sample, *batch, K], or [*sample, *batch] for a mean index
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    given: Tensor,  # [*batch, K]
    mask: Tensor | None,  # bool, broadcastable to [*batch, K]
    index: Tensor | None,  # int64 [*sample, *batch]
    shape: torch.Size,
    *,
    probs: bool = False,
    mean_index: bool = False,
) -> Tensor:
    """The gradient of `draw` and `score` by what is given, `[*sample, *batch, K]`.

    Args:
        grad_value: gradient of the probabilities that the value carries, None for none.
        grad_score: gradient of the log-probability, None for none.
        grad_entropy: gradient of the entropy, None for none.
        given: as in `draw`.
        mask: as in `draw`.
        index: the categories that were scored; needed along with `grad_score`.
        shape: sample dimensions.
        probs: as in `draw`.
        mean_index: whether the value is the mean of the index.
    """
    a = given.shape[-1]
    batch = given.shape[:-1]
    grad = torch.empty(shape + given.shape, dtype=given.dtype, device=given.device)
    total_rows = (shape + batch).numel()
    if grad.numel() == 0:
        return grad
    read = parameter(given, 1, bool(shape))
    allowed, layout, mask_row, mask_column = _mask_parameter(mask, given, bool(shape))
    by_value = NO_VALUE.value
    upstream = read
    if grad_value is not None:
        by_value = MEAN_INDEX.value if mean_index else PROBS_VALUE.value
        upstream = parameter(
            grad_value.contiguous() if mean_index else grad_value, 0 if mean_index else 1, False
        )
    tiles = tiling(total_rows, a, given.element_size(), HELD_BACKWARD, True)
    with launching(given):
        backward_kernel[(tiles.programs,)](
            upstream.tensor, tail(grad_score), tail(grad_entropy), read.tensor, allowed, index,
            grad, total_rows, batch.numel(), read.row, read.column, mask_row, mask_column,
            upstream.row, upstream.column,
            A=a, COUNT=tiles.count, REP=tiles.rep, ROWS=tiles.rows, LANES=tiles.lanes,
            PIECE=tiles.piece, OWN=tiles.own, CHUNKS=tiles.chunks, GIVEN=read.layout,
            MASK=layout, VALUE=upstream.layout, PROBS=probs, EPS=_of_weights(given),
            BY_VALUE=by_value, BY_SCORE=grad_score is not None,
            BY_ENTROPY=grad_entropy is not None, FAST=fast(given), num_warps=tiles.warps,
        )  # fmt: skip
    return grad
