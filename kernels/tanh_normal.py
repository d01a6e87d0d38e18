"""TanhNormal with independent elements: sample, score and clamp in one pass, and backward.

y = mid + half tanh(x) with x ~ Normal(loc, scale), z = (x - loc) / scale, over a row of A elements:

    log p(y) = -sum(z^2 / 2 + log(scale) + log(1 - tanh(x)^2) + log(half)) - A log(2 pi) / 2

With t = exp(-2 |x|) and q = 1 / (1 + t):

    tanh(x) = +-(1 - t) q               1 - tanh(x)^2 = 4 t q^2
    log(scale) + log(1 - tanh(x)^2) = log(scale q^2) - 2 |x| + log(4)

which is one logarithm, exact where tanh saturates: a drawn value is scored at the x that was drawn,
never through atanh. With g the gradient of the value, gl that of its score, u = (y - mid) / half:

    drawn:     e = g half (1 - tanh(x)^2) + 2 tanh(x) gl
               dloc = e                 dscale = e noise - gl / scale
    detached:  that of the Normal before tanh, at x
    given:     x = atanh(u)             dloc = gl z / scale       dscale = gl (z^2 - 1) / scale
               dvalue = gl (2 u - z / scale) / (half (1 - u^2))

Where tanh is limited to 1 - resolution, the value's gradient takes 1 - tanh(x)^2 at that limit.

The mode and the mean of y are found in registers, see `_tanh_points`. At the mode the score does
not change with x, and z / scale = 2 tanh(x), so that

    dx/dloc = 1 / (1 - 2 scale^2 (1 - tanh(x)^2))         dx/dscale = 4 scale tanh(x) dx/dloc
    dl/dloc = 2 tanh(x)                                   dl/dscale = (z^2 - 1) / scale

A mean is scored as a given value, and its score's gradient goes through it.

Source: Haarnoja et al. 2018, "Soft actor-critic", appendix C; a draw's gradient as in `normal`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprob.kernels._launch import (
    FLAT,
    NO_MAPPING,
    NO_STATE,
    Grid,
    Mapping,
    State,
    bounds_of,
    event_numel,
    fast,
    flat_grid,
    fold,
    forward_grid,
    gradients,
    launching,
    limited,
    parameter,
    strided_rows,
    tail,
    vector_of,
)
from fastprob.kernels._tanh_normal_draw import MEAN, MEDIAN, MODE, RANDOM, draw_kernel
from fastprob.kernels._tanh_normal_draw_backward import draw_backward_kernel
from fastprob.kernels._tanh_normal_score import score_kernel
from fastprob.kernels._tanh_normal_score_backward import score_backward_kernel

__all__ = [
    "LIMITS",
    "MEAN",
    "MEDIAN",
    "MODE",
    "RANDOM",
    "draw",
    "draw_backward",
    "score",
    "score_backward",
]

# 1 minus the resolution of the dtype, rounded to it: the largest |tanh| that is let through.
LIMITS = {
    dtype: torch.tensor(1.0 - torch.finfo(dtype).resolution, dtype=dtype, device="cpu").item()
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
}


def _span(bounds: Any) -> tuple[int, Any, Any, Any, Any, Any]:
    """How a kernel reads the interval: numbers and tensors, of which it takes what it needs.

    Args:
        bounds: the operators' `Bounds`: half the width, middle and logarithm of the half, numbers
            or contiguous tensors of an event.

    Returns:
        0 for (-1, 1), 1 for numbers, 2 for tensors; half, middle and logarithm of the half as
        numbers; half and middle as tensors.
    """
    if isinstance(bounds.half, Tensor):
        return 2, None, None, None, bounds.half, bounds.mid
    if bounds.half == 1.0 and bounds.mid == 0.0:
        return 0, None, None, None, None, None
    return 1, bounds.half, bounds.mid, bounds.log_half, None, None


def _limit(x: Tensor, safe: bool) -> float:
    return LIMITS[x.dtype] if safe else 1.0


def most_registers(grid: Grid, a: int, kind: int, raw: bool, spanned: bool) -> int | None:
    """The most registers of a draw on NVIDIA's GPUs, None for the assembler's own choice.

    That is 96 on sm_100 for a mean at A = 17 in fp32, and 8 bytes of stack; told 168, none. 128 for
    a mode between bounds of each element on sm_80, at A = 8 in bf16, likewise. And 168 on sm_90 for
    draws from a raw output in chunks, at A = 1025, with as many; told 200, none.

    Args:
        grid: the tiles.
        a: size of a row.
        kind: how the value is chosen.
        raw: whether the scale is mapped.
        spanned: whether bounds are tensors.
    """
    if grid.wide:
        return 200 if raw and a % 4 else None
    return 168 if (kind == MEAN and grid.gather) or (kind == MODE and spanned) else None


def draw(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    bounds: Any,
    shape: torch.Size,
    ndims: int,
    *,
    state: State | None,
    point: int = MEDIAN,
    score: bool = True,
    clamp: Any = None,
    keep: bool = False,
    raw: Mapping = NO_MAPPING,
    mapped: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A value, its score and the state that was used, in one launch.

    Args:
        loc: mean before tanh; of one shape, dtype and device with `scale`.
        scale: standard deviation before tanh.
        bounds: the `Bounds` where the values lie, and whether |tanh| is limited.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions, summed over.
        state: where the noise comes from; None for a value that is not drawn.
        point: which value that is: MEDIAN, the squashed mean, or MEAN or MODE of what is squashed.
        score: whether the log-density is wanted.
        clamp: the `Bounds` that the value is projected onto, after it was scored.
        keep: whether the backward pass needs the state.
        raw: how the standard deviation is mapped from `scale`, if that is a raw value.
        mapped: gets the standard deviation then, `[*batch, *event]`, contiguous. Nothing is written
            to it where there is no sample.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]` and an int64 pair; None
        for what was not wanted.
    """
    full = shape + loc.shape
    a = event_numel(loc.shape, ndims)
    batch = loc.shape[: loc.dim() - ndims]
    value = torch.empty(full, dtype=loc.dtype, device=loc.device)
    scores = torch.empty(shape + batch, dtype=loc.dtype, device=loc.device) if score else None
    used = torch.empty(2, dtype=torch.int64, device=loc.device) if keep and state else None
    total = value.numel()
    if total == 0:
        if scores is not None:
            scores.zero_()
        return value, scores, used if used is None else used.zero_()
    rows, total_rows = loc.numel() // a, total // a
    span, half, mid, log_half, halves, mids = _span(bounds)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    kind, lo, hi, low, high = bounds_of(clamp)
    source = state or NO_STATE
    grid = forward_grid(total_rows, a, vector_of(loc.dtype))
    how = point if state is None else RANDOM
    with launching(loc):
        draw_kernel[(grid.programs,)](
            mu.tensor, sigma.tensor, value, scores, mapped, low, high, lo, hi,
            halves, mids, half, mid, log_half, *raw.numbers,
            source.pair, used, source.ticket, source.seed, source.call,
            total_rows, rows, mu.row, mu.column, sigma.row, sigma.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, LOC=mu.layout, SCALE=sigma.layout,
            KIND=how, SCORE=score, SPAN=span, LIMIT=_limit(loc, bounds.safe), CLAMP=kind,
            MAP=raw.kind, HOST=source.pair is None, ADVANCE=source.ticket is not None,
            KEEP=used is not None, FAST=fast(loc), num_warps=grid.warps,
            **limited(loc, most_registers(grid, a, how, raw.kind > 0, span == 2)),
        )  # fmt: skip
    return value, scores, used


def threads(kind: int, span: int, size: int) -> int:
    """Times the warps of `_launch`'s tiles that a gradient of a draw has.

    A mean between bounds of each element has 4 elements a thread in fp32, one vector: 62 registers
    at A = 17 on sm_90, where 8 took 128 and 8 bytes of stack, at 288 issue slots each.

    Args:
        kind: how the value is chosen.
        span: 2 where bounds are tensors.
        size: bytes of an element.
    """
    return 2 if kind == MEAN and span == 2 and size == 4 else 1


def draw_backward(
    grad_value: Tensor | None,  # [*sample, *batch, *event]
    grad_score: Tensor | None,  # [*sample, *batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    bounds: Any,
    used: Tensor | None,
    shape: torch.Size,
    ndims: int,
    *,
    point: int = MEDIAN,
    clamp: Any = None,
    raw: Mapping = NO_MAPPING,
    grad_mapped: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of `draw` by loc and scale, `[*batch, *event]`.

    Where no gradient flows through the value, that of its score is the Normal's before tanh:
    `normal.draw_backward` with `pathwise=False`.

    Args:
        grad_value: gradient of the value, None for none.
        grad_score: gradient of the log-density, None for none.
        loc: as in `draw`.
        scale: as in `draw`.
        bounds: as in `draw`.
        used: what `draw` has kept; None for a value that is not drawn.
        shape: as in `draw`.
        ndims: as in `draw`.
        point: as in `draw`.
        clamp: as in `draw`.
        raw: as in `draw`.
        grad_mapped: gradient of the standard deviation itself, None for none.
        into: `[*sample, *batch, 2 A]`, contiguous, gets both gradients side by side. Those of the
            samples are left to the caller to add up, in one sum in place of two.

    Returns:
        both; with `into` its halves, `[*sample, *batch, *event]`.
    """
    a = event_numel(loc.shape, ndims)
    out, out_row = FLAT, 0
    if into is None:
        grad_loc, grad_scale = gradients(shape, loc), gradients(shape, scale)
    else:
        grad_loc, grad_scale = into.chunk(2, -1)
        out, out_row = strided_rows(2 * a, into.dtype)
    total = grad_loc.numel()
    if total == 0:
        return torch.zeros_like(loc), torch.zeros_like(scale)
    span, half, mid, _, halves, mids = _span(bounds)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    upstream = parameter(grad_value if grad_value is not None else loc, ndims, False)
    further = parameter(grad_mapped if grad_mapped is not None else loc, ndims, False)
    kind, lo, hi, low, high = bounds_of(clamp)
    how = point if used is None else RANDOM
    programs, count, warps = flat_grid(total)
    warps *= threads(how, span, loc.element_size())
    with launching(loc):
        draw_backward_kernel[(programs,)](
            upstream.tensor, tail(grad_score), further.tensor, mu.tensor, sigma.tensor,
            grad_loc, grad_scale, low, high, lo, hi,
            halves, mids, half, mid, *raw.numbers, used,
            total, loc.numel() // a, upstream.row, upstream.column, mu.row, mu.column,
            sigma.row, sigma.column, further.row, further.column, out_row,
            A=a, COUNT=count, VALUE=upstream.layout, LOC=mu.layout, SCALE=sigma.layout,
            KIND=how, BY_VALUE=grad_value is not None,
            BY_SCORE=grad_score is not None, SPAN=span, LIMIT=_limit(loc, bounds.safe),
            CLAMP=kind, MAP=raw.kind, MAPPED=further.layout if grad_mapped is not None else -1,
            OUT=out, FAST=fast(loc), num_warps=warps,
        )  # fmt: skip
    if into is not None:
        return grad_loc, grad_scale
    return fold(grad_loc, loc), fold(grad_scale, scale)


def score(
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event]
    bounds: Any,
    ndims: int,
) -> Tensor:
    """The log-density of a given value, `[*sample, *batch]`, of the dtype that both promote to.

    Args:
        loc: mean before tanh; of one shape, dtype and device with `scale`.
        scale: standard deviation before tanh.
        value: what is scored; on or outside of the bounds as if just inside.
        bounds: the `Bounds` where the values lie, and whether |tanh| is limited.
        ndims: number of event dimensions, summed over.
    """
    shape = value.shape[: value.dim() - loc.dim()]
    batch = loc.shape[: loc.dim() - ndims]
    a = event_numel(loc.shape, ndims)
    dtype = torch.promote_types(loc.dtype, value.dtype)
    scores = torch.empty(shape + batch, dtype=dtype, device=loc.device)
    rows = loc.numel() // a if a else 0
    total_rows = rows * shape.numel()
    if total_rows == 0:
        return scores.zero_()
    span, half, mid, log_half, halves, mids = _span(bounds)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    given = parameter(value, ndims, False)
    grid = forward_grid(total_rows, a, vector_of(loc.dtype, value.dtype))
    with launching(loc):
        score_kernel[(grid.programs,)](
            mu.tensor, sigma.tensor, given.tensor, scores,
            halves, mids, half, mid, log_half,
            total_rows, rows, mu.row, mu.column, sigma.row, sigma.column, given.row, given.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, LOC=mu.layout, SCALE=sigma.layout,
            VALUE=given.layout, SPAN=span, LIMIT=_limit(loc, bounds.safe), FAST=fast(loc),
            num_warps=grid.warps,
        )  # fmt: skip
    return scores


def score_backward(
    grad_score: Tensor,  # [*sample, *batch]
    loc: Tensor,  # [*batch, *event]
    scale: Tensor,  # [*batch, *event]
    value: Tensor,  # [*sample, *batch, *event]
    bounds: Any,
    ndims: int,
    *,
    to_value: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `score` by loc, scale and value, of the shapes of these.

    Args:
        grad_score: gradient of the log-density.
        loc: as in `score`.
        scale: as in `score`.
        value: as in `score`.
        bounds: as in `score`.
        ndims: as in `score`.
        to_value: whether the gradient of the value is wanted.
    """
    shape = value.shape[: value.dim() - loc.dim()]
    a = event_numel(loc.shape, ndims)
    grad_loc, grad_scale = gradients(shape, loc), gradients(shape, scale)
    grad_value = (
        torch.empty(value.shape, dtype=value.dtype, device=loc.device) if to_value else None
    )
    total = grad_loc.numel()
    if total == 0:
        return torch.zeros_like(loc), torch.zeros_like(scale), grad_value
    span, half, mid, _, halves, mids = _span(bounds)
    mu = parameter(loc, ndims, bool(shape))
    sigma = parameter(scale, ndims, bool(shape))
    given = parameter(value, ndims, False)
    programs, count, warps = flat_grid(total)
    with launching(loc):
        score_backward_kernel[(programs,)](
            tail(grad_score), mu.tensor, sigma.tensor, given.tensor, grad_loc, grad_scale,
            grad_value, halves, mids, half, mid,
            total, loc.numel() // a, mu.row, mu.column, sigma.row, sigma.column,
            given.row, given.column,
            A=a, COUNT=count, LOC=mu.layout, SCALE=sigma.layout, VALUE=given.layout,
            TO_VALUE=to_value, SPAN=span, LIMIT=_limit(loc, bounds.safe), FAST=fast(loc),
            num_warps=warps,
        )  # fmt: skip
    return fold(grad_loc, loc), fold(grad_scale, scale), grad_value
