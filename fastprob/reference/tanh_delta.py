"""TanhDelta in plain PyTorch: the CPU path, and the oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_prob(
    param: Tensor,  # [*batch, *event], before tanh
    point: Tensor,  # [*batch, *event], after tanh
    before: Tensor,  # [*sample, *batch, *event], the value before tanh
    value: Tensor,  # [*sample, *batch, *event]
    atol: float,
    rtol: float,
    ndims: int,
) -> Tensor:  # [*sample, *batch]
    """`inf` where the value is the point, `-inf` elsewhere.

    The tolerance is that of the value before tanh; where tanh saturates, and two roundings of its
    result span more than that, two roundings.
    """
    near = (before - param).abs() < atol + rtol * param.abs()
    rounding = 2.0 * torch.finfo(value.dtype).eps
    near = near | ((value - point).abs() <= rounding * point.abs().clamp_min(1.0))
    if ndims:
        near = near.flatten(-ndims).all(-1)
    inf = torch.full((), math.inf, dtype=value.dtype, device=value.device)
    return torch.where(near, inf, -inf)
