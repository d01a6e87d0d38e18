"""Categorical and OneHotCategorical in plain PyTorch: the CPU path, and the oracle of the tests.

With logits normalized to log-probabilities l_k = logits_k - logsumexp(logits):

    log p(k) = l_k            H = -sum_k exp(l_k) l_k

A draw is the k with the largest p_k / e_k, e_k ~ Exponential(1): what torch.multinomial does for
one draw, without its checks of the probabilities. From a counter-based state it is the first k
whose running sum of p exceeds one uniform: the draws of the kernels.

Source: Devroye 1986, "Non-Uniform Random Variate Generation", section III.2, for the inverse CDF.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprob.reference import philox
from fastprob.reference._reduce import affine_sum, plain_tensors_only

# How a value is chosen, and what is made of it, as the kernels number them.
RANDOM, MEDIAN, MODE, MEAN = range(4)
NO_VALUE, MEAN_INDEX, ONE_HOT, PROBS = range(4)


# ATen's softmax takes rows of less than a vector one element at a time: 4096 x 8 in fp32 take 484
# us, where a reduction, a difference, an exponential and a sum take 88; 2048 x 16 take 32 and 77.
_VECTOR = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
# In float64 it is slow up to 50 elements and more: 77 us in place of 249 for 2048 x 16.
_NARROW = {torch.float32: _VECTOR // 4 - 1, torch.float64: 32}
# Below it, the calls count: 16 x 8 take 3.0 us in log_softmax, and 5.6 in passes.
_LEAST = 1024
# Sums of exponentials between these two are exact to rounding without a shift by the largest.
_SMALLEST, _LARGEST = 1e-20, 1e30


def by_passes(x: Tensor) -> bool:
    """Whether rows of `[*batch, K]` are normalized in passes, and not by ATen's softmax.

    In plain eager mode, and for whoever needs no gradient through the passes.
    """
    return (
        x.shape[-1] <= _NARROW.get(x.dtype, 0)
        and x.is_cpu
        and plain_tensors_only()
        and x.numel() >= _LEAST
    )


def normalize(logits: Tensor) -> Tensor:
    """Log-probabilities, `[*batch, K]`."""
    if (logits.requires_grad and torch.is_grad_enabled()) or not by_passes(logits):
        return torch.log_softmax(logits, -1)
    return normalize_by_passes(logits)


def normalize_by_passes(logits: Tensor) -> Tensor:
    """The same where `by_passes` says so; has no gradient."""
    shifted = logits - logits.amax(-1, keepdim=True)
    total = affine_sum(shifted.exp(), 1, 0.0, 1, True)
    return shifted.sub_(total.log_().unsqueeze(-1))


def exponentials(log_probs: Tensor) -> Tensor:
    """Probabilities of log-probabilities, `[*batch, K]`; a softmax corrects half precisions."""
    return log_probs.exp() if by_passes(log_probs) else torch.softmax(log_probs, -1)


def from_probs(probs: Tensor) -> Tensor:
    """Log-probabilities of unnormalized probabilities, `[*batch, K]`.

    Probabilities are kept an epsilon away from 0 and 1, as torch's do.
    """
    eps = torch.finfo(probs.dtype).eps
    return (probs / probs.sum(-1, keepdim=True)).clamp(eps, 1 - eps).log()


# By another name where an argument has this one.
_from_probs = from_probs


def race(
    probs: Tensor,  # [*batch, K]
    noise: Tensor,  # [*batch, K], exponential of rate 1
) -> Tensor:  # [*batch]
    """The index that wins, int64."""
    return torch.argmax(probs / noise, -1)


def race_score(
    given: Tensor,  # [*batch, K]
    noise: Tensor,  # [*batch, K], exponential of rate 1; used up
    from_probs: bool,
    score: bool,
) -> tuple[Tensor, Tensor | None]:  # [*batch] both
    """The index that wins and its log-probability, of logits or weights, without gradients.

    A winner's probability is not small enough to lose digits: its logarithm is all that is taken.
    For plain CPU tensors in float32 or float64.
    """
    shares, total = _shares(given, from_probs)
    index = _largest(torch.div(shares, noise, out=noise))
    return index, _score_share(shares, total, index, from_probs) if score else None


def mode_score(given: Tensor, from_probs: bool) -> tuple[Tensor, Tensor]:  # [*batch] both
    """The index of the largest logit or weight and its log-probability, where `by_passes`."""
    index = _largest(given)
    shares, total = _shares(given, from_probs)
    return index, _score_share(shares, total, index, from_probs)


def _shares(given: Tensor, from_probs: bool) -> tuple[Tensor, Tensor | None]:
    """Probabilities up to a factor of each row, and their sums; None where those are 1."""
    if by_passes(given):
        shares = given if from_probs else given.exp()
        total = affine_sum(shares, 1, 0.0, 1, True)
        low, high = total.aminmax()
        if float(low) > _SMALLEST and float(high) < _LARGEST:
            return shares, total
        if not from_probs:
            shares = (given - given.amax(-1, keepdim=True)).exp_()
            return shares, affine_sum(shares, 1, 0.0, 1, True)
    if from_probs:
        return given / given.sum(-1, keepdim=True), None
    return torch.softmax(given, -1), None


def _score_share(
    shares: Tensor, total: Tensor | None, index: Tensor, from_probs: bool
) -> Tensor:  # [*batch]
    p = shares.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    if total is not None:
        p.div_(total)
    if from_probs:
        eps = torch.finfo(p.dtype).eps
        p.clamp_(eps, 1 - eps)
    return p.log_()


def _largest(x: Tensor) -> Tensor:
    """The index of the largest of each row, the first of equals, int64 `[*batch]`."""
    # 38 us in place of 49 for 4096 x 8, but 3.2 in place of 1.8 for 16 x 8.
    return torch.max(x, -1)[1] if x.numel() >= _LEAST else torch.argmax(x, -1)


_kept_rows: dict[int, Tensor] = {}


def one_hot(index: Tensor, count: int) -> Tensor:
    """One-hot vectors, int64 `[*batch, K]`."""
    if count > 64 or not (index.is_cpu and plain_tensors_only()):
        return F.one_hot(index, count)
    # Rows of a table: 14 us for 4096 x 8, 2.1 for 16 x 8; writing ones into zeros takes 32 and 3.4.
    rows = _kept_rows.get(count)
    if rows is None:
        with torch.inference_mode(False):
            rows = _kept_rows[count] = torch.eye(count, dtype=torch.int64, device="cpu")
    return torch.embedding(rows, index)


def pick(
    log_probs: Tensor,  # [*batch, K]
    index: Tensor,  # [*sample, *batch]
) -> Tensor:  # [*sample, *batch]
    """The log-probability of each index."""
    index = index.long().unsqueeze(-1)
    if index.ndim == log_probs.ndim and index.shape[:-1] == log_probs.shape[:-1]:
        return log_probs.gather(-1, index).squeeze(-1)
    index, log_probs = torch.broadcast_tensors(index, log_probs)
    return log_probs.gather(-1, index[..., :1]).squeeze(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats, `[*batch]`; a category of probability 0 contributes 0."""
    least = torch.finfo(log_probs.dtype).min
    return -(log_probs.exp() * log_probs.clamp_min(least)).sum(-1)


def mean_index(log_probs: Tensor) -> Tensor:
    """`sum_k k p_k`, `[*batch]`."""
    count = log_probs.shape[-1]
    index = torch.arange(count, dtype=log_probs.dtype, device=log_probs.device)
    return (log_probs.exp() * index).sum(-1)


def median_index(log_probs: Tensor) -> Tensor:
    """The smallest index whose cumulative probability reaches 1/2, int64 `[*batch]`."""
    return median_of(log_probs.exp())


def median_of(probs: Tensor) -> Tensor:
    """The same from probabilities that sum to 1."""
    # A cumulative sum that rounding leaves just below 1/2 still counts as having reached it.
    half = 0.5 - 4 * torch.finfo(probs.dtype).eps
    return (probs.cumsum(-1) < half).sum(-1)


# draws from a counter-based state, and what the kernels' operators compute without kernels ------


def weights(given: Tensor, from_probs: bool) -> Tensor:
    """Weights that a draw goes by, `[*batch, K]`, unnormalized and in fp32 at least.

    A half's rounding of the running sums would take small probabilities from a category.
    """
    x = given if given.dtype is torch.float64 else given.float()
    if from_probs:
        return x
    return torch.exp(x - x.amax(-1, keepdim=True))


def inverse_cdf(
    log_probs: Tensor,  # [*batch, K], up to a constant of each row
    uniform: Tensor,  # [*sample, *batch], in (0, 1)
) -> Tensor:  # int64 [*sample, *batch]
    """The first category whose running sum of probabilities exceeds `uniform` of the whole sum."""
    return first_beyond(weights(log_probs, False), uniform)


def first_beyond(
    weights: Tensor,  # [*batch, K], 0 or more
    uniform: Tensor,  # [*sample, *batch], in (0, 1)
) -> Tensor:  # int64 [*sample, *batch]
    """The same for weights.

    A weight of 0 is never drawn, whatever rounding does to the running sums: where none of a
    positive weight exceeds the threshold, the last of them is taken.
    """
    running = weights.cumsum(-1)
    threshold = uniform * running[..., -1]
    count = weights.shape[-1]
    k = torch.arange(count, device=weights.device)
    positive = weights > 0
    hit = positive & (running > threshold.unsqueeze(-1))
    first = torch.where(hit, k, count).amin(-1)
    return torch.minimum(first, torch.where(positive, k, 0).amax(-1))


def choose(
    given: Tensor,  # [*batch, K], logits or weights
    mask: Tensor | None,  # bool, broadcastable to [*batch, K]
    state: Tensor | None,  # int64 [2]
    shape: torch.Size,
    from_probs: bool,
    kind: int,
) -> Tensor:  # int64 [*sample, *batch]
    """The index by its kind; 0 for the mean, which has none."""
    x = given if mask is None else torch.where(mask, given, -math.inf)
    size = shape + x.shape[:-1]
    if kind == RANDOM:
        assert state is not None
        w = weights(x, from_probs)
        return first_beyond(w, philox.uniform(state, size, w.dtype))
    if kind == MODE:
        index = x.argmax(-1)
    elif kind == MEDIAN:
        w = weights(x, from_probs)
        index = median_of(w / w.sum(-1, keepdim=True))
    else:
        index = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    return index.expand(size).clone()


def normalized(
    given: Tensor,  # [*batch, K]
    mask: Tensor | None,
    from_probs: bool,
) -> Tensor:  # [*batch, K]
    """Log-probabilities of logits or weights, -inf where masked."""
    if from_probs:
        return _from_probs(given)
    return normalize(given if mask is None else torch.where(mask, given, -math.inf))


def value_of(
    given: Tensor,  # [*batch, K]
    mask: Tensor | None,
    index: Tensor,  # int64 [*sample, *batch]
    shape: torch.Size,
    from_probs: bool,
    value: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """What is made of an index: `[*sample, *batch, K]`, `[*sample, *batch]` for a mean."""
    if value == NO_VALUE:
        return None
    if value == ONE_HOT:
        return one_hot(index, given.shape[-1]).to(dtype)
    probs = weights(given if mask is None else torch.where(mask, given, -math.inf), from_probs)
    probs = probs / probs.sum(-1, keepdim=True)
    if value == MEAN_INDEX:
        k = torch.arange(given.shape[-1], dtype=probs.dtype, device=probs.device)
        probs = (probs * k).sum(-1)
    return probs.to(dtype).expand(shape + probs.shape).clone()


def score_and_entropy(
    given: Tensor,  # [*batch, K]
    mask: Tensor | None,
    index: Tensor | None,  # int64 [*sample, *batch]
    from_probs: bool,
    entropies: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Log-probability of an index and the entropy; None for what is not wanted."""
    log_probs = normalized(given, mask, from_probs)
    return (
        None if index is None else pick(log_probs, index),
        entropy(log_probs) if entropies else None,
    )


def backward(
    grad_value: Tensor | None,  # [*sample, *batch, K], or [*sample, *batch] for a mean index
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    given: Tensor,  # [*batch, K]
    mask: Tensor | None,
    index: Tensor | None,  # int64 [*sample, *batch]
    shape: torch.Size,
    from_probs: bool,
    mean_index: bool,
) -> Tensor:  # [*sample, *batch, K]
    """The gradient of value, score and entropy by logits or weights; see the kernels' formulas."""
    x = given if mask is None else torch.where(mask, given, -math.inf)
    w = weights(x, from_probs)
    total = w.sum(-1, keepdim=True)
    q = w / total
    k = torch.arange(x.shape[-1], device=x.device)
    by_value = q.new_zeros(())
    if grad_value is not None:
        by_value = grad_value.to(q.dtype)
        if mean_index:
            by_value = by_value.unsqueeze(-1) * k
    rate = by_value.expand(shape + q.shape).clone()
    eps = torch.finfo(given.dtype).eps
    clamped = q.clamp(eps, 1 - eps)
    by_index = torch.zeros_like(rate)
    if grad_score is not None and index is not None:
        by_row = grad_score.to(q.dtype).unsqueeze(-1)
        hot = index.unsqueeze(-1) == k
        if from_probs:
            rate = rate + torch.where(hot & (clamped == q), by_row / clamped, 0.0)
        else:
            if mask is not None:
                # The score of a masked category is a constant.
                by_row = torch.where((hot & mask).any(-1, keepdim=True), by_row, 0.0)
            by_index = torch.where(hot, by_row, 0.0)
            rate = rate - by_row
    if grad_entropy is not None:
        by_row = grad_entropy.to(q.dtype).unsqueeze(-1)
        if from_probs:
            term = torch.where(clamped == q, by_row * (clamped.log() + 1.0), 0.0)
        else:
            log_q = q.clamp_min(torch.finfo(q.dtype).tiny).log()
            term = by_row * (log_q - (q * log_q).sum(-1, keepdim=True))
        # The entropy has no sample dimensions: its gradient goes to the first sample alone.
        rate = rate.contiguous()
        rate.view(-1, *q.shape)[0] -= term
    if from_probs:
        made = (rate - (q * rate).sum(-1, keepdim=True)) / total
    else:
        mean = (q * by_value).sum(-1, keepdim=True)
        made = q * (rate - mean) + by_index
    return made.to(given.dtype)
