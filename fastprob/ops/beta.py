"""Sample, score and entropy of Beta, with hand-written gradients.

For a = concentration1 and b = concentration0:

    d log p / da = log(x) - psi(a) + psi(a + b)         d log p / db likewise with 1 - x
    d log p / dx = (a - 1) / x - (b - 1) / (1 - x)
    dH / da = (a + b - 2) psi'(a + b) - (a - 1) psi'(a)

The pathwise derivative of a draw is ATen's, for a Dirichlet of two parts.

`draw` and `score_given` are what the kernels serve: they draw from a counter-based state, and
clamp, score and give the entropy in the same pass. Their operators have an implementation for
every device, in plain PyTorch where the kernels cannot run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastprob import backend, rng
from fastprob.ops import _random
from fastprob.ops._autograd import over_event, sum_to, wants_function
from fastprob.ops._fused import (
    Bounds,
    bounds_of,
    given,
    no_bounds,
    plain_eager,
    wanted,
    wants_gradient,
)
from fastprob.ops._register import lead, nothing, register
from fastprob.reference import beta as reference
from fastprob.reference import normal as normal_reference
from fastprob.reference import philox
from fastprob.reference._reduce import differentiated, plain_tensors_only

__all__ = [
    "GIVEN",
    "MEAN",
    "MODE",
    "RANDOM",
    "bounds_of",
    "draw",
    "entropy",
    "entropy_given",
    "log_prob",
    "mean",
    "median",
    "mode",
    "sample",
    "sample_score",
    "score_and_entropy",
    "score_given",
]

mean = reference.mean
median = reference.median
mode = reference.mode


def _slopes(parts: Tensor, concentration: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of the first part by the two concentrations."""
    total = concentration.sum(-1, True).expand_as(concentration)
    grad = torch._dirichlet_grad(parts, concentration, total)  # type: ignore[attr-defined]
    x = parts[..., 0]
    return grad[..., 0] * (1.0 - x), grad[..., 1] * -x


def _draw(a: Tensor, b: Tensor, shape: Any, generator: Any) -> tuple[Tensor, Tensor]:
    """A Dirichlet's two parts and its concentrations, `[*shape, *batch, *event, 2]`."""
    concentration = torch.stack((a, b), -1)
    if shape:
        concentration = concentration.expand(shape + concentration.shape)
    return rng.dirichlet(concentration, generator), concentration


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, shape: Any, generator: Any):
        parts, concentration = _draw(a, b, shape, generator)
        ctx.save_for_backward(parts, concentration)
        ctx.shape = a.shape
        return parts[..., 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any):
        by_a, by_b = _slopes(*ctx.saved_tensors)
        return sum_to(grads[0] * by_a, ctx.shape), sum_to(grads[0] * by_b, ctx.shape), None, None


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, value: Tensor, ndims: int):
        ctx.save_for_backward(a, b, value)
        ctx.ndims = ndims
        return reference.log_prob(a, b, value, ndims)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        a, b, value = ctx.saved_tensors
        rate = over_event(grads[0], ctx.ndims)
        by_a = by_b = by_value = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            total = torch.digamma(a + b)
            by_a = sum_to(rate * (torch.log(value) + (total - torch.digamma(a))), a.shape)
            by_b = sum_to(rate * (torch.log1p(-value) + (total - torch.digamma(b))), b.shape)
        if ctx.needs_input_grad[2]:
            slope = (a - 1.0) / value - (b - 1.0) / (1.0 - value)
            by_value = sum_to(rate * slope, value.shape)
        return by_a, by_b, by_value, None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, ndims: int):
        ctx.save_for_backward(a, b)
        ctx.ndims = ndims
        return reference.entropy(a, b, ndims)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        a, b = ctx.saved_tensors
        rate = over_event(grads[0], ctx.ndims)
        total = a + b
        shared = (total - 2.0) * torch.polygamma(1, total)
        return (
            rate * (shared - (a - 1.0) * torch.polygamma(1, a)),
            rate * (shared - (b - 1.0) * torch.polygamma(1, b)),
            None,
        )


def _transformed() -> bool:
    """Whether a transform but vmap is at work in eager mode; `differentiated` if compiled."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack() or ()  # type: ignore[attr-defined]
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack)  # type: ignore[attr-defined]


def sample(a: Tensor, b: Tensor, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """Draws, `[*shape, *batch, *event]`, with pathwise gradients.

    Unlike the other families' op this one draws: ATen's sampler takes no noise from outside.
    """
    if wants_function(a, b):
        return _Sample.apply(a, b, shape, generator)
    if not _transformed() and not differentiated(a, b):
        with torch.no_grad():
            return _draw(a, b, shape, generator)[0][..., 0]
    # What traces or batches gets the gradient by a value that is 0. Detached as well, as no_grad
    # lets tangents through, which the sampler has no rule for.
    with torch.no_grad():
        parts, concentration = _draw(a.detach(), b.detach(), shape, generator)
    by_a, by_b = _slopes(parts.detach(), concentration.detach())
    value = parts[..., 0].detach()
    return value + by_a * (a - a.detach()) + by_b * (b - b.detach())


def sample_score(
    a: Tensor, b: Tensor, shape: torch.Size, generator: torch.Generator | None, ndims: int
) -> tuple[Tensor, Tensor]:
    """Value `[*shape, *batch, *event]` and log-density `[*shape, *batch]` of one draw."""
    if (
        type(a) is not Tensor
        or type(b) is not Tensor
        or differentiated(a, b)
        or not plain_tensors_only()
    ):
        value = sample(a, b, shape, generator)
        return value, log_prob(a, b, value, ndims)
    # In the sampler's own two tensors: 38 us at 16 x 8, of which the sampler takes 17, where one
    # function after the other takes 50.
    concentration = torch.stack((a, b), -1)
    wide = concentration.expand(shape + concentration.shape) if shape else concentration
    parts = rng.dirichlet(wide, generator)
    value = parts.select(-1, 0)
    norm = torch.add(a, b).lgamma_()
    return value, reference.score_draw(value, parts, concentration, norm, ndims)


def log_prob(a: Tensor, b: Tensor, value: Tensor, ndims: int) -> Tensor:
    """Log-density of `value`, `[*sample, *batch]`."""
    if wants_function(a, b, value):
        return _LogProb.apply(a, b, value, ndims)
    return reference.log_prob(a, b, value, ndims)


def entropy(a: Tensor, b: Tensor, ndims: int) -> Tensor:
    """Differential entropy in nats, `[*batch]`."""
    if wants_function(a, b):
        return _Entropy.apply(a, b, ndims)
    return reference.entropy(a, b, ndims)


# the kernels' operators ---------------------------------------------------------------------

# How a value is chosen, as the kernels number it; GIVEN for one without derivatives.
RANDOM, MEAN, MODE, GIVEN = range(4)


def draw(
    a: Tensor,
    b: Tensor,
    shape: torch.Size,
    ndims: int,
    generator: Any = None,
    *,
    kind: int = RANDOM,
    score: bool = True,
    pathwise: bool = True,
    clamp: Bounds | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A value and its log-density, in one launch where the kernels serve it.

    Args:
        a: concentration1, `[*batch, *event]`.
        b: concentration0, likewise, of the same dtype and device.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions.
        generator: a `CounterStream`, a `torch.Generator`, or None for torch's default one.
        kind: RANDOM, MEAN or MODE.
        score: whether the log-density is wanted.
        pathwise: whether gradients flow through the value.
        clamp: what the value is clamped to after it was scored.

    Returns:
        value `[*shape, *batch, *event]` and log-density `[*shape, *batch]`, or None.
    """
    random = kind == RANDOM
    if not plain_eager():
        state = _random.device_pair(a, generator) if random and generator is not None else None
        value, scores, _ = torch.ops.fastprob.beta_draw(
            a, b, state, list(shape), ndims, kind, score, pathwise, *(clamp or no_bounds)
        )
        return value if pathwise else value.detach(), scores if score else None
    state = _random.state_for(a, generator) if random else None
    if wants_gradient(a, b):
        return _Draw.apply(a, b, state, shape, ndims, kind, score, pathwise, clamp)
    return backend.kernels("beta").draw(
        a, b, shape, ndims, kind=kind, state=state, score=score, clamp=clamp
    )[:2]


def score_given(
    a: Tensor, b: Tensor, value: Tensor | None, ndims: int, *, entropy: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """The log-density of a given value and the entropy, in one launch.

    Args:
        a: concentration1, `[*batch, *event]`.
        b: concentration0, likewise, of the same dtype and device.
        value: from 0 to 1, `[*sample, *batch, *event]`; None for the entropy alone.
        ndims: number of event dimensions.
        entropy: whether the entropy is wanted.

    Returns:
        log-density `[*sample, *batch]` and entropy `[*batch]`; None for what was not wanted.

    Raises:
        ValueError: if the value is on another device, or of a shape that does not broadcast.
    """
    if value is not None:
        a, b, value = given("Beta", a, b, value)
    if not plain_eager():
        scores, entropies = torch.ops.fastprob.beta_score(a, b, value, ndims, entropy)
        return scores if value is not None else None, entropies if entropy else None
    if wants_gradient(a, b, value):
        return _ScoreGiven.apply(a, b, value, ndims, entropy)
    return backend.kernels("beta").score(a, b, value, ndims, entropy=entropy)


def score_and_entropy(
    a: Tensor, b: Tensor, value: Tensor, ndims: int, memo: dict[str, Any] | None
) -> Tensor:
    """The score, and on the way the entropy, which PPO asks the same distribution for next.

    Args:
        a: as in `score_given`.
        b: likewise.
        value: likewise.
        ndims: likewise.
        memo: where the entropy is kept for `entropy_given`; None where it is not wanted.
    """
    if value is None:
        given("Beta", a, b, value)
    made, entropies = score_given(a, b, value, ndims, entropy=memo is not None)
    assert made is not None
    # A value of more batch dimensions broadcasts the parameters, and the entropy with them.
    if memo is not None and entropies is not None and entropies.shape == a.shape[: a.dim() - ndims]:
        memo["entropy"] = (a._version, b._version, entropies)
    return made


def entropy_given(a: Tensor, b: Tensor, ndims: int, memo: dict[str, Any] | None) -> Tensor:
    """Differential entropy in nats, `[*batch]`; arguments as for `score_and_entropy`."""
    found = None if memo is None else memo.get("entropy")
    if found is not None and found[:2] == (a._version, b._version):
        return found[2]
    made = score_given(a, b, None, ndims, entropy=True)[1]
    assert made is not None
    return made


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, state, shape, ndims, kind, score, pathwise, clamp):
        ctx.set_materialize_grads(False)
        value, scores, _, drawn = backend.kernels("beta").draw(
            a, b, shape, ndims, kind=kind, state=state, score=score, clamp=clamp, keep=True
        )
        ctx.save_for_backward(a, b, drawn)
        ctx.ndims, ctx.kind, ctx.clamp = ndims, kind if pathwise else GIVEN, clamp
        if not pathwise:
            ctx.mark_non_differentiable(value)
        return value, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        grads = (None, grads[1]) if ctx.kind == GIVEN else grads
        made = backend.kernels("beta").draw_backward(
            *grads, None, *ctx.saved_tensors, ctx.ndims, kind=ctx.kind, clamp=ctx.clamp
        )
        return *made, *(None,) * 7


class _ScoreGiven(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, value, ndims, entropy):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, value)
        ctx.ndims = ndims
        return backend.kernels("beta").score(a, b, value, ndims, entropy=entropy)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        made = backend.kernels("beta").score_backward(
            *grads, *ctx.saved_tensors, ctx.ndims, to_value=ctx.needs_input_grad[2]
        )
        return *made, None, None


def _point(a: Tensor, b: Tensor, kind: int, shape: torch.Size) -> Tensor:
    value = mode(a, b) if kind == MODE else mean(a, b)
    return value.expand(shape + value.shape).clone(memory_format=torch.contiguous_format)


def _draw_op(a, b, state, sample, ndims, kind, score, pathwise, clamp, low, high):
    shape = torch.Size(sample)
    random = kind == RANDOM
    bounds = Bounds(clamp, low, high)
    if backend.serves(a):
        source = None
        if random:
            source = _random.state_for(a, None) if state is None else _random.given_pair(state)
        # The value before its clamp is 4 bytes more; without a clamp it is the value.
        value, scores, _, drawn = backend.kernels("beta").draw(
            a, b, shape, ndims, kind=kind, state=source, score=score, clamp=bounds, keep=True
        )
        return value, wanted(scores, a), wanted(drawn if bounds.kind else None, a)
    if random:
        state = _random.device_pair(a, None) if state is None else state
        full = shape + a.shape
        value = philox.beta(state, a.expand(full), b.expand(full))[0]
    else:
        value = _point(a, b, kind, shape)
    scores = reference.log_prob(a, b, value, ndims) if score else nothing(a)
    if not bounds.kind:
        return value, scores, nothing(a)
    return normal_reference.clamped(value, clamp, low, high), scores, value


def _draw_fake(a, b, state, sample, ndims, kind, score, pathwise, *clamp):
    full = (*sample, *a.shape)
    return (
        a.new_empty(full),
        a.new_empty((*sample, *a.shape[: a.dim() - ndims])) if score else nothing(a),
        a.new_empty(full) if Bounds(*clamp).kind else nothing(a),
    )


def _draw_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    a, b, _, _, ctx.ndims, kind, ctx.score, pathwise, ctx.clamp, low, high = inputs
    ctx.kind = kind if pathwise else GIVEN
    ctx.save_for_backward(
        a, b, output[2] if Bounds(ctx.clamp, low, high).kind else output[0], low, high
    )


def _draw_gradient(ctx, grad_value, grad_score, _):
    a, b, drawn, low, high = ctx.saved_tensors
    made = torch.ops.fastprob.beta_draw_backward(
        None if ctx.kind == GIVEN else grad_value, grad_score if ctx.score else None,
        a, b, drawn, ctx.ndims, ctx.kind, ctx.clamp, low, high,
    )  # fmt: skip
    return *made, *(None,) * 9


def _draw_backward_op(grad_value, grad_score, a, b, value, ndims, kind, clamp, low, high):
    if backend.serves(a):
        return backend.kernels("beta").draw_backward(
            grad_value, grad_score, None, a, b, value, ndims, kind=kind,
            clamp=Bounds(clamp, low, high),
        )  # fmt: skip
    grads, along = _score_slopes(grad_score, a, b, value, ndims)
    if along is None:
        along = torch.zeros_like(value)
    elif kind == MODE:
        # At an end the mode stays where it is.
        along = torch.where(value * (1.0 - value) > 0, along, 0.0)
    if grad_value is not None:
        kept = normal_reference.clamped(value, clamp, low, high) == value
        along = along + torch.where(kept, grad_value, 0.0)
    if kind != GIVEN:
        slopes = _value_slopes(a, b, value, kind)
        grads = [g + along * slope for g, slope in zip(grads, slopes, strict=True)]
    grads = [sum_to(g, t.shape).to(t.dtype) for g, t in zip(grads, (a, b), strict=True)]
    return grads[0].contiguous(), grads[1].contiguous()


def _value_slopes(a: Tensor, b: Tensor, value: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """The derivatives of a value by the concentrations, of its shape."""
    if kind == RANDOM:
        concentration = torch.stack(torch.broadcast_tensors(a, b, value)[:2], -1)
        return _slopes(torch.stack((value, 1.0 - value), -1), concentration)
    if kind == MEAN:
        total = a + b
        return (1.0 - value) / total, -value / total
    up, down = (a - 1.0).clamp_min(0.0), (b - 1.0).clamp_min(0.0)
    inner = up + down
    rate = torch.where(inner > 0, 1.0 / torch.where(inner > 0, inner, 1.0), 0.0)
    return torch.where(up > 0, rate * (1.0 - value), 0.0), torch.where(down > 0, -rate * value, 0.0)


def _score_slopes(
    grad_score: Tensor | None, a: Tensor, b: Tensor, value: Tensor, ndims: int
) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of the score by the concentrations and the value, of the value's shape."""
    if grad_score is None:
        return [torch.zeros_like(value), torch.zeros_like(value)], None
    rate = over_event(grad_score, ndims)
    total = torch.digamma(a + b)
    by_a = rate * (torch.log(value) + (total - torch.digamma(a)))
    by_b = rate * (torch.log1p(-value) + (total - torch.digamma(b)))
    return [by_a, by_b], rate * ((a - 1.0) / value - (b - 1.0) / (1.0 - value))


def _draw_backward_fake(grad_value, grad_score, a, b, *_):
    return _like(a), _like(b)


def _like(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _score_op(a, b, value, ndims, entropy):
    if backend.serves(a):
        made = backend.kernels("beta").score(a, b, value, ndims, entropy=entropy)
    else:
        made = (
            None if value is None else reference.log_prob(a, b, value, ndims),
            reference.entropy(a, b, ndims) if entropy else None,
        )
    return wanted(made[0], a), wanted(made[1], a)


def _score_fake(a, b, value, ndims, entropy):
    scores = nothing(a)
    if value is not None:
        dtype = torch.promote_types(a.dtype, value.dtype)
        scores = a.new_empty(value.shape[: value.dim() - ndims], dtype=dtype)
    return scores, a.new_empty(a.shape[: a.dim() - ndims]) if entropy else nothing(a)


def _score_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    a, b, value, ctx.ndims, ctx.entropy = inputs
    ctx.save_for_backward(a, b, value)


def _score_gradient(ctx, grad_score, grad_entropy):
    a, b, value = ctx.saved_tensors
    to_value = ctx.needs_input_grad[2]
    *made, grad_value = torch.ops.fastprob.beta_score_backward(
        grad_score if value is not None else None, grad_entropy if ctx.entropy else None,
        a, b, value, ctx.ndims, to_value,
    )  # fmt: skip
    return *made, grad_value if to_value else None, None, None


def _score_backward_op(grad_score, grad_entropy, a, b, value, ndims, to_value):
    if backend.serves(a):
        made = backend.kernels("beta").score_backward(
            grad_score, grad_entropy, a, b, value, ndims, to_value=to_value
        )
        return *made[:2], wanted(made[2], a if value is None else value)
    grads, along = _score_slopes(grad_score, a, b, a if value is None else value, ndims)
    grads = [sum_to(g, a.shape) for g in grads]
    if grad_entropy is not None:
        rate = over_event(grad_entropy, ndims)
        total = a + b
        shared = (total - 2.0) * torch.polygamma(1, total)
        grads = [
            g + rate * (shared - (c - 1.0) * torch.polygamma(1, c))
            for g, c in zip(grads, (a, b), strict=True)
        ]
    grad_value = None
    if value is not None and to_value:
        grad_value = (torch.zeros_like(value) if along is None else along).to(value.dtype)
        grad_value = grad_value.contiguous()
    grad_a, grad_b = (g.to(t.dtype).contiguous() for g, t in zip(grads, (a, b), strict=True))
    return grad_a, grad_b, wanted(grad_value, a if value is None else value)


def _score_backward_fake(grad_score, grad_entropy, a, b, value, ndims, to_value):
    like = a if value is None else value
    return _like(a), _like(b), _like(like) if to_value and value is not None else nothing(like)


def _score_vmap(info, in_dims, a, b, value, ndims, entropy):
    a, b = (lead(t, dim, info.batch_size) for t, dim in zip((a, b), in_dims[:2], strict=True))
    scores = entropies = nothing(a)
    if value is not None:
        # Sample dimensions stand in front of the batch, and the new dimension in front of them.
        value = lead(value, in_dims[2], info.batch_size)
        ones = (1,) * (value.dim() - a.dim())
        wide = [t.reshape(t.shape[:1] + ones + t.shape[1:]).expand(value.shape) for t in (a, b)]
        scores, _ = torch.ops.fastprob.beta_score(*wide, value, ndims, False)
    if entropy:
        _, entropies = torch.ops.fastprob.beta_score(a, b, None, ndims, True)
    return (scores, entropies), (None if value is None else 0, 0 if entropy else None)


_CLAMP = "float[]? clamp, Tensor? low, Tensor? high"

register(
    "beta_draw_backward",
    "(Tensor? grad_value, Tensor? grad_score, Tensor a, Tensor b, Tensor drawn, int ndims, "
    f"int kind, {_CLAMP}) -> (Tensor, Tensor)",
    _draw_backward_op,
    _draw_backward_fake,
)
register(
    "beta_draw",
    "(Tensor a, Tensor b, Tensor? state, SymInt[] sample, int ndims, int kind, bool score, "
    f"bool pathwise, {_CLAMP}) -> (Tensor, Tensor, Tensor)",
    _draw_op,
    _draw_fake,
    setup=_draw_setup,
    backward=_draw_gradient,
    batched=(0, 1),
    out_dims=lambda a, b, state, sample, ndims, kind, score, pathwise, *clamp: (
        len(sample),
        len(sample) if score else None,
        len(sample) if Bounds(*clamp).kind else None,
    ),
    random=lambda *args: args[5] == RANDOM,
)
register(
    "beta_score_backward",
    "(Tensor? grad_score, Tensor? grad_entropy, Tensor a, Tensor b, Tensor? value, int ndims, "
    "bool to_value) -> (Tensor, Tensor, Tensor)",
    _score_backward_op,
    _score_backward_fake,
)
register(
    "beta_score",
    "(Tensor a, Tensor b, Tensor? value, int ndims, bool entropy) -> (Tensor, Tensor)",
    _score_op,
    _score_fake,
    setup=_score_setup,
    backward=_score_gradient,
    vmap=_score_vmap,
)
