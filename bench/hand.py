"""The hand-written floor: the same maths on bare tensors, with no module and no distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
Made = Callable[[], dict[str, Tensor]]

# A module's results live in its tensordict until the next call replaces them. The hand-written
# forms keep theirs as long; freed at once, 4 MB at 65536 x 16 would stay in the cache for the
# next call.


def normal(params: Params) -> Made:
    """The fastest eager form known here: five calls of ATen; a matrix product sums the row."""
    loc, scale = params["loc"], params["scale"]
    width = loc.shape[-1]
    ones = torch.ones(width, device=loc.device)
    held: dict[str, Tensor] = {}
    bias = torch.full((1,), -0.5 * math.log(2 * math.pi) * width, device=loc.device)

    def call() -> dict[str, Tensor]:
        eps = torch.empty_like(loc).normal_()
        action = torch.addcmul(loc, eps, scale)
        energy = torch.log(scale).addcmul_(eps, eps, value=0.5)
        held["action"] = action
        held["log_prob"] = torch.addmv(bias, energy, ones, alpha=-1)
        return held

    return call


def tanh_normal(params: Params) -> Made:
    """The same with tanh, scored before it: log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2 x))."""
    loc, scale = params["loc"], params["scale"]
    width = loc.shape[-1]
    ones = torch.ones(width, device=loc.device)
    held: dict[str, Tensor] = {}
    constant = -(0.5 * math.log(2 * math.pi) + 2 * math.log(2)) * width
    bias = torch.full((1,), constant, device=loc.device)

    def call() -> dict[str, Tensor]:
        eps = torch.empty_like(loc).normal_()
        x = torch.addcmul(loc, eps, scale)
        energy = torch.log(scale).addcmul_(eps, eps, value=0.5).sub_(x, alpha=2)
        # softplus(x, beta=-2) = -softplus(-2 x) / 2
        energy.add_(F.softplus(x, beta=-2), alpha=4)
        held["action"] = x.tanh_()
        held["log_prob"] = torch.addmv(bias, energy, ones, alpha=-1)
        return held

    return call
