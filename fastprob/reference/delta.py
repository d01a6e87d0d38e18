"""Delta in plain PyTorch: the CPU path, and the oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_prob(
    param: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event]
    atol: float,
    rtol: float,
    ndims: int,
) -> Tensor:  # [*sample, *batch]
    """`inf` where each element is within `atol + rtol * |param|`, `-inf` elsewhere."""
    near = (value - param).abs() < atol + rtol * param.abs()
    if ndims:
        near = near.flatten(-ndims).all(-1)
    inf = torch.full((), math.inf, dtype=value.dtype, device=value.device)
    return torch.where(near, inf, -inf)
