"""Large draws in pieces that stay in the cache.

A draw and its score run five to nine elementwise operations. On tensors that outgrow the cache each
of them streams through memory and, where the allocator has no block of that size at hand, lands in
freshly mapped pages, which cost more than the arithmetic. In pieces of 262,144 elements with two or
three scratch buffers, 65536 x 16 takes 9.7 ms for a Normal and 15.0 for a TanhNormal; on whole
tensors 9.7 to 17 and 19 to 30, as the pages come. Pieces of 32,768 elements cost 11.0 and 16.4, the
calls adding up.

The noise comes out bit for bit the same: ATen fills a normal buffer sixteen elements at a time from
one sequence of uniform numbers, so that pieces of a multiple of sixteen continue each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastprob.reference._reduce import WIDEST, event_numel, plain_tensors_only

PIECE = 262_144
_GROUP = 16
_DTYPES = (torch.float32, torch.float64)

Fill = Callable[[Tensor], Tensor]


def rows_per_piece(loc: Tensor, scale: Tensor, ndims: int) -> int:
    """Rows of an event each in one piece; 0 where the draw is better made whole.

    The caller has seen to it that no gradient is wanted.
    """
    # A compiler would take the comparison of sizes for a condition of its graph.
    if torch.compiler.is_compiling():
        return 0
    numel = loc.numel()
    if numel < 2 * PIECE or not (
        loc.is_cpu
        and loc.dtype in _DTYPES
        and loc.shape == scale.shape
        and loc.is_contiguous()
        and scale.is_contiguous()
        and plain_tensors_only()
    ):
        return 0
    # ATen splits an operation over the threads: each gets a piece of its own.
    piece = PIECE * torch.get_num_threads()
    n = event_numel(loc.shape, ndims)
    if n > WIDEST:
        return 0
    rows = piece // n // _GROUP * _GROUP
    # A last piece of fewer than sixteen elements would be drawn by another rule.
    if rows == 0 or numel < 2 * piece or 0 < numel % (rows * n) < _GROUP:
        return 0
    return rows


def pieces(tensors: tuple[Tensor, ...], rows: int, n: int) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, each cut into `[rows, n]`, and the outputs of one number a row into `[rows]`.

    Args:
        tensors: contiguous, of `R * n` or `R` elements.
        rows: rows in one piece.
        n: elements in a row.
    """
    count = tensors[0].numel() // n
    flat = [t.view(count, n) if t.numel() == count * n else t.view(count) for t in tensors]
    yield from zip(*(t.split(rows) for t in flat), strict=True)
