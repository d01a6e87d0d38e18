"""Kullback-Leibler divergences, registered with `torch.distributions.kl`.

Normal, IndependentNormal, Bernoulli, Beta and their `Independent` forms are subclasses of torch's
and keep torch's formulas, also against torch's own. Registered here are the categorical families
(torch's formula gives NaN gradients where a mask puts -inf), TruncatedNormal, and TruncatedNormal
and TanhNormal against TorchRL's classes of the same names. A Delta has none, as upstream.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor
from torch import distributions as D
from torch.distributions.kl import kl_divergence, register_kl

from fastprob.distributions.categorical import Categorical, OneHotCategorical
from fastprob.distributions.masked_categorical import MaskedCategorical, MaskedOneHotCategorical
from fastprob.distributions.tanh_normal import TanhNormal
from fastprob.distributions.truncated_normal import TruncatedNormal
from fastprob.ops import kl as ops
from fastprob.ops import truncated_normal as truncated_ops

_CATEGORICALS = (Categorical, OneHotCategorical, MaskedCategorical, MaskedOneHotCategorical)
_TORCHRL = "torchrl.modules.distributions.continuous."


def _log_probs(dist: Any) -> Tensor:
    """Log-probabilities of the actions, `[*batch, K]`, -inf where masked."""
    if isinstance(dist, (MaskedCategorical, MaskedOneHotCategorical)):
        return dist._action_log_probs
    return dist._scores if isinstance(dist, _CATEGORICALS) else dist.logits


def _kl_categorical(p: Any, q: Any) -> Tensor:
    p_scores, q_scores = _log_probs(p), _log_probs(q)
    if p_scores.shape[-1] != q_scores.shape[-1]:
        raise ValueError(
            "the KL divergence of categorical distributions needs the same number of categories, "
            f"got {p_scores.shape[-1]} and {q_scores.shape[-1]}"
        )
    return ops.categorical(p_scores, q_scores)


for _p, _q in itertools.product((*_CATEGORICALS, D.Categorical), repeat=2):
    if (_p, _q) != (D.Categorical, D.Categorical):
        register_kl(_p, _q)(_kl_categorical)


def _adopt(dist: Any, kind: type) -> Any:
    """`dist` as one of fastprob's `kind`, from TorchRL's class of the same name.

    Raises:
        NotImplementedError: if it is anything else.
    """
    if isinstance(dist, kind):
        return dist
    for cls in type(dist).__mro__:
        if f"{cls.__module__}.{cls.__qualname__}" == _TORCHRL + kind.__name__:
            extra = {"event_dims": len(dist.event_shape)} if kind is TanhNormal else {}
            return kind(
                dist.loc,
                dist.scale,
                low=dist.low,
                high=dist.high,
                validate_args=False,
                **extra,  # type: ignore[arg-type]
            )
    raise NotImplementedError(
        f"no KL divergence is known between a {kind.__name__} and a {type(dist).__name__}; "
        "estimate it from samples"
    )


@register_kl(TruncatedNormal, TruncatedNormal)
def _kl_truncated_normal(p: TruncatedNormal, q: TruncatedNormal) -> Tensor:
    """Closed form for any bounds; `inf` where p leaves q's interval."""
    left, right = (truncated_ops.standardize(*d._args()) for d in (p, q))
    return ops.truncated(left, right, p._ndims).to(p.loc.dtype)


@register_kl(TanhNormal, D.TransformedDistribution)
def _kl_tanh_normal_other(p: Any, q: Any) -> Tensor:
    return kl_divergence(p, _adopt(q, TanhNormal))


@register_kl(D.TransformedDistribution, TanhNormal)
def _kl_other_tanh_normal(p: Any, q: Any) -> Tensor:
    return kl_divergence(_adopt(p, TanhNormal), q)


@register_kl(TruncatedNormal, D.Independent)
def _kl_truncated_normal_other(p: Any, q: Any) -> Tensor:
    return _kl_truncated_normal(p, _adopt(q, TruncatedNormal))


@register_kl(D.Independent, TruncatedNormal)
def _kl_other_truncated_normal(p: Any, q: Any) -> Tensor:
    return _kl_truncated_normal(_adopt(p, TruncatedNormal), q)
