"""Sample, score and entropy of TruncatedNormal, with hand-written gradients.

For z = (x - loc) / scale, the density f of z, and E over the truncated distribution, the
log-density l of a given value has the gradients of an exponential family:

    dl/dloc = (z - E[z]) / scale            dl/dscale = (z^2 - E[z^2]) / scale
    dl/dlow = f(a) / scale                  dl/dhigh = -f(b) / scale          dl/dx = -z / scale

and the value at probability p, with A = (1 - p) f(a) / f(z) and B = p f(b) / f(z),

    dx/dloc = 1 - A - B     dx/dscale = z - a A - b B     dx/dlow = A     dx/dhigh = B

With h the entropy of z, dh/da = f(a) (log f(a) + h - 1) and dh/db is its mirror image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprob.ops._autograd import over_event, sum_to, wants_function
from fastprob.reference import truncated_normal as reference
from fastprob.reference._reduce import plain_tensors_only
from fastprob.reference.truncated_normal import Standard

mean = reference.mean
variance = reference.variance
cdf = reference.cdf
standardize = reference.standardize


def _slopes(std: Standard, p: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The derivatives of the value at probability p by loc, scale, low and high."""
    a, b = std.a, std.b
    # f(a) / f(z) = exp((z - a) (z + a) / 2), from the distance to the bound.
    up, down = (value - std.low) / std.scale, (value - std.high) / std.scale
    at_low = (1.0 - p) * torch.exp(0.5 * up * (up + 2.0 * a))
    at_high = p * torch.exp(0.5 * down * (down + 2.0 * b))
    z = (value - std.loc) / std.scale
    return 1.0 - at_low - at_high, z - a * at_low - b * at_high, at_low, at_high


class _Sample(torch.autograd.Function):
    """Value and energy at probability p; the latter, and log(M), have no gradient here."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, low: Any, high: Any, p: Tensor):
        std = reference.standardize(loc, scale, low, high)
        value, cost, log_m = reference.quantile(std, p)
        ctx.bounds = (None, None)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            low_t, high_t = torch.as_tensor(low), torch.as_tensor(high)
            ctx.save_for_backward(loc, scale, p, value, low_t, high_t)
        else:
            ctx.save_for_backward(loc, scale, p, value)
            ctx.bounds = (low, high)
        ctx.mark_non_differentiable(cost, log_m)
        return value, cost, log_m

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        loc, scale, p, value, *tensors = ctx.saved_tensors
        low, high = tensors or ctx.bounds
        std = reference.standardize(loc, scale, low, high)
        if torch.is_grad_enabled():
            # A second derivative follows: the value must depend on the inputs again.
            value = _Sample.apply(loc, scale, low, high, p)[0]
        slopes = _slopes(std, p, value)
        out: list[Tensor | None] = []
        for i, source in enumerate((loc, scale, low, high)):
            if not ctx.needs_input_grad[i]:
                out.append(None)
                continue
            out.append(sum_to((grads[0] * slopes[i]).to(source.dtype), source.shape))
        return *out, None


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, scale: Tensor, low: Any, high: Any, value: Tensor, ndims: int
    ):
        ctx.bounds = (None, None)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            low_t, high_t = torch.as_tensor(low), torch.as_tensor(high)
            ctx.save_for_backward(loc, scale, value, low_t, high_t)
        else:
            ctx.save_for_backward(loc, scale, value)
            ctx.bounds = (low, high)
        ctx.ndims = ndims
        return reference.log_prob(loc, scale, low, high, value, ndims)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        loc, scale, value, *tensors = ctx.saved_tensors
        low, high = tensors or ctx.bounds
        std = reference.standardize(loc, scale, low, high)
        m = reference.moments(std)
        # Outside of the bounds the score is -inf whatever the parameters.
        inside = ~reference.outside(value, low, high, ctx.ndims)
        rate = over_event(torch.where(inside, grads[0], 0.0), ctx.ndims) / std.scale
        out: list[Tensor | None] = [None] * 6
        z = (value - std.loc) / std.scale
        u = z - std.c
        terms = (
            lambda: u - m.first,
            lambda: 2.0 * reference.energy(std, value) - m.second,
            lambda: m.at_low,
            lambda: -m.at_high,
            lambda: -z,
        )
        for i, source in enumerate((loc, scale, low, high, value)):
            if ctx.needs_input_grad[i]:
                out[i] = sum_to((rate * terms[i]()).to(source.dtype), source.shape)
        return tuple(out)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, low: Any, high: Any, ndims: int):
        std = reference.standardize(loc, scale, low, high)
        ctx.save_for_backward(loc, scale)
        ctx.bounds, ctx.ndims = (low, high), ndims
        return reference.entropy(std, ndims).to(loc.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        loc, scale = ctx.saved_tensors
        std = reference.standardize(loc, scale, *ctx.bounds)
        m = reference.moments(std)
        h = reference.log_mass(std) + 0.5 * m.second - 1.0
        by_low = torch.special.xlogy(m.at_low, m.at_low) + m.at_low * h
        by_high = -torch.special.xlogy(m.at_high, m.at_high) - m.at_high * h
        rate = over_event(grads[0], ctx.ndims) / std.scale
        grad_loc = -rate * (by_low + by_high)
        grad_scale = rate * (1.0 - std.a * by_low - std.b * by_high)
        return grad_loc.to(loc.dtype), grad_scale.to(scale.dtype), None, None, None


def _tensors(low: Any, high: Any) -> tuple[Tensor, ...]:
    return tuple(t for t in (low, high) if isinstance(t, Tensor))


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _transformed() -> bool:
    """Whether a functorch transform is at work, which `requires_grad` does not tell."""
    return not torch.compiler.is_compiling() and not plain_tensors_only()


def _sample(loc: Tensor, scale: Tensor, low: Any, high: Any, p: Tensor):
    """Value, its energy, and log(M), in float64."""
    tensors = (loc, scale, *_tensors(low, high))
    p = p.double()
    if wants_function(*tensors):
        return _Sample.apply(loc, scale, low, high, p)
    std = reference.standardize(loc, scale, low, high)
    if not _needs_grad(*tensors) and not _transformed():
        return reference.quantile(std, p)
    # What traces or batches gets the same gradient by a value that is 0: the first one only.
    with torch.no_grad():
        value, cost, log_m = reference.quantile(std, p)
        slopes = _slopes(std, p, value)
    for slope, source in zip(slopes, (loc, scale, low, high), strict=True):
        if isinstance(source, Tensor):
            value = value + slope.detach() * (source - source.detach())
    return value, cost, log_m


def sample(loc: Tensor, scale: Tensor, low: Any, high: Any, p: Tensor) -> Tensor:
    """The value below which the probability is `p`, `[*sample, *batch, *event]`."""
    return _sample(loc, scale, low, high, p)[0].to(loc.dtype)


def sample_score(
    loc: Tensor, scale: Tensor, low: Any, high: Any, p: Tensor, ndims: int
) -> tuple[Tensor, Tensor]:
    """The value at probability p and its log-density.

    Args:
        loc: `[*batch, *event]`.
        scale: `[*batch, *event]`.
        low: lower bound, a number or broadcastable with `loc`.
        high: upper bound, likewise.
        p: uniform noise, `[*sample, *batch, *event]`.
        ndims: number of event dimensions.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`.
    """
    if not torch.is_grad_enabled():
        std = reference.central(loc, scale, low, high)
        if std is not None:
            value, z = reference.central_quantile(std, low, high, p.double())
            return value.to(loc.dtype), reference.central_score(std, z, ndims, loc.dtype)
    value, cost, log_m = _sample(loc, scale, low, high, p)
    if value.requires_grad or _transformed():
        # Scored before it is rounded: 300 steps of float32 from a tail's value to its score.
        score = log_prob(loc, scale, low, high, value, ndims).to(loc.dtype)
    else:
        score = reference.total(cost + (torch.log(scale.double()) + log_m), ndims, loc.dtype)
    return value.to(loc.dtype), score


def sample_score_detached(
    loc: Tensor, scale: Tensor, low: Any, high: Any, p: Tensor, ndims: int
) -> tuple[Tensor, Tensor]:
    """As `sample_score`, with no gradient into the value, and that of a given value's score."""
    with torch.no_grad():
        value = _sample(loc, scale, low, high, p)[0]
    score = log_prob(loc, scale, low, high, value, ndims)
    return value.to(loc.dtype), score.to(loc.dtype)


def log_prob(loc: Tensor, scale: Tensor, low: Any, high: Any, value: Tensor, ndims: int) -> Tensor:
    """Log-density of `value`, `[*sample, *batch]`; `-inf` outside of the bounds."""
    if wants_function(loc, scale, value, *_tensors(low, high)):
        return _LogProb.apply(loc, scale, low, high, value, ndims)
    return reference.log_prob(loc, scale, low, high, value, ndims)


def entropy(loc: Tensor, scale: Tensor, low: Any, high: Any, ndims: int) -> Tensor:
    """Differential entropy in nats, `[*batch]`."""
    if wants_function(loc, scale) and not any(t.requires_grad for t in _tensors(low, high)):
        return _Entropy.apply(loc, scale, low, high, ndims)
    std = reference.standardize(loc, scale, low, high)
    return reference.entropy(std, ndims).to(loc.dtype)
