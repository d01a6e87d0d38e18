"""Tilings of rows that programs go over in chunks, as large batches have them: for few rows.

Programs have one row each unless there are thousands, see `_launch.wide_grid`.
"""

from __future__ import annotations

import pytest

from fastprob.kernels._launch import Grid

# Sizes of a row, rows of a program and of the batch: programs that begin and end within a vector of
# 4 or 8 elements, or with one, chunks without an end of a row and with several, a last program with
# fewer rows.
TILINGS = ((257, 1, 3), (257, 3, 5), (259, 2, 1), (67, 3, 8), (90, 4, 5), (516, 2, 3), (264, 3, 4))


def chunked(a: int, own: int, rows: int, count: int, warps: int) -> Grid:
    """Chunks of `count` elements over `own` rows for each program."""
    return Grid(-(-rows // own), count, own * a, 1, own, False, True, warps)


tilings = pytest.mark.parametrize(("a", "own", "rows"), TILINGS)
