"""The scale of a network's raw output, as tensordict's NormalParamExtractor maps it.

scale = max(softplus(raw + bias) + least, floor)        dscale / draw = sigmoid(raw + bias)
scale = max(exp(raw), floor)                            dscale / draw = exp(raw)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

SOFTPLUS, EXP = 1, 2


def scale(
    raw: Tensor,  # [*batch, *event]
    kind: int,
    bias: float,
    least: float,
    floor: float,
) -> Tensor:  # [*batch, *event]
    """The scale of a raw value."""
    mapped = torch.exp(raw) if kind == EXP else softplus(raw + bias) + least
    return mapped.clamp_min(floor)


def slope(
    raw: Tensor,  # [*batch, *event]
    kind: int,
    bias: float,
    least: float,
    floor: float,
) -> Tensor:  # [*batch, *event]
    """The derivative of `scale` by the raw value."""
    if kind == EXP:
        mapped = rate = torch.exp(raw)
    else:
        x = raw + bias
        mapped, rate = softplus(x) + least, torch.sigmoid(x)
    return torch.where(mapped >= floor, rate, 0.0)
