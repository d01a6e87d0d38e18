"""TanhNormal in plain PyTorch: the CPU path, and the oracle of the tests.

y = mid + half * tanh(x) with x ~ Normal(loc, scale), summed over the event dimensions:

    log p(y) = sum(log N(x; loc, scale) - log(1 - tanh(x)^2) - log(half))
    log(1 - tanh(x)^2) = 2 * (log(2) - x - softplus(-2 x))

The score of a drawn value uses the x that was drawn: going back through atanh loses it once tanh
saturates (off by 16,312 at |loc| = 50, TorchRL's issue 4080).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastprob.reference._reduce import affine_sum, plain_tensors_only
from fastprob.reference.normal import HALF_LOG_2PI

# log(2 pi) / 2 of the Normal, and 2 log(2) of the Jacobian
_BIAS = -(HALF_LOG_2PI + 2 * math.log(2))


def limit(dtype: torch.dtype) -> float:
    """The largest |tanh| that is let through, so that its inverse stays finite."""
    return 1.0 - torch.finfo(dtype).resolution


def squash(x: Tensor, half: Tensor | float, mid: Tensor | float, safe: bool) -> Tensor:
    """`mid + half * tanh(x)`, with tanh kept off +-1 where `safe`.

    Args:
        x: `[*batch, *event]`.
        half: half the width of the interval, a number or broadcastable with `x`.
        mid: its middle, likewise.
        safe: whether |tanh| is limited to 1 minus the dtype's resolution.
    """
    y = torch.tanh(x)
    if safe:
        bound = limit(x.dtype)
        if y.requires_grad:
            # The clamp must not stop the gradient of a saturated value, only change the value.
            y = y + (y.detach().clamp(-bound, bound) - y.detach())
        else:
            y = y.clamp(-bound, bound)
    if not isinstance(half, float):
        return torch.addcmul(mid, y, half)  # type: ignore[arg-type]
    if half != 1.0:
        y = y * half
    return y + mid if mid != 0.0 else y


def unsquash(y: Tensor, half: Tensor | float, mid: Tensor | float, safe: bool) -> Tensor:
    """The x with `squash(x) == y`; values on or outside the bounds are taken just inside."""
    if not isinstance(half, float) or half != 1.0 or mid != 0.0:
        y = (y - mid) / half
    bound = limit(y.dtype) if safe else 1.0
    return torch.atanh(y.clamp(-bound, bound))


def score(
    scale: Tensor,  # [*batch, *event]
    noise: Tensor,  # [*sample, *batch, *event]
    x: Tensor,  # [*sample, *batch, *event], loc + noise * scale
    log_half: Tensor | float,
    ndims: int,
) -> Tensor:  # [*sample, *batch]
    """Log-density at `squash(x)`, from the value before tanh."""
    # -(z^2 / 2 + log(scale)) + 2 (x + softplus(-2 x)) = -(t - 2 u)
    u = softplus(x * -2.0)
    plain = plain_tensors_only()
    if not plain or u.requires_grad or scale.requires_grad:
        energy = torch.addcmul(torch.log(scale), noise, noise, value=0.5) - 2.0 * (u + x)
    else:
        u.add_(x)
        energy = torch.log(scale)
        if energy.shape == noise.shape:
            energy.addcmul_(noise, noise, value=0.5).sub_(u, alpha=2.0)
        else:
            energy = torch.addcmul(energy, noise, noise, value=0.5).sub_(u, alpha=2.0)
    if isinstance(log_half, float):
        return affine_sum(energy, ndims, _BIAS - log_half, -1, plain)
    return affine_sum(energy + log_half, ndims, _BIAS, -1, plain)


def log_jacobian(
    x: Tensor,  # [*sample, *batch, *event]
    log_half: Tensor | float,
    ndims: int,
) -> Tensor:  # [*sample, *batch]
    """`log |d squash / dx|`, summed over the event."""
    u = softplus(x * -2.0) + x
    if isinstance(log_half, float):
        return affine_sum(u, ndims, 2 * math.log(2) + log_half, -2)
    return affine_sum(u - 0.5 * log_half, ndims, 2 * math.log(2), -2)


def mode(loc: Tensor, scale: Tensor) -> Tensor:
    """The x at the highest density of tanh(x).

    The density of y = tanh(x) is stationary where x = loc + 2 scale^2 tanh(x). The highest of the
    roots lies on the side of `loc`, between |loc| and |loc| + 2 scale^2, and is the largest one in
    |x|, where the function is convex: Newton's method from the right end goes down to it without
    ever passing it. Where 2 scale^2 is close to 1 and loc close to 0 the three roots meet and it
    converges only linearly, by 2/3 a step; 64 steps reach 1e-8 there, and rounding elsewhere.

    Args:
        loc: mean before tanh, `[*batch, *event]`.
        scale: standard deviation before tanh, `[*batch, *event]`.

    Returns:
        `[*batch, *event]`; where loc is 0 and the two sides are equally high, the positive one.
        Differentiable once, by the implicit function theorem.
    """
    with torch.no_grad():
        m, w = loc.abs(), 2.0 * scale * scale
        x = m + w
        for _ in range(64):
            t = torch.tanh(x)
            slope = (1.0 - w * (1.0 - t * t)).clamp_min(torch.finfo(x.dtype).tiny)
            step = (x - m - w * t) / slope
            x = torch.maximum(x - step.clamp_min(0.0), m)
        x = torch.where(loc < 0, -x, x)
    if not (torch.is_grad_enabled() and (loc.requires_grad or scale.requires_grad)):
        return x
    # One step whose derivative is that of the root: its residual is 0 up to rounding.
    t = torch.tanh(x)
    slope = 1.0 - 2.0 * scale.detach() ** 2 * (1.0 - t * t)
    residual = x - loc - 2.0 * scale * scale * t
    return x - (residual - residual.detach()) / slope


def _grid(lo: float, hi: float, count: int, like: Tensor) -> tuple[Tensor, float]:
    step = (hi - lo) / (count - 1)
    nodes = torch.arange(count, dtype=torch.float64, device=like.device) * step + lo
    return nodes.to(like.dtype).view(-1, *([1] * like.ndim)), step


def mean(loc: Tensor, scale: Tensor) -> Tensor:
    """The mean of tanh(x).

    Two integrals by the trapezoid rule, whose error falls exponentially with the step for functions
    analytic in a strip around the real axis:

        scale <= 1:  integral of tanh(loc + scale z) phi(z) dz
        scale >= 1:  integral of erf((loc - x) / (scale sqrt(2))) sech(x)^2 / 2 dx

    The second comes from the first by parts. Either integrand's nearest singularity is pi/2 away or
    more in units in which the step is 1/2, which leaves an error below 1e-8.

    Args:
        loc: mean before tanh, `[*batch, *event]`.
        scale: standard deviation before tanh, `[*batch, *event]`.

    Returns:
        `[*batch, *event]`. Differentiable.
    """
    loc, scale = torch.broadcast_tensors(loc, scale)
    work = loc.dtype if loc.dtype in (torch.float32, torch.float64) else torch.float32
    mu, sigma = loc.to(work), scale.to(work)
    z, step = _grid(-8.0, 8.0, 41, mu)
    small = sigma.clamp_max(1.0)
    weight = torch.exp(-0.5 * z * z) * (step / math.sqrt(2 * math.pi))
    narrow = (torch.tanh(mu + small * z) * weight).sum(0)
    x, step = _grid(-19.0, 19.0, 96, mu)
    large = sigma.clamp_min(1.0)
    weight = torch.cosh(x).pow(-2) * (step / 2)
    wide = (torch.erf((mu - x) / (large * math.sqrt(2))) * weight).sum(0)
    return torch.where(sigma <= 1.0, narrow, wide).to(loc.dtype)
