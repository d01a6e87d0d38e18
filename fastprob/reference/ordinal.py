"""Ordinal and OneHotOrdinal in plain PyTorch: the CPU path, and the oracle of the tests.

Tang & Agrawal 2020, equation 4, with s the scores and sigma the logistic function:

    logits_k = sum_{j <= k} log sigma(s_j) + sum_{j > k} log(1 - sigma(s_j))

Since log sigma(s) = s + log(1 - sigma(s)), the second terms add up to the same constant for each k,
and what is left is the running sum of the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(scores: Tensor) -> Tensor:
    """Log-probabilities but for a constant in each row, `[*batch, K]`.

    One operation where the formula as it stands takes eight, and no cancellation.
    """
    return torch.cumsum(scores, -1)
