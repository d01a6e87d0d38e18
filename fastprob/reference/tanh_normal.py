"""TanhNormal in plain PyTorch: the CPU path, and the oracle of the tests.

y = mid + half * tanh(x) with x ~ Normal(loc, scale), summed over the event dimensions:

    log p(y) = sum(log N(x; loc, scale) - log(1 - tanh(x)^2) - log(half))
    log(1 - tanh(x)^2) = 2 * (log(2) - x - softplus(-2 x))

The score of a drawn value uses the x that was drawn: going back through atanh loses it once tanh
saturates (off by 16,312 at |loc| = 50, TorchRL's issue 4080).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastprob.reference import normal, philox
from fastprob.reference._chunks import Fill, pieces
from fastprob.reference._reduce import (
    affine_sum,
    differentiated,
    event_numel,
    plain_tensors_only,
    transformed,
    vectors,
)
from fastprob.reference.normal import HALF_LOG_2PI

# log(2 pi) / 2 of the Normal, and 2 log(2) of the Jacobian
_BIAS = -(HALF_LOG_2PI + 2 * math.log(2))


# How a value is chosen: drawn, median, mean, mode, as the kernels number it.
KINDS = range(4)
_RANDOM, _MEDIAN, _MEAN, _MODE = KINDS

# Looking a dtype's resolution up takes 0.3 us.
_LIMITS = {
    dtype: 1.0 - torch.finfo(dtype).resolution
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def limit(dtype: torch.dtype) -> float:
    """The largest |tanh| that is let through, so that its inverse stays finite."""
    return _LIMITS[dtype]


def squash(
    x: Tensor, half: Tensor | float, mid: Tensor | float, safe: bool, spent: bool = False
) -> Tensor:
    """`mid + half * tanh(x)`, with tanh kept off +-1 where `safe`.

    Args:
        x: `[*batch, *event]`.
        half: half the width of the interval, a number or broadcastable with `x`.
        mid: its middle, likewise.
        safe: whether |tanh| is limited to 1 minus the dtype's resolution.
        spent: whether x is of no use to the caller any more, so that its memory may be taken.
    """
    ours = not x.requires_grad and plain_tensors_only()
    return _place(torch.tanh_(x) if ours and spent else torch.tanh(x), half, mid, safe, ours)


def _place(y: Tensor, half: Tensor | float, mid: Tensor | float, safe: bool, ours: bool) -> Tensor:
    """`squash` from the tanh, in place where it is `ours`."""
    if safe:
        bound = limit(y.dtype)
        if ours:
            y.clamp_(-bound, bound)
        else:
            y = _limited(y)
    if not isinstance(half, float):
        return torch.addcmul(mid, y, half)  # type: ignore[arg-type]
    if half != 1.0:
        y = y.mul_(half) if ours else y * half
    if mid != 0.0:
        y = y.add_(mid) if ours else y + mid
    return y


def _limited(y: Tensor) -> Tensor:
    """`y` off +-1. The clamp must not stop the gradient of a saturated value, only change it."""
    bound = limit(y.dtype)
    return y + (y.detach().clamp(-bound, bound) - y.detach())


def unsquash(y: Tensor, half: Tensor | float, mid: Tensor | float, safe: bool) -> Tensor:
    """The x with `squash(x) == y`; values on or outside the bounds are taken just inside."""
    if not isinstance(half, float) or half != 1.0 or mid != 0.0:
        y = (y - mid) / half
    bound = limit(y.dtype) if safe else 1.0
    return torch.atanh(y.clamp(-bound, bound))


def half_softplus(x: Tensor) -> Tensor:
    """`-softplus(-2 x) / 2` in one operation: a negative beta turns both signs.

    The threshold past which ATen takes the argument itself is 40 in place of 20, where the two
    differ by 2e-9, too much for float64.
    """
    return softplus(x, -2.0, 40.0)  # type: ignore[arg-type]


def score(
    scale: Tensor,  # [*batch, *event]
    noise: Tensor,  # [*sample, *batch, *event]
    x: Tensor,  # [*sample, *batch, *event], loc + noise * scale
    log_half: Tensor | float,
    ndims: int,
) -> Tensor:  # [*sample, *batch]
    """Log-density at `squash(x)`, from the value before tanh."""
    # The sum of z^2 / 2 + log(scale) - 2 (x + softplus(-2 x)), with its sign turned at the end.
    u = half_softplus(x)
    energy = torch.log(scale)
    plain = plain_tensors_only()
    # A value may be of a wider type than the scale.
    if not plain or u.requires_grad or energy.requires_grad or energy.dtype is not u.dtype:
        # No addcmul, as in `normal.score_noise`.
        energy = energy + 0.5 * (noise * noise) - 2.0 * (x - 2.0 * u)
    else:
        if energy.shape == noise.shape:
            energy.addcmul_(noise, noise, value=0.5)
        else:
            energy = torch.addcmul(energy, noise, noise, value=0.5)
        energy.sub_(torch.sub(x, u, alpha=2.0, out=u), alpha=2.0)
    if isinstance(log_half, float):
        return affine_sum(energy, ndims, _BIAS - log_half, -1, plain)
    return affine_sum(energy + log_half, ndims, _BIAS, -1, plain)


def sample_score(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    noise: Tensor,  # [*sample, *batch, *event]
    half: Tensor | float,
    mid: Tensor | float,
    log_half: Tensor | float,
    safe: bool,
    ndims: int,
) -> tuple[Tensor, Tensor]:  # [*sample, *batch, *event], [*sample, *batch]
    """Value and score of one draw, as a compiler should see them.

    The tanh serves both: `log(1 - tanh(x)^2) = 2 (log(1 + |tanh(x)|) - |x|)`, whose logarithm that
    of the scale takes in. An exponential and a logarithm fewer: 4.9 -> 3.2 ms for 65536 x 16 under
    Inductor, the noise apart. In eager mode these are four operations more.

    Methods, not functions of torch: a graph guards the latter, and calls into Python where one is
    reached by way of two modules.
    """
    x = loc.addcmul(noise, scale)
    y = x.tanh()
    if safe and y.dtype in (torch.float32, torch.float64):
        # Then the score reads the value, and no second buffer is filled: 6.1 -> 5.0 ms in all. It
        # costs a saturated element 1e-6 of its score; half precisions limit at 0.99.
        y, safe = _limited(y), False
    grown = y.abs() + 1.0
    # No addcmul, as in `normal.score_noise`.
    energy = (scale * (grown * grown)).log() + 0.5 * (noise * noise)
    energy = energy - 2.0 * x.abs()
    if isinstance(log_half, float):
        total = affine_sum(energy, ndims, -HALF_LOG_2PI - log_half, -1, False)
    else:
        total = affine_sum(energy + log_half, ndims, -HALF_LOG_2PI, -1, False)
    return _place(y, half, mid, safe, False), total


def sample_score_pieces(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    fill: Fill,
    half: float,
    mid: float,
    safe: bool,
    ndims: int,
    rows: int,
) -> tuple[Tensor, Tensor]:  # [*batch, *event], [*batch]
    """Value and score of a large draw without gradients, piece by piece.

    Args:
        loc: contiguous.
        scale: contiguous, of the same shape.
        fill: draws standard normal noise into a buffer and returns it.
        half: half the width of the interval.
        mid: its middle.
        safe: whether |tanh| is limited to 1 minus the dtype's resolution.
        ndims: number of event dimensions.
        rows: what `rows_per_piece` says.
    """
    n = event_numel(loc.shape, ndims)
    value = torch.empty_like(loc)
    total = loc.new_empty(loc.shape[: loc.ndim - ndims])
    offset, weights = vectors(n, -HALF_LOG_2PI - math.log(half), -1, loc.dtype)
    buffers = [loc.new_empty(rows, n) for _ in range(3)]
    bound = limit(loc.dtype)
    for mu, sigma, out, sums in pieces((loc, scale, value, total), rows, n):
        noise, x, energy = (b[: mu.shape[0]] for b in buffers)
        fill(noise)
        torch.addcmul(mu, noise, sigma, out=x)
        torch.tanh(x, out=out)
        # As in `sample_score`: five cheap passes over what the cache holds for a softplus.
        torch.abs(out, out=energy).add_(1.0)
        energy.mul_(energy).mul_(sigma).log_().addcmul_(noise, noise, value=0.5)
        energy.sub_(x.abs_(), alpha=2.0)
        if safe:
            out.clamp_(-bound, bound)
        if half != 1.0 or mid != 0.0:
            out.mul_(half).add_(mid)
        if ndims:
            torch.addmv(offset, energy, weights, out=sums)
        else:
            torch.sub(offset, energy, out=sums)
    return value, total


def log_jacobian(
    x: Tensor,  # [*sample, *batch, *event]
    log_half: Tensor | float,
    ndims: int,
) -> Tensor:  # [*sample, *batch]
    """`log |d squash / dx|`, summed over the event."""
    u = x - 2.0 * half_softplus(x)
    if isinstance(log_half, float):
        return affine_sum(u, ndims, 2 * math.log(2) + log_half, -2)
    return affine_sum(u - 0.5 * log_half, ndims, 2 * math.log(2), -2)


def draw(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    state: Tensor | None,  # int64 [2]
    shape: torch.Size,
    ndims: int,
    score_wanted: bool,
    half: Tensor | float,  # [*event]
    mid: Tensor | float,  # [*event]
    safe: bool,
    limits: Sequence[float] | None,
    low: Tensor | None,  # [*event]
    high: Tensor | None,  # [*event]
    point: int = _MEDIAN,
) -> tuple[Tensor, Tensor | None]:
    """A value from a counter-based state and its score; one that is not drawn without a state.

    That is the squashed mean where `point` is 1, the mean where 2, the mode where 3. The value is
    clamped to `limits`, or to `low` and `high`, after it was scored.
    """
    if state is None and point in (_MEAN, _MODE):
        x, noise, value = _point(loc, scale, point, half, mid, safe)
        x, noise, value = (t.expand(shape + loc.shape) for t in (x, noise, value))
    else:
        noise = _noise(loc, state, shape)
        x = normal.sample(loc, scale, noise)
        value = squash(x, half, mid, safe)
    value = normal.clamped(value, limits, low, high).contiguous()
    log_half = torch.log(half) if isinstance(half, Tensor) else math.log(half)
    return value, score(scale, noise, x, log_half, ndims) if score_wanted else None


def _point(
    loc: Tensor, scale: Tensor, point: int, half: Tensor | float, mid: Tensor | float, safe: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What is scored, before tanh and in units of the scale from loc, and the value itself."""
    if point == _MODE:
        x = mode(loc, scale)
        return x, 2.0 * scale * torch.tanh(x), squash(x, half, mid, safe)
    y = mean(loc, scale)
    bound = limit(y.dtype) if safe else 1.0
    x = torch.atanh(y.clamp(-bound, bound))
    return x, normal.standardize(loc, scale, x), y * half + mid


def _noise(loc: Tensor, state: Tensor | None, shape: torch.Size) -> Tensor:
    full = shape + loc.shape
    if state is None:
        return torch.zeros(full, dtype=loc.dtype, device=loc.device)
    return philox.standard_normal(state, full, loc.dtype)


def draw_backward(
    grad_value: Tensor | None,  # [*sample, *batch, *event]
    grad_score: Tensor | None,  # [*sample, *batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    state: Tensor | None,  # int64 [2]
    shape: torch.Size,
    ndims: int,
    pathwise: bool,
    half: Tensor | float,  # [*event]
    mid: Tensor | float,  # [*event]
    safe: bool,
    limits: Sequence[float] | None,
    low: Tensor | None,  # [*event]
    high: Tensor | None,  # [*event]
    point: int = _MEDIAN,
) -> tuple[Tensor, Tensor]:  # [*batch, *event] both
    """The gradients of `draw` by loc and scale, the noise drawn anew."""
    if state is None and pathwise and point in (_MEAN, _MODE):
        clamp = limits, low, high
        slopes = _mode_backward if point == _MODE else _mean_backward
        by_loc, by_scale = slopes(
            grad_value, grad_score, loc, scale, shape, ndims, half, mid, safe, clamp
        )
        return _fold(by_loc, loc), _fold(by_scale, scale)
    if not pathwise:
        # The Jacobian depends on the value alone: the gradients are those of a Normal.
        return normal.draw_backward(
            None, grad_score, None, loc, scale, state, shape, ndims, False, None, None, None
        )
    noise = _noise(loc, state, shape)
    x = normal.sample(loc, scale, noise)
    y = torch.tanh(x)
    by_loc = torch.zeros_like(noise)
    if grad_value is not None:
        inner = y.clamp(-limit(x.dtype), limit(x.dtype)) if safe else y
        value = squash(x, half, mid, safe)
        kept = normal.clamped(value, limits, low, high) == value
        by_loc = torch.where(kept, grad_value, 0.0) * half * (1.0 - inner * inner)
    by_scale = by_loc * noise
    if grad_score is not None:
        rate = grad_score.reshape(grad_score.shape + (1,) * ndims)
        by_loc = torch.addcmul(by_loc, y, rate, value=2.0)
        by_scale = by_loc * noise - rate / scale
    return _fold(by_loc, loc), _fold(by_scale, scale)


def _let_through(
    grad: Tensor,  # [*sample, *batch, *event]
    value: Tensor,  # [*batch, *event]
    clamp: tuple[Sequence[float] | None, Tensor | None, Tensor | None],
) -> Tensor:
    """The gradient of a value that is clamped, where it is not."""
    return torch.where(normal.clamped(value, *clamp) == value, grad, 0.0)


def _mode_backward(grad_value, grad_score, loc, scale, shape, ndims, half, mid, safe, clamp):
    """The gradients of the mode by loc and scale, by the implicit function theorem.

    At the mode the score does not change with x.
    """
    x, z, value = _point(loc, scale, _MODE, half, mid, safe)
    y = torch.tanh(x)
    by_loc = torch.zeros(shape + loc.shape, dtype=loc.dtype, device=loc.device)
    if grad_value is not None:
        inner = y.clamp(-limit(x.dtype), limit(x.dtype)) if safe else y
        by_loc = _let_through(grad_value, value, clamp) * half * (1.0 - inner * inner)
        slope = 1.0 - 2.0 * scale * scale * (1.0 - y * y)
        by_loc = by_loc / slope.clamp_min(torch.finfo(x.dtype).eps)
    by_scale = by_loc * 2.0 * z
    if grad_score is not None:
        rate = grad_score.reshape(grad_score.shape + (1,) * ndims)
        by_loc = by_loc + rate * 2.0 * y
        by_scale = by_scale + rate * (z * z - 1.0) / scale
    return by_loc, by_scale


def _mean_backward(grad_value, grad_score, loc, scale, shape, ndims, half, mid, safe, clamp):
    """The gradients of the mean by loc and scale, its score's through the mean."""
    x, z, value = _point(loc, scale, _MEAN, half, mid, safe)
    along = torch.zeros(shape + loc.shape, dtype=loc.dtype, device=loc.device)
    by_loc, by_scale = along, along
    if grad_value is not None:
        along = _let_through(grad_value, value, clamp) * half
    if grad_score is not None:
        rate = grad_score.reshape(grad_score.shape + (1,) * ndims)
        by_loc = rate * z / scale
        by_scale = rate * (z * z - 1.0) / scale
        y = torch.tanh(x)
        unit = mean(loc, scale)
        bound = limit(y.dtype) if safe else 1.0
        through = (2.0 * y - z / scale) / (1.0 - y * y)
        along = along + rate * torch.where(unit.abs() <= bound, through, 0.0)
    to_loc, to_scale = mean_slopes(loc, scale)
    return by_loc + along * to_loc, by_scale + along * to_scale


def score_backward(
    grad_score: Tensor,  # [*sample, *batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event]
    ndims: int,
    half: Tensor | float,  # [*event]
    mid: Tensor | float,  # [*event]
    safe: bool,
    to_value: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of a given value's score by loc, scale and value, of their shapes."""
    u = (value - mid) / half
    bound = limit(u.dtype) if safe else 1.0
    y = u.clamp(-bound, bound)
    z = (torch.atanh(y) - loc) / scale
    rate = grad_score.reshape(grad_score.shape + (1,) * ndims)
    by_loc = rate * z / scale
    by_scale = rate * (z * z - 1.0) / scale
    grad_value = None
    if to_value:
        slope = rate * (2.0 * y - z / scale) / ((1.0 - y * y) * half)
        grad_value = torch.where(u == y, slope, 0.0).to(value.dtype)
    return (
        _fold(by_loc.to(loc.dtype), loc),
        _fold(by_scale.to(scale.dtype), scale),
        grad_value,
    )


def _fold(grad: Tensor, parameter: Tensor) -> Tensor:
    """Summed over the sample dimensions."""
    samples = grad.dim() - parameter.dim()
    return grad.sum(tuple(range(samples))) if samples else grad


# The square root of 1/2 in two parts, of which the second is what float64 leaves of it.
_ROOT_HALF, _ROOT_HALF_REST = 0.7071067811865476, -4.833646656726457e-17


def mode(loc: Tensor, scale: Tensor, keep: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The x at the highest density of tanh(x).

    The density of y = tanh(x) is stationary where f(x) = x - loc - w tanh(x) is 0, w = 2 scale^2.
    The highest of the roots lies on the side of `loc` and is the largest one in |x|, right of which
    f is convex. As tanh(x) <= x - 0.238 x^3 up to 1, it is no larger than

        cbrt(8.5 |loc|) + sqrt(4.2 max(w - 1, 0)), where that is below 1, or |loc| + w

    which is of its size also where w is 1, loc 0 and three roots meet. Halley's method gets from
    there to 2e-8 in three steps and to 1e-12 in four (800 roots, half of them near that point; the
    rest of the error is the rounding of f). Newton's took 64 steps from |loc| + w to 1e-8.

    Args:
        loc: mean before tanh, `[*batch, *event]`.
        scale: standard deviation before tanh, `[*batch, *event]`.
        keep: applied to the root before it is differentiated.

    Returns:
        `[*batch, *event]`; where loc is 0 and the two sides are equally high, the positive one.
        Differentiable once, by the implicit function theorem.
    """
    with torch.no_grad():
        # Detached, as no_grad lets tangents through. The digits of float32 take float64.
        size, sigma = loc.detach().double().abs(), scale.detach().double()
        # Where tanh is 1 there is nothing to find, and infinity less itself is none.
        m = size.clamp_max(20.0)
        w = 2.0 * sigma * sigma
        # 1 - w, which w itself has rounded away where three roots meet.
        rest = 2.0 * ((_ROOT_HALF - sigma) + _ROOT_HALF_REST) * (_ROOT_HALF + sigma)
        far = m + w
        # pow takes 1 ms more for 4096 x 8.
        near = torch.exp(torch.log(8.5 * m) / 3.0) + (-4.2017 * rest).clamp_min(0.0).sqrt()
        x = torch.where(near < 1.0, torch.minimum(near, far), far)
        for _ in range(4 if loc.dtype is torch.float64 else 3):
            t = torch.tanh(x)
            bend = w * t
            f = (x - m).sub_(bend)
            # No addcmul: dynamo 2.13 fails on its decomposition inside `torch.func.grad`.
            slope = (bend * t).add_(rest)
            curve = bend.mul_(f).mul_(t.mul_(t).neg_().add_(1.0))
            curve = (slope * slope).sub_(curve).clamp_min_(1e-300)
            x = torch.maximum(x - f.mul_(slope).div_(curve), m)
        x = x + (size - m)
        x = torch.where(loc < 0, -x, x).to(loc.dtype)
    if not differentiated(loc, scale) and not transformed():
        return x
    if keep is not None:
        x = keep(x)
    # One step whose derivative is that of the root: its residual is 0 up to rounding.
    t = torch.tanh(x)
    # Where three roots meet it is 0, which must not make a NaN of the value.
    slope = (1.0 - 2.0 * scale.detach() ** 2 * (1.0 - t * t)).clamp_min(torch.finfo(x.dtype).eps)
    residual = x - loc - 2.0 * scale * scale * t
    return x - (residual - residual.detach()) / slope


def _mixture(like: Tensor) -> tuple[Tensor, Tensor]:
    """Weights c and variances v with `tanh(x) = sum of c_i erf(x / sqrt(2 v_i))`.

    The logistic density sech(x)^2 / 2 is that of a Normal whose standard deviation t follows
    Kolmogorov's distribution, with the density 8 t sum of (-1)^(k+1) k^2 exp(-2 k^2 t^2). In log(t)
    that falls doubly exponentially on both sides, so that the trapezoid rule needs few nodes: 26
    are exact to 3e-14, and 16 to 3e-9 of the value, for half precision and float32.

    Made on the device: numbers that are copied there would stop it.

    Source: Andrews and Mallows 1974, "Scale mixtures of normal distributions".

    Args:
        like: gives dtype, device, and the number of dimensions behind the first.

    Returns:
        two tensors `[nodes, 1, ...]`.
    """
    first, step, count = (-1.75, 0.13, 26) if like.dtype is torch.float64 else (-1.7, 0.2, 16)
    t = torch.exp(torch.arange(count, dtype=torch.float64, device=like.device) * step + first)
    v = t * t
    k = torch.arange(1, 28, dtype=torch.float64, device=like.device).unsqueeze(-1)
    terms = (k % 2.0 * 2.0 - 1.0) * k * k * torch.exp(-2.0 * k * k * v)
    c = terms.sum(0) * v
    shape = (-1, *([1] * like.ndim))
    # Divided by their sum, so that the limits are 1 and -1.
    return (c / c.sum()).to(like.dtype).view(shape), v.to(like.dtype).view(shape)


def mean(loc: Tensor, scale: Tensor) -> Tensor:
    """The mean of tanh(x).

    A Normal x widens each part of tanh's mixture: `sum of c_i erf(loc / sqrt(2 (v_i + scale^2)))`,
    see `_mixture`. A fifth of the time of quadratures over x of 137 nodes, which left 1e-8.

    Args:
        loc: mean before tanh, `[*batch, *event]`.
        scale: standard deviation before tanh, `[*batch, *event]`.

    Returns:
        `[*batch, *event]`. Differentiable.
    """
    loc, scale = torch.broadcast_tensors(loc, scale)
    work = loc.dtype if loc.dtype in (torch.float32, torch.float64) else torch.float32
    mu, sigma = loc.to(work), scale.to(work)
    weight, variance = _mixture(mu)
    parts = torch.erf(mu * (2.0 * (variance + sigma * sigma)).rsqrt())
    return (parts * weight).sum(0).to(loc.dtype)


def mean_slopes(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of `mean` by loc and scale.

    Args:
        loc: mean before tanh, `[*batch, *event]`.
        scale: standard deviation before tanh, of the same shape.

    Returns:
        `[*batch, *event]` both.
    """
    work = loc.dtype if loc.dtype in (torch.float32, torch.float64) else torch.float32
    mu, sigma = loc.to(work), scale.to(work)
    weight, variance = _mixture(mu)
    over = (2.0 * (variance + sigma * sigma)).rsqrt()
    u = mu * over
    density = torch.exp(-u * u) * over * weight * (2.0 / math.sqrt(math.pi))
    by_scale = -2.0 * mu * sigma * (density * over * over).sum(0)
    return density.sum(0).to(loc.dtype), by_scale.to(loc.dtype)
