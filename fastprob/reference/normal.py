"""Normal and Independent(Normal) in plain PyTorch: the CPU path, and the oracle of the tests.

With z = (x - loc) / scale, summed over the event dimensions:

    log p(x) = sum(-z^2 / 2 - log(scale) - log(2 pi) / 2)
    H        = sum(log(scale) + (1 + log(2 pi)) / 2)

A drawn value is x = loc + noise * scale, so its z is the noise itself and scoring it needs no
subtraction and no division.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastprob.reference import philox
from fastprob.reference._chunks import Fill, pieces
from fastprob.reference._reduce import affine_sum, event_numel, plain_tensors_only, vectors

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def sample(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    noise: Tensor,  # [*sample, *batch, *event]
) -> Tensor:  # [*sample, *batch, *event]
    """Reparameterized value `loc + noise * scale`, as one fused multiply-add."""
    return torch.addcmul(loc, noise, scale)


def score_noise(
    scale: Tensor,  # [*batch, *event]
    noise: Tensor,  # [*sample, *batch, *event]
    ndims: int,
    log_scale: Tensor | None = None,  # [*batch, *event]
) -> Tensor:  # [*sample, *batch]
    """Log-density at `loc + noise * scale`, from the noise; `log_scale` where it is known."""
    if log_scale is not None:
        energy = torch.addcmul(log_scale, noise, noise, value=0.5)
        return affine_sum(energy, ndims, -HALF_LOG_2PI, -1)
    energy = torch.log(scale)
    if not plain_tensors_only():
        # Compiled forward mode crashes where addcmul scales what has no tangent (torch 2.13).
        energy = energy + 0.5 * (noise * noise)
        return affine_sum(energy, ndims, -HALF_LOG_2PI, -1)
    if (
        energy.requires_grad
        or energy.shape != noise.shape
        # A value may be of a wider type.
        or energy.dtype is not noise.dtype
    ):
        energy = torch.addcmul(energy, noise, noise, value=0.5)
        return affine_sum(energy, ndims, -HALF_LOG_2PI, -1)
    # One buffer fewer: 26.7 -> 24.3 us at 4096 x 8, with the logarithm.
    energy.addcmul_(noise, noise, value=0.5)
    return affine_sum(energy, ndims, -HALF_LOG_2PI, -1, True)


def sample_score(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    noise: Tensor,  # [*sample, *batch, *event]
    ndims: int,
    spent: bool = False,
) -> tuple[Tensor, Tensor]:  # [*sample, *batch, *event], [*sample, *batch]
    """`sample` and `score_noise` of one draw.

    `spent` says that the noise is of no use to the caller any more, so that the value may take its
    memory: 1.4 times as fast at 32768 x 8, where a third tensor comes in fresh pages.
    """
    if (
        spent
        and not torch.is_grad_enabled()
        and plain_tensors_only()
        and noise.shape == loc.shape == scale.shape
        and noise.dtype is loc.dtype is scale.dtype
    ):
        score = score_noise(scale, noise, ndims)
        return torch.addcmul(loc, noise, scale, out=noise), score
    return torch.addcmul(loc, noise, scale), score_noise(scale, noise, ndims)


def sample_score_pieces(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    fill: Fill,
    ndims: int,
    rows: int,
) -> tuple[Tensor, Tensor]:  # [*batch, *event], [*batch]
    """`sample_score` of a large draw without gradients, piece by piece.

    Args:
        loc: contiguous.
        scale: contiguous, of the same shape.
        fill: draws standard normal noise into a buffer and returns it.
        ndims: number of event dimensions.
        rows: what `rows_per_piece` says.
    """
    n = event_numel(loc.shape, ndims)
    value = torch.empty_like(loc)
    score = loc.new_empty(loc.shape[: loc.ndim - ndims])
    offset, weights = vectors(n, -HALF_LOG_2PI, -1, loc.dtype)
    energy_buffer = loc.new_empty(rows, n)
    for mu, sigma, out, total in pieces((loc, scale, value, score), rows, n):
        # The noise lies where the value will: a buffer fewer takes 4% off 65536 x 16.
        noise = fill(out)
        energy = torch.log(sigma, out=energy_buffer[: mu.shape[0]])
        energy.addcmul_(noise, noise, value=0.5)
        torch.addcmul(mu, noise, sigma, out=out)
        if ndims:
            torch.addmv(offset, energy, weights, out=total)
        else:
            torch.sub(offset, energy, out=total)
    return value, score


def standardize(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event]
) -> Tensor:  # [*sample, *batch, *event]
    """`(value - loc) / scale`."""
    z = value - loc
    if (
        z.shape == scale.shape
        and z.dtype is scale.dtype
        and not (z.requires_grad or scale.requires_grad)
        and plain_tensors_only()
    ):
        return z.div_(scale)
    return z / scale


def log_prob(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event]
    ndims: int,
) -> Tensor:  # [*sample, *batch]
    """Log-density of `value`, summed over the last `ndims` dimensions."""
    return score_noise(scale, standardize(loc, scale, value), ndims)


def entropy(
    scale: Tensor,  # [*batch, *event]
    ndims: int,
    log_scale: Tensor | None = None,  # [*batch, *event]
) -> Tensor:  # [*batch]
    """Differential entropy in nats, summed over the last `ndims` dimensions."""
    if log_scale is None:
        log_scale = torch.log(scale)
    return affine_sum(log_scale, ndims, 0.5 + HALF_LOG_2PI, 1)


def draw(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    state: Tensor | None,  # int64 [2]
    shape: torch.Size,
    ndims: int,
    score: bool,
    entropies: bool,
    limits: Sequence[float] | None,
    low: Tensor | None,  # [*event]
    high: Tensor | None,  # [*event]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A value from a counter-based state, its score and the entropy; the mean without a state."""
    full = shape + loc.shape
    if state is None:
        noise = torch.zeros(full, dtype=loc.dtype, device=loc.device)
    else:
        noise = philox.standard_normal(state, full, loc.dtype)
    value = clamped(sample(loc, scale, noise), limits, low, high)
    return (
        value,
        score_noise(scale, noise, ndims) if score else None,
        entropy(scale, ndims) if entropies else None,
    )


def clamped(
    value: Tensor,  # [*sample, *batch, *event]
    limits: Sequence[float] | None,
    low: Tensor | None,  # [*event]
    high: Tensor | None,  # [*event]
) -> Tensor:
    """The value between two numbers, between bounds of each element's own, or as it is."""
    if limits is not None:
        return value.clamp(limits[0], limits[1])
    if low is not None:
        return value.clamp(low.to(value.dtype), None if high is None else high.to(value.dtype))
    return value


def draw_backward(
    grad_value: Tensor | None,  # [*sample, *batch, *event]
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    state: Tensor | None,  # int64 [2]
    shape: torch.Size,
    ndims: int,
    pathwise: bool,
    limits: Sequence[float] | None,
    low: Tensor | None,  # [*event]
    high: Tensor | None,  # [*event]
) -> tuple[Tensor, Tensor]:  # [*batch, *event] both
    """The gradients of `draw` by loc and scale, the noise drawn anew."""
    full = shape + loc.shape
    if state is None:
        noise = torch.zeros(full, dtype=loc.dtype, device=loc.device)
    else:
        noise = philox.standard_normal(state, full, loc.dtype)
    by_loc, by_scale = torch.zeros_like(noise), torch.zeros_like(noise)
    if grad_value is not None and pathwise:
        x = sample(loc, scale, noise)
        kept = clamped(x, limits, low, high) == x
        by_loc = torch.where(kept, grad_value, 0.0)
        by_scale = by_loc * noise
    if grad_score is not None:
        rate = _over_event(grad_score, ndims) / scale
        if pathwise:
            by_scale = by_scale - rate
        else:
            by_loc = rate * noise
            by_scale = rate * (noise * noise - 1.0)
    if grad_entropy is not None:
        # The entropy has no sample dimensions: its gradient goes to the first sample alone.
        rate = (_over_event(grad_entropy, ndims) / scale).expand(loc.shape)
        by_scale = by_scale.clone()
        by_scale.view(-1, *loc.shape)[0] += rate
    return _fold(by_loc, loc), _fold(by_scale, scale)


def score_backward(
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    to_value: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `log_prob` and `entropy` by loc, scale and value, of their shapes."""
    full = loc.shape if value is None else value.shape
    by_loc, by_scale = loc.new_zeros(full), loc.new_zeros(full)
    if grad_score is not None and value is not None:
        z = (value - loc) / scale
        rate = _over_event(grad_score, ndims) / scale
        by_loc = (rate * z).to(loc.dtype)
        by_scale = (rate * (z * z - 1.0)).to(loc.dtype)
    if grad_entropy is not None:
        rate = (_over_event(grad_entropy, ndims) / scale).expand(loc.shape)
        by_scale.view(-1, *loc.shape)[0] += rate
    grad_value = None
    if to_value and value is not None:
        grad_value = (-by_loc).to(value.dtype)
    return _fold(by_loc, loc), _fold(by_scale, scale), grad_value


def _fold(grad: Tensor, parameter: Tensor) -> Tensor:
    """Summed over the sample dimensions."""
    samples = grad.dim() - parameter.dim()
    return grad.sum(tuple(range(samples))) if samples else grad


def _over_event(grad: Tensor, ndims: int) -> Tensor:
    return grad.reshape(grad.shape + (1,) * ndims)
