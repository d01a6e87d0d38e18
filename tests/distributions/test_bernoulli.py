"""Bernoulli and Independent(Bernoulli) against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import distributions as D

from fastprob import distributions as F
from tests.distributions._suite import Suite, close


class TestBernoulliLogits(Suite):
    event = ()
    discrete = True
    pathwise = False
    value_grad = False

    def params(self, batch, dtype=torch.float64):
        return {"logits": torch.randn((*batch, *self.event), dtype=dtype) * 2}

    def build(self, params):
        return F.Bernoulli(**params)

    def upstream(self, params):
        return D.Bernoulli(**params)

    def frozen(self, params):
        return scipy.stats.bernoulli(scipy.special.expit(params["logits"]))

    def total(self, each):
        return each.sum(tuple(range(-len(self.event), 0))) if self.event else each

    def log_prob(self, params, value):
        return self.total(self.frozen(params).logpmf(value))

    def entropy(self, params):
        return self.total(self.frozen(params).entropy())

    def points(self, params):
        dist = self.frozen(params)
        ones = (dist.mean() > 0.5) * 1.0
        return {"mode": ones, "median": ones, "mean": dist.mean(), "variance": dist.var()}

    @pytest.mark.parametrize("sample", [(), (7,)], ids=str)
    def test_draws_are_upstreams(self, sample):
        params = self.params((50,))
        torch.manual_seed(5)
        drawn = self.build(params).sample(sample)
        torch.manual_seed(5)
        assert torch.equal(drawn, self.upstream(params).sample(sample))

    def test_kl_divergence(self):
        p, q = self.params((3,)), self.params((3,))
        expected = D.kl_divergence(self.upstream(p), self.upstream(q))
        for one, other in ((self.build(p), self.build(q)), (self.build(p), self.upstream(q))):
            torch.testing.assert_close(D.kl_divergence(one, other), expected)

    # torch.bernoulli refuses randomness="same" with a batched probability.
    @pytest.mark.parametrize("randomness", ["different"])
    def test_vmap_of_draws(self, randomness):
        super().test_vmap_of_draws(randomness)


class TestBernoulliProbs(TestBernoulliLogits):
    def params(self, batch, dtype=torch.float64):
        return {"probs": torch.rand((*batch, *self.event), dtype=dtype) * 0.8 + 0.1}

    def frozen(self, params):
        return scipy.stats.bernoulli(params["probs"])


class TestIndependentBernoulli(TestBernoulliLogits):
    event = (4,)

    def build(self, params):
        return F.recognize(self.upstream(params))

    def upstream(self, params):
        return D.Independent(D.Bernoulli(**params), 1)


def test_large_logits_keep_their_digits():
    logits = torch.tensor([-700.0, -40.0, 25.0, 40.0, 700.0], dtype=torch.float64)
    dist = F.Bernoulli(logits=logits)
    for value in (0.0, 1.0):
        expected = -np.logaddexp(0, (1 - 2 * value) * logits.numpy())
        found = dist.log_prob(torch.full((5,), value).double())
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-16)
    size = logits.abs().numpy()
    expected = np.log1p(np.exp(-size)) + size * scipy.special.expit(-size)
    np.testing.assert_allclose(dist.entropy().numpy(), expected, rtol=1e-12)


def test_at_one_half_both_are_as_likely_and_0_is_taken():
    for dist in (F.Bernoulli(0.5), F.Bernoulli(logits=0.0)):
        assert dist.mode.item() == dist.median.item() == 0.0
        close(dist.mean, 0.5, 0)


def test_what_torch_has_computed_does_not_change_what_is_recognized():
    dist = D.Bernoulli(logits=torch.tensor([0.3]))
    assert dist.probs is not None
    assert F.recognize(dist)._from_probs is False
    nested = D.Independent(D.Independent(D.Bernoulli(torch.rand(2, 3, 4)), 1), 1)
    assert F.recognize(nested).event_shape == (3, 4)
    assert type(F.recognize(nested).base_dist) is F.Bernoulli


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "neither"),
        ({"logits": torch.zeros(2), "probs": torch.ones(2)}, "both"),
        ({"logits": torch.tensor([0.0, float("nan")])}, r"logits.*index \(1,\)"),
        ({"probs": torch.tensor([0.5, -0.5])}, r"probs.*between 0 and 1.*index \(1,\)"),
        ({"probs": torch.tensor([1.5, 0.5])}, r"probs.*index \(0,\)"),
        ({"probs": torch.tensor([float("nan"), 0.5])}, r"probs.*index \(0,\)"),
    ],
)
def test_bad_parameters(params, message):
    with pytest.raises(ValueError, match=f"Bernoulli.*{message}"):
        F.Bernoulli(**params, validate_args=True)


def test_the_mean_has_no_score():
    with pytest.raises(NotImplementedError, match="mean of a Bernoulli"):
        F.Bernoulli(0.3).take(F._base.MEAN, score=True)


def test_several_gradients_of_an_entropy_at_once():
    logits = torch.randn(3, 4, requires_grad=True)
    weights = torch.randn(5, 3, 4)
    (found,) = torch.autograd.grad(
        F.Bernoulli(logits=logits).entropy(), logits, weights, is_grads_batched=True
    )
    expected = [
        torch.autograd.grad(F.Bernoulli(logits=logits).entropy(), logits, w)[0] for w in weights
    ]
    torch.testing.assert_close(found, torch.stack(expected))
