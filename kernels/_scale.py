"""The positive scale of a network's raw output, as tensordict's NormalParamExtractor maps it.

    scale = max(softplus(raw + bias) + least, floor)        dscale / draw = sigmoid(raw + bias)
    scale = max(exp(raw), floor)                            dscale / draw = exp(raw)

with a slope of 0 where the floor is above. Computed in front of the draw, so that the raw output is
read once: 16 bytes an element in fp32, where a kernel of its own for it takes 8 more.

Source: the documentation of tensordict's NormalParamExtractor; torch.nn.functional.softplus.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastprob.kernels import _math as m

NONE, SOFTPLUS, EXP = range(3)


@triton.jit
def log1p_unit(t):
    """log(1 + t) for t in [0, 1], to a relative error of 1.9e-7.

    By a polynomial: 1 + t has lost a small t already, and the approximate logarithm is right to
    2^-22 in all near 1, which leaves no digit of a softplus of 1e-6.
    """
    p = t * 0.005232659168541431 - 0.029505105689167976
    p = p * t + 0.0782257467508316
    p = p * t - 0.1366322934627533
    p = p * t + 0.19106000661849976
    p = p * t - 0.2484298050403595
    p = p * t + 0.3331909775733948
    p = p * t - 0.4999949336051941
    p = p * t + 0.9999999403953552
    return p * t


@triton.jit
def exp_wide(x, FAST: tl.constexpr):
    """exp(x), right to 2 units in the last place for any size of x.

    By steps of log(2), taken off in two parts of which the first is exact (Cody and Waite 1980):
    x / log(2) alone is rounded by 5e-7 at x = 10, and the result with it.
    """
    n = tl.floor(x * m.LOG2E + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4
    return m.exp2(rest * m.LOG2E, FAST) * m.exp2(n, FAST)


@triton.jit
def positive(raw, bias, least, floor, MAP: tl.constexpr, FAST: tl.constexpr):
    """The scale of a raw value; MAP 1 for softplus, 2 for exp."""
    if MAP == 2:
        y = exp_wide(raw, FAST)
    else:
        x = raw + bias
        y = tl.maximum(x, 0.0) + log1p_unit(m.exp(-tl.abs(x), FAST)) + least
        # What the maximum would make a number of.
        y = tl.where(x == x, y, x)
    return tl.maximum(y, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def slope(raw, bias, least, floor, MAP: tl.constexpr, FAST: tl.constexpr):
    """The scale and its derivative by the raw value."""
    if MAP == 2:
        y = exp_wide(raw, FAST)
        rate = y
    else:
        x = raw + bias
        t = m.exp(-tl.abs(x), FAST)
        y = tl.where(x == x, tl.maximum(x, 0.0) + log1p_unit(t) + least, x)
        rate = tl.where(x >= 0.0, 1.0, t) * m.reciprocal(1.0 + t, FAST)
    rate = tl.where(y >= floor, rate, 0.0)
    return tl.maximum(y, floor, propagate_nan=tl.PropagateNan.ALL), rate
