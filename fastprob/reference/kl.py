"""Kullback-Leibler divergences in plain PyTorch, in nats.

KL(p || q) = E_p[log p(x) - log q(x)]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprob.reference import truncated_normal
from fastprob.reference._reduce import sum_rightmost
from fastprob.reference.truncated_normal import Standard


def categorical(
    p: Tensor,  # [*batch, K], log-probabilities
    q: Tensor,  # [*batch, K], log-probabilities
) -> Tensor:  # [*batch]
    """`sum_k p_k (log p_k - log q_k)`; `inf` where q rules out what p does not.

    A category that p rules out contributes 0, and gradients of 0, whatever q says.
    """
    p, q = torch.broadcast_tensors(p, q)
    possible = p > -math.inf
    gap = torch.where(possible, p, 0.0) - torch.where(possible, q, 0.0)
    return (torch.where(possible, p, -math.inf).exp() * gap).sum(-1)


def truncated(p: Standard, q: Standard, ndims: int) -> Tensor:
    """That of two truncated Normals, float64 `[*batch]`; `inf` where p leaves q's interval.

    With u = z - c under p, modes m and energies from each one's own mode, as in
    `reference.truncated_normal`: q's energy is quadratic in u, and E[u] and E[u^2] are known.
    """
    moments = truncated_normal.moments(p)
    first = moments.first
    square = moments.second - 2.0 * p.c * first
    # Values from the modes: p.loc + c * scale, but without its rounding.
    shift = (truncated_normal.mode(p) - truncated_normal.mode(q)) / q.scale
    ratio = p.scale / q.scale
    cost_q = shift * (shift + 2.0 * q.c) + 2.0 * ratio * (shift + q.c) * first
    cost_q = 0.5 * (cost_q + ratio * ratio * square)
    kl = cost_q - 0.5 * moments.second - torch.log(ratio)
    kl = kl + truncated_normal.log_mass(q) - truncated_normal.log_mass(p)
    (p_low, p_high), (q_low, q_high) = truncated_normal.bounds(p), truncated_normal.bounds(q)
    kl = torch.where((p_low < q_low) | (p_high > q_high), math.inf, kl)
    return sum_rightmost(kl, ndims)
