"""How a kernel's threads may reach memory: what the cases of its machine code demand.

Tensors whose elements a tile reads or writes one for one are moved in 128 bits. Fewer bits are left
to what has one element for a row or for a program, and to tensors `[A]` or of rows apart in which
no vectors lie. What is demanded is for a thread, on the shortest way.
"""

from __future__ import annotations

import math
from typing import TypedDict

from fastprob.kernels._launch import FLAT_TILE, Grid


class Accesses(TypedDict):
    """Arguments of a `machine.Case`."""

    accesses: tuple[int, int]
    narrow: tuple[int, int]


def size_of(dtype: str) -> int:
    """Bytes of an element."""
    return 4 if dtype == "fp32" else 2


def vectors(size: int, count: int, warps: int) -> int:
    """Loads or stores of 128 bits that a thread needs for `count` elements of `size` bytes."""
    return -(-count * size // (32 * warps * 16))


def chunks(grid: Grid) -> int:
    """Turns of a program over its wide rows, that begin as far behind a vector as they may."""
    return math.ceil((grid.tile + _ahead(grid)) / grid.count)


def _ahead(grid: Grid) -> int:
    return 8 - math.gcd(grid.tile, 8)


def filled(grid: Grid) -> float:
    """The part of the elements of a program's tiles that exists."""
    return grid.tile / (grid.count * (chunks(grid) if grid.wide else 1))


def through(
    grid: Grid, a: int, dtype: str, loads: int, *, stores: int = 0, sums: int,
    random: bool = False, warps: int | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """The whole way of a program over wide rows: the vectors of each chunk, and the ends of rows.

    Where the state is advanced, a store of 32 bits returns the ticket too.

    Args:
        grid: the tiles.
        a: size of a row.
        dtype: of all tensors.
        loads: tensors that are read one for one.
        stores: tensors that are written so, which are asked for in place of those read: of these
            there may be others.
        sums: results of rows.
        random: whether the state is advanced.
        warps: of a program, where they are not those of `grid`.
    """
    if not grid.wide:
        return ()
    each = (stores or loads) * vectors(size_of(dtype), grid.count, warps or grid.warps)
    vector = "STG.128" if stores else "LDG.128"
    store = "STG.32" if dtype == "fp32" else "STG.U16"
    kinds, begin = [], _ahead(grid)
    ends = [begin + (row + 1) * a for row in range(grid.own)]
    for chunk in range(chunks(grid)):
        here = sum(chunk * grid.count < end <= (chunk + 1) * grid.count for end in ends)
        kinds += [vector] * each + [store] * (here * sums)
    return (*kinds, *["STG.32"] * random)


def forward(
    grid: Grid, a: int, dtype: str, loads: int, stores: int, *, sums: int, warps: int | None = None,
    random: bool = False, keep: bool = False, repeated: int = 0, scattered: int = 0,
) -> Accesses:  # fmt: skip
    """Of a forward pass over rows of `a`.

    Args:
        grid: its tiles.
        a: size of a row.
        dtype: of all tensors.
        loads: tensors that are read one for one.
        stores: tensors that are written so.
        sums: results of rows.
        warps: of a program, where they are not those of `grid`.
        random: whether the state of the noise is read and advanced.
        keep: whether what a draw has used is written.
        repeated: tensors `[A]` that are read.
        scattered: tensors that are read one for one whose rows have no vectors.
    """
    size = size_of(dtype)
    threads = 32 * (warps or grid.warps)
    each = vectors(size, grid.count, threads // 32)
    elements = -(-grid.count // threads)
    alike = a * size % 16 == 0
    if a == 1:
        # A row's result is one for each element.
        stores, sums = stores + sums, 0
    turns = chunks(grid) if grid.wide else 1
    narrow_loads = 2 * random + turns * (scattered + (0 if alike else repeated)) * elements
    each_sum = grid.own if grid.wide else -(-grid.own // threads)
    narrow_stores = sums * each_sum + 2 * random + 2 * keep
    return {
        "accesses": (turns * (loads * each + alike * repeated), turns * stores * each),
        "narrow": (narrow_loads, narrow_stores),
    }


def flat(
    a: int, dtype: str, loads: int, stores: int, *, warps: int = 1, slopes: int = 0,
    by_row: int = 1, by_first: bool = False, random: bool = False, repeated: int = 0,
    scattered: tuple[int, int] = (0, 0), out: str | None = None,
) -> Accesses:  # fmt: skip
    """Of a backward pass over rows of `a`.

    Args:
        a: size of a row.
        dtype: of all tensors but the slopes.
        loads: tensors that are read one for one.
        stores: tensors that are written so.
        warps: of a program, times those of a flat tile.
        slopes: fp32 tensors that are read so.
        by_row: tensors with one element for each row, such as the gradient of its score.
        by_first: whether there is one with an element for each of the first rows, the gradient of
            their entropy.
        random: whether the state of the noise is read.
        repeated: tensors `[A]` that are read.
        scattered: tensors that are read one for one, and written so, whose rows have no vectors.
        out: dtype of what is written, where it is another.
    """
    count, warps = FLAT_TILE[0], FLAT_TILE[1] * warps
    size, elements = size_of(dtype), count // (32 * warps)
    each = vectors(size, count, warps)
    alike = a * size % 16 == 0
    # Rows lie within a tile, or a vector has two of them; see `_tile.of_rows`.
    rows = -(-count // a // (32 * warps)) if count % a == 0 else 0
    narrow = 2 * random + by_row * (rows or 2 * each) + by_first * (rows or elements)
    return {
        "accesses": (
            loads * each + slopes * vectors(4, count, warps) + alike * repeated,
            stores * vectors(size_of(out or dtype), count, warps),
        ),
        "narrow": (
            narrow + (scattered[0] + (0 if alike else repeated)) * elements,
            scattered[1] * elements,
        ),
    }  # fmt: skip
