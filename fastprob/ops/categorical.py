"""Sample, score and entropy of Categorical and OneHotCategorical."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprob.ops._autograd import wants_function
from fastprob.reference import categorical as reference

normalize = reference.normalize
from_probs = reference.from_probs
race = reference.race
mean_index = reference.mean_index
median_index = reference.median_index
median_of = reference.median_of
pick = reference.pick


class _Entropy(torch.autograd.Function):
    """dH/dl_k = -p_k (l_k + 1), which keeps nothing but the log-probabilities."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor):
        ctx.save_for_backward(log_probs)
        return reference.entropy(log_probs)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (log_probs,) = ctx.saved_tensors
        least = torch.finfo(log_probs.dtype).min
        rate = log_probs.exp() * (log_probs.clamp_min(least) + 1.0)
        return rate * -grads[0].unsqueeze(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats, `[*batch]`."""
    if wants_function(log_probs):
        return _Entropy.apply(log_probs)
    return reference.entropy(log_probs)
