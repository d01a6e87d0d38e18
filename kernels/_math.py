"""Primitives of the kernels: pure functions from values to values, in fp32.

`FAST` picks the body. With it the approximate instructions of NVIDIA's special function unit are
written out, one instruction each: `tl.log2` is a polynomial of 25 instructions, and `tl.cos` and
`tl.sin` carry a slow path with a table in local memory. Without it the plain functions of
`triton.language` serve, for AMD and for Triton's interpreter, which cannot run inline assembly.

Error of the approximate ones (PTX ISA 8.7, section 9.7.3): lg2 2^-22 absolute near 1 and 2 ulp
elsewhere, ex2 2 ulp, sin and cos 2^-20.5 absolute in [-pi, pi], sqrt and rcp 1 ulp.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
HALF_LOG_2PI = tl.constexpr(0.9189385332046727)


@triton.jit
def log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def exp2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def sqrt(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt(x)


@triton.jit
def sqrt_of_size(x, FAST: tl.constexpr):
    """`sqrt(|x|)`; within the assembly an absolute value is part of the root's operand."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 s; abs.f32 s, $1; sqrt.approx.ftz.f32 $0, s; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.sqrt(tl.abs(x))


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def divide(a, b, FAST: tl.constexpr):
    """A quotient right to half a unit in the last place: a product with `reciprocal` has 1.5.

    For gradients, which square it. Of finite numbers, b not 0.
    """
    if FAST:
        inverse = reciprocal(b, FAST)
        q = a * inverse
        return tl.fma(tl.fma(-q, b, a), inverse, q)
    else:
        return a / b


@triton.jit
def sin(x, FAST: tl.constexpr):
    """Sine of an angle in [-pi, pi]."""
    if FAST:
        return tl.inline_asm_elementwise(
            "sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sin(x)


@triton.jit
def cos(x, FAST: tl.constexpr):
    """Cosine of an angle in [-pi, pi]."""
    if FAST:
        return tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.cos(x)


@triton.jit
def log(x, FAST: tl.constexpr):
    return log2(x, FAST) * LN2


@triton.jit
def exp(x, FAST: tl.constexpr):
    return exp2(x * LOG2E, FAST)


@triton.jit
def with_sign(size, x):
    """`size`, 0 or above, with the sign of x: one instruction, where a comparison takes two."""
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def tanh_parts(x, FAST: tl.constexpr):
    """`t = exp(-2 |x|)` and `q = 1 / (1 + t)`.

    Of these, 1 - tanh(x)^2 = 4 t q^2 and |tanh(x)| = (1 - t) q; neither loses anything where tanh
    saturates.
    """
    t = exp2(tl.abs(x) * -2.8853900817779268, FAST)
    return t, reciprocal(t + 1.0, FAST)


@triton.jit
def abs_tanh(x, far):
    """`|tanh(x)|`, given what it is where |x| is 0.15 or more.

    Below by a polynomial, fitted to a relative error of 2.4e-8: from `tanh_parts` it is off by 6e-8
    in all, which is 0.6% of a tanh of 1e-5.
    """
    size = tl.abs(x)
    u = size * size
    near = size + size * (u * (-0.33332173 + u * 0.13166036))
    return tl.where(size < 0.15, near, far)


@triton.jit
def atanh(y, FAST: tl.constexpr):
    """The inverse of tanh, for |y| < 1.

    Below 0.4 by a polynomial, fitted to a relative error of 3.3e-8; beyond, the
    logarithms differ by 1.2 or more, and errors of 2^-22 are as small as the rounding.
    """
    u = y * y
    near = y + y * (u * (0.33332714 + u * (0.20036444 + u * (0.13627383 + u * 0.15631629))))
    far = (log2(1.0 + y, FAST) - log2(1.0 - y, FAST)) * 0.34657359027997264
    return tl.where(tl.abs(y) < 0.4, near, far)


@triton.jit
def log1p(x, FAST: tl.constexpr):
    """`log(1 + x)` for x > -1.

    Below 0.25 by the series of the inverse of tanh, cut where it is off by 2e-8: the logarithm of
    1 + x has an error of 2^-22 there, however small it is.
    """
    y = x * reciprocal(x + 2.0, FAST)
    u = y * y
    near = 2.0 * y + 2.0 * y * (u * (0.33333333 + u * (0.2 + u * (0.14285714 + u * 0.11111111))))
    return tl.where(tl.abs(x) < 0.25, near, log(1.0 + x, FAST))


@triton.jit
def expm1(x, FAST: tl.constexpr):
    """`exp(x) - 1`; below 0.4 by its Taylor series, cut where it is off by 4e-8."""
    series = 0.0083333333 + x * (0.0013888889 + x * 0.0001984127)
    series = 1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666667 + x * series)))
    return tl.where(tl.abs(x) < 0.4, x * series, exp(x, FAST) - 1.0)


@triton.jit
def normal_tail(x, FAST: tl.constexpr):
    """`exp(-x^2 / 2)` and the probability of a standard normal above x, for x of 0 and above.

    The quotient of the two by a polynomial in (x - 4) / (x + 4), fitted so that the probability is
    off by 2e-8, or by 1e-6 of itself where that is less. From 14 on both are 0 in fp32.
    """
    x = tl.minimum(x, 40.0)
    density = exp2(x * x * -0.7213475204444817, FAST)
    t = reciprocal(x + 4.0, FAST) * -8.0 + 1.0
    p = 0.030879874 + t * (-0.0085709449 + t * (0.00041208355 + t * 0.00074127602))
    p = 0.094410688 + t * (-0.17039873 + t * (0.1243783 + t * (-0.071690686 + t * p)))
    return density, density * p


@triton.jit
def normal_quantile(tail, FAST: tl.constexpr):
    """The point above which a standard normal has the probability `tail`, from 3e-10 to 1/2.

    With v = 1 - 2 tail it is v times a rational function of log2(1 - v^2), fitted to a relative
    error of 8.6e-8. Source: the form is that of Giles 2010, "Approximating the erfinv function".
    """
    if not FAST:
        # NumPy, which interprets it, warns of a logarithm of 0.
        tail = tl.maximum(tail, 1e-30)
    w = log2(tail * (4.0 - 4.0 * tail), FAST)
    p = -0.00388633595 + w * (0.000225430114 + w * -4.78998598e-06)
    p = 1.25331426 + w * (-0.310903453 + w * (0.0425831655 + w * p))
    q = -0.000730038785 + w * (3.93097935e-05 + w * -1.67483489e-07)
    q = 1.0 + w * (-0.0666010655 + w * (0.0156252627 + w * q))
    return (1.0 - 2.0 * tail) * (p * reciprocal(q, FAST))


@triton.jit
def hazard_excess(x, FAST: tl.constexpr):
    """The hazard of a standard normal, density over probability above, minus x; x above -0.4.

    By a polynomial in (x - 3) / (x + 3), fitted to a relative error of 9.1e-8, over x + 3. The
    hazard loses nothing when x is added, and the excess keeps what x would swallow.
    """
    y = reciprocal(x + 3.0, FAST)
    t = y * -6.0 + 1.0
    p = -0.00055965548 + t * (0.00079894077 + t * 0.00022027268)
    p = 0.017565107 + t * (-0.00071374374 + t * (-0.0049502854 + t * p))
    p = -0.025384080 + t * (-0.05436349 + t * (0.0075134165 + t * p))
    return y * (1.698592 + t * (-0.84153712 + t * (0.017158762 + t * (0.18565995 + t * p))))


@triton.jit
def hazard_slope(x, excess, FAST: tl.constexpr):
    """Minus the derivative of `hazard_excess`, the variance of a normal above x in its units.

    The square of the excess times a polynomial in (x - 4) / (x + 4), fitted to 2.8e-6.
    """
    t = reciprocal(x + 4.0, FAST) * -8.0 + 1.0
    p = 0.013818814 + t * (-0.0027251798 + t * -0.0026219396)
    p = -0.019407899 + t * (-0.03964219 + t * (0.011541592 + t * p))
    p = -0.0034743645 + t * (0.091153987 + t * p)
    return excess * excess * (0.91697651 + t * (0.22866917 + t * (-0.19428574 + t * p)))


# The functions of Gamma, each in two pieces that meet at 1: in w = 1 / z from there on, where they
# are what Stirling's series leaves, and in z below, at 1 + z, which splits off the poles at 0.
# Fitted by minimax (Lawson's algorithm) to values of 40 digits; the errors are absolute. Source of
# the series: Abramowitz and Stegun 1964, 6.1.40, 6.3.18 and 6.4.12; of the shift: 6.1.15 and 6.3.5.


@triton.jit
def stirling_rest(w):
    """What Stirling's formula leaves of log Gamma(z), for w = 1 / z in (0, 1], to 1.7e-8.

    `log Gamma(z) = (z - 1/2) log(z) - z + log(2 pi) / 2 + stirling_rest(1 / z)`
    """
    p = 0.000366448599 + w * (0.000412545225 + w * -0.000158714232)
    return w * (0.0833322480 + w * (2.11594162e-05 + w * (-0.00291223964 + w * p)))


@triton.jit
def log_gamma1p(z):
    """`log Gamma(1 + z)` for z in [0, 1], to 5e-9."""
    p = 0.129651383 + z * (-0.0690357387 + z * (0.0241050515 + z * -0.00396465557))
    p = -0.400246978 + z * (0.267293423 + z * (-0.193025321 + z * p))
    return z * (-0.577215016 + z * (0.822437823 + z * p))


@triton.jit
def digamma_gap(w):
    """`log(z) - psi(z)` for w = 1 / z in (0, 1], to 2.8e-8."""
    p = 0.00336855650 + w * (0.000286462455 + w * -0.000329488917)
    return w * (0.5 + w * (0.0833157375 + w * (0.000253167556 + w * (-0.00967879873 + w * p))))


@triton.jit
def digamma1p(z):
    """`psi(1 + z)` for z in [0, 1], to 3.2e-8."""
    p = -0.695160270 + z * (0.400533497 + z * (-0.146379903 + z * 0.0247281566))
    p = 1.07878292 + z * (-1.01111853 + z * (0.905492485 + z * p))
    return -0.577215612 + z * (1.64492702 + z * (-1.20180535 + z * p))


@triton.jit
def trigamma_excess(w):
    """`z psi'(z) - 1` for w = 1 / z in (0, 1], to 3.5e-8."""
    p = 0.0139514775 + w * (-0.0123922843 + w * 0.00319631770)
    p = 0.000542947265 + w * (-0.0367498919 + w * (0.00975036994 + w * p))
    return w * (0.5 + w * (0.166635171 + w * p))


@triton.jit
def trigamma1p(z):
    """`psi'(1 + z)` for z in [0, 1], to 4.7e-8."""
    p = 2.40405893 + z * (-0.835457623 + z * 0.133014947)
    p = 5.00407457 + z * (-5.60808086 + z * (5.48648548 + z * (-4.28797531 + z * p)))
    p = -2.40410137 + z * (3.24642849 + z * (-4.13844728 + z * p))
    return 1.64493406 + z * p


@triton.jit
def log1p_gap(u):
    """`(u - log(1 + u)) / u^2` for |u| up to 1/4, to 1.4e-8."""
    p = 0.166126877 + u * (-0.142005518 + u * (0.138480216 + u * -0.126672223))
    return 0.5 + u * (-0.333333224 + u * (0.250006825 + u * (-0.200017482 + u * p)))


@triton.jit
def log1p_beyond_cube(t):
    """`(log(1 + t) - t + t^2 / 2 - t^3 / 3) / t^4` for |t| up to 1/4, to 8.6e-7."""
    p = 0.142389446 + t * (-0.134979948 + t * 0.123396173)
    return -0.250000834 + t * (0.200004682 + t * (-0.166427881 + t * p))


@triton.jit
def cos_sin_of_turn(x):
    """Cosine and sine of pi x for x in [-1, 1], by polynomials, to 1e-8.

    For AMD, where the plain functions reduce angles of any size: half of a kernel of 14,000 lines.
    """
    quarter = tl.floor(2.0 * x + 0.5)
    f = x - 0.5 * quarter
    u = f * f
    s = f * (3.14159274 + u * (-5.16770792 + u * (2.54976749 + u * -0.589080095)))
    c = 1.0 + u * (-4.93480206 + u * (4.05870724 + u * (-1.33504462 + u * 0.231330082)))
    odd = quarter * quarter == 1.0
    near = tl.where(odd, s, c)
    far = tl.where(odd, c, s)
    # Of -2 to 2 quarters: cosines c, -s, -c; sines s, c, -s; odd ones by the side they lie on.
    flip = tl.where(tl.abs(quarter) == 2.0, -1.0, 1.0)
    return near * tl.where(odd, -quarter, flip), far * tl.where(odd, quarter, flip)
