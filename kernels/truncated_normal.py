"""TruncatedNormal with independent elements: sample, score and entropy in one pass, and backward.

A Normal cut to [low, high], in units of the scale from loc: z = (x - loc) / scale between a and b,
mirrored where a + b < 0, so that a is the bound nearer to the mean. Over a row of A elements:

    log p(x) = -sum((z - c)(z + c) / 2 + log(scale M))
    M = integral from a to b of exp(-(z - c)(z + c) / 2) dz

fp32 bears two sets of formulas. The central one, for a < 2 and b - a >= 3/4, has c = 0 and takes
the probabilities below a and above b as they are, each from its own tail. The outer one has c = a
and measures from there, u = z - a and w = b - a. With the hazard h of the Normal, k(x) = h(x) - x,
and r the probability above b over that above a:

    -log(r) = w (a + w / 2) + log(h(b) / h(a))                      M = (1 - r) / h(a)

where both terms are positive and log(h(b) / h(a)) = log1p((w + k(b) - k(a)) / h(a)), so that
nothing cancels: exact however far out a is, and however close b is to a. A tile without outer
elements leaves their formulas out, which a policy that stays near its bounds never sees run.

A value at probability p is found by inversion: centrally from the nearer tail; outside as the root
of the equation above for -log(1 - p (1 - r)), by one step of Halley's method from the root of a
quadratic that is off by 1.6% at most, which leaves 5e-7.

With e the density of z, A = (1 - p) e(a) / e(z), B = p e(b) / e(z), and E over the truncated
distribution, a value has the derivatives of a fixed p, and a score those of an exponential family:

    dx/dloc = 1 - A - B             dx/dscale = z - a A - b B
    dl/dloc = (z - E[z]) / scale    dl/dscale = (z^2 - E[z^2]) / scale    dl/dx = -z / scale

Source: Robert 1995, https://arxiv.org/abs/0907.4010, for the tails.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprob.kernels._halves import BLOCKS, EIGHTS, WHOLE
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
    forward_grid,
    gradients,
    launching,
    parameter,
    tail,
    vector_of,
)
from fastprob.kernels._truncated_normal_draw import MEAN, MEDIAN, MODE, RANDOM, draw_kernel
from fastprob.kernels._truncated_normal_draw_backward import draw_backward_kernel
from fastprob.kernels._truncated_normal_parts import EPS, FARTHEST
from fastprob.kernels._truncated_normal_score import score_kernel
from fastprob.kernels._truncated_normal_score_backward import score_backward_kernel

__all__ = [
    "EPS",
    "MEAN",
    "MEDIAN",
    "MODE",
    "RANDOM",
    "draw",
    "draw_backward",
    "score",
    "score_backward",
]


class Form(NamedTuple):
    """How a kernel goes over its tile.

    Attributes:
        cut: whether it is computed in halves, see `_halves`.
        warps: times the warps of `_launch`'s tiles.
        registers: most that a thread may take on NVIDIA; the assembler stays below. Without a
            limit of its own it aims at one more program on a multiprocessor, and spills for it.
    """

    cut: int
    warps: int
    registers: int


def forward_form(
    size: int, vector: int, tensors: bool, entropy: bool, rows: int, a: int, amd: bool = False
) -> tuple[Grid, Form]:
    """The tiles and the form of kernels that sum rows: 8 elements a thread, 4 on AMD.

    128 registers let two programs of 8 warps share a multiprocessor, where one of 184 had it for
    itself, and are all that one of 16 warps can have. In halves an element takes 6 to 9 issue slots
    more, which a draw and its score by themselves are spared: they take 122 registers whole. With
    all that can be asked, 8 elements take more than there are. In fp32, where 4 are a vector, a
    thread has 4, in tiles of 2048 at most, as of 4096 that would be 32 warps, with 64 registers
    each. In half precision programs have 4 warps at most, 12 of which share a multiprocessor at 160
    registers; with 128 scores of wide rows had 24 bytes of stack on sm_100.

    Args:
        size: bytes of an element of loc.
        vector: as of `_launch.forward_grid`.
        tensors: whether bounds are tensors.
        entropy: whether the entropy is wanted.
        rows: how many rows there are.
        a: their size.
        amd: whether it runs on AMD.
    """
    full = tensors and entropy
    most = (1024 if size == 2 else 2048) if full else 4096
    grid = forward_grid(rows, a, vector, most)
    if amd:
        return grid, Form(WHOLE, 2, 0)
    if full:
        return grid, Form(EIGHTS, 2, 160) if size == 2 else Form(WHOLE, 4, 128)
    if not (tensors or entropy) and grid.warps <= 4:
        # Told 128, Triton 3.6's assembler has 8 bytes of stack for a draw at A = 1025 in fp32; told
        # 136 none, and 123 registers.
        return grid, Form(WHOLE, 2, 136 if grid.warps == 1 else 128)
    # Small programs share a multiprocessor whatever they take: told 128, draws with tensor bounds
    # and a clamp have 24 bytes of stack at A = 1025 in fp32 on sm_80, told 160 none.
    return grid, Form(EIGHTS if size == 2 else BLOCKS, 2, 160 if grid.warps == 1 else 128)


def backward_form(size: int, amd: bool = False) -> Form:
    """The form of kernels of gradients: 128 bits of each tensor a thread, 4 elements on AMD.

    Args:
        size: bytes of an element of loc.
        amd: whether it runs on AMD.
    """
    if amd:
        return Form(WHOLE, 1, 0)
    return Form(EIGHTS, 1, 168) if size == 2 else Form(WHOLE, 2, 128)


def _options(form: Form, warps: int) -> dict[str, int]:
    options = {"CUT": form.cut, "num_warps": form.warps * warps}
    return {**options, "maxnreg": form.registers} if form.registers else options


def _limits(low: Any, high: Any, ndims: int, repeated: bool) -> tuple[Any, dict[str, Any]]:
    """The bounds as arguments of a kernel, numbers or parameters; the others None."""
    if not isinstance(low, Tensor):
        numbers = {
            "lo": max(float(low), -FARTHEST), "hi": min(float(high), FARTHEST),
            "low_row": 0, "low_column": 0, "high_row": 0, "high_column": 0, "LOW": -1, "HIGH": -1,
        }  # fmt: skip
        return (None, None), numbers
    least, most = parameter(low, ndims, repeated), parameter(high, ndims, repeated)
    return (least.tensor, most.tensor), {
        "lo": None, "hi": None, "low_row": least.row, "low_column": least.column,
        "high_row": most.row, "high_column": most.column, "LOW": least.layout,
        "HIGH": most.layout,
    }  # fmt: skip


def draw(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    low: Tensor | float,  # [*batch, *event]
    high: Tensor | float,  # [*batch, *event]
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
    """A value, its score, the entropy and the state that was used, in one launch.

    Args:
        loc: mean of the Normal; of one shape, dtype and device with `scale`.
        scale: its standard deviation, 1e-6 or more.
        low: lower bound; a number, or of the shape and dtype of `loc`.
        high: upper bound; a number where `low` is one, a tensor where it is one.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions, summed over.
        kind: RANDOM, MEDIAN, MEAN or MODE.
        state: where the noise comes from, for a RANDOM value.
        score: whether the log-density is wanted.
        entropy: whether the entropy is wanted.
        clamp: the `Bounds` that the value is projected onto, after it was scored.
        keep: whether the backward pass needs the state.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`, entropy `[*batch]`, and
        an int64 pair; None for what was not wanted.
    """
    full = shape + loc.shape
    batch = loc.shape[: loc.dim() - ndims]
    a = event_numel(loc.shape, ndims)
    value = torch.empty(full, dtype=loc.dtype, device=loc.device)
    scores = torch.empty(shape + batch, dtype=loc.dtype, device=loc.device) if score else None
    entropies = torch.empty(batch, dtype=loc.dtype, device=loc.device) if entropy else None
    used = torch.empty(2, dtype=torch.int64, device=loc.device) if keep and state else None
    total = value.numel()
    if total == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return value, scores, entropies, used if used is None else used.zero_()
    rows, total_rows = loc.numel() // a, total // a
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    (least, most), limits = _limits(low, high, ndims, bool(shape))
    clamped, clamp_lo, clamp_hi, clamp_low, clamp_high = bounds_of(clamp)
    source = state or NO_STATE
    tensors = isinstance(low, Tensor)
    grid, form = forward_form(
        loc.element_size(), vector_of(loc.dtype), tensors, entropy, total_rows, a, AMD
    )
    with launching(loc):
        draw_kernel[(grid.programs,)](
            mu.tensor, sigma.tensor, least, most, value, scores, entropies,
            clamp_low=clamp_low, clamp_high=clamp_high, clamp_lo=clamp_lo, clamp_hi=clamp_hi,
            state=source.pair, used=used, ticket=source.ticket, seed=source.seed,
            call=source.call, total_rows=total_rows, rows=rows, loc_row=mu.row,
            loc_column=mu.column, scale_row=sigma.row, scale_column=sigma.column, **limits,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, LOC=mu.layout, SCALE=sigma.layout,
            KIND=kind, SCORE=score, ENTROPY=entropy, CLAMP=clamped, HOST=source.pair is None,
            ADVANCE=source.ticket is not None, KEEP=used is not None, FAST=fast(loc),
            **_options(form, grid.warps),
        )  # fmt: skip
    return value, scores, entropies, used


def draw_backward(
    grad_value: Tensor | None,  # [*sample, *batch, *event]
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    low: Tensor | float,  # [*batch, *event]
    high: Tensor | float,  # [*batch, *event]
    used: Tensor | None,
    shape: torch.Size,
    ndims: int,
    *,
    kind: int = RANDOM,
    pathwise: bool = True,
    clamp: Any = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `draw` by loc and scale, `[*batch, *event]`.

    Args:
        grad_value: gradient of the value, None for none.
        grad_score: gradient of the log-density, None for none.
        grad_entropy: gradient of the entropy, None for none.
        loc: as in `draw`.
        scale: as in `draw`.
        low: as in `draw`.
        high: as in `draw`.
        used: what `draw` has kept, for a RANDOM value.
        shape: as in `draw`.
        ndims: as in `draw`.
        kind: as in `draw`; not MEAN.
        pathwise: whether gradients flow through the value; if not, it is a constant.
        clamp: as in `draw`.
    """
    a = event_numel(loc.shape, ndims)
    grad_loc, grad_scale = gradients(shape, loc), gradients(shape, scale)
    total = grad_loc.numel()
    if total == 0:
        return torch.zeros_like(loc), torch.zeros_like(scale)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    (least, most), limits = _limits(low, high, ndims, bool(shape))
    upstream = parameter(grad_value if grad_value is not None else grad_loc, ndims, False)
    clamped, clamp_lo, clamp_hi, clamp_low, clamp_high = bounds_of(clamp)
    programs, count, warps = flat_grid(total)
    form = backward_form(loc.element_size(), AMD)
    with launching(loc):
        draw_backward_kernel[(programs,)](
            upstream.tensor, tail(grad_score), tail(grad_entropy), mu.tensor, sigma.tensor,
            least, most, grad_loc, grad_scale,
            clamp_low=clamp_low, clamp_high=clamp_high, clamp_lo=clamp_lo, clamp_hi=clamp_hi,
            used=used, total=total, rows=loc.numel() // a, value_row=upstream.row,
            value_column=upstream.column, loc_row=mu.row, loc_column=mu.column,
            scale_row=sigma.row, scale_column=sigma.column, **limits,
            A=a, COUNT=count, VALUE=upstream.layout, LOC=mu.layout, SCALE=sigma.layout,
            KIND=kind, PATHWISE=pathwise, BY_VALUE=grad_value is not None,
            BY_SCORE=grad_score is not None, BY_ENTROPY=grad_entropy is not None,
            CLAMP=clamped, FAST=fast(loc), **_options(form, warps),
        )  # fmt: skip
    return fold(grad_loc, loc), fold(grad_scale, scale)


def score(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    low: Tensor | float,  # [*batch, *event]
    high: Tensor | float,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    *,
    entropy: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The log-density of a given value and the entropy, in one launch.

    Args:
        loc: as in `draw`.
        scale: as in `draw`.
        low: as in `draw`.
        high: as in `draw`.
        value: what is scored, `-inf` outside of the bounds; None for the entropy alone.
        ndims: number of event dimensions, summed over.
        entropy: whether the entropy is wanted.

    Returns:
        log-density `[*sample, *batch]`, of the dtype that loc and value promote to, and entropy
        `[*batch]`, of that of loc.
    """
    shape = torch.Size() if value is None else value.shape[: value.dim() - loc.dim()]
    batch = loc.shape[: loc.dim() - ndims]
    a = event_numel(loc.shape, ndims)
    dtype = loc.dtype if value is None else torch.promote_types(loc.dtype, value.dtype)
    scores = None if value is None else torch.empty(shape + batch, dtype=dtype, device=loc.device)
    entropies = torch.empty(batch, dtype=loc.dtype, device=loc.device) if entropy else None
    rows = loc.numel() // a if a else 0
    total_rows = rows * shape.numel()
    if total_rows == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return scores, entropies
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    (least, most), limits = _limits(low, high, ndims, bool(shape))
    given = mu if value is None else parameter(value, ndims, False)
    tensors = isinstance(low, Tensor)
    grid, form = forward_form(
        loc.element_size(), vector_of(loc.dtype, given.tensor.dtype), tensors, entropy,
        total_rows, a, AMD,
    )  # fmt: skip
    with launching(loc):
        score_kernel[(grid.programs,)](
            mu.tensor, sigma.tensor, least, most, given.tensor, scores, entropies,
            total_rows=total_rows, rows=rows, loc_row=mu.row, loc_column=mu.column,
            scale_row=sigma.row, scale_column=sigma.column, **limits,
            value_row=given.row, value_column=given.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, LOC=mu.layout, SCALE=sigma.layout,
            VALUE=given.layout, SCORE=value is not None, ENTROPY=entropy, FAST=fast(loc),
            **_options(form, grid.warps),
        )  # fmt: skip
    return scores, entropies


def score_backward(
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    low: Tensor | float,  # [*batch, *event]
    high: Tensor | float,  # [*batch, *event]
    value: Tensor | None,  # [*sample, *batch, *event]
    scores: Tensor | None,  # [*sample, *batch]
    ndims: int,
    *,
    to_value: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `score` by loc, scale and value, of the shapes of these.

    Args:
        grad_score: gradient of the log-density, None for none.
        grad_entropy: gradient of the entropy, None for none.
        loc: as in `draw`.
        scale: as in `draw`.
        low: as in `draw`.
        high: as in `draw`.
        value: as in `score`.
        scores: what `score` has given; where it is `-inf` there is no gradient.
        ndims: as in `score`.
        to_value: whether the gradient of the value is wanted.
    """
    shape = torch.Size() if value is None else value.shape[: value.dim() - loc.dim()]
    a = event_numel(loc.shape, ndims)
    grad_loc, grad_scale = gradients(shape, loc), gradients(shape, scale)
    grad_value = (
        torch.empty(value.shape, dtype=value.dtype, device=loc.device)
        if to_value and value is not None
        else None
    )
    total = grad_loc.numel()
    if total == 0:
        return torch.zeros_like(loc), torch.zeros_like(scale), grad_value
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    (least, most), limits = _limits(low, high, ndims, bool(shape))
    given = mu if value is None else parameter(value, ndims, False)
    if grad_score is None and grad_value is not None:
        grad_value.zero_()
    to_value = grad_value is not None and grad_score is not None
    programs, count, warps = flat_grid(total)
    form = backward_form(loc.element_size(), AMD)
    with launching(loc):
        score_backward_kernel[(programs,)](
            tail(grad_score), tail(grad_entropy), mu.tensor, sigma.tensor, least, most,
            given.tensor, tail(scores), grad_loc, grad_scale, grad_value,
            total=total, rows=loc.numel() // a, loc_row=mu.row, loc_column=mu.column,
            scale_row=sigma.row, scale_column=sigma.column, **limits,
            value_row=given.row, value_column=given.column,
            A=a, COUNT=count, LOC=mu.layout, SCALE=sigma.layout, VALUE=given.layout,
            BY_SCORE=grad_score is not None, BY_ENTROPY=grad_entropy is not None,
            TO_VALUE=to_value, FAST=fast(loc), **_options(form, warps),
        )  # fmt: skip
    return fold(grad_loc, loc), fold(grad_scale, scale), grad_value
