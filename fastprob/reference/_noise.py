"""Exponential noise on a CPU from ATen's uniform numbers: the same noise in a third of the time.

Where MKL does not draw it, ATen's `exponential_` takes a uniform number u of 53 bits for each
element, whatever the dtype, and the scalar `-log1p(-u)` of the C library: 629 us for 4096 x 8.
`uniform_` in float64 draws the same u, and ATen's vectorized log1p takes 66 us of them: 213 us in
all. Rounded to float32 the two logarithms agree: all of 4e7 numbers did.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprob.reference._reduce import plain_tensors_only

# Below it the four calls cost more than they spare: equal at 400 elements, 1.7 times at 1024.
LEAST = 1024
# A float64 buffer of 256 KB stays in the cache.
_PIECE = 32_768

_same: bool | None = None


def exponential_(buffer: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fills a buffer with exponential noise of rate 1: what `Tensor.exponential_` draws.

    Args:
        buffer: dense, of any strides: the numbers come in the order of the memory.
        generator: source of the noise; None for torch's default one.

    Returns:
        the buffer.
    """
    numel = buffer.numel()
    if (
        numel < LEAST
        or buffer.dtype is not torch.float32
        or not buffer.is_cpu
        or not plain_tensors_only()
        or not _as_torch()
    ):
        return buffer.exponential_(generator=generator)
    if numel <= _PIECE or not buffer.is_contiguous():
        _fill(buffer, torch.empty_like(buffer, dtype=torch.float64), generator)
        return buffer
    uniform = torch.empty(_PIECE, dtype=torch.float64, device="cpu")
    # The numbers come one after the other, so that pieces continue each other.
    for piece in buffer.view(-1).split(_PIECE):
        _fill(piece, uniform[: piece.numel()], generator)
    return buffer


def _fill(piece: Tensor, uniform: Tensor, generator: torch.Generator | None) -> None:
    piece.copy_(uniform.uniform_(generator=generator).neg_().log1p_()).neg_()


def _as_torch() -> bool:
    """Whether ATen draws this noise as described above, here and in this version."""
    global _same
    if _same is None:
        generators = [torch.Generator("cpu").manual_seed(5) for _ in range(2)]
        with torch.inference_mode(False), torch.no_grad():
            theirs = torch.empty(100, dtype=torch.float32, device="cpu").exponential_(
                generator=generators[0]
            )
            u = torch.empty(100, dtype=torch.float64, device="cpu").uniform_(
                generator=generators[1]
            )
            states = [g.get_state() for g in generators]
            _same = torch.equal(u.neg().log1p().neg().float(), theirs) and torch.equal(*states)
    return _same
