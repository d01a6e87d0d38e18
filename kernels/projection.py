"""Projections alone: clamp, round, nearest valid index, and one-hot rows, each in one launch.

Elements, one by one: y = min(max(x, low), high), rounded to the nearest integer (halves to even)
where the set is one of indices, and looked up in a table of nearest valid ones where a mask forbids
some. A clamp's gradient is that of its result where low <= x <= high, and 0 elsewhere.

Rows: the one-hot row of the largest valid entry, the first of equals, a NaN counting as the
largest; rows that are members already stay. An entry's order is that of a key: its bits as a signed
integer, those of a negative number turned round, so that one integer comparison serves NaN,
infinities and entries that the mask forbids.

Source: `fastprob.reference.projection`, and the order of IEEE 754 numbers by their bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprob.kernels import _tile as tile
from fastprob.kernels._launch import (
    FEW,
    LARGE,
    SMALL,
    STRIDED,
    flat_grid,
    launching,
    parameter,
)

# Widest segment of a one-hot row that is brought together in a tile; wider ones are gone over.
WIDEST = 1024
# Longest row of several segments that a thread has in its registers.
NARROW = 128


@triton.jit
def _limits(
    low, high, lo, hi, start, i,
    A: tl.constexpr, COUNT: tl.constexpr, EACH: tl.constexpr, LAST: tl.constexpr,
    WORK: tl.constexpr,
):  # fmt: skip
    """Bounds of the elements in the type WORK: numbers, or of a row's elements where EACH."""
    if EACH:
        _, column = tile.place(start, i, A, COUNT)
        if LAST != A:
            column = column % LAST
        most = tl.load(high + column).to(WORK)
        if low is None:
            return tl.zeros([COUNT], WORK), most
        else:
            return tl.load(low + column).to(WORK), most
    else:
        return lo, hi


@triton.jit
def between(x, least, most):
    """`torch.clamp`, a NaN stays."""
    if x.dtype == tl.float32:
        return tile.clamp(x, least, most)
    else:
        return tl.minimum(tl.maximum(x, least), most)


@triton.jit
def nearest_integer(x):
    """Rounds a number from 0 on, halves to even: beyond 2^23 there are no fractions."""
    return tl.where(x < 8388608.0, (x + 8388608.0) - 8388608.0, x)


@triton.jit
def in_steps(y, out):
    """An integer on its way to a half precision, by way of fp32, as the interpreter needs it."""
    if y.dtype.is_int() and (
        out.dtype.element_ty == tl.float16 or out.dtype.element_ty == tl.bfloat16
    ):
        return y.to(tl.float32)
    else:
        return y


@triton.jit
def _elements_tile(
    value, out, low, high, table, lo, hi, n, start, left, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, EACH: tl.constexpr,
    LAST: tl.constexpr, ROUND: tl.constexpr, TABLE: tl.constexpr, WORK: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    at = tile.pointers(value, start, i, 1, value_row, value_column, A, COUNT, VALUE)
    if WHOLE:
        x = tl.load(at).to(WORK)
    else:
        x = tl.load(at, mask=inside, other=0).to(WORK)
    least, most = _limits(low, high, lo, hi, start, i, A, COUNT, EACH, LAST, WORK)
    y = between(x, least, most)
    if x.dtype == tl.float32 and ROUND:
        # The bounds are integers, so that rounding may come second.
        y = nearest_integer(y)
        if TABLE or not out.dtype.element_ty.is_floating():
            # An integer is no NaN: 0 stands for it.
            y = tl.where(x == x, y, 0.0)
    if TABLE:
        index = y.to(tl.int32)
        if TABLE == 2:
            _, column = tile.place(start, i, A, COUNT)
            index += column * n
        chosen = tl.load(table + index)
        if x.dtype == tl.float32:
            y = tl.where(x == x, chosen.to(tl.float32), x)
        else:
            y = chosen
    tile.store(out, start, in_steps(y, out), i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["lo", "hi", "n", "total"])
def elements_kernel(
    value, out, low, high, table, lo, hi, n, total, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, VALUE: tl.constexpr, EACH: tl.constexpr,
    LAST: tl.constexpr, ROUND: tl.constexpr, TABLE: tl.constexpr, WORK: tl.constexpr,
):  # fmt: skip
    """Projects COUNT elements, each by itself.

    A: size of a row, whose elements have bounds (EACH, every LAST of them anew) or tables of their
    own (TABLE is 2; 1 is one table for all), of `n` entries each.
    """
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _elements_tile(
            value, out, low, high, table, lo, hi, n, start, COUNT, value_row, value_column,
            A, COUNT, VALUE, EACH, LAST, ROUND, TABLE, WORK, True,
        )  # fmt: skip
    else:
        _elements_tile(
            value, out, low, high, table, lo, hi, n, start, (total - start).to(tl.int32),
            value_row, value_column,
            A, COUNT, VALUE, EACH, LAST, ROUND, TABLE, WORK, False,
        )  # fmt: skip


@triton.jit
def _clamp_backward_tile(
    grad, value, out, low, high, lo, hi, start, left, grad_row, grad_column, value_row,
    value_column,
    A: tl.constexpr, COUNT: tl.constexpr, GRAD: tl.constexpr, VALUE: tl.constexpr,
    EACH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    x = tile.load(value, start, i, inside, 0.0, 1, value_row, value_column, A, COUNT, VALUE, WHOLE)
    g = tile.load(grad, start, i, inside, 0.0, 1, grad_row, grad_column, A, COUNT, GRAD, WHOLE)
    least, most = _limits(low, high, lo, hi, start, i, A, COUNT, EACH, A, tl.float32)
    g = tl.where((x >= least) & (x <= most), g, 0.0)
    tile.store(out, start, g, i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["lo", "hi", "total"])
def clamp_backward_kernel(
    grad, value, out, low, high, lo, hi, total, grad_row, grad_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, GRAD: tl.constexpr, VALUE: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """Gradients of COUNT clamped elements."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _clamp_backward_tile(
            grad, value, out, low, high, lo, hi, start, COUNT, grad_row, grad_column, value_row,
            value_column, A, COUNT, GRAD, VALUE, EACH, True,
        )  # fmt: skip
    else:
        _clamp_backward_tile(
            grad, value, out, low, high, lo, hi, start, (total - start).to(tl.int32),
            grad_row, grad_column, value_row, value_column, A, COUNT, GRAD, VALUE, EACH, False,
        )  # fmt: skip


@triton.jit
def key(x, allowed, MASKED: tl.constexpr, LEAST: tl.constexpr):
    """Integers in the order of the entries, those that are not allowed below all others.

    Args:
        x: fp32, int32 or int64.
        allowed: which entries may be set.
        MASKED: whether any may not.
        LEAST: the smallest integer of the key's type.
    """
    if x.dtype == tl.float32:
        # A sum with 0 makes a 0 of a -0, which is as large.
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        k = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        k = tl.where(x == x, k, 0x7FFFFFFF)
    elif MASKED:
        k = tl.maximum(x, LEAST + 1)
    else:
        k = x
    if MASKED:
        k = tl.where(allowed, k, LEAST)
    return k


@triton.jit
def share(x, allowed, MASKED: tl.constexpr):
    """What an entry adds to the sum of its row, which is 1 for a member of the set.

    An entry that is set and may not be makes a sum that is none: NaN, or far from 1.
    """
    if not MASKED:
        return x
    elif x.dtype == tl.float32:
        return tl.where(allowed | (x == 0.0), x, float("nan"))
    else:
        return tl.where(allowed, x, 0)


@triton.jit
def _entries(
    value, mask, start, i, inside,
    A: tl.constexpr, COUNT: tl.constexpr, PERIOD: tl.constexpr, MASKED: tl.constexpr,
    WORK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The entries of a tile, and which of them may be set."""
    if WHOLE:
        x = tl.load(value + start + i).to(WORK)
    else:
        x = tl.load(value + start + i, mask=inside, other=0).to(WORK)
    allowed = inside
    if MASKED:
        _, column = tile.place(start, i, PERIOD, COUNT)
        allowed = tl.load(mask + column) != 0
    return x, allowed


@triton.jit
def _is_member(sums, forbidden, value, MASKED: tl.constexpr):
    """Whether rows are one-hot already, by their sums in the value's own type."""
    if sums.dtype == tl.float32:
        return sums.to(value.dtype.element_ty).to(tl.float32) == 1.0
    elif MASKED:
        return (sums == 1) & (forbidden == 0)
    else:
        return sums == 1


@triton.jit
def _one_hot_tile(
    value, out, members, mask, tables, start, left, segments_left, first_segment,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr, GATHER: tl.constexpr,
    PERIOD: tl.constexpr, MASKED: tl.constexpr, MEMBER: tl.constexpr, KEEP: tl.constexpr,
    WORK: tl.constexpr, LEAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    x, allowed = _entries(value, mask, start, i, inside, A, COUNT, PERIOD, MASKED, WORK, WHOLE)
    k = key(x, allowed, MASKED, LEAST)
    AXIS: tl.constexpr = 0 if GATHER else 1
    if GATHER:
        # Whole rows lie in the tile one after the other: their segments are brought together.
        segment = tl.arange(0, ROWS)[None, :]
        column = tl.arange(0, WIDTH)[:, None]
        if PARTS == 1:
            here = (column < A) & (segment < OWN)
            place = segment * A + column
            segment_of = i // A
        else:
            part = segment % PARTS
            here = (column < tl.load(tables + PARTS + part)) & (segment < OWN)
            place = segment // PARTS * A + tl.load(tables + part) + column
            segment_of = i // A * PARTS + tl.load(tables + 2 * PARTS + i % A)
        place = tl.where(here, place, 0)
        flat = tl.reshape(place, [WIDTH * ROWS])
        k = tl.reshape(tl.gather(k, flat, 0), [WIDTH, ROWS])
        top = tl.max(tl.where(here, k, LEAST), 0)
        first = tl.min(tl.where(here & (k == top[None, :]), place, COUNT), 0)
    else:
        place = tl.reshape(i, [ROWS, WIDTH])
        k = tl.reshape(k, [ROWS, WIDTH])
        top = tl.max(k, 1)
        first = tl.min(tl.where(k == top[:, None], place, COUNT), 1)
    if MEMBER:
        s = share(x, allowed, MASKED)
        forbidden = first * 0
        wrong = i * 0
        if MASKED and x.dtype != tl.float32:
            wrong = tl.where(allowed | (x == 0), 0, 1)
        if GATHER:
            s = tl.where(here, tl.reshape(tl.gather(s, flat, 0), [WIDTH, ROWS]), 0)
            if MASKED and x.dtype != tl.float32:
                wrong = tl.reshape(tl.gather(wrong, flat, 0), [WIDTH, ROWS])
                forbidden = tl.max(tl.where(here, wrong, 0), 0)
        else:
            s = tl.reshape(s, [ROWS, WIDTH])
            if MASKED and x.dtype != tl.float32:
                forbidden = tl.max(tl.reshape(wrong, [ROWS, WIDTH]), 1)
        member = _is_member(tl.sum(s, AXIS), forbidden, value, MASKED)
        if KEEP:
            tile.store_rows(members, first_segment, member, segments_left, ROWS, OWN, WHOLE)
        first = tl.where(member, -1, first)
    if GATHER:
        winner = tl.gather(first, tl.minimum(segment_of, ROWS - 1), 0)
    else:
        winner = tl.reshape(tl.broadcast_to(first[:, None], [ROWS, WIDTH]), [COUNT])
    hot = (i == winner).to(WORK)
    if MEMBER:
        hot = tl.where(winner < 0, x, hot)
    tile.store(out, start, in_steps(hot, out), i, inside, COUNT, TILE, WHOLE)


@triton.constexpr_function
def begin_of(begins, part):
    """Where a segment begins, by a number whose bits are set where one does, or the row ends."""
    for _ in range(part):
        begins &= begins - 1
    return (begins & -begins).bit_length() - 1


@triton.jit
def _segments_tile(
    value, out, members, mask, start, left, rows_left, first_row,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, OWN: tl.constexpr, BEGINS: tl.constexpr, PERIOD: tl.constexpr,
    MASKED: tl.constexpr, MEMBER: tl.constexpr, KEEP: tl.constexpr, WORK: tl.constexpr,
    LEAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of narrow rows of several segments: a thread has whole rows in its registers.

    Which of them belong to a segment is settled when compiled, and what stands in for the others is
    not compared: 64 compiled comparisons of 4 segments of 16 are those of 16 entries.
    """
    i = tl.arange(0, COUNT)
    inside = i < left
    x, _ = _entries(value, mask, start, i, inside, A, COUNT, PERIOD, False, WORK, WHOLE)
    REP: tl.constexpr = triton.next_power_of_2(A)
    rep = tl.arange(0, REP)[:, None]
    row = tl.arange(0, ROWS)[None, :]
    place = tl.where(rep < A, tl.minimum(row, OWN - 1) * A + rep, 0)
    x = tl.reshape(tl.gather(x, tl.reshape(place, [REP * ROWS]), 0), [REP, ROWS])
    allowed = rep < A
    if MASKED:
        column = ((first_row + row) % (PERIOD // A)).to(tl.int32) * A + rep
        allowed = tl.load(mask + column, mask=allowed, other=0) != 0
    k = key(x, allowed, MASKED, LEAST)
    s = share(x, allowed, MASKED)
    # -0 is left out of a sum when compiled, as 0 is not.
    EMPTY: tl.constexpr = -0.0 if x.dtype == tl.float32 else 0
    winner = tl.zeros([REP, ROWS], tl.int32)
    for part in tl.static_range(PARTS):
        here = (rep >= begin_of(BEGINS, part)) & (rep < begin_of(BEGINS, part + 1))
        top = tl.max(tl.where(here, k, LEAST), 0, keep_dims=True)
        first = tl.min(tl.where(here & (k == top), rep, 0x7FFFFFFF), 0, keep_dims=True)
        if MEMBER:
            forbidden = first * 0
            if MASKED and x.dtype != tl.float32:
                wrong = here & (x != 0) & (allowed == 0)
                forbidden = tl.max(wrong.to(tl.int32), 0, keep_dims=True)
            sums = tl.sum(tl.where(here, s, EMPTY), 0, keep_dims=True)
            member = _is_member(sums, forbidden, value, MASKED)
            if KEEP:
                exists = (row < OWN) & (row < rows_left)
                tl.store(members + (first_row + row) * PARTS + part, member, mask=exists)
            first = tl.where(member, -1, first)
        winner = tl.where(here, first, winner)
    hot = (rep == winner).to(WORK)
    if MEMBER:
        hot = tl.where(winner < 0, x, hot)
    source = (i % A) * ROWS + tl.minimum(i // A, ROWS - 1)
    hot = tl.gather(tl.reshape(hot, [REP * ROWS]), source, 0)
    tile.store(out, start, in_steps(hot, out), i, inside, COUNT, TILE, WHOLE)


@triton.jit(do_not_specialize=["rows"])
def one_hot_kernel(
    value, out, members, mask, tables, rows,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr, GATHER: tl.constexpr,
    PERIOD: tl.constexpr, MASKED: tl.constexpr, MEMBER: tl.constexpr, KEEP: tl.constexpr,
    WORK: tl.constexpr, LEAST: tl.constexpr, BEGINS: tl.constexpr,
):  # fmt: skip
    """Projects whole rows of A entries, in PARTS segments each.

    Args:
        value: `[rows, A]`, contiguous.
        out: likewise.
        members: bool, which segments were one-hot already, where KEEP.
        mask: bool, of the first PERIOD entries, which begins anew after them.
        tables: int32, where each segment of a row begins, their widths, and the segment of each
            entry; where PARTS is above 1.
        rows: number of rows.
        A: size of a row.
        COUNT: size of a tile.
        TILE: elements of whole rows in it.
        PARTS: segments of a row.
        WIDTH: the widest segment, for the gather the next power of two.
        ROWS: segments of a tile, likewise.
        OWN: segments of a tile that are its own.
        GATHER: whether segments are brought together; else the tile is [ROWS, WIDTH].
        PERIOD: see `mask`.
        MASKED: whether there is a mask.
        MEMBER: whether segments that are one-hot already stay as they are.
        KEEP: whether `members` is written.
        WORK: type that entries are compared in.
        LEAST: the smallest integer of a key, see `key`.
        BEGINS: where segments begin, see `begin_of`; 0 for rows that are not narrow. Else ROWS and
            OWN count rows.
    """
    program = tl.program_id(0).to(tl.int64)
    start = program * TILE
    end = rows.to(tl.int64) * A
    if BEGINS:
        first = program * OWN
        if start + COUNT <= end:
            _segments_tile(
                value, out, members, mask, start, COUNT, rows - first, first, A, COUNT, TILE, PARTS,
                ROWS, OWN, BEGINS, PERIOD, MASKED, MEMBER, KEEP, WORK, LEAST, True,
            )  # fmt: skip
        else:
            _segments_tile(
                value, out, members, mask, start, tl.minimum(end - start, TILE).to(tl.int32),
                rows - first, first, A, COUNT, TILE, PARTS,
                ROWS, OWN, BEGINS, PERIOD, MASKED, MEMBER, KEEP, WORK, LEAST, False,
            )  # fmt: skip
    elif start + COUNT <= end:
        _one_hot_tile(
            value, out, members, mask, tables, start, COUNT,
            rows.to(tl.int64) * PARTS, program * OWN,
            A, COUNT, TILE, PARTS, WIDTH, ROWS, OWN, GATHER, PERIOD, MASKED, MEMBER, KEEP, WORK,
            LEAST, True,
        )  # fmt: skip
    else:
        _one_hot_tile(
            value, out, members, mask, tables, start,
            tl.minimum(end - start, TILE).to(tl.int32), rows.to(tl.int64) * PARTS, program * OWN,
            A, COUNT, TILE, PARTS, WIDTH, ROWS, OWN, GATHER, PERIOD, MASKED, MEMBER, KEEP, WORK,
            LEAST, False,
        )  # fmt: skip


@triton.jit
def wide_one_hot_kernel(
    value, out, members, mask, tables,
    A: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, PERIOD: tl.constexpr,
    MASKED: tl.constexpr, MEMBER: tl.constexpr, KEEP: tl.constexpr, WORK: tl.constexpr,
    LEAST: tl.constexpr,
):  # fmt: skip
    """Projects one segment, chunk by chunk, twice; arguments as for `one_hot_kernel`."""
    segment = tl.program_id(0).to(tl.int64)
    if PARTS == 1:
        start = segment * A
        width = A
    else:
        start = segment // PARTS * A + tl.load(tables + segment % PARTS)
        width = tl.load(tables + PARTS + segment % PARTS)
    i = tl.arange(0, COUNT)
    best = tl.full([], LEAST, tl.int32 if LEAST == -0x80000000 else tl.int64)
    first = tl.full([], 0, tl.int32)
    sums = tl.zeros([COUNT], WORK)
    wrong = tl.zeros([COUNT], tl.int32)
    for chunk in range(0, width, COUNT):
        inside = i < width - chunk
        x, allowed = _entries(
            value, mask, start + chunk, i, inside, A, COUNT, PERIOD, MASKED, WORK, False
        )
        k = tl.where(inside, key(x, allowed, MASKED, LEAST), LEAST)
        top = tl.max(k, 0)
        at = tl.min(tl.where(k == top, i, COUNT), 0) + chunk
        first = tl.where(top > best, at, first)
        best = tl.maximum(top, best)
        if MEMBER:
            sums += tl.where(inside, share(x, allowed, MASKED), 0)
            if MASKED:
                wrong |= tl.where(inside & (x != 0) & (allowed == 0), 1, 0)
    if MEMBER:
        member = _is_member(tl.sum(sums, 0), tl.max(wrong, 0), value, MASKED)
        if KEEP:
            tl.store(members + segment, member)
        first = tl.where(member, -1, first)
    for chunk in range(0, width, COUNT):
        inside = i < width - chunk
        hot = (i + chunk == first).to(WORK)
        if MEMBER:
            x = tl.load(value + start + chunk + i, mask=inside, other=0).to(WORK)
            hot = tl.where(first < 0, x, hot)
        tile.store(out, start + chunk, in_steps(hot, out), i, inside, COUNT, COUNT, False)


class _Rows(NamedTuple):
    """The tiles of one-hot rows, in the terms of `one_hot_kernel`; WIDE where `count` is 0."""

    programs: int
    count: int
    tile: int
    width: int
    rows: int
    own: int
    gather: bool
    warps: int


@functools.lru_cache(maxsize=4096)
def begins(widths: tuple[int, ...]) -> int:
    """`BEGINS` of the kernels for rows of several segments; 0 where they are too wide for it."""
    if len(widths) == 1 or sum(widths) > NARROW:
        return 0
    return sum(1 << sum(widths[:part]) for part in range(len(widths) + 1))


@functools.lru_cache(maxsize=4096)
def one_hot_grid(rows: int, a: int, parts: int, width: int, size: int) -> _Rows:
    """The tiles for `rows` rows of `a` entries in `parts` segments, the widest of `width`.

    Args:
        rows: number of rows.
        a: entries of a row.
        parts: segments of a row.
        width: the widest of them.
        size: bytes of the smallest entry, which a tile of whole vectors depends on.
    """
    few = rows * a < FEW
    if parts == 1 and a & (a - 1) == 0 and a <= WIDEST:
        count, warps = SMALL if few and a <= SMALL[0] else LARGE
        own = count // a
        return _Rows(-(-rows // own), count, count, a, own, own, False, warps)
    padded = triton.next_power_of_2(width)
    for count, warps in (SMALL, LARGE) if few else (LARGE,):
        # A tile of a multiple of 16 bytes; where that leaves too few rows, of fewer.
        for step in (16 // size, 4, 1):
            own = count // a // step * step
            segments = triton.next_power_of_2(max(own * parts, 1))
            full = own * a * 4 >= count * 3 or (own and step == 1 and count == LARGE[0])
            if full and padded * segments <= 4 * count and width <= WIDEST:
                tiles = -(-rows // own)
                return _Rows(tiles, count, own * a, padded, segments, own * parts, True, warps)
    count, warps = LARGE if width > SMALL[0] else SMALL
    return _Rows(rows * parts, 0, count, width, 1, 1, False, warps)


def _integers(*dtypes: torch.dtype) -> tl.dtype:
    """What integers of these types are compared in."""
    return tl.int64 if any(d.itemsize > 2 for d in dtypes) else tl.int32


def elements(
    value: Tensor,  # [..., *shape]
    low: float,
    high: float,
    lows: Tensor | None,  # [*shape]
    highs: Tensor | None,  # [*shape], or [shape[-1]]
    table: Tensor | None,  # [n], or [*shape, n]
    dtype: torch.dtype,
    rounded: bool,
) -> Tensor:
    """Projects each element by itself, in one launch.

    Args:
        value: of any dtype but fp64.
        low: lower bound; counts where `highs` is None.
        high: upper bound, likewise.
        lows: lower bounds of each element's own, contiguous; 0 where it is None and `highs` is not.
        highs: upper bounds likewise.
        table: int64, what each index becomes, contiguous.
        dtype: of the result. A clamp computes in it, everything else in that of the value.
        rounded: whether the result is an index.

    Returns:
        `[..., *shape]`, contiguous, in `dtype`.
    """
    out = torch.empty(value.shape, dtype=dtype, device=value.device)
    total = out.numel()
    if total == 0:
        return out
    of_value = value.dtype.is_floating_point
    if of_value if rounded else dtype.is_floating_point:
        work = tl.float32
        low, high = float(low), float(high)
    else:
        others = [t.dtype for t in (lows, highs) if t is not None]
        work = _integers(value.dtype, *others) if rounded else _integers(dtype)
    ndims, n, kind = 0, 1, 0
    if table is not None:
        n = table.shape[-1]
        kind = 1 if table.dim() == 1 else 2
        ndims = table.dim() - 1
    if highs is not None:
        ndims = max(ndims, highs.dim())
    if ndims == 0 and value.dim():
        ndims = 1
    a = 1
    for size in value.shape[value.dim() - ndims :]:
        a *= size
    x = parameter(value, ndims, False)
    if highs is None and kind != 2 and x.layout < STRIDED:
        # One kernel for rows of any size.
        a = 1
    programs, count, warps = flat_grid(total)
    with launching(value):
        elements_kernel[(programs,)](
            x.tensor, out, lows, highs, table, low, high, n, total, x.row, x.column,
            A=a, COUNT=count, VALUE=x.layout, EACH=highs is not None,
            LAST=a if highs is None else highs.numel(), ROUND=rounded, TABLE=kind, WORK=work,
            num_warps=warps,
        )  # fmt: skip
    return out


def clamp_backward(
    grad: Tensor,  # [..., *shape]
    value: Tensor,  # [..., *shape]
    low: float,
    high: float,
    lows: Tensor | None,  # [*shape]
    highs: Tensor | None,  # [*shape]
) -> Tensor:
    """The gradient of a clamp by the value, in one launch; arguments as for `elements`."""
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    total = out.numel()
    if total == 0:
        return out
    ndims = highs.dim() if highs is not None else min(1, value.dim())
    a = 1
    for size in value.shape[value.dim() - ndims :]:
        a *= size
    x, g = parameter(value, ndims, False), parameter(grad, ndims, False)
    if highs is None and x.layout < STRIDED and g.layout < STRIDED:
        a = 1
    programs, count, warps = flat_grid(total)
    with launching(value):
        clamp_backward_kernel[(programs,)](
            g.tensor, x.tensor, out, lows, highs, float(low), float(high), total,
            g.row, g.column, x.row, x.column,
            A=a, COUNT=count, GRAD=g.layout, VALUE=x.layout, EACH=highs is not None,
            num_warps=warps,
        )  # fmt: skip
    return out


def one_hot(
    value: Tensor,  # [..., n]
    mask: Tensor | None,  # [n], or [*shape]
    tables: Tensor,  # int32 [2 K + n]
    widths: Sequence[int],
    dtype: torch.dtype,
    member: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Projects rows of one-hot segments, in one launch.

    Args:
        value: of any dtype but fp64; copied where it is not contiguous.
        mask: bool, which entries may be set, contiguous, its dimensions the last ones of the value.
        tables: where the segments of a row begin, their widths, and the segment of each entry.
        widths: those of the K segments.
        dtype: of the result; that of the value where `member` is set.
        member: whether segments that are one-hot already stay as they are.
        keep: whether it is wanted which those are.

    Returns:
        `[..., n]`, contiguous, and bool `[..., K]` or None.
    """
    x = value.contiguous()
    a, parts, width = x.shape[-1], len(widths), max(widths)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    members = None
    if keep:
        make = torch.empty if member else torch.zeros
        members = make((*x.shape[:-1], parts), dtype=torch.bool, device=x.device)
    total = x.numel()
    if total == 0:
        return out, members
    period = a if mask is None else mask.numel()
    if parts > 1 and width * parts == a:
        # Segments of one width are rows of their own.
        a, parts = width, 1
    rows = total // a
    narrow = begins(tuple(widths)) if parts > 1 else 0
    segments = (1, a) if narrow else (parts, width)
    grid = one_hot_grid(rows, a, *segments, min(x.element_size(), out.element_size()))
    work = tl.float32 if x.dtype.is_floating_point else _integers(x.dtype)
    flags = {
        "A": a, "PARTS": parts, "PERIOD": period, "MASKED": mask is not None, "MEMBER": member,
        "KEEP": keep, "WORK": work, "LEAST": -(2**63) if work == tl.int64 else -(2**31),
    }  # fmt: skip
    with launching(x):
        if grid.count == 0:
            wide_one_hot_kernel[(grid.programs,)](
                x, out, members, mask, tables, COUNT=grid.tile, num_warps=grid.warps, **flags
            )
        else:
            one_hot_kernel[(grid.programs,)](
                x, out, members, mask, tables, rows, COUNT=grid.count, TILE=grid.tile,
                WIDTH=grid.width, ROWS=grid.rows, OWN=grid.own, GATHER=grid.gather,
                BEGINS=narrow, num_warps=grid.warps, **flags,
            )  # fmt: skip
    return out, members
