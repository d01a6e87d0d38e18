"""Beta with independent elements: sample, score and entropy in one pass, and backward.

With the concentrations a and b, T = a + b and y = 1 - x, over a row of A elements:

    log p(x) = sum((a - 1) log x + (b - 1) log y - log B(a, b))

A draw is G_a / (G_a + G_b) of two Gammas. A Gamma of concentration c >= 1 is d (1 + t)^3 with
d = c - 1/3 and t = z / (3 sqrt(d)) of a normal z, accepted where 1 + t > 0 and, for a uniform u,

    log u < 3 d (log(1 + t) - t + t^2 / 2 - t^3 / 3)

in which z^2 / 2 + d (1 - v + log v) of the source, v = (1 + t)^3, has been worked out: the terms
that cancel are gone, which at c = 1e6 are as large as 1 of fp32. Of c < 1 it is a Gamma of 1 + c
times U^(1 / c), taken as a logarithm and only in the quotient of the two, so that no concentration
is too small. A value is kept away from 0 and 1 by what torch's sampler keeps.

fp32 loses the digits of log B(a, b), of size T, against the other terms. Here large terms are
paired before they are rounded. With e = x b - y a, u = e / a and v = -e / b,

    log p(x) = -a D(u) - log x - b D(v) - log y + K(a) + K(b) - K(T)
    D(u) = u - log(1 + u)                    K(z) = z log z - z - log Gamma(z)

in which D is a series near 0 and -a D(u) - log x = (a - 1) log x + a log(T / a) - e elsewhere. K
grows as log(z) / 2. With r(z) = log z - psi(z) and s(z) = z psi'(z) - 1, all of them small,

    H = K(T) - K(a) - K(b) - log(T / a) - log(T / b) + (a - 1) r(a) + (b - 1) r(b) - (T - 2) r(T)
    d log p / da = log x + log(T / a) + r(a) - r(T)
    dH / da = s(T) - s(a) + (1 + s(a)) / a - 2 (1 + s(T)) / T

Source: Marsaglia and Tsang 2000, "A simple method for generating gamma variables"; for D, Loader
2000, "Fast and accurate computation of binomial probabilities".
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from fastprob.kernels import _halves as halves
from fastprob.kernels._beta_backward import backward_kernel
from fastprob.kernels._beta_draw import GIVEN, MEAN, MODE, RANDOM, draw_kernel
from fastprob.kernels._beta_score import score_kernel
from fastprob.kernels._launch import (
    AMD,
    NO_STATE,
    Grid,
    State,
    bounds_of,
    event_numel,
    fast,
    flat_grid,
    fold,
    gradients,
    launching,
    limited,
    parameter,
    tail,
    vector_of,
    wide_grid,
)

__all__ = [
    "GIVEN",
    "MEAN",
    "MODE",
    "RANDOM",
    "draw",
    "draw_backward",
    "limits",
    "score",
    "score_backward",
    "slopes",
]

# Tiles and their warps, 8 elements a thread, which takes up to 244 registers: a tile of more than
# 256 threads would spill. A tile tries on until its last element is accepted, so that a larger one
# tries more often, besides waiting for each other's warps.
SINGLE = (256, 1)
# For the gather of A that is no power of two: within one warp it goes by shuffles, and a draw at
# A = 17 takes 543 issue slots an element in place of 310.
SIZES = ((512, 2), (1024, 4), (2048, 8))
# Larger A go in chunks, which leave less empty than whole rows of a gather, a multiple of 4: a draw
# at A = 171 takes 305 issue slots an element in place of 423.
GATHERED = 64


@functools.lru_cache(maxsize=4096)
def tiling(rows: int, a: int, vector: int) -> Grid:
    """The tiles for `rows` rows of `a` elements, `vector` of which are 128 bits."""
    count, warps = SINGLE
    if a & (a - 1) == 0 and a <= count:
        own = count // a
        return Grid(-(-rows // own), count, count, own, own, False, False, warps)
    if a > GATHERED:
        # A vector of each thread: 8 elements in fp32 take as many issue slots and up to 255
        # registers in place of 164, and 8 bytes of stack with all that can be asked.
        return wide_grid(rows, a, 32 * vector, 1)
    # Whole rows that are whole vectors. The smallest tile that is at least seven eighths full, or
    # the fullest; where 8 elements leave none so, as at A = 37, with vectors of 4.
    for unit in (vector, 4):
        even = unit // math.gcd(a, unit)
        fitting = [(c, w, c // a // even * even) for c, w in SIZES if a * 4 <= c]
        full = [s for s in fitting if s[2] * a * 8 >= s[0] * 7]
        if full:
            break
    count, warps, own = full[0] if full else max(fitting, key=lambda s: s[2] * a / s[0])
    padded = triton.next_power_of_2(own)
    return Grid(-(-rows // own), count, own * a, padded, own, True, False, warps)


def form_of(grid: Grid, size: int, entropy: bool, amd: bool = False) -> int:
    """How the scores of a draw are computed, see `_halves`.

    In halves for rows of 16 bits in chunks, with the entropy: 8 elements at once had up to 24 bytes
    of stack on sm_100, whatever the assembler was told.

    Args:
        grid: the tiles.
        size: bytes of an element.
        entropy: whether the entropy is wanted.
        amd: whether it runs on AMD, where a thread has fewer.
    """
    return halves.EIGHTS if grid.wide and size == 2 and entropy and not amd else halves.WHOLE


def most_registers(grid: Grid, size: int, kind: int) -> int | None:
    """The most registers of a draw on NVIDIA's GPUs, None for the assembler's own choice.

    Draws of 16 bits in chunks have 16 bytes of stack on sm_100 where they are clamped at A = 260,
    or, in halves for the entropy, at A = 65; told 232, none. In fp32, with half the elements, it
    takes 128 at A = 257 on sm_80, and 8 bytes; told 168, none.

    Args:
        grid: the tiles.
        size: bytes of an element.
        kind: how the value is chosen.
    """
    if not grid.wide or kind != RANDOM:
        return None
    return 232 if size == 2 else 168


def most_registers_of_backward(kind: int, clamp: int) -> int | None:
    """The same of a gradient.

    That is 128 on sm_90 for a mean clamped to bounds of each element, and 8 bytes of stack; told
    144, none.
    """
    return 144 if kind == MEAN and clamp else None


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and the largest value that a draw may have: the ends of torch's sampler."""
    info = torch.finfo(dtype)
    return info.tiny, 1.0 - info.eps / 2


def draw(
    concentration1: Tensor,  # [*batch, *event]
    concentration0: Tensor,  # [*batch, *event]
    shape: torch.Size,
    ndims: int,
    *,
    kind: int = RANDOM,
    state: State | None = None,
    score: bool = True,
    entropy: bool = False,
    clamp: Any = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """A value, its score, the entropy and the value before its clamp, in one launch.

    Args:
        concentration1: a, greater than 0; of one shape, dtype and device with the other.
        concentration0: b, likewise.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions, summed over.
        kind: RANDOM, MEAN or MODE.
        state: where the noise comes from, for a RANDOM value.
        score: whether the log-density is wanted.
        entropy: whether the entropy is wanted.
        clamp: the operators' `Bounds` that the value is clamped to after it was scored, or None.
        keep: whether the value before the clamp is wanted, which a backward pass reads.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`, entropy `[*batch]` and
        the value before the clamp, which without one is the value; None for what was not wanted.
    """
    like = concentration1
    full = shape + like.shape
    batch = like.shape[: like.dim() - ndims]
    a = event_numel(like.shape, ndims)
    value = torch.empty(full, dtype=like.dtype, device=like.device)
    scores = torch.empty(shape + batch, dtype=like.dtype, device=like.device) if score else None
    entropies = torch.empty(batch, dtype=like.dtype, device=like.device) if entropy else None
    kind_of_clamp, lo, hi, low, high = bounds_of(clamp)
    before = torch.empty_like(value) if keep and kind_of_clamp else None
    kept = (value if before is None else before) if keep else None
    total = value.numel()
    if total == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return value, scores, entropies, kept
    one = parameter(concentration1, ndims, bool(shape))
    zero = parameter(concentration0, ndims, bool(shape))
    least, most = limits(like.dtype)
    source = state or NO_STATE
    grid = tiling(total // a, a, vector_of(like.dtype))
    registers = most_registers(grid, like.element_size(), kind)
    with launching(like):
        draw_kernel[(grid.programs,)](
            one.tensor, zero.tensor, value, scores, entropies, before, low, high, lo, hi,
            source.pair, None, source.ticket, source.seed, source.call,
            total // a, like.numel() // a, one.row, one.column, zero.row, zero.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, CONC1=one.layout, CONC0=zero.layout, KIND=kind,
            LEAST=least, MOST=most, SCORE=score, ENTROPY=entropy, CLAMP=kind_of_clamp,
            KEEP=before is not None, HOST=source.pair is None, ADVANCE=source.ticket is not None,
            FAST=fast(like), CUT=form_of(grid, like.element_size(), entropy, AMD),
            num_warps=grid.warps, **limited(like, registers),
        )  # fmt: skip
    return value, scores, entropies, kept


def score(
    concentration1: Tensor,  # [*batch, *event]
    concentration0: Tensor,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    *,
    entropy: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The log-density of a given value and the entropy, in one launch.

    Args:
        concentration1: as in `draw`.
        concentration0: as in `draw`.
        value: what is scored, from 0 to 1; None for the entropy alone.
        ndims: number of event dimensions, summed over.
        entropy: whether the entropy is wanted.

    Returns:
        log-density `[*sample, *batch]`, of the dtype that concentration and value promote to, and
        entropy `[*batch]`, of that of the concentration.
    """
    like = concentration1
    shape = torch.Size() if value is None else value.shape[: value.dim() - like.dim()]
    batch = like.shape[: like.dim() - ndims]
    a = event_numel(like.shape, ndims)
    dtype = like.dtype if value is None else torch.promote_types(like.dtype, value.dtype)
    scores = None if value is None else torch.empty(shape + batch, dtype=dtype, device=like.device)
    entropies = torch.empty(batch, dtype=like.dtype, device=like.device) if entropy else None
    rows = like.numel() // a if a else 0
    total_rows = rows * shape.numel()
    if total_rows == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return scores, entropies
    one = parameter(concentration1, ndims, bool(shape))
    zero = parameter(concentration0, ndims, bool(shape))
    given = one if value is None else parameter(value, ndims, False)
    grid = tiling(total_rows, a, vector_of(like.dtype, given.tensor.dtype))
    with launching(like):
        score_kernel[(grid.programs,)](
            one.tensor, zero.tensor, given.tensor, scores, entropies, total_rows, rows,
            one.row, one.column, zero.row, zero.column, given.row, given.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, CONC1=one.layout, CONC0=zero.layout,
            VALUE=given.layout, SCORE=value is not None, ENTROPY=entropy, FAST=fast(like),
            num_warps=grid.warps,
        )  # fmt: skip
    return scores, entropies


def draw_backward(
    grad_value: Tensor | None,  # [*sample, *batch, *event]
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    concentration1: Tensor,  # [*batch, *event]
    concentration0: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event]
    ndims: int,
    *,
    kind: int = RANDOM,
    clamp: Any = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `draw` by the concentrations, of their shape.

    The value is read where the other families draw theirs anew: it is 4 bytes of 20, and a draw is
    190 issue slots and more.

    Args:
        grad_value: gradient of the value, None for none.
        grad_score: gradient of the log-density, None for none.
        grad_entropy: gradient of the entropy, None for none.
        concentration1: as in `draw`.
        concentration0: as in `draw`.
        value: what `draw` has given, before its clamp.
        ndims: as in `draw`.
        kind: as in `draw`, or GIVEN where no gradient flows through the value.
        clamp: as in `draw`; it stops the gradient of a value outside.
    """
    return _backward(
        grad_value, grad_score, grad_entropy, concentration1, concentration0, value, ndims, kind,
        False, clamp,
    )[:2]  # fmt: skip


def score_backward(
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    concentration1: Tensor,  # [*batch, *event]
    concentration0: Tensor,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    *,
    to_value: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `score` by the concentrations and the value, of the shapes of these.

    Args:
        grad_score: gradient of the log-density, None for none.
        grad_entropy: gradient of the entropy, None for none.
        concentration1: as in `draw`.
        concentration0: as in `draw`.
        value: as in `score`.
        ndims: as in `score`.
        to_value: whether the gradient of the value is wanted.
    """
    return _backward(
        None, grad_score, grad_entropy, concentration1, concentration0, value, ndims, GIVEN,
        to_value,
    )  # fmt: skip


def slopes(concentration1: Tensor, concentration0: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """`dx/da / (1 - x)` and `-dx/db / x` of a drawn value x, fp32, by ATen: a launch for each.

    Implicit reparameterization (Figurnov et al. 2018, https://arxiv.org/abs/1805.08498). ATen
    picks one of four expansions for each element; a tile would compute all of them.
    """
    a, b, x = (
        t.to(torch.float32).broadcast_to(value.shape)
        for t in (concentration1, concentration0, value)
    )
    total = a + b
    by_a = torch._dirichlet_grad(x, a, total)  # type: ignore[attr-defined]
    by_b = torch._dirichlet_grad(1.0 - x, b, total)  # type: ignore[attr-defined]
    # Nothing to do but for transposed concentrations, which ATen may follow.
    return by_a.contiguous(), by_b.contiguous()


def _backward(
    grad_value, grad_score, grad_entropy, concentration1, concentration0, value, ndims, kind,
    to_value, clamp=None,
) -> Any:  # fmt: skip
    like = concentration1
    full = like.shape if value is None else value.shape
    shape = full[: len(full) - like.dim()]
    a = event_numel(like.shape, ndims)
    grad_one, grad_zero = gradients(shape, concentration1), gradients(shape, concentration0)
    grad_scored = None
    if to_value:
        # The entropy does not depend on the value.
        make = torch.zeros if grad_score is None else torch.empty
        grad_scored = make(full, dtype=value.dtype, device=like.device)
        to_value = grad_score is not None
    total = grad_one.numel()
    if total == 0:
        return torch.zeros_like(concentration1), torch.zeros_like(concentration0), grad_scored
    if grad_value is None and grad_score is None:
        # A value without an upstream gradient needs no derivatives.
        kind = GIVEN
    by_one, by_zero = None, None
    if kind == RANDOM:
        by_one, by_zero = slopes(concentration1, concentration0, value)
    one = parameter(concentration1, ndims, bool(shape))
    zero = parameter(concentration0, ndims, bool(shape))
    given = one if value is None else parameter(value, ndims, False)
    upstream = parameter(grad_value if grad_value is not None else grad_one, ndims, False)
    kind_of_clamp, lo, hi, low, high = bounds_of(None if grad_value is None else clamp)
    programs, count, warps = flat_grid(total)
    with launching(like):
        backward_kernel[(programs,)](
            upstream.tensor, tail(grad_score), tail(grad_entropy), one.tensor, zero.tensor,
            given.tensor, by_one, by_zero, grad_one, grad_zero, grad_scored, low, high, lo, hi,
            total, like.numel() // a, one.row, one.column, zero.row, zero.column,
            given.row, given.column, upstream.row, upstream.column,
            A=a, COUNT=count, CONC1=one.layout, CONC0=zero.layout, VALUE=given.layout,
            UPSTREAM=upstream.layout, KIND=kind, BY_VALUE=grad_value is not None,
            BY_SCORE=grad_score is not None, BY_ENTROPY=grad_entropy is not None,
            TO_VALUE=to_value, CLAMP=kind_of_clamp, FAST=fast(like), num_warps=warps,
            **limited(like, most_registers_of_backward(kind, kind_of_clamp)),
        )  # fmt: skip
    return fold(grad_one, concentration1), fold(grad_zero, concentration0), grad_scored
