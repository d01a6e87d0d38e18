"""A draw from the raw output of a network: the scale is mapped in front of it, in the same launch.

`raw` holds loc and the raw scale side by side, `[*batch, 2 A]`, as tensordict's
NormalParamExtractor takes it. Reading it and writing scale and value moves 16 bytes an element in
fp32; a kernel of its own for the scale moves 8 more. Of several samples only the first writes the
scale, and the gradients of loc and the raw scale are added up in one launch, not in two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprob import backend
from fastprob.ops import _random, tanh_normal
from fastprob.ops._fused import Bounds, no_bounds, plain_eager, wanted, wants_gradient
from fastprob.ops._register import nothing, register
from fastprob.ops.tanh_normal import Bounds as Interval
from fastprob.reference import extractor as reference
from fastprob.reference import normal as normal_reference
from fastprob.reference import tanh_normal as tanh_reference

SOFTPLUS, EXP = reference.SOFTPLUS, reference.EXP
_ONE = torch.Size()
# How a value is chosen, as the kernels number it. A Normal's median, mean and mode are one.
RANDOM, MEDIAN, MEAN, MODE = tanh_reference.KINDS


class Mapping(NamedTuple):
    """How a raw value becomes a scale.

    Attributes:
        kind: 1 for softplus, 2 for exp.
        bias: added to the raw value of a softplus.
        least: added to a softplus.
        floor: lower bound of the scale.
    """

    kind: int
    bias: float
    least: float
    floor: float


def scale(raw: Tensor, mapping: Mapping) -> Tensor:
    """The scale alone, `[*batch, A]`, of `[*batch, 2 A]`."""
    return reference.scale(raw.chunk(2, -1)[1], *mapping)


def draw(
    raw: Tensor,
    mapping: Mapping,
    generator: Any = None,
    *,
    shape: torch.Size = _ONE,
    kind: int = RANDOM,
    score: bool = True,
    pathwise: bool = True,
    bounds: Bounds | None = None,
    interval: Interval | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A value with one event dimension, its log-density, and the scale.

    Args:
        raw: `[*batch, 2 A]`.
        mapping: how its second half becomes the scale.
        generator: a `CounterStream`, a `torch.Generator`, or None for torch's default one.
        shape: sample dimensions in front of the value.
        kind: RANDOM, MEDIAN, MEAN or MODE.
        score: whether the log-density is wanted.
        pathwise: whether gradients flow through a value that is drawn; through others they do.
        bounds: what the value is clamped to after it was scored.
        interval: where a TanhNormal's values lie, from `served_bounds`; None for a Normal.

    Returns:
        value `[*shape, *batch, A]`, log-density `[*shape, *batch]` or None, scale `[*batch, A]`.
    """
    random = kind == RANDOM
    pathwise = pathwise or not random
    if not plain_eager():
        state = _random.device_pair(raw, generator) if random and generator is not None else None
        value, scores, scales, _ = torch.ops.fastprob.extracted_draw(
            raw, state, list(shape), kind, score, pathwise, list(mapping), *(bounds or no_bounds),
            *_spread(interval),
        )  # fmt: skip
        return value if pathwise else value.detach(), scores if score else None, scales
    state = _random.state_for(raw, generator) if random else None
    if wants_gradient(raw):
        return _Draw.apply(raw, state, shape, kind, score, pathwise, mapping, bounds, interval)
    value, scores, scales, _ = _launch(
        raw, state, shape, kind, score, mapping, bounds, interval, False
    )
    return value, scores, scales


def _spread(interval: Interval | None) -> tuple[Any, Any, Any, bool]:
    """An interval as arguments of an operator: numbers, half widths, middles and `safe`."""
    return (None, None, None, False) if interval is None else tanh_normal.as_arguments(interval)


def _gather(numbers: Any, halves: Any, mids: Any, safe: bool) -> Interval | None:
    """The inverse of `_spread`."""
    if numbers is None and halves is None:
        return None
    return tanh_normal.from_arguments(numbers, halves, mids, safe)


def _launch(raw, state, shape, kind, score, mapping, bounds, interval, keep):
    loc, rough = raw.chunk(2, -1)
    scales = torch.empty_like(loc, memory_format=torch.contiguous_format)
    wanted = {
        "state": state, "score": score, "clamp": bounds, "keep": keep, "mapped": scales,
        "raw": backend.kernels("_launch").Mapping(*mapping),
    }  # fmt: skip
    if interval is None:
        value, scores, _, used = backend.kernels("normal").draw(loc, rough, shape, 1, **wanted)
    else:
        value, scores, used = backend.kernels("tanh_normal").draw(
            loc, rough, interval, shape, 1, point=kind, **wanted
        )
    if 0 in shape:
        # Nothing was launched that could have mapped it.
        scales = reference.scale(rough, *mapping)
    return value, scores, scales, used


def _launch_backward(grads, raw, used, shape, kind, pathwise, mapping, bounds, interval):
    """The gradient of `raw`; `grads` those of value, log-density and scale."""
    launch = backend.kernels("_launch")
    loc, rough = raw.chunk(2, -1)
    grad_value, grad_score, grad_scale = grads
    into = launch.gradients(shape, raw)
    if into.numel() == 0:
        # Without a sample the scale alone has one.
        by_loc = torch.zeros_like(loc)
        by_scale = by_loc if grad_scale is None else grad_scale * reference.slope(rough, *mapping)
        return torch.cat((by_loc, by_scale), -1)
    given = {"raw": launch.Mapping(*mapping), "grad_mapped": grad_scale, "into": into}
    if interval is None or not pathwise:
        # Of a detached value the Jacobian is a constant: what is left is the Normal's.
        backend.kernels("normal").draw_backward(
            grad_value, grad_score, None, loc, rough, used, shape, 1, pathwise=pathwise,
            clamp=bounds, **given,
        )  # fmt: skip
    else:
        backend.kernels("tanh_normal").draw_backward(
            grad_value, grad_score, loc, rough, interval, used, shape, 1, point=kind,
            clamp=bounds, **given,
        )  # fmt: skip
    return launch.fold(into, raw)


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, state, shape, kind, score, pathwise, mapping, bounds, interval):
        ctx.set_materialize_grads(False)
        value, scores, scales, used = _launch(
            raw, state, shape, kind, score, mapping, bounds, interval, True
        )
        ctx.save_for_backward(raw, used)
        ctx.rest = shape, kind, pathwise, mapping, bounds, interval
        if not pathwise:
            ctx.mark_non_differentiable(value)
        return value, scores, scales

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        raw, used = ctx.saved_tensors
        return _launch_backward(grads, raw, used, *ctx.rest), *(None,) * 8


def _mapping(numbers):
    return Mapping(int(numbers[0]), *numbers[1:])


def _draw_op(raw, state, sample, kind, score, pathwise, mapping, limits, low, high, *interval):
    shape = torch.Size(sample)
    bounds = Bounds(limits, low, high)
    span = _gather(*interval)
    made = _mapping(mapping)
    random = kind == RANDOM
    if backend.serves(raw):
        source = None
        if random:
            source = _random.state_for(raw, None) if state is None else _random.given_pair(state)
        value, scores, scales, used = _launch(
            raw, source, shape, kind, score, made, bounds, span, random
        )
    else:
        used = None
        if random:
            used = _random.device_pair(raw, None) if state is None else state.clone()
        loc, rough = raw.chunk(2, -1)
        scales = reference.scale(rough, *made)
        if span is None:
            value, scores, _ = normal_reference.draw(
                loc, scales, used, shape, 1, score, False, *bounds
            )
        else:
            value, scores = tanh_reference.draw(
                loc, scales, used, shape, 1, score, span.half, span.mid, span.safe, *bounds, kind
            )  # fmt: skip
    return (
        value,
        wanted(scores, raw),
        scales,
        raw.new_empty(0, dtype=torch.int64) if used is None else used,
    )


def _draw_fake(raw, state, sample, kind, score, *_):
    batch, a = raw.shape[:-1], raw.shape[-1] // 2
    return (
        raw.new_empty((*sample, *batch, a)),
        raw.new_empty((*sample, *batch)) if score else nothing(raw),
        raw.new_empty((*batch, a)),
        raw.new_empty(2 if kind == RANDOM else 0, dtype=torch.int64),
    )


def _draw_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    raw, _, ctx.sample, ctx.kind, ctx.score, ctx.pathwise, ctx.mapping, ctx.limits, *rest = inputs
    ctx.pathwise = ctx.pathwise or ctx.kind != RANDOM
    low, high, ctx.interval, halves, mids, ctx.safe = rest
    ctx.save_for_backward(raw, output[3], low, high, halves, mids)


def _draw_gradient(ctx, grad_value, grad_score, grad_scale, _):
    raw, used, low, high, halves, mids = ctx.saved_tensors
    made = torch.ops.fastprob.extracted_draw_backward(
        grad_value if ctx.pathwise else None, grad_score if ctx.score else None, grad_scale, raw,
        used if ctx.kind == RANDOM else None, ctx.sample, ctx.kind, ctx.pathwise, ctx.mapping,
        ctx.limits, low, high, ctx.interval, halves, mids, ctx.safe,
    )  # fmt: skip
    return made, *(None,) * 13


def _draw_backward_op(
    grad_value, grad_score, grad_scale, raw, used, sample, kind, pathwise, mapping, limits, low,
    high, *interval,
):  # fmt: skip
    shape = torch.Size(sample)
    bounds = Bounds(limits, low, high)
    made, span = _mapping(mapping), _gather(*interval)
    if backend.serves(raw):
        return _launch_backward(
            (grad_value, grad_score, grad_scale), raw, used, shape, kind, pathwise, made, bounds,
            span,
        )  # fmt: skip
    loc, rough = raw.chunk(2, -1)
    scales = reference.scale(rough, *made)
    if span is None:
        by_loc, by_scale = normal_reference.draw_backward(
            grad_value, grad_score, None, loc, scales, used, shape, 1, pathwise, *bounds
        )
    else:
        by_loc, by_scale = tanh_reference.draw_backward(
            grad_value, grad_score, loc, scales, used, shape, 1, pathwise, span.half, span.mid,
            span.safe, *bounds, kind,
        )  # fmt: skip
    if grad_scale is not None:
        by_scale = by_scale + grad_scale
    return torch.cat((by_loc, by_scale * reference.slope(rough, *made)), -1)


def _draw_backward_fake(grad_value, grad_score, grad_scale, raw, *_):
    return raw.new_empty(raw.shape)


register(
    "extracted_draw_backward",
    "(Tensor? grad_value, Tensor? grad_score, Tensor? grad_scale, Tensor raw, Tensor? used, "
    "SymInt[] sample, int kind, bool pathwise, float[] mapping, float[]? limits, Tensor? low, "
    "Tensor? high, float[]? interval, Tensor? halves, Tensor? mids, bool safe) -> Tensor",
    _draw_backward_op,
    _draw_backward_fake,
)
register(
    "extracted_draw",
    "(Tensor raw, Tensor? state, SymInt[] sample, int kind, bool score, bool pathwise, "
    "float[] mapping, float[]? limits, Tensor? low, Tensor? high, float[]? interval, "
    "Tensor? halves, Tensor? mids, bool safe) -> (Tensor, Tensor, Tensor, Tensor)",
    _draw_op,
    _draw_fake,
    setup=_draw_setup,
    backward=_draw_gradient,
    batched=(0,),
    out_dims=lambda raw, state, sample, kind, score, *_: (
        len(sample),
        len(sample) if score else None,
        0,
        None,
    ),
    random=lambda raw, state, sample, kind, *_: kind == RANDOM,
)
