"""MaskedCategorical in plain PyTorch: the CPU path, and the oracle of the tests.

A masked category has logit -inf, which log_softmax carries through with gradients of 0. With a list
of allowed actions the logits are gathered first, and the row has as many entries as the list; an
action's probability is the sum over the entries that name it.

The rest is `reference.categorical`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprob.reference import categorical


def mask_logits(
    logits: Tensor,  # [*batch, K]
    allowed: Tensor,  # [*batch, K] or broadcastable, bool
) -> Tensor:  # [*batch, K]
    """Logits with -inf where not allowed."""
    return torch.where(allowed, logits, -math.inf)


def probs_to_logits(
    probs: Tensor,  # [*batch, K]
    allowed: Tensor | None,  # [*batch, K] or broadcastable, bool
) -> Tensor:  # [*batch, K]
    """Logarithm of the allowed probabilities, -inf elsewhere, with a gradient of 0 there."""
    positive = probs > 0
    if allowed is not None:
        positive = positive & allowed
    # The logarithm of what is left out would hand 0 * inf back.
    return torch.where(positive, torch.where(positive, probs, 1.0).log(), -math.inf)


def gather(
    logits: Tensor,  # [*batch, K]
    indices: Tensor,  # [*batch, L], int64
    padded: Tensor | None,  # [*batch, L], bool
) -> Tensor:  # [*batch, L]
    """Logits of the listed actions, -inf at the padding."""
    if indices.shape[:-1] != logits.shape[:-1]:
        batch = torch.broadcast_shapes(indices.shape[:-1], logits.shape[:-1])
        logits = logits.expand(batch + logits.shape[-1:])
        indices = indices.expand(batch + indices.shape[-1:])
    picked = logits.gather(-1, indices)
    return picked if padded is None else torch.where(padded, -math.inf, picked)


def to_action(
    indices: Tensor,  # [*batch, L]
    position: Tensor,  # [*sample, *batch], int64
) -> Tensor:  # [*sample, *batch]
    """The listed action at each position."""
    return categorical.pick(indices, position)


def score_action(
    log_probs: Tensor,  # [*batch, L]
    indices: Tensor,  # [*batch, L]
    action: Tensor,  # [*sample, *batch]
) -> Tensor:  # [*sample, *batch]
    """Log-probability of actions under a list, -inf for those that it does not name."""
    match = (indices == action.unsqueeze(-1)) & (log_probs > -math.inf)
    found = match.any(-1)
    # A finite stand-in for a row without a match keeps its gradient 0 and not NaN.
    terms = torch.where(match, log_probs, torch.finfo(log_probs.dtype).min)
    return torch.where(found, torch.logsumexp(terms, -1), -math.inf)


def score_position(
    log_probs: Tensor,  # [*batch, L]
    indices: Tensor,  # [*batch, L]
    position: Tensor,  # [*sample, *batch]
    action: Tensor,  # [*sample, *batch], the one listed at the position
) -> Tensor:  # [*sample, *batch]
    """Log-probability of the action at a position of the list that is not padding.

    Entries that name the same action have the same logit: it is the entry's, and the logarithm of
    their number. Half the time of looking the action up.
    """
    match = (indices == action.unsqueeze(-1)) & (log_probs > -math.inf)
    return categorical.pick(log_probs, position) + match.sum(-1).to(log_probs.dtype).log()


def spread(
    probs: Tensor,  # [*batch, L]
    indices: Tensor,  # [*batch, L]
    count: int,
) -> Tensor:  # [*batch, count]
    """Probabilities of the actions themselves; those that are not listed get 0."""
    zeros = torch.zeros((*probs.shape[:-1], count), dtype=probs.dtype, device=probs.device)
    return zeros.scatter_add(-1, indices.expand(probs.shape), probs)
