"""A draw from the raw output of a network: the scale is mapped in front of it, in the same launch.

`raw` holds loc and the raw scale side by side, `[*batch, 2 A]`, as tensordict's
NormalParamExtractor takes it. Reading it and writing scale and value moves 16 bytes an element in
fp32; a kernel of its own for the scale moves 8 more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprob import backend
from fastprob.ops import _random
from fastprob.ops._fused import Bounds, no_bounds, plain_eager, wanted, wants_gradient
from fastprob.ops._register import nothing, register
from fastprob.reference import extractor as reference
from fastprob.reference import normal as normal_reference

SOFTPLUS, EXP = reference.SOFTPLUS, reference.EXP


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
    random: bool = True,
    score: bool = True,
    pathwise: bool = True,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A value of a Normal with one event dimension, its log-density, and the scale.

    Args:
        raw: `[*batch, 2 A]`.
        mapping: how its second half becomes the scale.
        generator: a `CounterStream`, a `torch.Generator`, or None for torch's default one.
        random: whether the value is drawn; if not, it is the mean.
        score: whether the log-density is wanted.
        pathwise: whether gradients flow through the value.
        bounds: what the value is clamped to after it was scored.

    Returns:
        value `[*batch, A]`, log-density `[*batch]` or None, scale `[*batch, A]`.
    """
    if not plain_eager():
        state = _random.device_pair(raw, generator) if random and generator is not None else None
        value, scores, scales, _ = torch.ops.fastprob.normal_extracted_draw(
            raw, state, random, score, pathwise, list(mapping), *(bounds or no_bounds)
        )
        return value if pathwise else value.detach(), scores if score else None, scales
    state = _random.state_for(raw, generator) if random else None
    if wants_gradient(raw):
        return _Draw.apply(raw, state, score, pathwise, mapping, bounds)
    value, scores, scales, _ = _launch(raw, state, score, mapping, bounds, False)
    return value, scores, scales


def _launch(raw, state, score, mapping, bounds, keep):
    loc, rough = raw.chunk(2, -1)
    scales = torch.empty_like(loc, memory_format=torch.contiguous_format)
    value, scores, _, used = backend.kernels("normal").draw(
        loc, rough, torch.Size(), 1, state=state, score=score, clamp=bounds, keep=keep,
        raw=backend.kernels("_launch").Mapping(*mapping), mapped=scales,
    )  # fmt: skip
    return value, scores, scales, used


def _launch_backward(grads, raw, used, pathwise, mapping, bounds):
    """The gradient of `raw`; `grads` those of value, log-density and scale."""
    loc, rough = raw.chunk(2, -1)
    into = torch.empty_like(raw, memory_format=torch.contiguous_format)
    if into.numel() == 0:
        return into
    backend.kernels("normal").draw_backward(
        grads[0], grads[1], None, loc, rough, used, torch.Size(), 1, pathwise=pathwise,
        clamp=bounds, raw=backend.kernels("_launch").Mapping(*mapping), grad_mapped=grads[2],
        into=into,
    )  # fmt: skip
    return into


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, state, score, pathwise, mapping, bounds):
        ctx.set_materialize_grads(False)
        value, scores, scales, used = _launch(raw, state, score, mapping, bounds, True)
        ctx.save_for_backward(raw, used)
        ctx.pathwise, ctx.mapping, ctx.bounds = pathwise, mapping, bounds
        if not pathwise:
            ctx.mark_non_differentiable(value)
        return value, scores, scales

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        raw, used = ctx.saved_tensors
        made = _launch_backward(grads, raw, used, ctx.pathwise, ctx.mapping, ctx.bounds)
        return made, *(None,) * 5


def _mapping(numbers):
    return Mapping(int(numbers[0]), *numbers[1:])


def _draw_op(raw, state, random, score, pathwise, mapping, limits, low, high):
    bounds = Bounds(limits, low, high)
    made = _mapping(mapping)
    if backend.serves(raw):
        source = None
        if random:
            source = _random.state_for(raw, None) if state is None else _random.given_pair(state)
        value, scores, scales, used = _launch(raw, source, score, made, bounds, random)
    else:
        used = None
        if random:
            used = _random.device_pair(raw, None) if state is None else state.clone()
        loc, rough = raw.chunk(2, -1)
        scales = reference.scale(rough, *made)
        value, scores, _ = normal_reference.draw(
            loc, scales, used, torch.Size(), 1, score, False, *bounds
        )
    return (
        value,
        wanted(scores, raw),
        scales,
        raw.new_empty(0, dtype=torch.int64) if used is None else used,
    )


def _draw_fake(raw, state, random, score, pathwise, mapping, limits, low, high):
    shape = (*raw.shape[:-1], raw.shape[-1] // 2)
    return (
        raw.new_empty(shape),
        raw.new_empty(shape[:-1]) if score else nothing(raw),
        raw.new_empty(shape),
        raw.new_empty(2 if random else 0, dtype=torch.int64),
    )


def _draw_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    raw, _, ctx.random, ctx.score, ctx.pathwise, ctx.mapping, ctx.limits, low, high = inputs
    ctx.save_for_backward(raw, output[3], low, high)


def _draw_gradient(ctx, grad_value, grad_score, grad_scale, _):
    raw, used, low, high = ctx.saved_tensors
    made = torch.ops.fastprob.normal_extracted_draw_backward(
        grad_value if ctx.pathwise else None, grad_score if ctx.score else None, grad_scale, raw,
        used if ctx.random else None, ctx.pathwise, ctx.mapping, ctx.limits, low, high,
    )  # fmt: skip
    return made, *(None,) * 8


def _draw_backward_op(
    grad_value, grad_score, grad_scale, raw, used, pathwise, mapping, limits, low, high
):
    bounds = Bounds(limits, low, high)
    made = _mapping(mapping)
    if backend.serves(raw):
        return _launch_backward(
            (grad_value, grad_score, grad_scale), raw, used, pathwise, made, bounds
        )
    loc, rough = raw.chunk(2, -1)
    by_loc, by_scale = normal_reference.draw_backward(
        grad_value, grad_score, None, loc, reference.scale(rough, *made), used, torch.Size(), 1,
        pathwise, *bounds,
    )  # fmt: skip
    if grad_scale is not None:
        by_scale = by_scale + grad_scale
    return torch.cat((by_loc, by_scale * reference.slope(rough, *made)), -1)


def _draw_backward_fake(
    grad_value, grad_score, grad_scale, raw, used, pathwise, mapping, limits, low, high
):
    return raw.new_empty(raw.shape)


register(
    "normal_extracted_draw_backward",
    "(Tensor? grad_value, Tensor? grad_score, Tensor? grad_scale, Tensor raw, Tensor? used, "
    "bool pathwise, float[] mapping, float[]? limits, Tensor? low, Tensor? high) -> Tensor",
    _draw_backward_op,
    _draw_backward_fake,
)
register(
    "normal_extracted_draw",
    "(Tensor raw, Tensor? state, bool random, bool score, bool pathwise, float[] mapping, "
    "float[]? limits, Tensor? low, Tensor? high) -> (Tensor, Tensor, Tensor, Tensor)",
    _draw_op,
    _draw_fake,
    setup=_draw_setup,
    backward=_draw_gradient,
    batched=(0,),
    out_dims=lambda raw, state, random, score, *_: (0, 0 if score else None, 0, None),
    random=True,
)
