"""Score and entropy of Bernoulli, with hand-written gradients.

For logits s:

    d log P / ds = x - sigmoid(s)           dH / ds = -s sigmoid(s) sigmoid(-s)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprob.ops._autograd import over_event, sum_to, wants_function
from fastprob.reference import bernoulli as reference

logits = reference.logits


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, ndims: int):
        ctx.save_for_backward(logits, value)
        ctx.ndims = ndims
        return reference.log_prob(logits, value, ndims)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        logits, value = ctx.saved_tensors
        grad = over_event(grads[0], ctx.ndims)
        grad_logits = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_logits = sum_to(grad * (value - torch.sigmoid(logits)), logits.shape)
        if ctx.needs_input_grad[1]:
            grad_value = sum_to(grad * logits, value.shape)
        return grad_logits, grad_value, None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ndims: int):
        ctx.save_for_backward(logits)
        ctx.ndims = ndims
        return reference.entropy(logits, ndims)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (logits,) = ctx.saved_tensors
        rate = logits * torch.sigmoid(logits) * torch.sigmoid(-logits)
        return -over_event(grads[0], ctx.ndims) * rate, None


def log_prob(logits: Tensor, value: Tensor, ndims: int) -> Tensor:
    """Log-probability of `value`, `[*sample, *batch]`."""
    if wants_function(logits, value):
        return _LogProb.apply(logits, value, ndims)
    return reference.log_prob(logits, value, ndims)


def entropy(logits: Tensor, ndims: int) -> Tensor:
    """Entropy in nats, `[*batch]`."""
    if wants_function(logits):
        return _Entropy.apply(logits, ndims)
    return reference.entropy(logits, ndims)
