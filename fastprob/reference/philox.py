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

from fastprob.reference._reduce import plain_tensors_only

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
    to_one = _to_one(drawn, dtype)
    return (_shaped(to_one, probs.shape, dtype) <= probs).to(probs.dtype)


# As the kernels have them: tries of a Gamma, and counters that no other draw reaches.
_TRIES = 16
_NEXT_TRY = 1 << 48
_BOOST = 0x7FFF << 48
# Elements up to which a try costs the calls, not the arithmetic.
_FEW = 512


def beta(
    state: Tensor,  # int64 [2]
    a: Tensor,  # [*shape]
    b: Tensor,  # [*shape]
) -> tuple[Tensor, Tensor]:  # [*shape] each
    """Draws x of a Beta with the concentrations a and b, and 1 - x, in their dtype.

    The quotient of two Gammas, each by the rejection of Marsaglia and Tsang 2000: one of a
    concentration c >= 1 is d (1 + t)^3 with d = c - 1/3 and t = z / (3 sqrt(d)) of a normal z. One
    of c < 1 is a Gamma of 1 + c times U^(1 / c), of which only the logarithm is taken, so that two
    tiny concentrations do not give 0 / 0. Element e takes the four words of the counters e, e +
    2^48, and so on for its tries, both Gammas of it from the same: two make the normals, one each
    the uniforms. A Gamma that 16 tries reject, of a chance below 1e-20, is d.

    Both are at least the smallest normal number, and at most the largest below 1, as torch's are.
    """
    dtype = _working(a.dtype)
    info = torch.finfo(a.dtype)
    shape = a.shape
    pair = torch.stack((a.reshape(-1), b.reshape(-1))).to(dtype)  # [2, N]
    element = torch.arange(pair.shape[1], dtype=torch.int64, device=a.device)
    # Off a CPU a look at the values stops the device, and vmap and its kin allow none.
    look = pair.is_cpu and plain_tensors_only()
    d = torch.where(pair < 1.0, pair + 1.0, pair) - 1.0 / 3.0
    root = _roots(state, element, d, look)
    gamma = d * root * root * root
    if not look or (pair < 1.0).any():
        low, high, _, _ = words(state[0], state[1], element + _BOOST)
        # In units of the smaller concentration: two that overflow would have no difference.
        unit = pair.amin(0)
        less = torch.log2(_to_one(torch.stack((low, high)), dtype)) * (unit / pair)
        less = torch.where(pair < 1.0, less, 0.0)
        # The smaller one is made smaller: neither overflows, and never are both 0.
        gamma = gamma * torch.exp2((less - less.amax(0)) / unit)
    x = (gamma / gamma.sum(0)).clamp(info.tiny, 1.0 - info.eps / 2)
    return x[0].reshape(shape).to(a.dtype), x[1].reshape(shape).to(a.dtype)


def _roots(
    state: Tensor,  # int64 [2]
    element: Tensor,  # int64 [N]
    d: Tensor,  # [2, N]
    look: bool,
) -> Tensor:  # [2, N]
    """1 + t of the first try that is accepted, of both Gammas of each element."""
    if not look:
        root, accepted = _tries(state, element, d, 0, _TRIES)
        return torch.where(accepted, root, 1.0)
    # Few elements cost the same for one try as for four; of many only those that are left go on.
    made = 4 if element.numel() <= _FEW else 1
    root, accepted = _tries(state, element, d, 0, made)
    while made < _TRIES:
        left = (~accepted.all(0)).nonzero()[:, 0]
        if not left.numel():
            break
        count = 4 - made % 4
        new, now = _tries(state, element[left], d[:, left], made, count)
        before = accepted[:, left]
        root[:, left] = torch.where(before, root[:, left], new)
        accepted[:, left] = before | now
        made += count
    return torch.where(accepted, root, 1.0)


def _tries(
    state: Tensor,  # int64 [2]
    element: Tensor,  # int64 [N]
    d: Tensor,  # [2, N]
    first: int,
    count: int,
) -> tuple[Tensor, Tensor]:  # [2, N] each
    """1 + t of the first of `count` tries that is accepted, and whether one is.

    log(u) < z^2 / 2 + d (1 - v + log(v)) with v = (1 + t)^3 is the source's rule. Worked out, it is
    log(u) < 3 d (log(1 + t) - t + t^2 / 2 - t^3 / 3), whose terms of a small t are those from the
    fourth power on.
    """
    number = torch.arange(first, first + count, dtype=torch.int64, device=d.device)
    w0, w1, w2, w3 = words(state[0], state[1], element + _NEXT_TRY * number[:, None])
    z = torch.stack(_box_muller(w0, w1, d.dtype), 1)  # [count, 2, N]
    log_u = torch.log(_to_one(torch.stack((w2, w3), 1), d.dtype))
    t = z * (torch.rsqrt(d) / 3.0)
    root = 1.0 + t
    series = torch.zeros_like(t)
    for power in range(_LAST_POWER, 3, -1):
        series = series * t + (-1.0) ** (power + 1) / power
    near = series * (t * t) * (t * t)
    far = torch.log(root.clamp_min(1e-9)) + t * (t * (0.5 - t / 3.0) - 1.0)
    bound = 3.0 * d * torch.where(t.abs() < 0.25, near, far)
    accepted = (log_u < bound) & (root > 0.0)
    if count == 1:
        return root[0], accepted[0]
    at = accepted.to(torch.int8).argmax(0, keepdim=True)
    return root.gather(0, at)[0], accepted.any(0)


# The series of log(1 + t) up to here is off by 4e-14 at t = 1/4.
_LAST_POWER = 20


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


def _to_one(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Words as uniforms in (0, 1]."""
    return (word.to(dtype) + 1.0) * 2.0**-32


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
