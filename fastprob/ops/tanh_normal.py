"""Sample and score of TanhNormal, with hand-written gradients.

For y = mid + half * tanh(x), x = loc + noise * scale, with log-density l and incoming gradients gy
and gl:

    g = gy * half * (1 - tanh(x)^2) + 2 tanh(x) * gl
    dloc = g            dscale = g * noise - gl / scale

`draw` and `score_given` are what the kernels serve: they take the noise from a counter-based state,
and squash, score and clamp in the same pass. Their operators have an implementation for every
device, in plain PyTorch where the kernels cannot run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprob import backend, lowering
from fastprob.ops import _random, normal
from fastprob.ops._autograd import over_event, sum_to, wants_function
from fastprob.ops._fused import Bounds as Clamped
from fastprob.ops._fused import (
    bounds_of,
    given,
    no_bounds,
    plain_eager,
    wanted,
    wants_gradient,
)
from fastprob.ops._register import lead, nothing, register
from fastprob.reference import normal as normal_reference
from fastprob.reference import tanh_normal as reference
from fastprob.reference._chunks import Fill
from fastprob.reference._reduce import outside_transforms

__all__ = [
    "MEAN",
    "MEDIAN",
    "MODE",
    "RANDOM",
    "Bounds",
    "bounds_of",
    "draw",
    "log_prob",
    "log_prob_before",
    "sample",
    "sample_score",
    "sample_score_pieces",
    "score_given",
    "served_bounds",
    "squash",
]


class Bounds(NamedTuple):
    """The interval of the values, as `mid + half * tanh(x)`; numbers or tensors.

    Bounds that are `learned` need gradients, which the hand-written backwards leave out.
    """

    half: Tensor | float
    mid: Tensor | float
    log_half: Tensor | float
    safe: bool
    learned: bool = False


class _Squash(torch.autograd.Function):
    """`mid + half * tanh(x)`, whose gradient is that of the value that was let through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: Bounds):
        y = torch.tanh(x)
        if bounds.safe:
            limit = reference.limit(x.dtype)
            y = y.clamp_(-limit, limit)
        ctx.save_for_backward(x, y)
        ctx.bounds = bounds
        return _scale(y, bounds)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        x, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = torch.tanh(x)
        return grads[0] * ctx.bounds.half * (1.0 - y * y), None


def _scale(y: Tensor, bounds: Bounds) -> Tensor:
    """`mid + half * y` into a new tensor."""
    half, mid = bounds.half, bounds.mid
    if not isinstance(half, float):
        return torch.addcmul(mid, y, half)  # type: ignore[arg-type]
    return torch.add(mid, y, alpha=half) if isinstance(mid, Tensor) else y.mul(half).add_(mid)


class _SampleScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, noise: Tensor, bounds: Bounds, ndims: int):
        x = normal_reference.sample(loc, scale, noise)
        value = reference.squash(x, bounds.half, bounds.mid, bounds.safe)
        ctx.save_for_backward(loc, scale, noise, x)
        ctx.bounds, ctx.ndims = bounds, ndims
        return value, reference.score(scale, noise, x, bounds.log_half, ndims)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        loc, scale, noise, x = ctx.saved_tensors
        grad_value, grad_score = grads
        if torch.is_grad_enabled():
            x = normal_reference.sample(loc, scale, noise)
        y = torch.tanh(x)
        grad_score = over_event(grad_score, ctx.ndims)
        # d(tanh) is that of the limited value, as upstream's; past the limit it is 2e-6 or less.
        limit = reference.limit(x.dtype) if ctx.bounds.safe else 1.0
        inner = y.clamp(-limit, limit)
        grad = torch.addcmul(
            grad_value * ctx.bounds.half * (1.0 - inner * inner), y, grad_score, value=2.0
        )
        grad_scale = torch.addcmul(grad * noise, grad_score, scale.reciprocal(), value=-1)
        return sum_to(grad, loc.shape), sum_to(grad_scale, scale.shape), None, None, None


def squash(x: Tensor, bounds: Bounds) -> Tensor:
    """`mid + half * tanh(x)`, `[*batch, *event]`."""
    if wants_function(x) and not bounds.learned:
        return _Squash.apply(x, bounds)
    return reference.squash(x, bounds.half, bounds.mid, bounds.safe)


def sample(loc: Tensor, scale: Tensor, noise: Tensor, bounds: Bounds) -> Tensor:
    """Reparameterized value, `[*sample, *batch, *event]`."""
    return squash(normal.sample(loc, scale, noise), bounds)


def sample_score(
    loc: Tensor, scale: Tensor, noise: Tensor, bounds: Bounds, ndims: int
) -> tuple[Tensor, Tensor]:
    """Reparameterized value and its log-density, from one draw of noise.

    Args:
        loc: mean before tanh, `[*batch, *event]`.
        scale: standard deviation before tanh, `[*batch, *event]`.
        noise: standard normal, `[*sample, *batch, *event]`.
        bounds: interval of the values.
        ndims: number of event dimensions.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`.
    """
    if wants_function(loc, scale) and not bounds.learned:
        return _SampleScore.apply(loc, scale, noise, bounds, ndims)
    if torch.compiler.is_compiling():
        return reference.sample_score(
            loc, scale, noise, bounds.half, bounds.mid, bounds.log_half, bounds.safe, ndims
        )
    x = normal_reference.sample(loc, scale, noise)
    # The score first: x is spent then, and its memory becomes the value's where no gradient needs
    # it.
    score = reference.score(scale, noise, x, bounds.log_half, ndims)
    return reference.squash(x, bounds.half, bounds.mid, bounds.safe, spent=True), score


def sample_score_pieces(
    loc: Tensor, scale: Tensor, fill: Fill, bounds: Bounds, ndims: int, rows: int
) -> tuple[Tensor, Tensor]:
    """`sample_score` of a large draw without gradients, piece by piece; bounds are numbers."""
    half, mid = bounds.half, bounds.mid
    assert isinstance(half, float) and isinstance(mid, float)
    return reference.sample_score_pieces(loc, scale, fill, half, mid, bounds.safe, ndims, rows)


def log_prob_before(loc: Tensor, scale: Tensor, x: Tensor, bounds: Bounds, ndims: int) -> Tensor:
    """Log-density at `squash(x)`, `[*sample, *batch]`, from the value before tanh."""
    z = normal_reference.standardize(loc, scale, x)
    return reference.score(scale, z, x, bounds.log_half, ndims)


def log_prob(loc: Tensor, scale: Tensor, value: Tensor, bounds: Bounds, ndims: int) -> Tensor:
    """Log-density of `value`, `[*sample, *batch]`."""
    x = reference.unsquash(value, bounds.half, bounds.mid, bounds.safe)
    if x.requires_grad or not wants_function(loc, scale):
        return log_prob_before(loc, scale, x, bounds, ndims)
    # The Jacobian depends on the value alone: the gradients are those of a Normal.
    jacobian = reference.log_jacobian(x, bounds.log_half, ndims)
    return normal.log_prob(loc, scale, x, ndims) - jacobian


def mode(loc: Tensor, scale: Tensor) -> Tensor:
    """The x at the highest density of tanh(x), `[*batch, *event]`; differentiable once."""
    in_graph = torch.compiler.is_compiling() and not backend.is_exporting() and outside_transforms()
    # A graph with gradients would run all steps again in its backward pass.
    return reference.mode(loc, scale, torch.ops.fastprob.kept if in_graph else None)


def _kept_fake(x):
    lowering.offer_kept(torch.ops.fastprob.kept.default)
    return torch.empty_like(x)


register(
    "kept",
    "(Tensor x) -> Tensor",
    torch.clone,
    _kept_fake,
    vmap=lambda info, in_dims, x: (torch.ops.fastprob.kept(x), in_dims[0]),
)


# the kernels' operators ---------------------------------------------------------------------

# How a value is chosen, as the kernels number it.
RANDOM, MEDIAN, MEAN, MODE = reference.KINDS


def served_bounds(bounds: Bounds, loc: Tensor, ndims: int) -> Bounds | None:
    """The interval as the kernels read it: numbers, or contiguous tensors of the event.

    Args:
        bounds: the interval.
        loc: a parameter, `[*batch, *event]`.
        ndims: number of event dimensions.

    Returns:
        None where the kernels do not serve it: a bound that is learned, or one that differs along
        the batch.
    """
    half, mid = bounds.half, bounds.mid
    if not isinstance(half, Tensor) or not isinstance(mid, Tensor):
        return None if isinstance(half, Tensor) or isinstance(mid, Tensor) else bounds
    if bounds.learned or half.dim() > ndims:
        return None
    event = loc.shape[loc.dim() - ndims :]
    half, mid = (t.expand(event).contiguous() for t in (half, mid))
    return bounds._replace(half=half, mid=mid)


def draw(
    loc: Tensor,
    scale: Tensor,
    bounds: Bounds,
    shape: torch.Size,
    ndims: int,
    generator: Any = None,
    *,
    kind: int = RANDOM,
    score: bool = True,
    pathwise: bool = True,
    clamp: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """A value and its log-density, in one launch where the kernels serve it.

    Args:
        loc: mean before tanh, `[*batch, *event]`.
        scale: standard deviation before tanh, of the same shape, dtype and device.
        bounds: interval of the values, from `served_bounds`.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions.
        generator: a `CounterStream`, a `torch.Generator`, or None for torch's default one.
        kind: RANDOM, MEDIAN (the squashed mean), MEAN or MODE (of what is squashed).
        score: whether the log-density is wanted.
        pathwise: whether gradients flow through a value that is drawn; through others they do.
        clamp: what the value is clamped to after it was scored.

    Returns:
        value `[*shape, *batch, *event]` and log-density `[*shape, *batch]`, or None.
    """
    random = kind == RANDOM
    pathwise = pathwise or not random
    if not plain_eager():
        state = _random.device_pair(loc, generator) if random and generator is not None else None
        value, scores, _ = torch.ops.fastprob.tanh_normal_draw(
            loc, scale, state, list(shape), ndims, kind, score, pathwise,
            *as_arguments(bounds), *(clamp or no_bounds),
        )  # fmt: skip
        return value if pathwise else value.detach(), scores if score else None
    state = _random.state_for(loc, generator) if random else None
    if wants_gradient(loc, scale):
        return _Draw.apply(loc, scale, state, bounds, shape, ndims, kind, score, pathwise, clamp)
    value, scores, _ = backend.kernels("tanh_normal").draw(
        loc, scale, bounds, shape, ndims, state=state, point=kind, score=score, clamp=clamp
    )
    return value, scores


def score_given(loc: Tensor, scale: Tensor, value: Tensor, bounds: Bounds, ndims: int) -> Tensor:
    """The log-density of a given value, `[*sample, *batch]`, in one launch.

    Args:
        loc: mean before tanh, `[*batch, *event]`.
        scale: standard deviation before tanh, of the same shape, dtype and device.
        value: `[*sample, *batch, *event]`.
        bounds: interval of the values, from `served_bounds`.
        ndims: number of event dimensions.

    Raises:
        ValueError: if the value is on another device, or of a shape that does not broadcast.
    """
    loc, scale, value = given("TanhNormal", loc, scale, value)
    if not plain_eager():
        return torch.ops.fastprob.tanh_normal_score(loc, scale, value, ndims, *as_arguments(bounds))
    if wants_gradient(loc, scale, value):
        return _ScoreGiven.apply(loc, scale, value, bounds, ndims)
    return backend.kernels("tanh_normal").score(loc, scale, value, bounds, ndims)


def as_arguments(bounds: Bounds) -> tuple[Any, Any, Any, bool]:
    """The interval as arguments of an operator: numbers, half widths, middles and `safe`."""
    if isinstance(bounds.half, Tensor):
        return None, bounds.half, bounds.mid, bounds.safe
    return (bounds.half, bounds.mid), None, None, bounds.safe


def from_arguments(interval: Any, halves: Any, mids: Any, safe: bool) -> Bounds:
    """The inverse of `as_arguments`."""
    if interval is None:
        return Bounds(halves, mids, torch.log(halves), safe)
    half, mid = interval
    return Bounds(half, mid, math.log(half), safe)


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loc, scale, state, bounds, shape, ndims, kind, score, pathwise, clamp):
        ctx.set_materialize_grads(False)
        value, scores, used = backend.kernels("tanh_normal").draw(
            loc, scale, bounds, shape, ndims, state=state, point=kind, score=score, clamp=clamp,
            keep=True,
        )  # fmt: skip
        ctx.save_for_backward(loc, scale, used)
        ctx.rest = bounds, shape, ndims, kind, pathwise, clamp
        if not pathwise:
            ctx.mark_non_differentiable(value)
        return value, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return *_draw_backward(*grads, *ctx.saved_tensors, *ctx.rest), *(None,) * 8


def _draw_backward(
    grad_value, grad_score, loc, scale, used, bounds, shape, ndims, kind, pathwise, clamp
) -> tuple[Tensor, Tensor]:
    if not pathwise:
        # The Jacobian depends on the value alone: the gradients are those of a Normal.
        return backend.kernels("normal").draw_backward(
            None, grad_score, None, loc, scale, used, shape, ndims, pathwise=False
        )
    return backend.kernels("tanh_normal").draw_backward(
        grad_value, grad_score, loc, scale, bounds, used, shape, ndims, point=kind, clamp=clamp
    )


class _ScoreGiven(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loc, scale, value, bounds, ndims):
        ctx.save_for_backward(loc, scale, value)
        ctx.bounds, ctx.ndims = bounds, ndims
        return backend.kernels("tanh_normal").score(loc, scale, value, bounds, ndims)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        made = backend.kernels("tanh_normal").score_backward(
            *grads, *ctx.saved_tensors, ctx.bounds, ctx.ndims, to_value=ctx.needs_input_grad[2]
        )
        return *made, None, None


def _draw_op(
    loc, scale, state, sample, ndims, kind, score, pathwise, interval, halves, mids, safe,
    limits, low, high,
):  # fmt: skip
    shape = torch.Size(sample)
    random = kind == RANDOM
    bounds = from_arguments(interval, halves, mids, safe)
    clamp = Clamped(limits, low, high)
    if backend.serves(loc):
        source = None
        if random:
            source = _random.state_for(loc, None) if state is None else _random.given_pair(state)
        value, scores, used = backend.kernels("tanh_normal").draw(
            loc, scale, bounds, shape, ndims, state=source, point=kind, score=score, clamp=clamp,
            keep=random,
        )  # fmt: skip
    else:
        used = None
        if random:
            used = _random.device_pair(loc, None) if state is None else state.clone()
        value, scores = reference.draw(
            loc, scale, used, shape, ndims, score, bounds.half, bounds.mid, safe, *clamp, kind
        )
    return (
        value,
        wanted(scores, loc),
        loc.new_empty(0, dtype=torch.int64) if used is None else used,
    )


def _draw_fake(loc, scale, state, sample, ndims, kind, score, *_):
    batch = loc.shape[: loc.dim() - ndims]
    return (
        loc.new_empty((*sample, *loc.shape)),
        loc.new_empty((*sample, *batch)) if score else nothing(loc),
        loc.new_empty(2 if kind == RANDOM else 0, dtype=torch.int64),
    )


def _draw_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    loc, scale, _, ctx.sample, ctx.ndims, ctx.kind, ctx.score, ctx.pathwise, *rest = inputs
    ctx.interval, halves, mids, ctx.safe, ctx.limits, low, high = rest
    ctx.pathwise = ctx.pathwise or ctx.kind != RANDOM
    ctx.save_for_backward(loc, scale, output[2], halves, mids, low, high)


def _draw_gradient(ctx, grad_value, grad_score, _):
    loc, scale, used, halves, mids, low, high = ctx.saved_tensors
    made = torch.ops.fastprob.tanh_normal_draw_backward(
        grad_value if ctx.pathwise else None, grad_score if ctx.score else None, loc, scale,
        used if ctx.kind == RANDOM else None, ctx.sample, ctx.ndims, ctx.kind, ctx.pathwise,
        ctx.interval, halves, mids, ctx.safe, ctx.limits, low, high,
    )  # fmt: skip
    return *made, *(None,) * 13


def _draw_backward_op(
    grad_value, grad_score, loc, scale, used, sample, ndims, kind, pathwise, interval, halves,
    mids, safe, limits, low, high,
):  # fmt: skip
    shape = torch.Size(sample)
    bounds = from_arguments(interval, halves, mids, safe)
    clamp = Clamped(limits, low, high)
    if backend.serves(loc):
        return _draw_backward(
            grad_value, grad_score, loc, scale, used, bounds, shape, ndims, kind, pathwise, clamp
        )
    return reference.draw_backward(
        grad_value, grad_score, loc, scale, used, shape, ndims, pathwise, bounds.half, bounds.mid,
        safe, *clamp, kind,
    )  # fmt: skip


def _draw_backward_fake(grad_value, grad_score, loc, scale, *_):
    return _like(loc), _like(scale)


def _like(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _score_op(loc, scale, value, ndims, interval, halves, mids, safe):
    bounds = from_arguments(interval, halves, mids, safe)
    if backend.serves(loc):
        return backend.kernels("tanh_normal").score(loc, scale, value, bounds, ndims)
    x = reference.unsquash(value, bounds.half, bounds.mid, safe)
    made = log_prob_before(loc, scale, x, bounds, ndims)
    return made.to(torch.promote_types(loc.dtype, value.dtype))


def _score_fake(loc, scale, value, ndims, *_):
    dtype = torch.promote_types(loc.dtype, value.dtype)
    return loc.new_empty(value.shape[: value.dim() - ndims], dtype=dtype)


def _score_setup(ctx, inputs, output):
    loc, scale, value, ctx.ndims, ctx.interval, halves, mids, ctx.safe = inputs
    ctx.save_for_backward(loc, scale, value, halves, mids)


def _score_gradient(ctx, grad_score):
    loc, scale, value, halves, mids = ctx.saved_tensors
    to_value = ctx.needs_input_grad[2]
    *made, grad_value = torch.ops.fastprob.tanh_normal_score_backward(
        grad_score, loc, scale, value, ctx.ndims, ctx.interval, halves, mids, ctx.safe, to_value
    )
    return *made, grad_value if to_value else None, *(None,) * 5


def _score_backward_op(
    grad_score, loc, scale, value, ndims, interval, halves, mids, safe, to_value
):  # fmt: skip
    bounds = from_arguments(interval, halves, mids, safe)
    if backend.serves(loc):
        made = backend.kernels("tanh_normal").score_backward(
            grad_score, loc, scale, value, bounds, ndims, to_value=to_value
        )
    else:
        made = reference.score_backward(
            grad_score, loc, scale, value, ndims, bounds.half, bounds.mid, safe, to_value
        )
    return *made[:2], wanted(made[2], value)


def _score_backward_fake(
    grad_score, loc, scale, value, ndims, interval, halves, mids, safe, to_value
):  # fmt: skip
    return _like(loc), _like(scale), _like(value) if to_value else nothing(value)


def _score_vmap(info, in_dims, loc, scale, value, ndims, *interval):
    if in_dims[5] is not None or in_dims[6] is not None:
        raise RuntimeError(
            "fastprob::tanh_normal_score under vmap needs the same bounds for the whole batch"
        )
    value = lead(value, in_dims[2], info.batch_size)
    # Sample dimensions stand in front of the batch, and the new dimension in front of them.
    wide = [
        t.reshape(t.shape[:1] + (1,) * (value.dim() - t.dim()) + t.shape[1:]).expand(value.shape)
        for t in (lead(loc, in_dims[0], info.batch_size), lead(scale, in_dims[1], info.batch_size))
    ]
    return torch.ops.fastprob.tanh_normal_score(*wide, value, ndims, *interval), 0


_INTERVAL = "float[]? interval, Tensor? halves, Tensor? mids, bool safe"
_CLAMP = "float[]? limits, Tensor? low, Tensor? high"

register(
    "tanh_normal_draw_backward",
    "(Tensor? grad_value, Tensor? grad_score, Tensor loc, Tensor scale, Tensor? used, "
    f"SymInt[] sample, int ndims, int kind, bool pathwise, {_INTERVAL}, {_CLAMP}) -> "
    "(Tensor, Tensor)",
    _draw_backward_op,
    _draw_backward_fake,
)
register(
    "tanh_normal_draw",
    "(Tensor loc, Tensor scale, Tensor? state, SymInt[] sample, int ndims, int kind, "
    f"bool score, bool pathwise, {_INTERVAL}, {_CLAMP}) -> (Tensor, Tensor, Tensor)",
    _draw_op,
    _draw_fake,
    setup=_draw_setup,
    backward=_draw_gradient,
    batched=(0, 1),
    out_dims=lambda loc, scale, state, sample, ndims, kind, score, *_: (
        len(sample),
        len(sample) if score else None,
        None,
    ),
    random=lambda loc, scale, state, sample, ndims, kind, *_: kind == RANDOM,
)
register(
    "tanh_normal_score_backward",
    f"(Tensor grad_score, Tensor loc, Tensor scale, Tensor value, int ndims, {_INTERVAL}, "
    "bool to_value) -> (Tensor, Tensor, Tensor)",
    _score_backward_op,
    _score_backward_fake,
)
register(
    "tanh_normal_score",
    f"(Tensor loc, Tensor scale, Tensor value, int ndims, {_INTERVAL}) -> Tensor",
    _score_op,
    _score_fake,
    setup=_score_setup,
    backward=_score_gradient,
    vmap=_score_vmap,
)
