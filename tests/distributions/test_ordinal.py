"""Ordinal and OneHotOrdinal against the formula of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch
import torchrl.modules as rl

from fastprob import distributions as F
from tests.distributions import test_categorical as base

K = base.K


class ScoresMixin:
    def params(self, batch, dtype=torch.float64):
        return {"scores": torch.randn(*batch, K, dtype=dtype)}

    def probs(self, params):
        scores = params["scores"]
        up, down = np.log(scipy.special.expit(scores)), np.log(scipy.special.expit(-scores))
        logits = [up[..., : k + 1].sum(-1) + down[..., k + 1 :].sum(-1) for k in range(K)]
        return scipy.special.softmax(np.stack(logits, -1), -1)


class TestOrdinal(ScoresMixin, base.TestCategoricalLogits):
    def build(self, params):
        return F.Ordinal(**params)

    def upstream(self, params):
        return rl.Ordinal(**params)


class TestOneHotOrdinal(ScoresMixin, base.TestOneHotLogits):
    def build(self, params):
        return F.OneHotOrdinal(**params)

    def upstream(self, params):
        return rl.OneHotOrdinal(**params)


@pytest.mark.parametrize("sample", [(), (7,)], ids=str)
@pytest.mark.parametrize("name", ["Ordinal", "OneHotOrdinal"])
def test_draws_are_upstreams(name, sample):
    scores = torch.randn(16, K)
    torch.manual_seed(5)
    drawn = getattr(F, name)(scores).sample(sample)
    torch.manual_seed(5)
    assert torch.equal(drawn, getattr(rl, name)(scores).sample(sample))


@pytest.mark.parametrize("name", ["Ordinal", "OneHotOrdinal"])
def test_bad_parameters(name):
    cls = getattr(F, name)
    with pytest.raises(ValueError, match=f"{name}.*scalar"):
        cls(torch.tensor(0.0))
    with pytest.raises(ValueError, match=f"{name}.*NaN"):
        cls(torch.tensor([0.0, float("nan")]), validate_args=True)
