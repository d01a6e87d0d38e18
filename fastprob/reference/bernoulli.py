"""Bernoulli in plain PyTorch: the CPU path, and the oracle of the tests.

With logits s = log(p / (1 - p)), summed over the event dimensions:

    log P(x) = x s - softplus(s)            H = softplus(-|s|) + |s| sigmoid(-|s|)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from fastprob.reference import philox
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


def entropy_parts(logits: Tensor, ndims: int) -> tuple[Tensor, Tensor]:
    """The entropy `[*batch]`, and the probability of the less likely value `[*batch, *event]`.

    In place, of plain tensors: score and entropy, both passes, take 0.85 of the time, 4096 x 8.
    """
    size = logits.abs().neg_()
    less = torch.sigmoid(size)
    each = softplus(size, threshold=50.0).addcmul_(size, less, value=-1.0)
    return affine_sum(each, ndims, 0.0, 1), less


def is_mode(given: Tensor, from_probs: bool) -> Tensor:
    """Where 1 is the more likely value. At p = 1/2 both are; the smaller one is taken."""
    return given > (0.5 if from_probs else 0.0)


def draw(
    given: Tensor,  # [*batch, *event], logits or probabilities
    from_probs: bool,
    state: Tensor | None,  # int64 [2]
    shape: torch.Size,
    ndims: int,
    score: bool,
    entropies: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A value from a counter-based state, its score and the entropy; the mode without a state."""
    value = _value(given, from_probs, state, shape)
    s = logits(given) if from_probs else given
    return (
        value,
        log_prob(s, value, ndims) if score else None,
        entropy(s, ndims) if entropies else None,
    )


def draw_backward(
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    given: Tensor,  # [*batch, *event]
    from_probs: bool,
    state: Tensor | None,  # int64 [2]
    shape: torch.Size,
    ndims: int,
) -> Tensor:  # [*batch, *event]
    """The gradient of `draw` by `given`, the value drawn anew."""
    value = _value(given, from_probs, state, shape)
    return score_backward(grad_score, grad_entropy, given, from_probs, value, ndims, False)[0]


def score_backward(
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    given: Tensor,  # [*batch, *event]
    from_probs: bool,
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    to_value: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `log_prob` and `entropy` by `given` and the value, of their shapes."""
    grad_given = given.new_zeros(given.shape if value is None else value.shape)
    grad_value = None
    s = logits(given) if from_probs else given
    p = torch.sigmoid(s)
    if value is not None and to_value:
        grad_value = torch.zeros_like(value)
    if grad_score is not None and value is not None:
        by_row = grad_score.reshape(grad_score.shape + (1,) * ndims)
        grad_given = (by_row * (value - p)).to(given.dtype)
        if to_value:
            grad_value = (by_row * s).to(value.dtype)
    if grad_entropy is not None:
        by_row = grad_entropy.reshape(grad_entropy.shape + (1,) * ndims)
        # The entropy has no sample dimensions: its gradient goes to the first sample alone.
        grad_given.view(-1, *given.shape)[0] -= by_row * s * p * torch.sigmoid(-s)
    samples = grad_given.dim() - given.dim()
    if samples:
        grad_given = grad_given.sum(tuple(range(samples)))
    if from_probs:
        # That of torch.logit: none where p was moved away from an end.
        eps = torch.finfo(given.dtype).eps
        inside = (given >= eps) & (given <= 1.0 - eps)
        rate = torch.where(inside, given * (1.0 - given), 1.0)
        grad_given = torch.where(inside, grad_given / rate, 0.0)
    return grad_given, grad_value


def _value(given: Tensor, from_probs: bool, state: Tensor | None, shape: torch.Size) -> Tensor:
    if state is None:
        return is_mode(given, from_probs).to(given.dtype).expand(shape + given.shape).clone()
    # In fp32 at least, as the kernels: a half's rounding of p would change one draw in 500.
    p = given if given.dtype is torch.float64 else given.float()
    if not from_probs:
        p = torch.sigmoid(p)
    return philox.bernoulli(state, p.expand(shape + p.shape)).to(given.dtype)
