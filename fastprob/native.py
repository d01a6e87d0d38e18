"""Normal noise on a CPU by a kernel in C++: the numbers of ATen, in a third of the time.

ATen draws the Mersenne Twister's words one by one; that is four fifths of what `normal_` takes for
a large buffer. Here the generator makes its 624 words at once and eight at a time, and leaves the
generator where ATen would leave it. The rest is ATen's own: `avx_mathfun.h` comes with torch.
65536 x 16 in fp32: 3.63 -> 1.01 ms; 2048 elements: 7.8 -> 4.2 us.

The kernel is compiled by what compiles Inductor's CPU kernels, and checked against ATen before it
is used. Compiled graphs build it when they are made, and eager mode uses it once it is there;
`build()` builds it without a graph.

Source: Matsumoto and Nishimura, "Mersenne Twister" (1998); Box and Muller (1958).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from fastprob.reference._reduce import functorch_level

__all__ = ["build"]

# Below it ATen is as fast: 2.2 us either way at 512, 7.8 against 4.6 at 2048.
LEAST = 1024

# What fills a float32 buffer from a generator's state, in place in both; None until it is built.
kernel: Any = None

_SOURCE = r"""
// ATen compiles its own copy for AVX2, with multiplications and additions contracted: two further
// roundings would change one number in a hundred.
#ifndef CPU_CAPABILITY_AVX2
#define CPU_CAPABILITY_AVX2
#endif
#pragma GCC optimize("fp-contract=fast")
#include <immintrin.h>
#include <cstdint>
#include <ATen/native/cpu/avx_mathfun.h>

namespace {

constexpr int N = 624, M = 397;

// The head of what torch.Generator.get_state() gives.
struct State {
  uint64_t seed;
  int32_t left, seeded;
  uint64_t next;
  uint64_t words[N];
};

inline __m256i load(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

inline __m256i every(uint32_t bits) { return _mm256_set1_epi32(static_cast<int>(bits)); }

inline uint32_t twist(uint32_t word, uint32_t next) {
  const uint32_t mixed = (word & 0x80000000u) | (next & 0x7fffffffu);
  return (mixed >> 1) ^ ((0u - (next & 1u)) & 0x9908b0dfu);
}

// Eight words in place; `far` is M words ahead, or N - M words back where those are made anew.
inline void twist8(uint32_t* p, const uint32_t* far) {
  const __m256i next = load(p + 1);
  const __m256i mixed = _mm256_or_si256(
      _mm256_and_si256(load(p), every(0x80000000u)), _mm256_and_si256(next, every(0x7fffffffu)));
  const __m256i odd =
      _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_and_si256(next, every(1)));
  const __m256i turned =
      _mm256_xor_si256(_mm256_srli_epi32(mixed, 1), _mm256_and_si256(odd, every(0x9908b0dfu)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_xor_si256(load(far), turned));
}

void advance(uint32_t* p) {
  int k = 0;
  for (; k + 8 <= N - M; k += 8) twist8(p + k, p + k + M);
  for (; k < N - M; ++k) p[k] = p[k + M] ^ twist(p[k], p[k + 1]);
  for (; k + 8 <= N - 1; k += 8) twist8(p + k, p + k + M - N);
  for (; k < N - 1; ++k) p[k] = p[k + M - N] ^ twist(p[k], p[k + 1]);
  p[N - 1] = p[M - 1] ^ twist(p[N - 1], p[0]);
}

// The words tempered, and the low 24 bits of each as a number in [0, 1).
void uniform(const uint32_t* words, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256i y = load(words + i);
    y = _mm256_xor_si256(y, _mm256_srli_epi32(y, 11));
    y = _mm256_xor_si256(y, _mm256_and_si256(_mm256_slli_epi32(y, 7), every(0x9d2c5680u)));
    y = _mm256_xor_si256(y, _mm256_and_si256(_mm256_slli_epi32(y, 15), every(0xefc60000u)));
    y = _mm256_xor_si256(y, _mm256_srli_epi32(y, 18));
    const __m256 x = _mm256_cvtepi32_ps(_mm256_and_si256(y, every(0xffffffu)));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(x, _mm256_set1_ps(0x1p-24f)));
  }
  for (; i < n; ++i) {
    uint32_t y = words[i];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    y ^= y >> 18;
    out[i] = static_cast<float>(y & 0xffffffu) * 0x1p-24f;
  }
}

struct Twister {
  uint32_t words[N];
  int64_t left, next;  // ATen makes new words when it wants one and `left` is 1

  void draw(float* out, int64_t n) {
    while (n > 0) {
      if (left == 1) {
        advance(words);
        left = N + 1;
        next = 0;
      }
      const int64_t count = left - 1 < n ? left - 1 : n;
      uniform(words + next, out, count);
      out += count;
      n -= count;
      left -= count;
      next += count;
    }
  }
};

// Eight pairs: radii from the first eight numbers, angles from the others.
inline void box_muller(float* x) {
  const __m256 u = _mm256_sub_ps(_mm256_set1_ps(1.0f), _mm256_loadu_ps(x));
  const __m256 radius = _mm256_sqrt_ps(_mm256_mul_ps(_mm256_set1_ps(-2.0f), log256_ps(u)));
  const __m256 turn = _mm256_set1_ps(6.283185307179586f);
  __m256 sine, cosine;
  sincos256_ps(_mm256_mul_ps(turn, _mm256_loadu_ps(x + 8)), &sine, &cosine);
  _mm256_storeu_ps(x, _mm256_mul_ps(radius, cosine));
  _mm256_storeu_ps(x + 8, _mm256_mul_ps(radius, sine));
}

}  // namespace

// n is 16 at least.
extern "C" void fill(void* bytes, float* out, int64_t n) {
  State* state = static_cast<State*>(bytes);
  Twister twister;
  for (int i = 0; i < N; ++i) twister.words[i] = static_cast<uint32_t>(state->words[i]);
  twister.left = state->left;
  twister.next = static_cast<int64_t>(state->next);
  const int64_t whole = n & ~int64_t{15};
  constexpr int64_t PIECE = 4096;  // 16 KiB, which the first cache holds
  for (int64_t i = 0; i < whole; i += PIECE) {
    const bool last = whole - i <= PIECE;
    const int64_t count = last ? whole - i : PIECE;
    twister.draw(out + i, last ? n - i : count);
    for (int64_t j = i; j < i + count; j += 16) box_muller(out + j);
  }
  if (n != whole) {
    // ATen draws the last 16 anew, over some that are done.
    twister.draw(out + n - 16, 16);
    box_muller(out + n - 16);
  }
  for (int i = 0; i < N; ++i) state->words[i] = twister.words[i];
  state->left = static_cast<int32_t>(twister.left);
  state->next = static_cast<uint64_t>(twister.next);
}
"""


def build() -> None:
    """Builds the kernel, for eager mode to use from now on.

    The first time on a machine takes as long as Inductor's first kernel, seconds; after that it
    comes from Inductor's cache. The noise is the same as before, bit by bit.

    Raises:
        RuntimeError: where it cannot be built, with the reason: no compiler, no AVX2, or a torch
            that draws in another way.
    """
    global kernel
    if kernel is not None:
        return
    reason = _build()
    if isinstance(reason, str):
        raise RuntimeError(f"the noise kernel cannot be used: {reason}")
    kernel = reason


@functools.cache
def available() -> bool:
    """Whether the kernel could be built; builds it."""
    try:
        build()
    except RuntimeError:
        return False
    return True


@functools.cache
def _build() -> Any:
    """The kernel, or why there is none."""
    level = torch.backends.cpu.get_cpu_capability()
    if level not in ("AVX2", "AVX512"):
        return f"it needs AVX2, and torch runs with {level}"
    try:
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(_SOURCE)
        # The interpreter's lock is held, so that no other thread draws between the reading of the
        # state and its writing back.
        fill = ctypes.PyDLL(library._name).fill
    except Exception as err:  # whatever a missing compiler or another Inductor makes of it
        return f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"
    fill.argtypes, fill.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
    return fill if _equal(fill) else "this torch draws normal noise in another way"


def _equal(fill: Any) -> bool:
    """Whether the kernel does what ATen does, to the numbers and to the generator."""
    with torch.inference_mode(False), torch.no_grad():
        ours, theirs = (torch.Generator("cpu").manual_seed(11) for _ in range(2))
        for n in (16, 31, 5000, 624, 9001):
            expected = torch.empty(n, dtype=torch.float32, device="cpu").normal_(generator=theirs)
            found = torch.empty(n, dtype=torch.float32, device="cpu")
            _run(fill, found, ours)
            if not torch.equal(found, expected):
                return False
            if not torch.equal(ours.get_state(), theirs.get_state()):
                return False
    return True


def _run(fill: Any, buffer: Tensor, generator: torch.Generator) -> None:
    state = generator.get_state()
    fill(state.data_ptr(), buffer.data_ptr(), buffer.numel())
    generator.set_state(state)


def serves(like: Tensor) -> bool:
    """Whether `normal_` may fill what is made like a tensor; which vmap would batch, it may not."""
    return like.dtype is torch.float32 and like.is_cpu and functorch_level() is None


def normal_(buffer: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fills a buffer with standard normal noise: what `Tensor.normal_` draws.

    Args:
        buffer: of any shape, dtype and device.
        generator: source of the noise; None for torch's default one.

    Returns:
        the buffer.
    """
    if (
        kernel is None
        or buffer.dtype is not torch.float32
        or buffer.numel() < LEAST
        or not buffer.is_cpu
        or not buffer.is_contiguous()
        or type(buffer) is not Tensor  # a FakeTensor has no memory
    ):
        return buffer.normal_(generator=generator)
    _run(kernel, buffer, torch.default_generator if generator is None else generator)
    return buffer


def normal_in_graph(buffer: Tensor) -> None:
    """`normal_` of a buffer in compiled code, which another process may have made."""
    if kernel is None:
        available()
    normal_(buffer)
