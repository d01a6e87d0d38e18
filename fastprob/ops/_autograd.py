"""What the families' ops share: when to use a hand-written backward, and broadcast gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastprob.reference._reduce import plain_tensors_only

_grad_enabled = torch.is_grad_enabled


def wants_function(*tensors: Tensor) -> bool:
    """Whether a hand-written backward serves this call.

    True in plain eager mode where one of the tensors needs a gradient. Compilers, functorch
    transforms and forward-mode differentiation get the plain formula, which they can see through.
    """
    if not _grad_enabled():
        return False
    for tensor in tensors:
        if tensor.requires_grad:
            return plain_tensors_only() and forward_ad._current_level < 0
    return False


def over_event(grad: Tensor, ndims: int) -> Tensor:
    """Gives `[*batch]` the `ndims` trailing dimensions of size 1 that broadcast over the event."""
    if ndims == 0:
        return grad
    if ndims == 1:
        return grad.unsqueeze(-1)
    return grad.reshape(grad.shape + (1,) * ndims)


def sum_to(grad: Tensor, shape: torch.Size) -> Tensor:
    """Sums a gradient over the dimensions along which its tensor was broadcast."""
    return grad if grad.shape == shape else grad.sum_to_size(shape)
