"""Sample, score and entropy of Categorical and OneHotCategorical.

`draw` and `score_given` are what the kernels serve: they take logits or weights as they are given,
and a boolean mask, draw from a counter-based state, and score and give the entropy in the same
pass. Their operators have an implementation for every device, in plain PyTorch where the kernels
cannot run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastprob import backend, lowering
from fastprob.ops import _random
from fastprob.ops._autograd import wants_function
from fastprob.ops._fused import fold_samples, plain_eager, wanted, wants_gradient
from fastprob.ops._register import lead, nothing, register
from fastprob.reference import categorical as reference
from fastprob.reference._reduce import outside_transforms

RANDOM, MEDIAN, MODE, MEAN = reference.RANDOM, reference.MEDIAN, reference.MODE, reference.MEAN
NO_VALUE, MEAN_INDEX = reference.NO_VALUE, reference.MEAN_INDEX
ONE_HOT, PROBS = reference.ONE_HOT, reference.PROBS

from_probs = reference.from_probs
exponentials = reference.exponentials
race = reference.race
race_score = reference.race_score
mode_score = reference.mode_score
by_passes = reference.by_passes
one_hot = reference.one_hot
mean_index = reference.mean_index
median_index = reference.median_index
median_of = reference.median_of
pick = reference.pick
weights = reference.weights
first_beyond = reference.first_beyond


class _Normalize(torch.autograd.Function):
    """dl_j/dlogits_k = [j = k] - p_k."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor):
        log_probs = reference.normalize_by_passes(logits)
        ctx.save_for_backward(log_probs)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (log_probs,) = ctx.saved_tensors
        return grads[0] - log_probs.exp() * grads[0].sum(-1, keepdim=True)


def normalize(logits: Tensor) -> Tensor:
    """Log-probabilities, `[*batch, K]`."""
    if wants_function(logits) and reference.by_passes(logits):
        return _Normalize.apply(logits)
    return reference.normalize(logits)


class _Entropy(torch.autograd.Function):
    """dH/dl_k = -p_k (l_k + 1), which keeps nothing but the log-probabilities."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor):
        ctx.save_for_backward(log_probs)
        return reference.entropy(log_probs)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (log_probs,) = ctx.saved_tensors
        least = torch.finfo(log_probs.dtype).min
        rate = log_probs.exp() * (log_probs.clamp_min(least) + 1.0)
        return rate * -grads[0].unsqueeze(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats, `[*batch]`."""
    if wants_function(log_probs):
        return _Entropy.apply(log_probs)
    return reference.entropy(log_probs)


# operators of graphs, which Inductor lowers on a CPU -----------------------------------------


def largest(x: Tensor) -> Tensor:
    """The index of the largest of each row, the first of equals, int64 `[*batch]`."""
    return torch.ops.fastprob.largest(x) if lowered(x) else x.argmax(-1)


def lowered(x: Tensor) -> bool:
    """Whether a graph holds operators about a tensor that `lowering` serves."""
    return (
        torch.compiler.is_compiling()
        and lowering.enabled
        and x.is_cpu
        and not backend.is_exporting()
        and outside_transforms()
    )


def race_score_in_graph(given: Tensor, noise: Tensor, from_probs: bool) -> tuple[Tensor, Tensor]:
    """`race_score` as an operator: the index that wins and its log-probability, `[*batch]` both."""
    return torch.ops.fastprob.categorical_race(given, noise, from_probs)


def _offer() -> None:
    lowering.offer_categorical(
        torch.ops.fastprob.largest.default, torch.ops.fastprob.categorical_race.default
    )


def _largest_fake(x):
    _offer()
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def _race_op(given, noise, from_probs):
    # The noise is used up, and belongs to the graph.
    return reference.race_score(given, noise.clone(), from_probs, True)


def _race_fake(given, noise, from_probs):
    _offer()
    batch = given.shape[:-1]
    return given.new_empty(batch, dtype=torch.int64), given.new_empty(batch)


register(
    "largest",
    "(Tensor x) -> Tensor",
    lambda x: x.argmax(-1),
    _largest_fake,
    vmap=lambda info, in_dims, x: (torch.ops.fastprob.largest(x.movedim(in_dims[0], 0)), 0),
)
register(
    "categorical_race",
    "(Tensor given, Tensor noise, bool from_probs) -> (Tensor, Tensor)",
    _race_op,
    _race_fake,
    vmap=lambda info, in_dims, given, noise, from_probs: (
        torch.ops.fastprob.categorical_race(
            lead(given, in_dims[0], info.batch_size),
            lead(noise, in_dims[1], info.batch_size),
            from_probs,
        ),
        (0, 0),
    ),
)


# the kernels' operators ---------------------------------------------------------------------


def draw(
    given: Tensor,
    mask: Tensor | None,
    shape: torch.Size,
    generator: Any = None,
    *,
    from_probs: bool = False,
    kind: int = RANDOM,
    value: int = NO_VALUE,
    pathwise: bool = False,
    score: bool = True,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """An index, a value, its log-probability and the entropy, in one launch where kernels serve it.

    Args:
        given: logits or weights, `[*batch, K]`.
        mask: True where a category may be drawn, of the shape of `given`; None for everywhere.
            For logits alone.
        shape: sample dimensions in front of the value.
        generator: a `CounterStream`, a `torch.Generator`, or None for torch's default one.
        from_probs: whether `given` holds weights.
        kind: RANDOM, MEDIAN, MODE or MEAN.
        value: NO_VALUE for the index alone, MEAN_INDEX, ONE_HOT or PROBS.
        pathwise: whether a one-hot vector is a floating-point one, whose gradient goes to the
            probabilities.
        score: whether the log-probability is wanted.
        entropy: whether the entropy is wanted.

    Returns:
        index int64 `[*shape, *batch]`; value `[*shape, *batch, K]`, or `[*shape, *batch]` for
        MEAN_INDEX; log-probability `[*shape, *batch]`; entropy `[*batch]`. None for what was not
        wanted.

    Raises:
        IndexError: if there are no categories.
    """
    if not given.shape[-1] and kind != MEAN:
        raise IndexError(
            f"Categorical has no category to choose from in parameters of shape "
            f"{tuple(given.shape)}"
        )
    random = kind == RANDOM
    if not plain_eager():
        state = _random.device_pair(given, generator) if random and generator is not None else None
        made, scores, entropies, index = torch.ops.fastprob.categorical_draw(
            given, mask, state, list(shape), from_probs, kind, value, pathwise, score, entropy
        )
        return (
            index,
            _detached(made, value, pathwise) if value else None,
            scores if score else None,
            entropies if entropy else None,
        )
    state = _random.state_for(given, generator) if random else None
    differentiable = score or entropy or _differentiable(value, pathwise)
    if differentiable and wants_gradient(given):
        return _Draw.apply(
            given, mask, state, shape, from_probs, kind, value, pathwise, score, entropy
        )
    return _draw_kernel(
        given, mask, state, shape, from_probs, kind, value, pathwise, score, entropy
    )


def score_given(
    given: Tensor,
    mask: Tensor | None,
    value: Tensor | None,
    *,
    from_probs: bool = False,
    hot: bool = False,
    neg_inf: float = -math.inf,
    entropy: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The log-probability of given indices or one-hot vectors and the entropy, in one launch.

    Args:
        given: as in `draw`.
        mask: as in `draw`.
        value: indices `[*sample, *batch]`, or vectors `[*sample, *batch, K]` where `hot`; None for
            the entropy alone. An index that names no category scores NaN.
        from_probs: as in `draw`.
        hot: whether `value` holds vectors.
        neg_inf: log-probability of masked categories.
        entropy: whether the entropy is wanted.

    Returns:
        log-probability `[*sample, *batch]` and entropy `[*batch]`; None for what was not wanted.

    Raises:
        ValueError: if the value is on another device, or of a shape that does not broadcast.
    """
    if value is not None:
        given, mask, value = fitting(given, mask, value, hot)
    if not plain_eager():
        scores, entropies, _ = torch.ops.fastprob.categorical_score(
            given, mask, value, from_probs, hot, neg_inf, entropy
        )
        return scores if value is not None else None, entropies if entropy else None
    if wants_gradient(given):
        return _ScoreGiven.apply(given, mask, value, from_probs, hot, neg_inf, entropy)
    return backend.kernels("categorical").score(
        given, mask, value, hot=hot, probs=from_probs, neg_inf=neg_inf, entropy=entropy
    )[:2]


def score_and_entropy(
    given: Tensor,
    mask: Tensor | None,
    value: Tensor,
    memo: dict[str, Any] | None,
    *,
    from_probs: bool = False,
    hot: bool = False,
    neg_inf: float = -math.inf,
) -> Tensor:
    """The score, and on the way the entropy, which PPO asks the same distribution for next.

    Args:
        given: as in `score_given`.
        mask: likewise.
        value: likewise.
        memo: where the entropy is kept for `entropy_given`; None where it is not wanted.
        from_probs: as in `score_given`.
        hot: likewise.
        neg_inf: likewise.
    """
    if value is None:
        fitting(given, mask, value, hot)
    made, entropies = score_given(
        given, mask, value, from_probs=from_probs, hot=hot, neg_inf=neg_inf,
        entropy=memo is not None,
    )  # fmt: skip
    assert made is not None
    # A value of more batch dimensions broadcasts the parameter, and the entropy with it.
    if memo is not None and entropies is not None and entropies.shape == given.shape[:-1]:
        memo["entropy"] = (given._version, entropies)
    return made


def entropy_given(
    given: Tensor, mask: Tensor | None, memo: dict[str, Any] | None, *, from_probs: bool = False
) -> Tensor:
    """Entropy in nats, `[*batch]`; arguments as for `score_and_entropy`."""
    found = None if memo is None else memo.get("entropy")
    if found is not None and found[0] == given._version:
        return found[1]
    made = score_given(given, mask, None, from_probs=from_probs, entropy=True)[1]
    assert made is not None
    return made


def fitting(given, mask, value, hot) -> tuple[Tensor, Tensor | None, Tensor]:
    """What is given and a value whose trailing dimensions are those of it, expanded where needed.

    Raises:
        TypeError: if the value is no tensor, or one of complex numbers.
        ValueError: if it is on another device, or does not broadcast.
    """
    if not isinstance(value, Tensor) or value.dtype.is_complex:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"Categorical scores tensors of real numbers, got {kind}")
    if value.device != given.device:
        raise ValueError(
            f"Categorical has parameters on {given.device} and was given a value on "
            f"{value.device}; move one of them"
        )
    tail = given.shape[-1:]
    batch, size = given.shape[:-1], value.shape[:-1] if hot else value.shape
    if hot and value.shape[-1:] != tail:
        raise ValueError(
            f"a one-hot value of shape {tuple(value.shape)} was given for {tail[0]} categories: "
            "its last dimension must be the categories"
        )
    if size == batch:
        return given, mask, value
    try:
        full = torch.broadcast_shapes(batch, size)
    except RuntimeError:
        raise ValueError(
            f"Categorical with a batch of shape {tuple(batch)} was given a value of shape "
            f"{tuple(value.shape)}, which does not broadcast with it"
        ) from None
    if full[len(full) - len(batch) :] != batch:
        given = given.expand(full + tail)
        mask = None if mask is None else mask.expand(full + tail)
    return given, mask, value.expand(full + tail if hot else full)


def _differentiable(value: int, pathwise: bool) -> bool:
    """Whether a gradient flows through the value: through all but indices and int64 vectors."""
    return value in (MEAN_INDEX, PROBS) or (value == ONE_HOT and pathwise)


def _detached(made: Tensor, value: int, pathwise: bool) -> Tensor:
    return made if _differentiable(value, pathwise) else made.detach()


def _dtype_of(given: Tensor, value: int, pathwise: bool) -> torch.dtype:
    return torch.int64 if value == ONE_HOT and not pathwise else given.dtype


def _draw_kernel(given, mask, state, shape, from_probs, kind, value, pathwise, score, entropy):
    kernels = backend.kernels("categorical")
    form = kernels.Form(kind, True, value, _dtype_of(given, value, pathwise))
    return kernels.draw(
        given, mask, shape, form, state=state, probs=from_probs, score=score, entropy=entropy
    )[:4]


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, given, mask, state, shape, from_probs, kind, value, pathwise, score, entropy
    ):  # fmt: skip
        ctx.set_materialize_grads(False)
        index, made, scores, entropies = _draw_kernel(
            given, mask, state, shape, from_probs, kind, value, pathwise, score, entropy
        )
        ctx.save_for_backward(given, mask, index)
        ctx.shape, ctx.from_probs, ctx.value = shape, from_probs, value
        ctx.mark_non_differentiable(index)
        if made is not None and not _differentiable(value, pathwise):
            ctx.mark_non_differentiable(made)
        return index, made, scores, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, *grads):
        given, mask, index = ctx.saved_tensors
        grad = backend.kernels("categorical").backward(
            *grads, given, mask, index, ctx.shape, probs=ctx.from_probs,
            mean_index=ctx.value == MEAN_INDEX,
        )  # fmt: skip
        return fold_samples((grad,), len(ctx.shape))[0], *(None,) * 9


class _ScoreGiven(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, mask, value, from_probs, hot, neg_inf, entropy):
        ctx.set_materialize_grads(False)
        scores, entropies, index = backend.kernels("categorical").score(
            given, mask, value, hot=hot, probs=from_probs, neg_inf=neg_inf, entropy=entropy,
            keep=True,
        )  # fmt: skip
        ctx.save_for_backward(given, mask, index if hot else value)
        ctx.from_probs = from_probs
        return scores, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_score, grad_entropy):
        given, mask, index = ctx.saved_tensors
        shape = given.shape[:0] if index is None else index.shape[: index.dim() - given.dim() + 1]
        grad = backend.kernels("categorical").backward(
            None, grad_score, grad_entropy, given, mask, index, shape, probs=ctx.from_probs
        )
        return fold_samples((grad,), len(shape))[0], *(None,) * 6


def _draw_op(given, mask, state, sample, from_probs, kind, value, pathwise, score, entropy):
    shape = torch.Size(sample)
    random = kind == RANDOM
    if backend.serves(given):
        source = None
        if random:
            source = _random.state_for(given, None) if state is None else _random.given_pair(state)
        index, made, scores, entropies = _draw_kernel(
            given, mask, source, shape, from_probs, kind, value, pathwise, score, entropy
        )
    else:
        if random and state is None:
            state = _random.device_pair(given, None)
        index = reference.choose(given, mask, state, shape, from_probs, kind)
        made = reference.value_of(
            given, mask, index, shape, from_probs, value, _dtype_of(given, value, pathwise)
        )
        scores, entropies = reference.score_and_entropy(
            given, mask, index if score else None, from_probs, entropy
        )
    return wanted(made, given), wanted(scores, given), wanted(entropies, given), index


def _draw_fake(given, mask, state, sample, from_probs, kind, value, pathwise, score, entropy):
    batch = given.shape[:-1]
    size = (*sample, *batch)
    full = size if value == MEAN_INDEX else (*size, given.shape[-1])
    return (
        given.new_empty(full, dtype=_dtype_of(given, value, pathwise)) if value else nothing(given),
        given.new_empty(size) if score else nothing(given),
        given.new_empty(batch) if entropy else nothing(given),
        given.new_empty(size, dtype=torch.int64),
    )


def _draw_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    given, mask, _, ctx.sample, ctx.from_probs, _, ctx.value, ctx.pathwise, *flags = inputs
    ctx.score, ctx.entropy = flags
    ctx.save_for_backward(given, mask, output[3])


def _draw_gradient(ctx, grad_value, grad_score, grad_entropy, _):
    given, mask, index = ctx.saved_tensors
    grad = torch.ops.fastprob.categorical_backward(
        grad_value if _differentiable(ctx.value, ctx.pathwise) else None,
        grad_score if ctx.score else None, grad_entropy if ctx.entropy else None,
        given, mask, index, ctx.sample, ctx.from_probs, ctx.value == MEAN_INDEX,
    )  # fmt: skip
    return grad, *(None,) * 9


def _backward_op(
    grad_value, grad_score, grad_entropy, given, mask, index, sample, from_probs, mean_index
):  # fmt: skip
    shape = torch.Size(sample)
    grads = grad_value, grad_score, grad_entropy
    if backend.serves(given):
        made = backend.kernels("categorical").backward(
            *grads, given, mask, index, shape, probs=from_probs, mean_index=mean_index
        )
    else:
        made = reference.backward(*grads, given, mask, index, shape, from_probs, mean_index)
    return fold_samples((made,), len(shape))[0]


def _backward_fake(
    grad_value, grad_score, grad_entropy, given, mask, index, sample, from_probs, mean_index
):  # fmt: skip
    return given.new_empty(given.shape)


def _score_op(given, mask, value, from_probs, hot, neg_inf, entropy):
    if backend.serves(given):
        made = backend.kernels("categorical").score(
            given, mask, value, hot=hot, probs=from_probs, neg_inf=neg_inf, entropy=entropy,
            keep=True,
        )  # fmt: skip
    else:
        index = value if value is None or not hot else value.argmax(-1)
        scores, entropies = reference.score_and_entropy(given, mask, index, from_probs, entropy)
        if scores is not None and mask is not None:
            scores = torch.where(scores == -math.inf, neg_inf, scores)
        made = scores, entropies, index if hot else None
    index = made[2] if hot and value is not None else given.new_empty(0, dtype=torch.int64)
    return wanted(made[0], given), wanted(made[1], given), index


def _score_fake(given, mask, value, from_probs, hot, neg_inf, entropy):
    size = given.shape[:0] if value is None else value.shape[:-1] if hot else value.shape
    return (
        nothing(given) if value is None else given.new_empty(size),
        given.new_empty(given.shape[:-1]) if entropy else nothing(given),
        given.new_empty(size if hot and value is not None else 0, dtype=torch.int64),
    )


def _score_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    given, mask, value, ctx.from_probs, ctx.hot, _, ctx.entropy = inputs
    ctx.save_for_backward(given, mask, output[2] if ctx.hot and value is not None else value)


def _score_gradient(ctx, grad_score, grad_entropy, _):
    given, mask, index = ctx.saved_tensors
    sample = [] if index is None else list(index.shape[: index.dim() - given.dim() + 1])
    grad = torch.ops.fastprob.categorical_backward(
        None, None if index is None else grad_score, grad_entropy if ctx.entropy else None,
        given, mask, index, sample, ctx.from_probs, False,
    )  # fmt: skip
    return grad, *(None,) * 6


def _score_vmap(info, in_dims, given, mask, value, from_probs, hot, neg_inf, entropy):
    size = info.batch_size
    given = lead(given, in_dims[0], size)
    if mask is not None:
        mask = lead(mask, in_dims[1], size)
    operator = torch.ops.fastprob.categorical_score
    scores = entropies = nothing(given)
    index = given.new_empty(0, dtype=torch.int64)
    if value is not None:
        # Sample dimensions stand in front of the batch, and the new dimension in front of them.
        value = lead(value, in_dims[2], size)
        full = value.shape if hot else (*value.shape, given.shape[-1])
        ones = (1,) * (len(full) - given.dim())
        wide, allowed = (
            None if t is None else t.reshape(t.shape[:1] + ones + t.shape[1:]).expand(full)
            for t in (given, mask)
        )
        scores, _, index = operator(wide, allowed, value, from_probs, hot, neg_inf, False)
    if entropy:
        _, entropies, _ = operator(given, mask, None, from_probs, False, neg_inf, True)
    scored = value is not None
    return (scores, entropies, index), (
        0 if scored else None,
        0 if entropy else None,
        0 if scored and hot else None,
    )


register(
    "categorical_backward",
    "(Tensor? grad_value, Tensor? grad_score, Tensor? grad_entropy, Tensor given, Tensor? mask, "
    "Tensor? index, SymInt[] sample, bool from_probs, bool mean_index) -> Tensor",
    _backward_op,
    _backward_fake,
)
register(
    "categorical_draw",
    "(Tensor given, Tensor? mask, Tensor? state, SymInt[] sample, bool from_probs, int kind, "
    "int value, bool pathwise, bool score, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)",
    _draw_op,
    _draw_fake,
    setup=_draw_setup,
    backward=_draw_gradient,
    batched=(0, 1),
    out_dims=lambda given, mask, state, sample, probs, kind, value, pathwise, score, entropy: (
        len(sample) if value else None,
        len(sample) if score else None,
        0 if entropy else None,
        len(sample),
    ),
    random=lambda given, mask, state, sample, from_probs, kind, *_: kind == RANDOM,
)
register(
    "categorical_score",
    "(Tensor given, Tensor? mask, Tensor? value, bool from_probs, bool hot, float neg_inf, "
    "bool entropy) -> (Tensor, Tensor, Tensor)",
    _score_op,
    _score_fake,
    setup=_score_setup,
    backward=_score_gradient,
    vmap=_score_vmap,
)
