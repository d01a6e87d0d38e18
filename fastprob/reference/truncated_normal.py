"""TruncatedNormal in plain PyTorch: the CPU path, and the oracle of the tests.

A Normal cut to [low, high]. With a = (low - loc) / scale, b = (high - loc) / scale, c the point of
[a, b] nearest to 0 (where the density is highest), and z = (x - loc) / scale:

    log p(x) = -(z - c)(z + c) / 2 - log(scale) - log(M)
    M = integral from a to b of exp(-(z - c)(z + c) / 2) dz

Everything is measured from c, not from 0: far out in a tail z^2 / 2 and log(M) + c^2 / 2 are both
5e5 at z = 1000 and their difference is what counts. For t = |c| and w = b - a, on one side of 0,

    M = m(t) (1 - r)
    m(t) = sqrt(pi / 2) erfcx(t / sqrt(2)),    r = exp(-w (t + w / 2)) m(t + w) / m(t)

is exact however far out; up to t = TAIL the difference of two erfc is as good and half the price.
All of it runs in float64: what is lost to cancellation there stays below float32's rounding.

Source: Robert 1995, https://arxiv.org/abs/0907.4010, for the tails; DLMF 7.9 for the fraction.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprob.reference._reduce import affine_sum, plain_tensors_only, sum_rightmost

# From here on a point's distance from the near bound is solved for, not the point itself. Below,
# ndtri leaves that distance with a relative error of 900 eps (2e-13) at most.
TAIL = 30.0
# Bounds beyond are as good as none, and infinite ones would give 0 * inf.
FAR = 1e100

_ROOT_HALF = math.sqrt(0.5)
_ROOT_TWO_OVER_PI = math.sqrt(2.0 / math.pi)
_LOG_ROOT_HALF_PI = 0.5 * math.log(math.pi / 2.0)
# Gauss-Legendre with 5 nodes on [0, 1]: nodes and weights.
_NODES = (
    (0.04691007703066800, 0.11846344252809454),
    (0.23076534494715845, 0.23931433524968324),
    (0.5, 0.28444444444444444),
    (0.76923465505284155, 0.23931433524968324),
    (0.95308992296933200, 0.11846344252809454),
)


class Standard(NamedTuple):
    """The parameters in units of the scale, float64 `[*batch, *event]`."""

    loc: Tensor
    scale: Tensor
    low: Tensor | float
    high: Tensor | float
    a: Tensor
    b: Tensor
    width: Tensor
    c: Tensor
    # Which elements lie in a tail; None where none does.
    tail: Tensor | None


def standardize(loc: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> Standard:
    """The parameters in units of the scale.

    Args:
        loc: `[*batch, *event]`.
        scale: `[*batch, *event]`.
        low: a number, or broadcastable with `loc`; finite.
        high: likewise.
    """
    loc, scale = loc.double(), scale.double()
    a, b = (low - loc) / scale, (high - loc) / scale
    # relu, unlike clamp, has the derivative 0 at 0, where c is that of the inside.
    c = torch.relu(a) - torch.relu(-b)
    tail: Tensor | None = c.abs() > TAIL
    if not _some(tail):
        tail = None
    return Standard(loc, scale, low, high, a, b, (high - low) / scale, c, tail)


def _some(where: Tensor) -> bool:
    """Whether a rare case is to be worked out: if there is one, or if that cannot be told.

    The rare formulas cost several times the common ones. A look at a CPU tensor takes 2 us and no
    synchronization; a compiler, vmap and a GPU run both.
    """
    return not (where.is_cpu and plain_tensors_only()) or bool(where.any())


class Central(NamedTuple):
    """What the common case needs, float64 `[*batch, *event]`."""

    loc: Tensor
    scale: Tensor
    mirrored: Tensor  # 1.0 where the interval leans to the right of 0, else 0.0
    below: Tensor  # twice the probability below the interval, mirrored to the left
    mass: Tensor  # twice that of the interval


def central(loc: Tensor, scale: Tensor, low: Any, high: Any) -> Central | None:
    """The common case, in place: no element in a tail, plain CPU tensors, no gradient.

    A third of the operations of `standardize` and `quantile`; None where it does not apply.
    """
    if not (loc.is_cpu and plain_tensors_only()):
        return None
    loc, scale = loc.double(), scale.double()
    minus_a, minus_b = loc.sub(low).div_(scale), loc.sub(high).div_(scale)
    a = minus_a.neg_()
    near = torch.maximum(a, minus_b)
    if near.numel() and float(near.max()) > TAIL:
        return None
    below = torch.minimum(a, minus_b).mul_(-_ROOT_HALF).erfc_()
    mass = near.mul_(_ROOT_HALF).erfc_().sub_(below)
    return Central(loc, scale, minus_b.lt_(a), below, mass)


def central_quantile(std: Central, low: Any, high: Any, p: Tensor) -> tuple[Tensor, Tensor]:
    """Value and z at probability p, away from 1 by 1e-6 or more; float64."""
    # p, or 1 - p where mirrored
    q = torch.sub(p, std.mirrored).abs_()
    z = torch.special.ndtri(torch.addcmul(std.below, q, std.mass).mul_(0.5))
    z = z.addcmul_(z, std.mirrored, value=-2.0)
    return torch.addcmul(std.loc, z, std.scale).clamp_(low, high), z


def central_score(std: Central, z: Tensor, ndims: int, dtype: torch.dtype) -> Tensor:
    """Log-density at z, `[*sample, *batch]`. Uses `std.mass` up."""
    cost = std.mass.mul_(std.scale).log_()
    if cost.shape == z.shape:
        cost.addcmul_(z, z, value=0.5)
    else:
        cost = torch.addcmul(cost, z, z, value=0.5)
    return affine_sum(cost, ndims, -_LOG_ROOT_HALF_PI, -1).to(dtype)


def inner_mean(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    low: Any,
    high: Any,
) -> tuple[Tensor, Tensor, Central] | None:
    """The mean in place where every loc lies between its bounds; None where that is not so.

    The formula of `moments` for the inside, in a third of the operations.

    Returns:
        mean and its z, float64 `[*batch, *event]`, and the parameters, of which `below` and
        `mirrored` are of no use.
    """
    if not (loc.is_cpu and plain_tensors_only()):
        return None
    x, sigma = loc.double(), scale.double()
    left, right = x.sub(low), x.neg().add_(high)
    if not loc.numel() or not (float(left.min()) >= 0.0 and float(right.min()) >= 0.0):
        return None
    left, right = left.div_(sigma), right.div_(sigma)
    # b - a, and b + a: how far the interval leans to the right.
    width, lean = left.add(right), right.sub(left)
    drop = width.mul_(lean).abs_().mul_(-0.5).expm1_()
    near = torch.minimum(left, right)
    mass = left.mul_(_ROOT_HALF).erf_().add_(right.mul_(_ROOT_HALF).erf_())
    density = near.mul_(near).mul_(-0.5).exp_().mul_(_ROOT_TWO_OVER_PI)
    z = drop.mul_(density).div_(mass).copysign_(lean)
    value = torch.addcmul(x, z, sigma).clamp_(low, high)
    return value, z, Central(x, sigma, lean, density, mass)


def _mills(t: Tensor) -> Tensor:
    """`1 / m(t)`, the hazard of the Normal."""
    return _ROOT_TWO_OVER_PI / torch.special.erfcx(t * _ROOT_HALF)


def _excess(t: Tensor, hazard: Tensor) -> Tensor:
    """`1 / m(t) - t`: the difference up to TAIL, at a cost of 900 eps; beyond, its fraction."""
    far = t >= TAIL
    if not _some(far):
        return hazard - t
    safe = torch.where(far, t, TAIL)
    # 7 levels of 1 / (t + 2 / (t + 3 / (t + ...))) reach rounding at t = 30.
    fraction = safe
    for level in range(7, 1, -1):
        fraction = safe + level / fraction
    return torch.where(far, 1.0 / fraction, hazard - t)


class _Side(NamedTuple):
    """An interval on one side of 0, from its near bound."""

    t: Tensor
    w: Tensor
    ratio: Tensor  # r
    near: Tensor  # 1 / m(t)
    far: Tensor  # 1 / m(t + w)
    ends: Tensor  # t and t + w
    hazards: Tensor  # near and far


def _side(std: Standard, where: Tensor) -> _Side:
    # Elements that are not there get an interval on which all formulas are finite.
    t, w = torch.where(where, std.c.abs(), 1.0), torch.where(where, std.width, 1.0)
    # Both ends at once: half the operations, for who makes a graph of them.
    ends = torch.stack((t, (t + w).clamp_max(1e150)))
    hazards = _mills(ends)
    near, far = hazards.unbind(0)
    return _Side(t, w, torch.exp(-w * (t + 0.5 * w)) * near / far, near, far, ends, hazards)


def _mass(std: Standard) -> tuple[Tensor, Tensor]:
    """Twice the Normal's probabilities, of the interval and of what lies outside of it.

    The interval is mirrored to the left of 0, where erfc is exact; the second result is twice the
    probability below it.
    """
    # (a, b) itself if a + b <= 0, else (-b, -a)
    left = torch.minimum(std.a, -std.b)
    right = torch.minimum(std.b, -std.a)
    below = torch.erfc(left * -_ROOT_HALF)
    return torch.erfc(right * -_ROOT_HALF) - below, below


def log_mass(std: Standard, mass: Tensor | None = None, side: _Side | None = None) -> Tensor:
    """`log(M)`, `[*batch, *event]`.

    Args:
        std: the parameters.
        mass: the first result of `_mass`, where it is known.
        side: the elements in a tail, where they are known.
    """
    if mass is None:
        mass, _ = _mass(std)
    tail = std.tail
    if tail is None:
        return torch.log(mass) + (0.5 * std.c * std.c + _LOG_ROOT_HALF_PI)
    if side is None:
        side = _side(std, tail)
    c = torch.where(tail, 0.0, std.c)
    central = torch.log(torch.where(tail, 1.0, mass)) + (0.5 * c * c + _LOG_ROOT_HALF_PI)
    return torch.where(tail, torch.log1p(-side.ratio) - torch.log(side.near), central)


def energy(std: Standard, value: Tensor) -> Tensor:
    """`(z - c)(z + c) / 2`, `[*sample, *batch, *event]`."""
    u = (value.double() - mode(std)) / std.scale
    return 0.5 * u * (u + 2.0 * std.c)


def bounds(std: Standard) -> tuple[Tensor, Tensor]:
    """The bounds as float64 tensors."""
    loc = std.loc
    return torch.as_tensor(std.low, dtype=loc.dtype, device=loc.device), torch.as_tensor(
        std.high, dtype=loc.dtype, device=loc.device
    )


def mode(std: Standard) -> Tensor:
    """Where the density is highest, float64 `[*batch, *event]`."""
    return torch.clamp(std.loc, *bounds(std))


class _Quantile(NamedTuple):
    """A value and what its score is made of, float64."""

    value: Tensor  # [*sample, *batch, *event]
    z: Tensor  # of elements that are in no tail, likewise
    mass: Tensor  # the first result of `_mass`
    side: _Side | None  # elements in a tail
    distance: Tensor | None  # theirs from the near bound


def _quantile(std: Standard, p: Tensor) -> _Quantile:
    mass, below = _mass(std)
    mirrored = std.a + std.b > 0
    q = torch.where(mirrored, 1.0 - p, p)
    # In the mirrored interval, from whichever end is nearer: exact for p close to 0 and to 1.
    lower = 0.5 * torch.addcmul(below, q, mass)
    above = torch.erfc(torch.minimum(std.b, -std.a) * _ROOT_HALF)
    upper = 0.5 * torch.addcmul(above, 1.0 - q, mass)
    z = torch.special.ndtri(torch.minimum(lower, upper))
    z = torch.where((lower > upper) ^ mirrored, -z, z)
    value = torch.addcmul(std.loc, z, std.scale)
    tail = std.tail
    if tail is None:
        return _Quantile(torch.clamp(value, *bounds(std)), z, mass, None, None)
    side = _side(std, tail)
    right = std.c > 0
    u = _distance(side, torch.where(right, p, 1.0 - p))
    step = std.scale * u
    far_value = torch.where(right, std.low + step, std.high - step)
    value = torch.clamp(torch.where(tail, far_value, value), *bounds(std))
    return _Quantile(value, z, mass, side, u)


def quantile(std: Standard, p: Tensor) -> Tensor:
    """The value below which the probability is `p`.

    Args:
        std: the parameters.
        p: `[*sample, *batch, *event]`, float64, between 0 and 1.

    Returns:
        `[*sample, *batch, *event]`.
    """
    return _quantile(std, p).value


def scored_quantile(std: Standard, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantile` gives, its energy of the same shape, and `log(M)` `[*batch, *event]`."""
    found = _quantile(std, p)
    z, c, side, u = found.z, std.c, found.side, found.distance
    cost = 0.5 * (z - c) * (z + c)
    if side is not None and std.tail is not None and u is not None:
        cost = torch.where(std.tail, u * (side.t + 0.5 * u), cost)
    return found.value, cost, log_mass(std, found.mass, side)


def _distance(side: _Side, p: Tensor) -> Tensor:
    """How far from the near bound the probability reaches p.

    Solves log m(t + u) - log m(t) - u (t + u / 2) = log(1 - p (1 - r)) by Halley's method from the
    solution without the two m; from t = TAIL on, one step ends at rounding.
    """
    t, near = side.t, side.near
    goal = torch.log1p(-p * (1.0 - side.ratio))
    u = -2.0 * goal / (near + torch.sqrt(near * near - 2.0 * goal))
    hazard = _mills(t + u)
    step = (torch.log(near / hazard) - u * (t + 0.5 * u) - goal) / hazard
    u = u + step / (1.0 + 0.5 * step * (hazard - (t + u)))
    return torch.minimum(u.clamp_min(0.0), side.w)


class Moments(NamedTuple):
    """What the gradients, the mean and the entropy are made of, float64 `[*batch, *event]`."""

    first: Tensor  # E[z - c]
    second: Tensor  # E[(z - c)(z + c)]
    at_low: Tensor  # density of z at a
    at_high: Tensor  # density of z at b


def moments(std: Standard) -> Moments:
    """The moments from c, and the densities at the bounds.

    With c = 0 inside, from the densities e = exp(-z^2 / 2) / M at the bounds:

        E[z] = e_a - e_b                         E[z^2] = 1 + a e_a - b e_b

    and on one side, with h = 1 / m and k = h - t, which keeps the small terms that are left:

        E[u] = (k(t) - r (w + k(t+w))) / (1 - r)
        E[u (u + 2 t)] = 1 + t k(t) + r (t h(t) - (t + w) h(t+w)) / (1 - r)
    """
    outside = std.c != 0
    # Inside, each density from the nearer bound by expm1: symmetric bounds give a mean of 0.
    a, b = torch.where(outside, -1.0, std.a), torch.where(outside, 1.0, std.b)
    mass = (torch.erf(b * _ROOT_HALF) - torch.erf(a * _ROOT_HALF)) / _ROOT_TWO_OVER_PI
    e_a, e_b = torch.exp(-0.5 * a * a) / mass, torch.exp(-0.5 * b * b) / mass
    lean = a + b
    # Not abs, whose derivative at 0 is 0.
    size = torch.where(lean >= 0, lean, -lean)
    drop = torch.expm1(torch.where(outside, 2.0, std.width) * size * -0.5)
    inside = Moments(
        torch.where(lean >= 0, -drop * e_a, drop * e_b),
        1.0 + a * e_a - b * e_b,
        e_a,
        e_b,
    )
    if not _some(outside):
        return inside
    side = _side(std, outside)
    t, w, r = side.t, side.w, side.ratio
    rest = 1.0 - r
    k, k_far = _excess(side.ends, side.hazards).unbind(0)
    u = (k - r * (w + k_far)) / rest
    narrow = w * (t + w) < 0.1
    if _some(narrow):
        u = torch.where(narrow, _narrow_mean(t, torch.where(narrow, w, 0.0)), u)
    square = 1.0 + t * k + r * (t * side.near - (t + w) * side.far) / rest
    e_near, e_far = side.near / rest, r * side.far / rest
    right = std.c > 0
    return Moments(
        torch.where(outside, torch.where(right, u, -u), inside.first),
        torch.where(outside, square, inside.second),
        torch.where(outside, torch.where(right, e_near, e_far), e_a),
        torch.where(outside, torch.where(right, e_far, e_near), e_b),
    )


def _narrow_mean(t: Tensor, w: Tensor) -> Tensor:
    """E[u] where the density is nearly flat: the closed form loses eps / w^2 there.

    Gauss-Legendre: 5 nodes leave 4e-14 of it for w (t + w) < 0.1, where 4 leave 5e-11.
    """
    slope, bend = w * t, 0.5 * w * w
    mass, weighted = torch.zeros_like(t), torch.zeros_like(t)
    for node, weight in _NODES:
        density = torch.exp(slope * -node - bend * (node * node))
        mass = mass + density * weight
        weighted = weighted + density * (weight * node)
    return w * weighted / mass


def total(cost: Tensor, ndims: int, dtype: torch.dtype) -> Tensor:
    """Minus the sum over the event, `[*sample, *batch]`."""
    return affine_sum(cost, ndims, 0.0, -1).to(dtype)


def log_prob(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    low: Tensor | float,
    high: Tensor | float,
    value: Tensor,  # [*sample, *batch, *event]
    ndims: int,
) -> Tensor:  # [*sample, *batch]
    """Log-density of `value`, `-inf` outside of the bounds."""
    dtype = torch.promote_types(loc.dtype, value.dtype)
    common = None if torch.is_grad_enabled() else central(loc, scale, low, high)
    if common is None:
        std = standardize(loc, scale, low, high)
        cost = energy(std, value) + (torch.log(std.scale) + log_mass(std))
        result = total(cost, ndims, dtype)
    else:
        z = (value - common.loc).div_(common.scale)
        result = central_score(common, z, ndims, dtype)
    return torch.where(outside(value, low, high, ndims), -math.inf, result)


def outside(value: Tensor, low: Tensor | float, high: Tensor | float, ndims: int) -> Tensor:
    """Whether an element of the event lies outside of the bounds, `[*sample, *batch]`."""
    off = (value < low) | (value > high)
    return off.flatten(-ndims).any(-1) if ndims else off


def mean(std: Standard) -> Tensor:
    """The mean, float64 `[*batch, *event]`."""
    return torch.clamp(torch.addcmul(mode(std), moments(std).first, std.scale), *bounds(std))


def variance(std: Standard) -> Tensor:
    """The variance, float64 `[*batch, *event]`."""
    m = moments(std)
    # E[z^2] - E[z]^2, from c
    spread = m.second - m.first * (m.first + 2.0 * std.c)
    return spread.clamp_min(0.0) * std.scale * std.scale


def entropy(std: Standard, ndims: int) -> Tensor:
    """Differential entropy in nats, float64 `[*batch]`."""
    return sum_rightmost(
        torch.log(std.scale) + log_mass(std) + 0.5 * moments(std).second,
        ndims,
    )


def cdf(std: Standard, value: Tensor) -> Tensor:
    """Probability of what lies below `value`, float64 `[*sample, *batch, *event]`."""
    low, high = bounds(std)
    inner = torch.clamp(value.double(), low, high)
    # The part up to the value, over the whole: both from the energy of their own mode.
    part = standardize(std.loc, std.scale, std.low, inner)
    gap = 0.5 * (part.c - std.c) * (part.c + std.c)
    share = torch.exp(log_mass(part) - log_mass(std) - gap)
    share = torch.where(inner <= low, 0.0, share)
    return torch.where(inner >= high, 1.0, share).clamp(0.0, 1.0)
