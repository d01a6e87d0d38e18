"""Sample, score and entropy of Normal and Independent(Normal), with hand-written gradients.

For y = loc + noise * scale with log-density l, and incoming gradients gy and gl:

    dloc = gy                    dscale = gy * noise - gl / scale

and for the log-density of a given value, with z = (value - loc) / scale:

    dloc = gl * z / scale        dscale = gl * (z^2 - 1) / scale        dvalue = -dloc

each a few tensor operations, on what the forward pass has kept.

`draw` and `score_given` are what the kernels serve: they take the noise from a counter-based state,
and clamp, score and give the entropy in the same pass. Their operators have an implementation for
every device, in plain PyTorch where the kernels cannot run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastprob import backend, lowering
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
from fastprob.reference import normal as reference
from fastprob.reference._reduce import outside_transforms

# A graph guards every name that it was traced through, and twice the modules that others name too.
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_fp32 = torch.float32

__all__ = [
    "bounds_of",
    "draw",
    "entropy",
    "log_prob",
    "sample",
    "sample_score",
    "sample_score_pieces",
    "score_given",
]


class _SampleScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, noise: Tensor, ndims: int):
        ctx.save_for_backward(scale, noise)
        ctx.loc_shape, ctx.ndims = loc.shape, ndims
        return reference.sample_score(loc, scale, noise, ndims)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        grad_value, grad_score = grads
        scale, noise = ctx.saved_tensors
        grad_loc = sum_to(grad_value, ctx.loc_shape)
        grad_scale = torch.addcmul(
            grad_value * noise, over_event(grad_score, ctx.ndims), scale.reciprocal(), value=-1
        )
        return grad_loc, sum_to(grad_scale, scale.shape), None, None


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, scale: Tensor, value: Tensor, ndims: int, log_scale: Tensor | None
    ):
        z = reference.standardize(loc, scale, value)
        ctx.save_for_backward(loc, scale, value, z)
        ctx.ndims = ndims
        return reference.score_noise(scale, z, ndims, log_scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        loc, scale, value, z = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A second derivative follows: z must depend on the inputs again.
            z = reference.standardize(loc, scale, value)
        rate = over_event(grads[0], ctx.ndims) / scale
        grad = rate * z
        grad_loc = grad_scale = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_loc = sum_to(grad, loc.shape)
        if ctx.needs_input_grad[1]:
            grad_scale = sum_to((grad * z).sub_(rate), scale.shape)
        if ctx.needs_input_grad[2]:
            grad_value = sum_to(-grad, value.shape)
        return grad_loc, grad_scale, grad_value, None, None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, ndims: int, log_scale: Tensor | None):
        ctx.save_for_backward(scale)
        ctx.ndims = ndims
        return reference.entropy(scale, ndims, log_scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (scale,) = ctx.saved_tensors
        return over_event(grads[0], ctx.ndims) / scale, None, None


sample_score_pieces = reference.sample_score_pieces


def sample(loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Reparameterized value, `[*sample, *batch, *event]`."""
    return reference.sample(loc, scale, noise)


def sample_score(
    loc: Tensor, scale: Tensor, noise: Tensor, ndims: int, spent: bool = False
) -> tuple[Tensor, Tensor]:
    """Reparameterized value and its log-density, from one draw of noise.

    Args:
        loc: `[*batch, *event]`.
        scale: `[*batch, *event]`.
        noise: standard normal, `[*sample, *batch, *event]`.
        ndims: number of event dimensions.
        spent: whether the noise is of no use to the caller any more.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`.
    """
    if _grad_enabled() and wants_function(loc, scale):
        return _SampleScore.apply(loc, scale, noise, ndims)
    return reference.sample_score(loc, scale, noise, ndims, spent)


def log_prob(
    loc: Tensor, scale: Tensor, value: Tensor, ndims: int, memo: dict[str, Any] | None = None
) -> Tensor:
    """Log-density of a given value.

    Args:
        loc: `[*batch, *event]`.
        scale: `[*batch, *event]`.
        value: `[*sample, *batch, *event]`.
        ndims: number of event dimensions.
        memo: what `log_prob` and `entropy` of the same scale share, kept by the caller.

    Returns:
        `[*sample, *batch]`.
    """
    if backend.serves(loc):
        return _score_and_entropy(loc, scale, value, ndims, memo)
    if wants_function(loc, scale, value):
        return _LogProb.apply(loc, scale, value, ndims, _log_scale(scale, memo))
    if _is_compiling() and _lowered(loc, scale, value, ndims):
        if memo is None or not scale.requires_grad or not _grad_enabled():
            return _score_in_graph(loc, scale, value, ndims, False)[0]
        scores, entropies = _score_in_graph(loc, scale, value, ndims, True)
        memo["entropy"] = scale, entropies
        return scores
    return reference.log_prob(loc, scale, value, ndims)


def _lowered(loc: Tensor, scale: Tensor, value: Tensor, ndims: int) -> bool:
    """Whether a graph that is compiled holds the score as an operator; see `lowering`."""
    return (
        lowering.enabled
        and ndims > 0
        and loc.is_cpu
        and loc.dtype is scale.dtype is value.dtype is _fp32
        and loc.shape == scale.shape == value.shape
        and not backend.is_exporting()
        and outside_transforms()
    )


def entropy(scale: Tensor, ndims: int, memo: dict[str, Any] | None = None) -> Tensor:
    """Differential entropy in nats, `[*batch]`; `memo` as in `log_prob`."""
    if backend.serves(scale):
        found = None if memo is None else memo.get("entropy")
        if found is not None and found[0] == scale._version and torch.is_grad_enabled():
            return found[1]
        made = score_given(scale, scale, None, ndims, entropy=True)[1]
        assert made is not None
        return made
    if memo is not None and _is_compiling() and _grad_enabled():
        # A score of the same graph has made it, and both are differentiated in one pass. Whoever
        # writes to a scale between the two breaks the gradients of the first anyway.
        found = memo.get("entropy")
        if found is not None and found[0] is scale:
            return found[1]
    if wants_function(scale):
        return _Entropy.apply(scale, ndims, _log_scale(scale, memo))
    return reference.entropy(scale, ndims)


def _log_scale(scale: Tensor, memo: dict[str, Any] | None) -> Tensor | None:
    """`log(scale)` without gradient, made once for a scale that was not written to since.

    PPO asks one distribution for both: one pass of four forward operations fewer.
    """
    if memo is None:
        return None
    found = memo.get("log_scale")
    if found is None or found[0] != scale._version:
        with torch.no_grad():
            found = memo["log_scale"] = (scale._version, torch.log(scale))
    return found[1]


# the kernels' operators ---------------------------------------------------------------------


def draw(
    loc: Tensor,
    scale: Tensor,
    shape: torch.Size,
    ndims: int,
    generator: Any = None,
    *,
    random: bool = True,
    score: bool = True,
    entropy: bool = False,
    pathwise: bool = True,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A value, its log-density and the entropy, in one launch where the kernels serve it.

    Args:
        loc: `[*batch, *event]`.
        scale: likewise, of the same dtype and device.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions.
        generator: a `CounterStream`, a `torch.Generator`, or None for torch's default one.
        random: whether the value is drawn; if not, it is the mean.
        score: whether the log-density is wanted.
        entropy: whether the entropy is wanted.
        pathwise: whether gradients flow through the value.
        bounds: what the value is clamped to after it was scored.

    Returns:
        value `[*shape, *batch, *event]`, log-density `[*shape, *batch]`, entropy `[*batch]`; None
        for what was not wanted.
    """
    if not plain_eager():
        state = _random.device_pair(loc, generator) if random and generator is not None else None
        value, scores, entropies, _ = torch.ops.fastprob.normal_draw(
            loc, scale, state, list(shape), ndims, random, score, entropy, pathwise,
            *(bounds or no_bounds),
        )  # fmt: skip
        if not pathwise:
            value = value.detach()
        return value, scores if score else None, entropies if entropy else None
    state = _random.state_for(loc, generator) if random else None
    if wants_gradient(loc, scale):
        return _Draw.apply(loc, scale, state, shape, ndims, score, entropy, pathwise, bounds)
    value, scores, entropies, _ = backend.kernels("normal").draw(
        loc, scale, shape, ndims, state=state, score=score, entropy=entropy, clamp=bounds
    )
    return value, scores, entropies


def score_given(
    loc: Tensor, scale: Tensor, value: Tensor | None, ndims: int, *, entropy: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """The log-density of a given value and the entropy, in one launch.

    Args:
        loc: `[*batch, *event]`.
        scale: likewise, of the same dtype and device.
        value: `[*sample, *batch, *event]`; None for the entropy alone.
        ndims: number of event dimensions.
        entropy: whether the entropy is wanted.

    Returns:
        log-density `[*sample, *batch]` and entropy `[*batch]`; None for what was not wanted.

    Raises:
        ValueError: if the value is on another device, or of a shape that does not broadcast.
    """
    if value is not None:
        loc, scale, value = given("Normal", loc, scale, value)
    if not plain_eager():
        scores, entropies = torch.ops.fastprob.normal_score(loc, scale, value, ndims, entropy)
        return scores if value is not None else None, entropies if entropy else None
    if wants_gradient(loc, scale, value):
        return _ScoreGiven.apply(loc, scale, value, ndims, entropy)
    return backend.kernels("normal").score(loc, scale, value, ndims, entropy=entropy)


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loc, scale, state, shape, ndims, score, entropy, pathwise, bounds):
        ctx.set_materialize_grads(False)
        value, scores, entropies, used = backend.kernels("normal").draw(
            loc, scale, shape, ndims, state=state, score=score, entropy=entropy, clamp=bounds,
            keep=True,
        )  # fmt: skip
        ctx.save_for_backward(loc, scale, used)
        ctx.shape, ctx.ndims, ctx.pathwise, ctx.bounds = shape, ndims, pathwise, bounds
        if not pathwise:
            ctx.mark_non_differentiable(value)
        return value, scores, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        loc, scale, used = ctx.saved_tensors
        made = backend.kernels("normal").draw_backward(
            *grads, loc, scale, used, ctx.shape, ctx.ndims, pathwise=ctx.pathwise, clamp=ctx.bounds
        )
        return *made, *(None,) * 7


class _ScoreGiven(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loc, scale, value, ndims, entropy):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(loc, scale, value)
        ctx.ndims = ndims
        return backend.kernels("normal").score(loc, scale, value, ndims, entropy=entropy)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        loc, scale, value = ctx.saved_tensors
        made = backend.kernels("normal").score_backward(
            *grads, loc, scale, value, ctx.ndims, to_value=ctx.needs_input_grad[2]
        )
        return *made, None, None


def _score_and_entropy(loc, scale, value, ndims, memo) -> Any:
    """The score, and on the way the entropy, which PPO asks the same distribution for next.

    One node of the graph serves both, so that both are differentiated in one backward pass or not
    at all, as it is with parameters that a network has made.
    """
    if value is None:
        given("Normal", loc, scale, value)
    if memo is None or not torch.is_grad_enabled() or scale.is_leaf:
        return score_given(loc, scale, value, ndims)[0]
    made, entropies = score_given(loc, scale, value, ndims, entropy=True)
    # A value with more dimensions broadcasts the parameters, and the entropy with them.
    if entropies is not None and entropies.shape == loc.shape[: loc.dim() - ndims]:
        memo["entropy"] = (scale._version, entropies)
    return made


def _draw_op(
    loc, scale, state, sample, ndims, random, score, entropy, pathwise, limits, low, high
):  # fmt: skip
    shape = torch.Size(sample)
    bounds = Bounds(limits, low, high)
    if backend.serves(loc):
        source = None
        if random:
            source = _random.state_for(loc, None) if state is None else _random.given_pair(state)
        made = backend.kernels("normal").draw(
            loc, scale, shape, ndims, state=source, score=score, entropy=entropy,
            clamp=bounds, keep=random,
        )  # fmt: skip
        value, scores, entropies, used = made
    else:
        used = None
        if random:
            used = _random.device_pair(loc, None) if state is None else state.clone()
        value, scores, entropies = reference.draw(
            loc, scale, used, shape, ndims, score, entropy, *bounds
        )
    return (
        value,
        wanted(scores, loc),
        wanted(entropies, loc),
        loc.new_empty(0, dtype=torch.int64) if used is None else used,
    )


def _draw_fake(
    loc, scale, state, sample, ndims, random, score, entropy, pathwise, limits, low, high
):  # fmt: skip
    batch = loc.shape[: loc.dim() - ndims]
    return (
        loc.new_empty((*sample, *loc.shape)),
        loc.new_empty((*sample, *batch)) if score else nothing(loc),
        loc.new_empty(batch) if entropy else nothing(loc),
        loc.new_empty(2 if random else 0, dtype=torch.int64),
    )


def _draw_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    loc, scale, _, ctx.sample, ctx.ndims, ctx.random, *flags = inputs
    ctx.score, ctx.entropy, ctx.pathwise, ctx.limits, low, high = flags
    ctx.save_for_backward(loc, scale, output[3], low, high)


def _draw_gradient(ctx, grad_value, grad_score, grad_entropy, _):
    loc, scale, used, low, high = ctx.saved_tensors
    made = torch.ops.fastprob.normal_draw_backward(
        grad_value if ctx.pathwise else None, grad_score if ctx.score else None,
        grad_entropy if ctx.entropy else None, loc, scale, used if ctx.random else None,
        ctx.sample, ctx.ndims, ctx.pathwise, ctx.limits, low, high,
    )  # fmt: skip
    return *made, *(None,) * 10


def _draw_backward_op(
    grad_value, grad_score, grad_entropy, loc, scale, used, sample, ndims, pathwise, limits,
    low, high,
):  # fmt: skip
    grads = grad_value, grad_score, grad_entropy
    shape = torch.Size(sample)
    bounds = Bounds(limits, low, high)
    if backend.serves(loc):
        return backend.kernels("normal").draw_backward(
            *grads, loc, scale, used, shape, ndims, pathwise=pathwise,
            clamp=bounds,
        )  # fmt: skip
    return reference.draw_backward(*grads, loc, scale, used, shape, ndims, pathwise, *bounds)


def _draw_backward_fake(
    grad_value, grad_score, grad_entropy, loc, scale, used, sample, ndims, pathwise, limits,
    low, high,
):  # fmt: skip
    return torch.empty_like(loc), torch.empty_like(scale)


def _score_op(loc, scale, value, ndims, entropy):
    if backend.serves(loc):
        made = backend.kernels("normal").score(loc, scale, value, ndims, entropy=entropy)
    else:
        made = (
            None if value is None else reference.log_prob(loc, scale, value, ndims),
            reference.entropy(scale, ndims) if entropy else None,
        )
    like = loc if value is None else value.new_empty(0, dtype=_result(loc, value))
    return wanted(made[0], like), wanted(made[1], loc)


def _score_fake(loc, scale, value, ndims, entropy):
    lowering.offer_score(
        torch.ops.fastprob.normal_score.default, torch.ops.fastprob.normal_score_backward.default
    )
    batch = loc.shape[: loc.dim() - ndims]
    return (
        nothing(loc)
        if value is None
        else loc.new_empty(value.shape[: value.dim() - ndims], dtype=_result(loc, value)),
        loc.new_empty(batch) if entropy else nothing(loc),
    )


def _result(loc: Tensor, value: Tensor) -> torch.dtype:
    return torch.promote_types(loc.dtype, value.dtype)


def _score_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    loc, scale, value, ctx.ndims, ctx.entropy = inputs
    ctx.save_for_backward(loc, scale, value)


def _score_gradient(ctx, grad_score, grad_entropy):
    loc, scale, value = ctx.saved_tensors
    if torch.is_grad_enabled() and not backend.serves(loc):
        # A second derivative follows, which the formula has.
        made = reference.score_backward(
            grad_score, grad_entropy, loc, scale, value, ctx.ndims, ctx.needs_input_grad[2]
        )
        return *made, None, None
    *made, grad_value = torch.ops.fastprob.normal_score_backward(
        grad_score if value is not None else None, grad_entropy if ctx.entropy else None,
        loc, scale, value, ctx.ndims, ctx.needs_input_grad[2],
    )  # fmt: skip
    return *made, grad_value if ctx.needs_input_grad[2] else None, None, None


def _score_backward_op(grad_score, grad_entropy, loc, scale, value, ndims, to_value):
    grads = grad_score, grad_entropy
    if backend.serves(loc):
        made = backend.kernels("normal").score_backward(
            *grads, loc, scale, value, ndims, to_value=to_value
        )
    else:
        made = reference.score_backward(*grads, loc, scale, value, ndims, to_value)
    return *made[:2], wanted(made[2], loc if value is None else value)


def _score_backward_fake(grad_score, grad_entropy, loc, scale, value, ndims, to_value):
    return (
        torch.empty_like(loc),
        torch.empty_like(scale),
        nothing(loc) if value is None else torch.empty_like(value) if to_value else nothing(value),
    )


def _score_vmap(info, in_dims, loc, scale, value, ndims, entropy):
    loc, scale = lead(loc, in_dims[0], info.batch_size), lead(scale, in_dims[1], info.batch_size)
    scores = entropies = nothing(loc)
    if value is not None:
        # Sample dimensions stand in front of the batch, and the new dimension in front of them.
        value = lead(value, in_dims[2], info.batch_size)
        wide = [
            t.reshape(t.shape[:1] + (1,) * (value.dim() - t.dim()) + t.shape[1:])
            for t in (loc, scale)
        ]
        mu, sigma = (t.expand(value.shape) for t in wide)
        scores, _ = torch.ops.fastprob.normal_score(mu, sigma, value, ndims, False)
    if entropy:
        _, entropies = torch.ops.fastprob.normal_score(loc, scale, None, ndims, True)
    return (scores, entropies), (None if value is None else 0, 0 if entropy else None)


register(
    "normal_draw_backward",
    "(Tensor? grad_value, Tensor? grad_score, Tensor? grad_entropy, Tensor loc, Tensor scale, "
    "Tensor? used, SymInt[] sample, int ndims, bool pathwise, float[]? limits, Tensor? low, "
    "Tensor? high) -> (Tensor, Tensor)",
    _draw_backward_op,
    _draw_backward_fake,
)
register(
    "normal_draw",
    "(Tensor loc, Tensor scale, Tensor? state, SymInt[] sample, int ndims, bool random, "
    "bool score, bool entropy, bool pathwise, float[]? limits, Tensor? low, Tensor? high) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _draw_op,
    _draw_fake,
    setup=_draw_setup,
    backward=_draw_gradient,
    batched=(0, 1),
    out_dims=lambda loc, scale, state, sample, ndims, random, score, entropy, *_: (
        len(sample),
        len(sample) if score else None,
        0 if entropy else None,
        None,
    ),
    random=lambda loc, scale, state, sample, ndims, random, *_: random,
)
register(
    "normal_score_backward",
    "(Tensor? grad_score, Tensor? grad_entropy, Tensor loc, Tensor scale, Tensor? value, "
    "int ndims, bool to_value) -> (Tensor, Tensor, Tensor)",
    _score_backward_op,
    _score_backward_fake,
)
register(
    "normal_score",
    "(Tensor loc, Tensor scale, Tensor? value, int ndims, bool entropy) -> (Tensor, Tensor)",
    _score_op,
    _score_fake,
    setup=_score_setup,
    backward=_score_gradient,
    vmap=_score_vmap,
)

_score_in_graph = torch.ops.fastprob.normal_score.default
