"""Sample, score and entropy of Normal and Independent(Normal), with hand-written gradients.

For y = loc + noise * scale with log-density l, and incoming gradients gy and gl:

    dloc = gy                    dscale = gy * noise - gl / scale

and for the log-density of a given value, with z = (value - loc) / scale:

    dloc = gl * z / scale        dscale = gl * (z^2 - 1) / scale        dvalue = -dloc

each a few tensor operations, on what the forward pass has kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprob.ops._autograd import over_event, sum_to, wants_function
from fastprob.reference import normal as reference

_grad_enabled = torch.is_grad_enabled


class _SampleScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, noise: Tensor, ndims: int):
        ctx.save_for_backward(scale, noise)
        ctx.loc_shape, ctx.ndims = loc.shape, ndims
        return reference.sample_score(loc, scale, noise, ndims)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        grad_value, grad_score = grads
        scale, noise = ctx.saved_tensors
        grad_loc = sum_to(grad_value, ctx.loc_shape)
        grad_scale = torch.addcmul(
            grad_value * noise, over_event(grad_score, ctx.ndims), scale.reciprocal(), value=-1
        )
        return grad_loc, sum_to(grad_scale, scale.shape), None, None


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, scale: Tensor, value: Tensor, ndims: int, log_scale: Tensor | None
    ):
        z = reference.standardize(loc, scale, value)
        ctx.save_for_backward(loc, scale, value, z)
        ctx.ndims = ndims
        return reference.score_noise(scale, z, ndims, log_scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        loc, scale, value, z = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A second derivative follows: z must depend on the inputs again.
            z = reference.standardize(loc, scale, value)
        rate = over_event(grads[0], ctx.ndims) / scale
        grad = rate * z
        grad_loc = grad_scale = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_loc = sum_to(grad, loc.shape)
        if ctx.needs_input_grad[1]:
            grad_scale = sum_to((grad * z).sub_(rate), scale.shape)
        if ctx.needs_input_grad[2]:
            grad_value = sum_to(-grad, value.shape)
        return grad_loc, grad_scale, grad_value, None, None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, ndims: int, log_scale: Tensor | None):
        ctx.save_for_backward(scale)
        ctx.ndims = ndims
        return reference.entropy(scale, ndims, log_scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (scale,) = ctx.saved_tensors
        return over_event(grads[0], ctx.ndims) / scale, None, None


sample_score_pieces = reference.sample_score_pieces


def sample(loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Reparameterized value, `[*sample, *batch, *event]`."""
    return reference.sample(loc, scale, noise)


def sample_score(loc: Tensor, scale: Tensor, noise: Tensor, ndims: int) -> tuple[Tensor, Tensor]:
    """Reparameterized value and its log-density, from one draw of noise.

    Args:
        loc: `[*batch, *event]`.
        scale: `[*batch, *event]`.
        noise: standard normal, `[*sample, *batch, *event]`.
        ndims: number of event dimensions.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`.
    """
    if _grad_enabled() and wants_function(loc, scale):
        return _SampleScore.apply(loc, scale, noise, ndims)
    return reference.sample_score(loc, scale, noise, ndims)


def log_prob(
    loc: Tensor, scale: Tensor, value: Tensor, ndims: int, memo: dict[str, Any] | None = None
) -> Tensor:
    """Log-density of a given value.

    Args:
        loc: `[*batch, *event]`.
        scale: `[*batch, *event]`.
        value: `[*sample, *batch, *event]`.
        ndims: number of event dimensions.
        memo: what `log_prob` and `entropy` of the same scale share, kept by the caller.

    Returns:
        `[*sample, *batch]`.
    """
    if wants_function(loc, scale, value):
        return _LogProb.apply(loc, scale, value, ndims, _log_scale(scale, memo))
    return reference.log_prob(loc, scale, value, ndims)


def entropy(scale: Tensor, ndims: int, memo: dict[str, Any] | None = None) -> Tensor:
    """Differential entropy in nats, `[*batch]`; `memo` as in `log_prob`."""
    if wants_function(scale):
        return _Entropy.apply(scale, ndims, _log_scale(scale, memo))
    return reference.entropy(scale, ndims)


def _log_scale(scale: Tensor, memo: dict[str, Any] | None) -> Tensor | None:
    """`log(scale)` without gradient, made once for a scale that was not written to since.

    PPO asks one distribution for both: one pass of four forward operations fewer.
    """
    if memo is None:
        return None
    found = memo.get("log_scale")
    if found is None or found[0] != scale._version:
        with torch.no_grad():
            found = memo["log_scale"] = (scale._version, torch.log(scale))
    return found[1]
