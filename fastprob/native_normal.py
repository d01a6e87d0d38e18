"""Score, entropy and gradients of a Normal on a CPU, in C++: for large batches of compiled code.

Inductor sums an event of 8 elements row by row, in a vector of which half is masked off, and
reduces that vector to a number twice a row; its backward pass has the same rows. Here a piece of
many rows is halved by adding neighbours, which keeps all vectors full, and one logarithm serves the
product of up to eight scales. At 4096 x 8 in fp32, on one thread: score and entropy 11 us, the
gradients of both 12 us; Inductor's two kernels for them take 80 to 90.

The source is plain C++ without intrinsics, for the compiler's own vectorization. It is built by
what builds Inductor's CPU kernels, and checked against float64 before it is used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["available"]

# Elements from which graphs call it. Inductor's code takes 0.97 of its time for both passes at
# 4,096 elements, 1.05 at 8,192, 1.14, 1.28 and 1.5 at 16,384, 32,768 and 65,536; for a forward pass
# alone 0.9 at 4,096, and 0.98 to 1.01 from 8,192 on.
LEAST = 8192
# Widest event: a piece holds 1024 elements, so that wider ones leave too few rows.
WIDEST = 64

_SOURCE = r"""
// Inductor switches the compiler's vectorization off; here it does all the work.
#pragma GCC optimize("tree-loop-vectorize", "fp-contract=fast")
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int PIECE = 1024;  // elements: 4 KiB a buffer, several of which the first cache holds
constexpr float LOG_2 = 0.6931471805599453f, HALF_LOG_2PI = 0.9189385332046727f;

struct Buffer {
  alignas(64) float data[PIECE];
};

struct Sum {
  static float of(float a, float b) { return a + b; }
};

struct Product {
  static float of(float a, float b) { return a * b; }
};

template <typename F>
void pairs(const float* __restrict x, float* __restrict out, int n) {
  for (int i = 0; i < n; ++i) out[i] = F::of(x[2 * i], x[2 * i + 1]);
}

// Neighbours together until a row has `least` elements or an odd number; says where they are.
template <typename F>
float* halve(float* x, float* other, int rows, int& width, int least) {
  while (width % 2 == 0 && width > least) {
    width /= 2;
    pairs<F>(x, other, rows * width);
    float* const swapped = x;
    x = other;
    other = swapped;
  }
  return x;
}

template <typename F>
void columns(const float* __restrict x, float* __restrict out, int rows, int width) {
  if (width == 1) {
    std::memcpy(out, x, rows * sizeof(float));
    return;
  }
  for (int r = 0; r < rows; ++r) out[r] = x[r * width];
  for (int k = 1; k < width; ++k)
    for (int r = 0; r < rows; ++r) out[r] = F::of(out[r], x[r * width + k]);
}

// Of normal positive numbers 2^e m, m from 1 / sqrt 2 to sqrt 2: log m = 2 artanh s with
// s = (m - 1) / (m + 1), whose series ends at s^9: the next term is below 2^-28 of the first.
void logarithms(float* x, int n) {
  for (int i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    const int32_t e = (bits - 0x3f3504f3) >> 23;
    bits -= e << 23;
    float m;
    std::memcpy(&m, &bits, 4);
    const float s = (m - 1.0f) / (m + 1.0f), t = s * s;
    const float rest = t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9))));
    x[i] = static_cast<float>(e) * LOG_2 + (2.0f * s * rest + 2.0f * s);
  }
}

// The sum of the logarithms of each row.
void log_scales(const float* scale, float* out, float* a, float* b, int rows, int width) {
  const int n = rows * width;
  uint32_t far = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, scale + i, 4);
    far |= bits - 0x38000000u > 0x0f000000u;  // not from 2^-15 to 2^15
  }
  if (far) {
    for (int r = 0; r < rows; ++r) {
      float sum = 0.0f;
      for (int k = 0; k < width; ++k) sum += std::log(scale[r * width + k]);
      out[r] = sum;
    }
    return;
  }
  // The product of eight of them stays within 2^-120 and 2^120.
  int left = width;
  float* x = a;
  if (width % 2) {
    std::memcpy(a, scale, n * sizeof(float));
  } else {
    left /= 2;
    pairs<Product>(scale, a, rows * left);
    x = halve<Product>(a, b, rows, left, (width + 7) / 8);
  }
  if (width <= 8) {
    columns<Product>(x, out, rows, left);
    logarithms(out, rows);
    return;
  }
  logarithms(x, rows * left);
  x = halve<Sum>(x, x == a ? b : a, rows, left, 1);
  columns<Sum>(x, out, rows, left);
}

void forward(const float* __restrict loc, const float* __restrict scale,
             const float* __restrict value, float* __restrict score, float* __restrict entropy,
             int64_t all, int width) {
  Buffer a, b, sums, logs;
  const int step = PIECE / width;
  const float offset = HALF_LOG_2PI * width, further = offset + 0.5f * width;
  for (int64_t start = 0; start < all; start += step) {
    const int rows = static_cast<int>(all - start < step ? all - start : step);
    const int n = rows * width;
    const int64_t at = start * width;
    log_scales(scale + at, logs.data, a.data, b.data, rows, width);
    for (int i = 0; i < n; ++i) {
      const float z = (value[at + i] - loc[at + i]) / scale[at + i];
      a.data[i] = 0.5f * z * z;
    }
    int left = width;
    const float* x = halve<Sum>(a.data, b.data, rows, left, 1);
    columns<Sum>(x, sums.data, rows, left);
    for (int r = 0; r < rows; ++r) {
      score[start + r] = -(sums.data[r] + logs.data[r]) - offset;
      entropy[start + r] = logs.data[r] + further;
    }
  }
}

void twice(const float* __restrict x, float* __restrict out, int n) {
  for (int i = 0; i < n; ++i) {
    out[2 * i] = x[i];
    out[2 * i + 1] = x[i];
  }
}

template <int K>
void repeat(const float* __restrict x, float* __restrict out, int rows) {
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < K; ++k) out[K * r + k] = x[r];
}

// Each number `width` times; says where.
const float* spread(const float* x, float* a, float* b, int rows, int width) {
  int odd = width;
  while (odd % 2 == 0) odd /= 2;
  switch (odd) {
    case 1: std::memcpy(a, x, rows * sizeof(float)); break;
    case 3: repeat<3>(x, a, rows); break;
    case 5: repeat<5>(x, a, rows); break;
    case 7: repeat<7>(x, a, rows); break;
    default:
      for (int r = 0; r < rows; ++r)
        for (int k = 0; k < odd; ++k) a[odd * r + k] = x[r];
  }
  for (; odd < width; odd *= 2) {
    twice(a, b, rows * odd);
    float* const swapped = a;
    a = b;
    b = swapped;
  }
  return a;
}

// With rate = 1 / scale and z = (value - loc) rate: loc g z rate, scale (g (z^2 - 1) + e) rate.
template <bool SCORE, bool ENTROPY>
void backward(const float* of_score, const float* of_entropy, const float* __restrict loc,
              const float* __restrict scale, const float* __restrict value,
              float* __restrict by_loc, float* __restrict by_scale, int64_t all, int width) {
  Buffer a, b, c, d;
  const int step = PIECE / width;
  for (int64_t start = 0; start < all; start += step) {
    const int rows = static_cast<int>(all - start < step ? all - start : step);
    const int n = rows * width;
    const int64_t at = start * width;
    const float* __restrict g = nullptr;
    const float* __restrict e = nullptr;
    if (SCORE) g = spread(of_score + start, a.data, b.data, rows, width);
    if (ENTROPY) e = spread(of_entropy + start, c.data, d.data, rows, width);
    for (int i = 0; i < n; ++i) {
      const float rate = 1.0f / scale[at + i];
      float loc_part = 0.0f, scale_part = 0.0f;
      if (SCORE) {
        const float z = (value[at + i] - loc[at + i]) * rate, gz = g[i] * z;
        loc_part = gz * rate;
        scale_part = gz * z - g[i];
      }
      if (ENTROPY) scale_part += e[i];
      by_loc[at + i] = loc_part;
      by_scale[at + i] = scale_part * rate;
    }
  }
}

}  // namespace

// `what` is 0 for score and entropy, one behind the other in `out`; else 1 with a gradient of the
// score, 2 with one of the entropy, 3 with both, for the gradients by loc and by scale.
extern "C" void kernel(const float* of_score, const float* of_entropy, const float* loc,
                       const float* scale, const float* value, float* out, int64_t rows,
                       int64_t width, int64_t what) {
  const int w = static_cast<int>(width);
  float *const first = out, *const second = out + (what == 0 ? rows : rows * width);
  if (what == 0) forward(loc, scale, value, first, second, rows, w);
  if (what == 1)
    backward<true, false>(of_score, of_entropy, loc, scale, value, first, second, rows, w);
  if (what == 2)
    backward<false, true>(of_score, of_entropy, loc, scale, value, first, second, rows, w);
  if (what == 3)
    backward<true, true>(of_score, of_entropy, loc, scale, value, first, second, rows, w);
}
"""

_TYPES = ["const float*"] * 5 + ["float*"] + ["int64_t"] * 3


def _first(*args: Any) -> None:
    """Stands for the kernel in code that another process compiled, until it is built here."""
    global kernel
    built = _build()
    kernel = by_formula if isinstance(built, str) else built
    kernel(*args)


# What fills score and entropy, or the gradients, of contiguous float32 tensors; see `kernel` in
# the source for its arguments.
kernel: Callable[..., Any] = _first


def available() -> bool:
    """Whether the kernel could be built; builds it."""
    global kernel
    built = _build()
    if isinstance(built, str):
        return False
    kernel = built
    return True


@functools.cache
def _build() -> Any:
    """The kernel, or why there is none."""
    try:
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        made = CppPythonBindingsCodeCache.load_pybinding(_TYPES, _SOURCE)
    except Exception as err:  # whatever a missing compiler or another Inductor makes of it
        return f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"
    return made if _right(made) else "what it computes is not right"


def by_formula(
    of_score: Tensor,  # [rows]
    of_entropy: Tensor,  # [rows]
    loc: Tensor,  # contiguous, rows * width elements
    scale: Tensor,  # likewise
    value: Tensor,  # likewise
    out: Tensor,  # [2, ...], each of rows elements where what is 0, else of rows * width
    rows: int,
    width: int,
    what: int,
) -> None:
    """What the kernel computes, in PyTorch, in the dtype of its arguments."""
    with torch.no_grad():
        loc, scale, value = (x.reshape(rows, width) for x in (loc, scale, value))
        z = (value - loc) / scale
        if what == 0:
            logs = scale.log().sum(-1)
            offset = 0.5 * width * math.log(2 * math.pi)
            score, entropy = -0.5 * (z * z).sum(-1) - logs - offset, logs + offset + 0.5 * width
            made = score, entropy
        else:
            made = torch.zeros_like(scale), torch.zeros_like(scale)
            if what & 1:
                rate = of_score.reshape(rows, 1) / scale
                made = rate * z, rate * (z * z - 1)
            if what & 2:
                made = made[0], made[1] + of_entropy.reshape(rows, 1) / scale
        out.copy_(torch.stack(made).reshape(out.shape))


def _right(candidate: Callable[..., Any]) -> bool:
    """Whether a kernel agrees with float64, and with the formula where a scale is a strange one."""
    draw = torch.Generator("cpu").manual_seed(5)
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        for rows, width in ((1, 1), (37, 3), (300, 8), (70, 12), (130, 17), (40, 64)):
            loc, value = torch.randn(2, rows, width, generator=draw, dtype=torch.float32)
            scale = torch.empty(rows, width, dtype=torch.float32).log_normal_(generator=draw)
            g, e = torch.randn(2, rows, generator=draw, dtype=torch.float32)
            for strange in (None, 0.0, 1e-30, math.inf, -1.0, math.nan):
                dtype = torch.float64 if strange is None else torch.float32
                if strange is not None:
                    scale[rows // 2, width // 2] = strange
                args = g, e, loc, scale, value
                for what in range(4):
                    size = (2, rows) if what == 0 else (2, rows, width)
                    found = torch.full(size, 7.0, dtype=torch.float32)
                    expected = torch.empty(size, dtype=dtype)
                    candidate(*args, found, rows, width, what)
                    by_formula(*[x.to(dtype) for x in args], expected, rows, width, what)  # type: ignore
                    near = torch.isclose(found.to(dtype), expected, 2e-5, 2e-5)
                    # Infinities may add up to no number on one side alone.
                    if not bool((near | ~(found.isfinite() | expected.isfinite())).all()):
                        return False
    return True
