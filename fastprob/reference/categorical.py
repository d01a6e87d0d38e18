"""Categorical and OneHotCategorical in plain PyTorch: the CPU path, and the oracle of the tests.

With logits normalized to log-probabilities l_k = logits_k - logsumexp(logits):

    log p(k) = l_k            H = -sum_k exp(l_k) l_k

A draw is the k with the largest p_k / e_k, e_k ~ Exponential(1): what torch.multinomial does for
one draw, without its checks of the probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(logits: Tensor) -> Tensor:
    """Log-probabilities, `[*batch, K]`."""
    return torch.log_softmax(logits, -1)


def from_probs(probs: Tensor) -> Tensor:
    """Log-probabilities of unnormalized probabilities, `[*batch, K]`.

    Probabilities are kept an epsilon away from 0 and 1, as torch's do.
    """
    eps = torch.finfo(probs.dtype).eps
    return (probs / probs.sum(-1, keepdim=True)).clamp(eps, 1 - eps).log()


def race(
    probs: Tensor,  # [*batch, K]
    noise: Tensor,  # [*batch, K], exponential of rate 1
) -> Tensor:  # [*batch]
    """The index that wins, int64."""
    return torch.argmax(probs / noise, -1)


def pick(
    log_probs: Tensor,  # [*batch, K]
    index: Tensor,  # [*sample, *batch]
) -> Tensor:  # [*sample, *batch]
    """The log-probability of each index."""
    index = index.long().unsqueeze(-1)
    if index.ndim == log_probs.ndim and index.shape[:-1] == log_probs.shape[:-1]:
        return log_probs.gather(-1, index).squeeze(-1)
    index, log_probs = torch.broadcast_tensors(index, log_probs)
    return log_probs.gather(-1, index[..., :1]).squeeze(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats, `[*batch]`; a category of probability 0 contributes 0."""
    least = torch.finfo(log_probs.dtype).min
    return -(log_probs.exp() * log_probs.clamp_min(least)).sum(-1)


def mean_index(log_probs: Tensor) -> Tensor:
    """`sum_k k p_k`, `[*batch]`."""
    count = log_probs.shape[-1]
    index = torch.arange(count, dtype=log_probs.dtype, device=log_probs.device)
    return (log_probs.exp() * index).sum(-1)


def median_index(log_probs: Tensor) -> Tensor:
    """The smallest index whose cumulative probability reaches 1/2, int64 `[*batch]`."""
    return median_of(log_probs.exp())


def median_of(probs: Tensor) -> Tensor:
    """The same from probabilities that sum to 1."""
    # A cumulative sum that rounding leaves just below 1/2 still counts as having reached it.
    half = 0.5 - 4 * torch.finfo(probs.dtype).eps
    return (probs.cumsum(-1) < half).sum(-1)
