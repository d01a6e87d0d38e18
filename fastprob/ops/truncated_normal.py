"""Sample, score and entropy of TruncatedNormal, with hand-written gradients.

For z = (x - loc) / scale, the density f of z, and E over the truncated distribution, the
log-density l of a given value has the gradients of an exponential family:

    dl/dloc = (z - E[z]) / scale            dl/dscale = (z^2 - E[z^2]) / scale
    dl/dlow = f(a) / scale                  dl/dhigh = -f(b) / scale          dl/dx = -z / scale

and the value at probability p, with A = (1 - p) f(a) / f(z) and B = p f(b) / f(z),

    dx/dloc = 1 - A - B     dx/dscale = z - a A - b B     dx/dlow = A     dx/dhigh = B

With h the entropy of z, dh/da = f(a) (log f(a) + h - 1) and dh/db is its mirror image.

`draw` and `score_given` are what the kernels serve: they take the noise from a counter-based state,
and clamp, score and give the entropy in the same pass. Their operators have an implementation for
every device, in plain PyTorch where the kernels cannot run.
"""

from __future__ import annotations

import math
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
from fastprob.reference import normal as normal_reference
from fastprob.reference import philox
from fastprob.reference import truncated_normal as reference
from fastprob.reference._reduce import differentiated, transformed
from fastprob.reference.truncated_normal import Standard

__all__ = [
    "MEAN",
    "MEDIAN",
    "MODE",
    "RANDOM",
    "bounds_of",
    "cdf",
    "draw",
    "entropy",
    "entropy_given",
    "log_prob",
    "mean_score",
    "sample",
    "sample_score",
    "sample_score_detached",
    "score_and_entropy",
    "score_given",
    "served",
    "standardize",
    "variance",
]

variance = reference.variance
cdf = reference.cdf
standardize = reference.standardize


def _slopes(std: Standard, p: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """The derivatives of the value at probability p by loc, scale, low and high."""
    a, b = std.a, std.b
    # f(a) / f(z) = exp((z - a) (z + a) / 2), from the distance to the bound.
    up, down = (value - std.low) / std.scale, (value - std.high) / std.scale
    at_low = (1.0 - p) * torch.exp(0.5 * up * (up + 2.0 * a))
    at_high = p * torch.exp(0.5 * down * (down + 2.0 * b))
    z = (value - std.loc) / std.scale
    return 1.0 - at_low - at_high, z - a * at_low - b * at_high, at_low, at_high


class _Sample(torch.autograd.Function):
    """The value at probability p."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, low: Any, high: Any, p: Tensor):
        value = reference.quantile(reference.standardize(loc, scale, low, high), p)
        ctx.bounds = (None, None)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            low_t, high_t = torch.as_tensor(low), torch.as_tensor(high)
            ctx.save_for_backward(loc, scale, p, value, low_t, high_t)
        else:
            ctx.save_for_backward(loc, scale, p, value)
            ctx.bounds = (low, high)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        loc, scale, p, value, *tensors = ctx.saved_tensors
        low, high = tensors or ctx.bounds
        std = reference.standardize(loc, scale, low, high)
        if torch.is_grad_enabled():
            # A second derivative follows: the value must depend on the inputs again.
            value = _Sample.apply(loc, scale, low, high, p)
        slopes = _slopes(std, p, value)
        out: list[Tensor | None] = []
        for i, source in enumerate((loc, scale, low, high)):
            if not ctx.needs_input_grad[i]:
                out.append(None)
                continue
            out.append(sum_to((grads[0] * slopes[i]).to(source.dtype), source.shape))
        return *out, None


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, scale: Tensor, low: Any, high: Any, value: Tensor, ndims: int
    ):
        ctx.bounds = (None, None)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            low_t, high_t = torch.as_tensor(low), torch.as_tensor(high)
            ctx.save_for_backward(loc, scale, value, low_t, high_t)
        else:
            ctx.save_for_backward(loc, scale, value)
            ctx.bounds = (low, high)
        ctx.ndims = ndims
        return reference.log_prob(loc, scale, low, high, value, ndims)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        loc, scale, value, *tensors = ctx.saved_tensors
        low, high = tensors or ctx.bounds
        std = reference.standardize(loc, scale, low, high)
        m = reference.moments(std)
        # Outside of the bounds the score is -inf whatever the parameters.
        inside = ~reference.outside(value, low, high, ctx.ndims)
        rate = over_event(torch.where(inside, grads[0], 0.0), ctx.ndims) / std.scale
        out: list[Tensor | None] = [None] * 6
        z = (value - std.loc) / std.scale
        u = z - std.c
        terms = (
            lambda: u - m.first,
            lambda: 2.0 * reference.energy(std, value) - m.second,
            lambda: m.at_low,
            lambda: -m.at_high,
            lambda: -z,
        )
        for i, source in enumerate((loc, scale, low, high, value)):
            if ctx.needs_input_grad[i]:
                out[i] = sum_to((rate * terms[i]()).to(source.dtype), source.shape)
        return tuple(out)


def _entropy_slopes(std: Standard) -> tuple[Tensor, Tensor]:
    """The derivatives of the entropy by loc and scale, float64 `[*batch, *event]`."""
    m = reference.moments(std)
    h = reference.log_mass(std) + 0.5 * m.second - 1.0
    by_low = torch.special.xlogy(m.at_low, m.at_low) + m.at_low * h
    by_high = -torch.special.xlogy(m.at_high, m.at_high) - m.at_high * h
    rate = 1.0 / std.scale
    return -rate * (by_low + by_high), rate * (1.0 - std.a * by_low - std.b * by_high)


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, low: Any, high: Any, ndims: int):
        std = reference.standardize(loc, scale, low, high)
        ctx.save_for_backward(loc, scale)
        ctx.bounds, ctx.ndims = (low, high), ndims
        return reference.entropy(std, ndims).to(loc.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        loc, scale = ctx.saved_tensors
        std = reference.standardize(loc, scale, *ctx.bounds)
        by_loc, by_scale = _entropy_slopes(std)
        rate = over_event(grads[0], ctx.ndims)
        grad_loc, grad_scale = rate * by_loc, rate * by_scale
        return grad_loc.to(loc.dtype), grad_scale.to(scale.dtype), None, None, None


def _tensors(low: Any, high: Any) -> tuple[Tensor, ...]:
    return tuple(t for t in (low, high) if isinstance(t, Tensor))


def _sample(loc: Tensor, scale: Tensor, low: Any, high: Any, p: Tensor) -> Tensor:
    """The value in float64."""
    tensors = (loc, scale, *_tensors(low, high))
    p = p.double()
    if wants_function(*tensors):
        return _Sample.apply(loc, scale, low, high, p)  # type: ignore[return-value]
    if not differentiated(*tensors) and not transformed():
        return reference.quantile(reference.standardize(loc, scale, low, high), p)
    # What traces or batches gets the same gradient by a value that is 0: the first one only.
    with torch.no_grad():
        # Detached, as no_grad lets tangents through, which would count twice.
        fixed = [t.detach() if isinstance(t, Tensor) else t for t in (loc, scale, low, high)]
        std = reference.standardize(*fixed)
        value = reference.quantile(std, p)
        slopes = _slopes(std, p, value)
    for slope, source in zip(slopes, (loc, scale, low, high), strict=True):
        if isinstance(source, Tensor):
            value = value + slope.detach() * (source - source.detach())
    return value


def sample(loc: Tensor, scale: Tensor, low: Any, high: Any, p: Tensor) -> Tensor:
    """The value below which the probability is `p`, `[*sample, *batch, *event]`."""
    return _sample(loc, scale, low, high, p).to(loc.dtype)


def sample_score(
    loc: Tensor, scale: Tensor, low: Any, high: Any, p: Tensor, ndims: int
) -> tuple[Tensor, Tensor]:
    """The value at probability p and its log-density.

    Args:
        loc: `[*batch, *event]`.
        scale: `[*batch, *event]`.
        low: lower bound, a number or broadcastable with `loc`.
        high: upper bound, likewise.
        p: uniform noise, `[*sample, *batch, *event]`.
        ndims: number of event dimensions.

    Returns:
        value `[*sample, *batch, *event]`, log-density `[*sample, *batch]`.
    """
    if not differentiated(loc, scale, *_tensors(low, high)):
        if (
            torch.compiler.is_compiling()
            and lowering.enabled
            and loc.is_cpu
            and not backend.is_exporting()
        ):
            # An operator that the compiler does not look into may look at the values, and takes the
            # short formula where every mean lies inside its bounds: 1.6 ms in place of 3.6 for
            # 4096 x 8 (`python -m bench opaque`). With gradients Inductor's code is faster.
            return torch.ops.fastprob.truncated_normal_quantile(
                loc, scale, *_as_arguments(low, high), p, ndims
            )
        std = reference.central(loc, scale, low, high)
        if std is not None:
            value, z = reference.central_quantile(std, low, high, p.double())
            return value.to(loc.dtype), reference.central_score(std, z, ndims, loc.dtype)
        if not transformed():
            std = reference.standardize(loc, scale, low, high)
            value, cost, log_m = reference.scored_quantile(std, p.double())
            cost = cost + (torch.log(std.scale) + log_m)
            return value.to(loc.dtype), reference.total(cost, ndims, loc.dtype)
    value = _sample(loc, scale, low, high, p)
    # Scored before it is rounded: 300 steps of float32 from a tail's value to its score.
    score = log_prob(loc, scale, low, high, value, ndims).to(loc.dtype)
    return value.to(loc.dtype), score


def _as_arguments(low: Any, high: Any) -> tuple[Any, Any, Any]:
    """Bounds as an operator takes them: two tensors, or two numbers."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.as_tensor(low), torch.as_tensor(high), None
    return None, None, (low, high)


def _quantile_op(loc, scale, lows, highs, limits, p, ndims):
    low, high = (lows, highs) if limits is None else limits
    value, score = sample_score(loc, scale, low, high, p, ndims)
    return value.contiguous(), score.contiguous()


def _quantile_fake(loc, scale, lows, highs, limits, p, ndims):
    batch = p.shape[: p.dim() - ndims]
    return loc.new_empty(p.shape), loc.new_empty(batch)


def _quantile_vmap(info, in_dims, loc, scale, lows, highs, limits, p, ndims):
    dims = dict(zip(("loc", "scale", "lows", "highs", "limits", "p"), in_dims, strict=False))
    p = lead(p, dims["p"], info.batch_size)

    def led(name, x):
        # Its own dimensions are the last ones of p.
        if not isinstance(x, Tensor):
            return x
        x = lead(x, dims[name], info.batch_size)
        return x.reshape(x.shape[0], *(1,) * (p.dim() - x.dim()), *x.shape[1:])

    made = torch.ops.fastprob.truncated_normal_quantile(
        led("loc", loc), led("scale", scale), led("lows", lows), led("highs", highs), limits, p,
        ndims,
    )  # fmt: skip
    return made, (0, 0)


register(
    "truncated_normal_quantile",
    "(Tensor loc, Tensor scale, Tensor? lows, Tensor? highs, float[]? limits, Tensor p, int ndims) "
    "-> (Tensor, Tensor)",
    _quantile_op,
    _quantile_fake,
    vmap=_quantile_vmap,
)


def sample_score_detached(
    loc: Tensor, scale: Tensor, low: Any, high: Any, p: Tensor, ndims: int
) -> tuple[Tensor, Tensor]:
    """As `sample_score`, with no gradient into the value, and that of a given value's score."""
    with torch.no_grad():
        value = _sample(loc, scale, low, high, p)
    score = log_prob(loc, scale, low, high, value, ndims)
    return value.to(loc.dtype), score.to(loc.dtype)


def mean_score(
    loc: Tensor, scale: Tensor, low: Any, high: Any, ndims: int, score: bool
) -> tuple[Tensor, Tensor | None]:
    """The mean and its log-density; arguments as for `sample_score`."""
    if not differentiated(loc, scale, *_tensors(low, high)):
        inner = reference.inner_mean(loc, scale, low, high)
        if inner is not None:
            value, z, std = inner
            made = reference.central_score(std, z, ndims, loc.dtype) if score else None
            return value.to(loc.dtype), made
    value = reference.mean(reference.standardize(loc, scale, low, high)).to(loc.dtype)
    return value, log_prob(loc, scale, low, high, value, ndims) if score else None


def log_prob(loc: Tensor, scale: Tensor, low: Any, high: Any, value: Tensor, ndims: int) -> Tensor:
    """Log-density of `value`, `[*sample, *batch]`; `-inf` outside of the bounds."""
    if wants_function(loc, scale, value, *_tensors(low, high)):
        return _LogProb.apply(loc, scale, low, high, value, ndims)
    return reference.log_prob(loc, scale, low, high, value, ndims)


def entropy(loc: Tensor, scale: Tensor, low: Any, high: Any, ndims: int) -> Tensor:
    """Differential entropy in nats, `[*batch]`."""
    if wants_function(loc, scale) and not any(t.requires_grad for t in _tensors(low, high)):
        return _Entropy.apply(loc, scale, low, high, ndims)
    std = reference.standardize(loc, scale, low, high)
    return reference.entropy(std, ndims).to(loc.dtype)


# the kernels' operators ---------------------------------------------------------------------

# How a value is chosen, as the kernels number it.
RANDOM, MEDIAN, MEAN, MODE = range(4)
# Values lie between the quantiles at 1e-6 and 1 - 1e-6, as TorchRL's.
EPS = 1e-6


def served(loc: Tensor, scale: Tensor, low: Any, high: Any, kind: int = RANDOM) -> bool:
    """Whether the kernels serve a call.

    Bounds that need a gradient, and the gradient of a mean, are left to the reference.

    Args:
        loc: `[*batch, *event]`.
        scale: likewise.
        low: lower bound, a number or of the shape of `loc`.
        high: upper bound, likewise.
        kind: RANDOM, MEDIAN, MEAN or MODE.
    """
    if not backend.serves(loc) or differentiated(*_tensors(low, high)):
        return False
    return kind != MEAN or not (wants_gradient(loc, scale) or transformed())


def draw(
    loc: Tensor,
    scale: Tensor,
    low: Any,
    high: Any,
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
        loc: `[*batch, *event]`.
        scale: likewise, of the same dtype and device.
        low: lower bound, a number or of the shape and dtype of `loc`.
        high: upper bound, likewise.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions.
        generator: a `CounterStream`, a `torch.Generator`, or None for torch's default one.
        kind: RANDOM, MEDIAN, MEAN or MODE. A mean has no gradient.
        score: whether the log-density is wanted.
        pathwise: whether gradients flow through the value.
        clamp: what the value is clamped to after it was scored.

    Returns:
        value `[*shape, *batch, *event]` and log-density `[*shape, *batch]`, or None.
    """
    random = kind == RANDOM
    if not plain_eager():
        state = _random.device_pair(loc, generator) if random and generator is not None else None
        value, scores, _ = torch.ops.fastprob.truncated_normal_draw(
            loc, scale, *_limits(low, high), state, list(shape), ndims, kind, score, pathwise,
            *(clamp or no_bounds),
        )  # fmt: skip
        return value if pathwise else value.detach(), scores if score else None
    state = _random.state_for(loc, generator) if random else None
    if wants_gradient(loc, scale):
        return _Draw.apply(loc, scale, low, high, state, shape, ndims, kind, score, pathwise, clamp)
    value, scores, _, _ = backend.kernels("truncated_normal").draw(
        loc, scale, low, high, shape, ndims, kind=kind, state=state, score=score, clamp=clamp
    )
    return value, scores


def score_given(
    loc: Tensor,
    scale: Tensor,
    low: Any,
    high: Any,
    value: Tensor | None,
    ndims: int,
    *,
    entropy: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The log-density of a given value and the entropy, in one launch.

    Args:
        loc: `[*batch, *event]`.
        scale: likewise, of the same dtype and device.
        low: lower bound, a number or of the shape and dtype of `loc`.
        high: upper bound, likewise.
        value: `[*sample, *batch, *event]`; None for the entropy alone.
        ndims: number of event dimensions.
        entropy: whether the entropy is wanted.

    Returns:
        log-density `[*sample, *batch]`, `-inf` outside of the bounds, and entropy `[*batch]`; None
        for what was not wanted.

    Raises:
        ValueError: if the value is on another device, or of a shape that does not broadcast.
    """
    if value is not None:
        loc, scale, value = given("TruncatedNormal", loc, scale, value)
        if isinstance(low, Tensor) and low.shape != loc.shape:
            low, high = low.expand(loc.shape), high.expand(loc.shape)
    if not plain_eager():
        scores, entropies = torch.ops.fastprob.truncated_normal_score(
            loc, scale, *_limits(low, high), value, ndims, entropy
        )
        return scores if value is not None else None, entropies if entropy else None
    if wants_gradient(loc, scale, value):
        return _ScoreGiven.apply(loc, scale, low, high, value, ndims, entropy)
    return backend.kernels("truncated_normal").score(
        loc, scale, low, high, value, ndims, entropy=entropy
    )


def score_and_entropy(
    loc: Tensor, scale: Tensor, low: Any, high: Any, value: Tensor, ndims: int, memo: Any
) -> Tensor:
    """The score, and on the way the entropy, which PPO asks the same distribution for next.

    Args:
        loc: as in `score_given`.
        scale: likewise.
        low: likewise.
        high: likewise.
        value: likewise.
        ndims: likewise.
        memo: where the entropy is kept for `entropy_given`; None where it is not wanted.
    """
    if value is None:
        given("TruncatedNormal", loc, scale, value)
    made, entropies = score_given(loc, scale, low, high, value, ndims, entropy=memo is not None)
    assert made is not None
    # A value of more batch dimensions broadcasts the parameters, and the entropy with them.
    if entropies is not None and entropies.shape == loc.shape[: loc.dim() - ndims]:
        memo["entropy"] = (loc._version, scale._version, entropies)
    return made


def entropy_given(loc: Tensor, scale: Tensor, low: Any, high: Any, ndims: int, memo: Any) -> Tensor:
    """Differential entropy in nats, `[*batch]`; arguments as for `score_and_entropy`."""
    found = None if memo is None else memo.get("entropy")
    if found is not None and found[:2] == (loc._version, scale._version):
        return found[2]
    made = score_given(loc, scale, low, high, None, ndims, entropy=True)[1]
    assert made is not None
    return made


def _limits(low: Any, high: Any) -> tuple[Any, Any, Any]:
    """The bounds as arguments of an operator: two tensors, and two numbers."""
    return (low, high, None) if isinstance(low, Tensor) else (None, None, (low, high))


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loc, scale, low, high, state, shape, ndims, kind, score, pathwise, clamp):
        ctx.set_materialize_grads(False)
        value, scores, _, used = backend.kernels("truncated_normal").draw(
            loc, scale, low, high, shape, ndims, kind=kind, state=state, score=score, clamp=clamp,
            keep=True,
        )  # fmt: skip
        ctx.save_for_backward(loc, scale, used)
        ctx.limits = low, high
        ctx.rest = shape, ndims, kind, pathwise, clamp
        if not pathwise:
            ctx.mark_non_differentiable(value)
        return value, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        loc, scale, used = ctx.saved_tensors
        shape, ndims, kind, pathwise, clamp = ctx.rest
        made = backend.kernels("truncated_normal").draw_backward(
            *grads, None, loc, scale, *ctx.limits, used, shape, ndims, kind=kind,
            pathwise=pathwise, clamp=clamp,
        )  # fmt: skip
        return *made, *(None,) * 9


class _ScoreGiven(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loc, scale, low, high, value, ndims, entropy):
        ctx.set_materialize_grads(False)
        made = backend.kernels("truncated_normal").score(
            loc, scale, low, high, value, ndims, entropy=entropy
        )
        ctx.save_for_backward(loc, scale, value, made[0])
        ctx.limits, ctx.ndims = (low, high), ndims
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        loc, scale, value, scores = ctx.saved_tensors
        grad_loc, grad_scale, grad_value = backend.kernels("truncated_normal").score_backward(
            *grads, loc, scale, *ctx.limits, value, scores, ctx.ndims,
            to_value=ctx.needs_input_grad[4],
        )  # fmt: skip
        return grad_loc, grad_scale, None, None, grad_value, None, None


def _noise(loc: Tensor, state: Tensor | None, shape: torch.Size) -> Tensor:
    """The probabilities of the values of a draw, 1/2 without a state."""
    full = shape + loc.shape
    if state is None:
        return torch.full(full, 0.5, dtype=torch.float64, device=loc.device)
    return philox.uniform(state, full, torch.float64) * (1.0 - 2.0 * EPS) + EPS


def _at(std: Standard, kind: int, p: Tensor, shape: torch.Size) -> Tensor:
    """The value of a kind, float64 `[*sample, *batch, *event]`."""
    if kind in (RANDOM, MEDIAN):
        return reference.quantile(std, p)
    value = reference.mode(std) if kind == MODE else reference.mean(std)
    return value.expand(shape + value.shape)


def _draw_op(
    loc, scale, low, high, limits, state, sample, ndims, kind, score, pathwise, clamp, clamp_low,
    clamp_high,
):  # fmt: skip
    shape = torch.Size(sample)
    least, most = (low, high) if limits is None else limits
    random = kind == RANDOM
    if backend.serves(loc):
        source = None
        if random:
            source = _random.state_for(loc, None) if state is None else _random.given_pair(state)
        value, scores, _, used = backend.kernels("truncated_normal").draw(
            loc, scale, least, most, shape, ndims, kind=kind, state=source, score=score,
            clamp=Bounds(clamp, clamp_low, clamp_high), keep=random,
        )  # fmt: skip
    else:
        used = None
        if random:
            used = _random.device_pair(loc, None) if state is None else state.clone()
        std = reference.standardize(loc, scale, least, most)
        x = _at(std, kind, _noise(loc, used, shape), shape)
        scores = None
        if score:
            cost = reference.energy(std, x) + (torch.log(std.scale) + reference.log_mass(std))
            scores = reference.total(cost, ndims, loc.dtype)
        value = normal_reference.clamped(x.to(loc.dtype), clamp, clamp_low, clamp_high)
        value = value.clone(memory_format=torch.contiguous_format)
    return (
        value,
        wanted(scores, loc),
        loc.new_empty(0, dtype=torch.int64) if used is None else used,
    )


def _draw_fake(loc, scale, low, high, limits, state, sample, ndims, kind, score, *_):
    batch = loc.shape[: loc.dim() - ndims]
    return (
        loc.new_empty((*sample, *loc.shape)),
        loc.new_empty((*sample, *batch)) if score else nothing(loc),
        loc.new_empty(2 if kind == RANDOM else 0, dtype=torch.int64),
    )


def _draw_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    loc, scale, low, high, ctx.limits, _, ctx.sample, ctx.ndims, ctx.kind, *rest = inputs
    ctx.score, ctx.pathwise, ctx.clamp, clamp_low, clamp_high = rest
    if ctx.kind == MEAN and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
        raise RuntimeError("fastprob::truncated_normal_draw gives a mean without a gradient")
    ctx.save_for_backward(loc, scale, low, high, output[2], clamp_low, clamp_high)


def _draw_gradient(ctx, grad_value, grad_score, _):
    loc, scale, low, high, used, clamp_low, clamp_high = ctx.saved_tensors
    made = torch.ops.fastprob.truncated_normal_draw_backward(
        grad_value if ctx.pathwise else None, grad_score if ctx.score else None, loc, scale, low,
        high, ctx.limits, used if ctx.kind == RANDOM else None, ctx.sample, ctx.ndims, ctx.kind,
        ctx.pathwise, ctx.clamp, clamp_low, clamp_high,
    )  # fmt: skip
    return *made, *(None,) * 12


def _draw_backward_op(
    grad_value, grad_score, loc, scale, low, high, limits, used, sample, ndims, kind, pathwise,
    clamp, clamp_low, clamp_high,
):  # fmt: skip
    shape = torch.Size(sample)
    least, most = (low, high) if limits is None else limits
    if backend.serves(loc):
        return backend.kernels("truncated_normal").draw_backward(
            grad_value, grad_score, None, loc, scale, least, most, used, shape, ndims, kind=kind,
            pathwise=pathwise, clamp=Bounds(clamp, clamp_low, clamp_high),
        )  # fmt: skip
    std = reference.standardize(loc, scale, least, most)
    p = _noise(loc, used, shape)
    x = _at(std, kind, p, shape)
    by_loc, by_scale, along = (torch.zeros_like(x) for _ in range(3))
    if grad_value is not None and pathwise:
        kept = normal_reference.clamped(x, clamp, clamp_low, clamp_high) == x
        along = torch.where(kept, grad_value.double(), 0.0)
    if grad_score is not None:
        m = reference.moments(std)
        rate = over_event(grad_score.double(), ndims) / std.scale
        z = (x - std.loc) / std.scale
        by_loc = rate * (z - std.c - m.first)
        by_scale = rate * (2.0 * reference.energy(std, x) - m.second)
        if pathwise:
            along = along - rate * z
    if kind == MODE:
        slopes: tuple[Any, ...] = ((std.a < 0) & (std.b > 0)).double(), torch.zeros_like(x)
    else:
        slopes = _slopes(std, p, x)
    grads = (by_loc + along * slopes[0], by_scale + along * slopes[1])
    return tuple(sum_to(g, t.shape).to(t.dtype) for g, t in zip(grads, (loc, scale), strict=True))


def _draw_backward_fake(grad_value, grad_score, loc, scale, *_):
    return _like(loc), _like(scale)


def _like(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _score_op(loc, scale, low, high, limits, value, ndims, entropy):
    least, most = (low, high) if limits is None else limits
    if backend.serves(loc):
        made = backend.kernels("truncated_normal").score(
            loc, scale, least, most, value, ndims, entropy=entropy
        )
    else:
        std = reference.standardize(loc, scale, least, most)
        made = (
            None if value is None else reference.log_prob(loc, scale, least, most, value, ndims),
            reference.entropy(std, ndims).to(loc.dtype) if entropy else None,
        )
    return wanted(made[0], loc), wanted(made[1], loc)


def _score_fake(loc, scale, low, high, limits, value, ndims, entropy):
    scores = nothing(loc)
    if value is not None:
        dtype = torch.promote_types(loc.dtype, value.dtype)
        scores = loc.new_empty(value.shape[: value.dim() - ndims], dtype=dtype)
    return scores, loc.new_empty(loc.shape[: loc.dim() - ndims]) if entropy else nothing(loc)


def _score_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    loc, scale, low, high, ctx.limits, value, ctx.ndims, ctx.entropy = inputs
    ctx.save_for_backward(loc, scale, low, high, value, output[0])


def _score_gradient(ctx, grad_score, grad_entropy):
    loc, scale, low, high, value, scores = ctx.saved_tensors
    to_value = ctx.needs_input_grad[5]
    *made, grad_value = torch.ops.fastprob.truncated_normal_score_backward(
        grad_score if value is not None else None, grad_entropy if ctx.entropy else None,
        loc, scale, low, high, ctx.limits, value, None if value is None else scores, ctx.ndims,
        to_value,
    )  # fmt: skip
    return *made, None, None, None, grad_value if to_value else None, None, None


def _score_backward_op(
    grad_score, grad_entropy, loc, scale, low, high, limits, value, scores, ndims, to_value
):  # fmt: skip
    least, most = (low, high) if limits is None else limits
    if backend.serves(loc):
        made = backend.kernels("truncated_normal").score_backward(
            grad_score, grad_entropy, loc, scale, least, most, value, scores, ndims,
            to_value=to_value,
        )  # fmt: skip
        return *made[:2], wanted(made[2], loc if value is None else value)
    std = reference.standardize(loc, scale, least, most)
    by_loc = by_scale = torch.zeros_like(std.loc)
    grad_value = None if value is None or not to_value else torch.zeros_like(value)
    if grad_score is not None and value is not None:
        m = reference.moments(std)
        kept = torch.where(scores == -math.inf, 0.0, grad_score.double())
        rate = over_event(kept, ndims) / std.scale
        z = (value - std.loc) / std.scale
        by_loc = rate * (z - std.c - m.first)
        by_scale = rate * (2.0 * reference.energy(std, value) - m.second)
        if to_value:
            grad_value = (-rate * z).to(value.dtype)
    grads = [sum_to(by_loc, loc.shape), sum_to(by_scale, scale.shape)]
    if grad_entropy is not None:
        slopes = _entropy_slopes(std)
        rate = over_event(grad_entropy.double(), ndims)
        grads = [g + rate * s for g, s in zip(grads, slopes, strict=True)]
    grad_loc, grad_scale = (g.to(t.dtype) for g, t in zip(grads, (loc, scale), strict=True))
    return grad_loc, grad_scale, wanted(grad_value, loc if value is None else value)


def _score_backward_fake(
    grad_score, grad_entropy, loc, scale, low, high, limits, value, scores, ndims, to_value
):  # fmt: skip
    like = loc if value is None else value
    return (
        _like(loc),
        _like(scale),
        _like(like) if to_value and value is not None else nothing(like),
    )


def _score_vmap(info, in_dims, loc, scale, low, high, limits, value, ndims, entropy):
    size = info.batch_size
    parameters = [
        None if t is None else lead(t, dim, size)
        for t, dim in zip((loc, scale, low, high), in_dims[:4], strict=True)
    ]
    scores = entropies = nothing(loc)
    if value is not None:
        # Sample dimensions stand in front of the batch, and the new dimension in front of them.
        value = lead(value, in_dims[5], size)
        wide = [
            None
            if t is None
            else t.reshape(t.shape[:1] + (1,) * (value.dim() - t.dim()) + t.shape[1:]).expand(
                value.shape
            )
            for t in parameters
        ]
        scores, _ = torch.ops.fastprob.truncated_normal_score(*wide, limits, value, ndims, False)
    if entropy:
        _, entropies = torch.ops.fastprob.truncated_normal_score(
            *parameters, limits, None, ndims, True
        )
    return (scores, entropies), (None if value is None else 0, 0 if entropy else None)


_PARAMETERS = "Tensor loc, Tensor scale, Tensor? low, Tensor? high, float[]? limits"
_CLAMP = "float[]? clamp, Tensor? clamp_low, Tensor? clamp_high"

register(
    "truncated_normal_draw_backward",
    f"(Tensor? grad_value, Tensor? grad_score, {_PARAMETERS}, Tensor? used, SymInt[] sample, "
    f"int ndims, int kind, bool pathwise, {_CLAMP}) -> (Tensor, Tensor)",
    _draw_backward_op,
    _draw_backward_fake,
)
register(
    "truncated_normal_draw",
    f"({_PARAMETERS}, Tensor? state, SymInt[] sample, int ndims, int kind, bool score, "
    f"bool pathwise, {_CLAMP}) -> (Tensor, Tensor, Tensor)",
    _draw_op,
    _draw_fake,
    setup=_draw_setup,
    backward=_draw_gradient,
    batched=(0, 1, 2, 3),
    out_dims=lambda loc, scale, low, high, limits, state, sample, ndims, kind, score, *_: (
        len(sample),
        len(sample) if score else None,
        None,
    ),
    random=lambda *args: args[8] == RANDOM,
)
register(
    "truncated_normal_score_backward",
    f"(Tensor? grad_score, Tensor? grad_entropy, {_PARAMETERS}, Tensor? value, Tensor? scores, "
    "int ndims, bool to_value) -> (Tensor, Tensor, Tensor)",
    _score_backward_op,
    _score_backward_fake,
)
register(
    "truncated_normal_score",
    f"({_PARAMETERS}, Tensor? value, int ndims, bool entropy) -> (Tensor, Tensor)",
    _score_op,
    _score_fake,
    setup=_score_setup,
    backward=_score_gradient,
    vmap=_score_vmap,
)
