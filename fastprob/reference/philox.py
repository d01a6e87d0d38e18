"""Philox4x32-10, the counter-based stream, in plain PyTorch: the same integers as the kernels'.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Key: the 64-bit seed.
Counter: (group, group >> 32, call, call >> 32). Element e of a draw belongs to group e // 4 and
takes its word e % 4; normals take words by pairs, 0 and 1 for the first two of a group.

A state is an int64 tensor `[2]`: the seed and the number of the draw. Nothing here looks at its
values, so that it works on any device, under `torch.compile` and in a captured graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def words(
    seed: Tensor,  # int64 []
    call: Tensor,  # int64 []
    group: Tensor,  # int64 [G]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # int64 [G] each
    """The four 32-bit words of each group, as int64 in `[0, 2^32)`."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = group & _LOW, (group >> 32) & _LOW
    c2, c3 = call & _LOW, (call >> 32) & _LOW
    for _ in range(10):
        # The product of two 32-bit numbers wraps in int64, which leaves its 64 bits right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.broadcast_tensors(c0, c1, c2, c3)  # type: ignore[return-value]


def uniform(
    state: Tensor,  # int64 [2]
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Uniforms in (0, 1), the middles of 2^23 equal steps, `shape`.

    The steps are those of the kernels, which compute in fp32, whatever the dtype is. Half
    precisions round a draw near 1 to 1.
    """
    drawn = torch.stack(_words_for(state, shape), -1)
    unit = ((drawn >> 9).to(_working(dtype)) + 0.5) * 2.0**-23
    return _shaped(unit, shape, dtype)


def standard_normal(
    state: Tensor,  # int64 [2]
    shape: torch.Size | tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Standard normals by Box and Muller 1958, up to 6.66 in size, `shape`."""
    a, b, c, d = _words_for(state, shape)
    z0, z1 = _box_muller(a, b, _working(dtype))
    z2, z3 = _box_muller(c, d, _working(dtype))
    return _shaped(torch.stack((z0, z1, z2, z3), -1), shape, dtype)


def bernoulli(
    state: Tensor,  # int64 [2]
    probs: Tensor,
) -> Tensor:
    """1 with probability `probs` and 0 otherwise, of the shape and dtype of `probs`.

    By steps of 2^-32 in (0, 1], so that 1 is certain at a probability of 1, impossible at 0, and
    met at any other down to 2^-32.
    """
    drawn = torch.stack(_words_for(state, probs.shape), -1)
    dtype = _working(probs.dtype)
    to_one = (drawn.to(dtype) + 1.0) * 2.0**-32
    return (_shaped(to_one, probs.shape, dtype) <= probs).to(probs.dtype)


def fold(
    seed: Tensor,  # int64 []
    index: Tensor,  # int64 []
) -> Tensor:  # int64 []
    """The seed of a stream of its own for a rank or a worker, `index` 0 or more.

    Two words of the stream at a counter that no draw reaches: draws count calls from 0, this is
    at call -1.
    """
    low, high, _, _ = words(seed, torch.full_like(seed, -1), index)
    return low | (high << 32)


def _words_for(state: Tensor, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, ...]:
    groups = (math.prod(shape) + 3) // 4
    group = torch.arange(groups, dtype=torch.int64, device=state.device)
    return words(state[0], state[1], group)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _box_muller(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two normals of two words: the radius of (a + 1) / 2^32, the angle of b as a signed word."""
    radius = torch.sqrt(-2.0 * torch.log((a.to(dtype) + 1.0) * 2.0**-32))
    signed = b - ((b >> 31) << 32)
    angle = signed.to(dtype) * (math.pi * 2.0**-31)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _shaped(x: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return x.reshape(-1)[: math.prod(shape)].reshape(shape).to(dtype)
