"""The mode and the mean of tanh(x) for x ~ Normal(loc, scale), found in registers.

The density of tanh(x) is highest at a root of f(x) = x - loc - 2 scale^2 tanh(x): of several the
one farthest out on the side of loc, right of which f is convex. Halley's method goes there from a
point to the right of it. With w = 2 scale^2 and tanh(x) <= x - 0.238 x^3 up to 1, that is

    b = cbrt(8.5 |loc|) + sqrt(4.2 max(w - 1, 0)), where it is below 1, or |loc| + w

which is of the size of the root also where three roots meet, at w = 1 and loc = 0. From there three
steps reach what fp32 can tell; from |loc| + w Newton's method takes 64.

The mean is that of a mixture. The logistic density sech(x)^2 / 2 is a scale mixture of normals; one
of eight agrees with it so well that

    tanh(x) = sum of c_i erf(x / (sqrt(2) t_i))

to 1.5e-8, its first derivative to 4.4e-8 and its second to 1.5e-7 (least squares of all three). A
Normal x only widens each of them, t_i^2 becomes t_i^2 + scale^2, for any scale.

Source: Stefanski 1991, "A normal scale mixture representation of the logistic distribution".
"""

import triton
import triton.language as tl

from fastprob.kernels import _math as m

ROOT, ROOT_REST = tl.constexpr(0.7071067690849304), tl.constexpr(1.21016172e-08)
# Weights of the mixture and 2 t_i^2, as a Normal before tanh sees them.
W0, T0 = tl.constexpr(0.00167932068), tl.constexpr(0.248239015)
W1, T1 = tl.constexpr(0.033077743), tl.constexpr(0.404467041)
W2, T2 = tl.constexpr(0.152861546), tl.constexpr(0.647831871)
W3, T3 = tl.constexpr(0.296300736), tl.constexpr(1.04607765)
W4, T4 = tl.constexpr(0.302827954), tl.constexpr(1.71541351)
W5, T5 = tl.constexpr(0.168841881), tl.constexpr(2.85162341)
W6, T6 = tl.constexpr(0.0418857583), tl.constexpr(4.78511822)
W7, T7 = tl.constexpr(0.00252501517), tl.constexpr(8.2291075)


@triton.jit
def _over_sqrt(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / tl.sqrt(x)


@triton.jit
def mode(mu, sigma, FAST: tl.constexpr):
    """The mode, before and after tanh.

    Returns:
        |x| and |tanh(x)|, both to their last digits however small, and 1 - 2 sigma^2, likewise.
    """
    # Where tanh is 1 there is nothing to find, and an infinite loc would be subtracted from itself.
    size = tl.minimum(tl.abs(mu), 20.0, propagate_nan=tl.PropagateNan.ALL)
    w = 2.0 * sigma * sigma
    # 1 - w, by the square root of 1/2 in two parts: where the three roots meet, the rounding of w
    # alone would move x by 1e-5.
    rest = 2.0 * ((ROOT - sigma) + ROOT_REST) * (ROOT + sigma)
    cubic = m.exp2(m.log2(tl.maximum(size * 8.5, 1e-30), FAST) * 0.3333333333, FAST)
    cubic += m.sqrt(tl.maximum(rest * -4.2017, 0.0), FAST)
    x = tl.where(cubic < 1.0, tl.minimum(cubic, size + w), size + w)
    y = x
    for _ in tl.static_range(3):
        # x - tanh(x), below 0.6 by a polynomial, fitted to a relative error of 9.0e-8.
        short = tl.minimum(x, 0.6)
        u = short * short
        p = -0.0211110397 + u * 0.00626922312
        p = 0.333333303 + u * (-0.133329155 + u * (0.0538739681 + u * p))
        gap = short * (u * p)
        t, q = m.tanh_parts(x, FAST)
        near = x < 0.6
        y = tl.where(near, short - gap, (1.0 - t) * q)
        f = tl.where(near, (rest * short - size) + w * gap, (x - size) - w * y)
        bend = w * y
        slope = rest + bend * y
        bend = bend * (1.0 - y * y)
        step = f * slope
        step = step * m.reciprocal(tl.maximum(slope * slope - f * bend, 1e-30), FAST)
        step = tl.minimum(step, x - size, propagate_nan=tl.PropagateNan.ALL)
        x -= step
        # tanh of the new x; the next term of the series is below 1e-10 at the last step.
        y -= step * (1.0 - y * y) * (1.0 + y * step)
    return x + (tl.abs(mu) - size), y, rest


@triton.jit
def _beyond(x, FAST: tl.constexpr):
    """1 - erf(x) for x of 0 and above, by a polynomial for its logarithm.

    Fitted to an error of 1.1e-8, or to 2e-6 of itself where that is less; from 4 on it is below
    what 1 can tell from itself. 1 at 0.
    """
    x = tl.minimum(x, 4.0, propagate_nan=tl.PropagateNan.ALL)
    p = -1.66303914e-4 + x * (1.82445475e-5 + x * -8.58858515e-7)
    p = -1.34429924e-4 + x * (-2.14464469e-3 + x * (8.26907065e-4 + x * p))
    p = -0.91843023 + x * (-0.148378718 + x * (0.027901258 + x * p))
    return m.exp2(x * (-1.62790799 + x * p), FAST)


@triton.jit
def _part(size, w, width: tl.constexpr, FAST: tl.constexpr):
    """How far the mean of one Normal lies from 1; `width` is 2 t^2."""
    return _beyond(size * _over_sqrt(w + width, FAST), FAST)


@triton.jit
def mean(mu, sigma, FAST: tl.constexpr):
    """The mean of tanh(x), to 1e-7 in all.

    Returns:
        its size, and what that lacks of 1, to 2e-6 of itself or 2e-8.
    """
    size = tl.abs(mu)
    w = 2.0 * sigma * sigma
    rest = _part(size, w, T0, FAST) * W0 + _part(size, w, T7, FAST) * W7
    rest += _part(size, w, T1, FAST) * W1
    rest += _part(size, w, T6, FAST) * W6
    rest += _part(size, w, T2, FAST) * W2
    rest += _part(size, w, T5, FAST) * W5
    rest += _part(size, w, T3, FAST) * W3
    rest += _part(size, w, T4, FAST) * W4
    return 1.0 - rest, rest


@triton.jit
def _parts(size, w, width: tl.constexpr, FAST: tl.constexpr):
    """The same, and its derivatives by size and w but for factors that all have in common."""
    over = _over_sqrt(w + width, FAST)
    x = size * over
    density = m.exp2(x * x * -1.4426950408889634, FAST) * over
    return _beyond(x, FAST), density, density * over * over


@triton.jit
def mean_slopes(mu, sigma, FAST: tl.constexpr):
    """What `mean` gives, and the derivatives of that size by the size of mu and by sigma."""
    # A size at which no product with 0 is a NaN.
    size = tl.minimum(tl.abs(mu), 1e6, propagate_nan=tl.PropagateNan.ALL)
    w = 2.0 * sigma * sigma
    rest, slope, bend = _parts(size, w, T0, FAST)
    rest, slope, bend = rest * W0, slope * W0, bend * W0
    r, s, b = _parts(size, w, T7, FAST)
    rest, slope, bend = rest + r * W7, slope + s * W7, bend + b * W7
    r, s, b = _parts(size, w, T1, FAST)
    rest, slope, bend = rest + r * W1, slope + s * W1, bend + b * W1
    r, s, b = _parts(size, w, T6, FAST)
    rest, slope, bend = rest + r * W6, slope + s * W6, bend + b * W6
    r, s, b = _parts(size, w, T2, FAST)
    rest, slope, bend = rest + r * W2, slope + s * W2, bend + b * W2
    r, s, b = _parts(size, w, T5, FAST)
    rest, slope, bend = rest + r * W5, slope + s * W5, bend + b * W5
    r, s, b = _parts(size, w, T3, FAST)
    rest, slope, bend = rest + r * W3, slope + s * W3, bend + b * W3
    r, s, b = _parts(size, w, T4, FAST)
    rest, slope, bend = rest + r * W4, slope + s * W4, bend + b * W4
    # 2 / sqrt(pi), and that times dw / dsigma = 4 sigma and the -1/2 of an inverse root.
    by_sigma = bend * (size * sigma * -2.256758334191025)
    return 1.0 - rest, rest, slope * 1.1283791670955126, by_sigma


@triton.jit
def before(y, rest, FAST: tl.constexpr):
    """The inverse of tanh for y of 0 and above and what it lacks of 1; see `_math.atanh`."""
    far = (m.log2(2.0 - rest, FAST) - m.log2(rest, FAST)) * 0.34657359027997264
    return tl.where(y < 0.4, m.atanh(tl.minimum(y, 0.4), FAST), far)
