"""Bernoulli in plain PyTorch: the CPU path, and the oracle of the tests.

With logits s = log(p / (1 - p)), summed over the event dimensions:

    log P(x) = x s - softplus(s)            H = softplus(-|s|) + |s| sigmoid(-|s|)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from fastprob.reference._reduce import affine_sum, sum_rightmost


def logits(probs: Tensor) -> Tensor:
    """`log(p / (1 - p))`, with p kept an epsilon away from 0 and 1, as torch does."""
    eps = torch.finfo(probs.dtype).eps
    return torch.logit(probs, eps=eps)


def log_prob(
    logits: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event], 0 or 1
    ndims: int,
) -> Tensor:  # [*sample, *batch]
    """Log-probability of `value`, summed over the last `ndims` dimensions."""
    if value.shape != logits.shape:
        value, logits = torch.broadcast_tensors(value, logits)
    # ATen's one operation for it: x s - max(s, 0) - log(1 + exp(-|s|)), without cancellation.
    cost = binary_cross_entropy_with_logits(logits, value, reduction="none")
    return affine_sum(cost, ndims, 0.0, -1) if ndims else cost.neg()


def entropy(logits: Tensor, ndims: int) -> Tensor:
    """Entropy in nats, `[*batch]`."""
    # In |s|: softplus(s) - s sigmoid(s) is the same for s and -s, and cancels for large s > 0.
    size = logits.abs()
    # The derivative of abs at 0 is 0, and so is that of the entropy there.
    return sum_rightmost(
        softplus(-size, threshold=50.0) + size * torch.sigmoid(-size),
        ndims,
    )
