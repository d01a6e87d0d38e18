"""Normal, Independent(Normal) and IndependentNormal against scipy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.stats
import torch
import torchrl.modules as rl
from torch import distributions as D

from fastprob import distributions as F
from tests.distributions._suite import Suite


class TestNormal(Suite):
    event = ()

    def params(self, batch, dtype=torch.float64):
        shape = (*batch, *self.event)
        return {
            "loc": torch.randn(shape, dtype=dtype),
            "scale": torch.rand(shape, dtype=dtype) * 1.5 + 0.1,
        }

    def build(self, params):
        return F.Normal(**params)

    def upstream(self, params):
        return D.Normal(**params)

    def over_event(self, x):
        return x.sum(tuple(range(-len(self.event), 0))) if self.event else x

    def log_prob(self, params, value):
        return self.over_event(scipy.stats.norm.logpdf(value, **params))

    def entropy(self, params):
        return self.over_event(scipy.stats.norm.entropy(**params))

    def points(self, params):
        exact = scipy.stats.norm(**params)
        return {"mean": exact.mean(), "median": exact.median(), "mode": params["loc"]}

    def test_draws_follow_the_distribution(self):
        params = {k: v.flatten()[0] for k, v in self.params((1,)).items()}
        dist = F.Normal(params["loc"], params["scale"])
        drawn = dist.sample((4000,)).numpy()
        exact = scipy.stats.norm(*(params[k].item() for k in ("loc", "scale")))
        assert scipy.stats.kstest(drawn, exact.cdf).pvalue > 0.01
        # The test can fail: a mean that is off by a tenth of the scale shows.
        assert scipy.stats.kstest(drawn + 0.1 * exact.std(), exact.cdf).pvalue < 1e-4

    def test_kl_divergence(self):
        p, q = self.params((3,)), self.params((3,))
        expected = D.kl_divergence(self.upstream(p), self.upstream(q))
        found = D.kl_divergence(self.build(p), self.build(q))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_moments(self):
        params = self.params((3,))
        dist, exact = self.build(params), scipy.stats.norm(**self.arrays(params))
        np.testing.assert_allclose(dist.variance.numpy(), exact.var(), rtol=1e-12)
        np.testing.assert_allclose(dist.stddev.numpy(), exact.std(), rtol=1e-12)


class TestIndependent(TestNormal):
    event = (4,)

    def build(self, params):
        return F.recognize(D.Independent(D.Normal(**params), len(self.event)))

    def upstream(self, params):
        return D.Independent(D.Normal(**params), len(self.event))


class TestIndependentTwoDims(TestIndependent):
    event = (2, 3)


class TestIndependentOfIndependent(TestIndependent):
    event = (2, 3)

    def build(self, params):
        return F.recognize(D.Independent(D.Independent(D.Normal(**params), 1), 1))


class TestIndependentNormal(TestNormal):
    event = (4,)

    def build(self, params):
        return F.IndependentNormal(**params)

    def upstream(self, params):
        return rl.IndependentNormal(**params)


class TestIndependentNormalNoEvent(TestIndependentNormal):
    event = ()

    def build(self, params):
        return F.IndependentNormal(**params, event_dim=0)

    def upstream(self, params):
        return rl.IndependentNormal(**params, event_dim=0)


class TestIndependentNormalEmptyEvent:
    def test_the_score_of_nothing_is_0(self):
        dist = F.IndependentNormal(torch.zeros(3, 0), torch.ones(3, 0))
        value, score = dist.rsample_and_log_prob((2,))
        assert value.shape == (2, 3, 0)
        assert torch.equal(score, torch.zeros(2, 3))
        assert torch.equal(dist.log_prob(value), torch.zeros(2, 3))
        assert torch.equal(dist.entropy(), torch.zeros(3))


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5), torch.full((3,), 0.5)], ids=str)
def test_scales_broadcast(scale):
    loc = torch.randn(2, 3)
    full = torch.full((2, 3), 0.5)
    value = torch.randn(2, 3)
    for cls in (F.Normal, F.IndependentNormal):
        dist, wanted = cls(loc, scale), cls(loc, full)
        assert dist.batch_shape == wanted.batch_shape
        assert torch.equal(dist.log_prob(value), wanted.log_prob(value))


@pytest.mark.parametrize(
    "scale", [torch.ones_like, functools.partial(torch.full_like, fill_value=1)]
)
def test_scales_as_callables(scale):
    loc, value = torch.randn(2, 3), torch.randn(2, 3)
    found = F.IndependentNormal(loc, scale).log_prob(value)
    assert torch.equal(found, F.IndependentNormal(loc, torch.ones(2, 3)).log_prob(value))


def test_gradients_of_broadcast_parameters():
    value = torch.randn(5, 3, dtype=torch.float64)
    loc = torch.randn(3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def score(loc, scale):
        dist = F.IndependentNormal(loc, scale)
        torch.manual_seed(5)
        return dist.log_prob(value), *dist.rsample_and_log_prob((5,)), dist.entropy()

    assert torch.autograd.gradcheck(score, (loc, scale))


def test_update_squashes_the_mean():
    # torchrl 0.14.1: tanh_loc acts in update(), and not in the constructor.
    loc, scale = torch.randn(2, 3) * 10, torch.ones(2, 3)
    mine, theirs = (
        c(loc, scale, tanh_loc=True, upscale=2.0)
        for c in (F.IndependentNormal, rl.IndependentNormal)
    )
    assert torch.equal(mine.mode, theirs.mode) and torch.equal(mine.mode, loc)
    mine.update(loc, scale)
    theirs.update(loc, scale)
    assert torch.equal(mine.mode, theirs.mode)
    torch.testing.assert_close(mine.mode, 2 * torch.tanh(loc / 2))


def test_numbers_as_parameters():
    dist = F.Normal(0.0, 2.0)
    assert dist.sample().dtype == torch.get_default_dtype()
    assert dist.log_prob(torch.tensor(1.0)).item() == pytest.approx(
        scipy.stats.norm.logpdf(1, 0, 2)
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"scale": torch.tensor([1.0, 0.0])},
        {"scale": torch.tensor([1.0, -1.0])},
        {"scale": torch.tensor([1.0, float("nan")])},
        {"loc": torch.tensor([0.0, float("nan")])},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", [F.Normal, F.IndependentNormal])
def test_bad_parameters(cls, bad):
    params = {"loc": torch.zeros(2), "scale": torch.ones(2), **bad}
    (name,) = bad
    with pytest.raises(ValueError, match=rf"{cls.__name__} expects {name}.*1 of 2.*index \(1,\)"):
        cls(**params, validate_args=True)
    cls(**params, validate_args=False)
