"""Score of Delta."""

from __future__ import annotations

from torch import Tensor

from fastprob.reference import delta as reference


def log_prob(param: Tensor, value: Tensor, atol: float, rtol: float, ndims: int) -> Tensor:
    """`inf` where `value` is `param`, `-inf` elsewhere, `[*sample, *batch]`; no gradient."""
    return reference.log_prob(param.detach(), value.detach(), atol, rtol, ndims)


def score_own(param: Tensor, ndims: int) -> Tensor:
    """The score of the point itself, `[*batch]`; no gradient."""
    return reference.score_own(param.detach(), ndims)
