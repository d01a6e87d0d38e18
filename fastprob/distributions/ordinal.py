"""Ordinal and OneHotOrdinal: categorical distributions over an ordered set."""

from __future__ import annotations

from torch import Tensor

from fastprob.distributions.categorical import Categorical, OneHotCategorical
from fastprob.ops import ordinal as ops


class Ordinal(Categorical):
    """Categorical distribution over an ordered set, for actions that discretize an interval.

    Takes what TorchRL's class of the same name takes, and has its probabilities.

    Source: Tang & Agrawal 2020, equation 4, https://arxiv.org/abs/1901.10500, which comes down to
    `logits_k = sum_{j <= k} scores_j`.

    Args:
        scores: log-odds of going on past each category, `[*batch, K]`.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if a checked score is NaN, or the scores are a scalar.
    """

    _name = "Ordinal"

    def __init__(self, scores: Tensor, validate_args: bool | None = None) -> None:
        self._set(_logits(self._name, scores), None, validate_args)


class OneHotOrdinal(OneHotCategorical):
    """One-hot form of `Ordinal`, int64 as TorchRL's.

    Args:
        scores: log-odds of going on past each category, `[*batch, K]`.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if a checked score is NaN, or the scores are a scalar.
    """

    _name = "OneHotOrdinal"

    def __init__(self, scores: Tensor, validate_args: bool | None = None) -> None:
        self.grad_method = "PassThrough"
        self._set(_logits(self._name, scores), None, validate_args)


def _logits(name: str, scores: Tensor) -> Tensor:
    if scores.ndim < 1:
        raise ValueError(
            f"{name} expects scores of one dimension or more, whose last one is the categories; "
            "got a scalar"
        )
    return ops.logits(scores)
