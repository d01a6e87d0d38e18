"""Sample and score of TanhNormal, with hand-written gradients.

For y = mid + half * tanh(x), x = loc + noise * scale, with log-density l and incoming gradients gy
and gl:

    g = gy * half * (1 - tanh(x)^2) + 2 tanh(x) * gl
    dloc = g            dscale = g * noise - gl / scale
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprob.ops import normal
from fastprob.ops._autograd import over_event, sum_to, wants_function
from fastprob.reference import normal as normal_reference
from fastprob.reference import tanh_normal as reference
from fastprob.reference._chunks import Fill


class Bounds(NamedTuple):
    """The interval of the values, as `mid + half * tanh(x)`; numbers or tensors.

    Bounds that are `learned` need gradients, which the hand-written backwards leave out.
    """

    half: Tensor | float
    mid: Tensor | float
    log_half: Tensor | float
    safe: bool
    learned: bool = False


class _Squash(torch.autograd.Function):
    """`mid + half * tanh(x)`, whose gradient is that of the value that was let through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: Bounds):
        y = torch.tanh(x)
        if bounds.safe:
            limit = reference.limit(x.dtype)
            y = y.clamp_(-limit, limit)
        ctx.save_for_backward(x, y)
        ctx.bounds = bounds
        return _scale(y, bounds)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        x, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = torch.tanh(x)
        return grads[0] * ctx.bounds.half * (1.0 - y * y), None


def _scale(y: Tensor, bounds: Bounds) -> Tensor:
    """`mid + half * y` into a new tensor."""
    half, mid = bounds.half, bounds.mid
    if not isinstance(half, float):
        return torch.addcmul(mid, y, half)  # type: ignore[arg-type]
    return torch.add(mid, y, alpha=half) if isinstance(mid, Tensor) else y.mul(half).add_(mid)


class _SampleScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, noise: Tensor, bounds: Bounds, ndims: int):
        x = normal_reference.sample(loc, scale, noise)
        value = reference.squash(x, bounds.half, bounds.mid, bounds.safe)
        ctx.save_for_backward(loc, scale, noise, x)
        ctx.bounds, ctx.ndims = bounds, ndims
        return value, reference.score(scale, noise, x, bounds.log_half, ndims)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        loc, scale, noise, x = ctx.saved_tensors
        grad_value, grad_score = grads
        if torch.is_grad_enabled():
            x = normal_reference.sample(loc, scale, noise)
        y = torch.tanh(x)
        grad_score = over_event(grad_score, ctx.ndims)
        # d(tanh) is that of the limited value, as upstream's; past the limit it is 2e-6 or less.
        limit = reference.limit(x.dtype) if ctx.bounds.safe else 1.0
        inner = y.clamp(-limit, limit)
        grad = torch.addcmul(
            grad_value * ctx.bounds.half * (1.0 - inner * inner), y, grad_score, value=2.0
        )
        grad_scale = torch.addcmul(grad * noise, grad_score, scale.reciprocal(), value=-1)
        return sum_to(grad, loc.shape), sum_to(grad_scale, scale.shape), None, None, None


def squash(x: Tensor, bounds: Bounds) -> Tensor:
    """`mid + half * tanh(x)`, `[*batch, *event]`."""
    if wants_function(x) and not bounds.learned:
        return _Squash.apply(x, bounds)
    return reference.squash(x, bounds.half, bounds.mid, bounds.safe)


def sample(loc: Tensor, scale: Tensor, noise: Tensor, bounds: Bounds) -> Tensor:
    """Reparameterized value, `[*sample, *batch, *event]`."""
    return squash(normal.sample(loc, scale, noise), bounds)


def sample_score(
    loc: Tensor, scale: Tensor, noise: Tensor, bounds: Bounds, ndims: int
) -> tuple[Tensor, Tensor]:
    """Reparameterized value and its log-density, from one draw of noise.

    Args:
        loc: mean before tanh, `[*batch, *event]`.
        scale: standard deviation before tanh, `[*batch, *event]`.
        noise: standard normal, `[*sample, *batch, *event]`.
        bounds: interval of the values.
        ndims: number of event dimensions.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`.
    """
    if wants_function(loc, scale) and not bounds.learned:
        return _SampleScore.apply(loc, scale, noise, bounds, ndims)
    x = normal_reference.sample(loc, scale, noise)
    # The score first: x is spent then, and its memory becomes the value's where no gradient needs
    # it.
    score = reference.score(scale, noise, x, bounds.log_half, ndims)
    return reference.squash(x, bounds.half, bounds.mid, bounds.safe, spent=True), score


def sample_score_pieces(
    loc: Tensor, scale: Tensor, fill: Fill, bounds: Bounds, ndims: int, rows: int
) -> tuple[Tensor, Tensor]:
    """`sample_score` of a large draw without gradients, piece by piece; bounds are numbers."""
    half, mid = bounds.half, bounds.mid
    assert isinstance(half, float) and isinstance(mid, float)
    return reference.sample_score_pieces(loc, scale, fill, half, mid, bounds.safe, ndims, rows)


def log_prob_before(loc: Tensor, scale: Tensor, x: Tensor, bounds: Bounds, ndims: int) -> Tensor:
    """Log-density at `squash(x)`, `[*sample, *batch]`, from the value before tanh."""
    z = normal_reference.standardize(loc, scale, x)
    return reference.score(scale, z, x, bounds.log_half, ndims)


def log_prob(loc: Tensor, scale: Tensor, value: Tensor, bounds: Bounds, ndims: int) -> Tensor:
    """Log-density of `value`, `[*sample, *batch]`."""
    x = reference.unsquash(value, bounds.half, bounds.mid, bounds.safe)
    if x.requires_grad or not wants_function(loc, scale):
        return log_prob_before(loc, scale, x, bounds, ndims)
    # The Jacobian depends on the value alone: the gradients are those of a Normal.
    jacobian = reference.log_jacobian(x, bounds.log_half, ndims)
    return normal.log_prob(loc, scale, x, ndims) - jacobian
