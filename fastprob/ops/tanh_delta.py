"""Score of TanhDelta; its value is `ops.tanh_normal.squash`."""

from __future__ import annotations

from torch import Tensor

from fastprob.ops.tanh_normal import Bounds
from fastprob.reference import tanh_delta as reference
from fastprob.reference import tanh_normal as tanh_reference


def log_prob(
    param: Tensor,
    point: Tensor,
    value: Tensor,
    bounds: Bounds,
    tolerance: tuple[float, float],
    ndims: int,
) -> Tensor:
    """`inf` where `value` is `point`, `-inf` elsewhere, `[*sample, *batch]`; no gradient."""
    param, point, value = param.detach(), point.detach(), value.detach()
    before = tanh_reference.unsquash(value, bounds.half, bounds.mid, bounds.safe)
    return reference.log_prob(param, point, before, value, *tolerance, ndims)
