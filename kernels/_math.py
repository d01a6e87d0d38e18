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
