"""Delta: its oracle is its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchrl.modules as rl

from fastprob import InteractionType
from fastprob import distributions as F
from tests.distributions._suite import Suite


class TestDelta(Suite):
    event = (4,)
    random = False
    value_grad = False

    def params(self, batch, dtype=torch.float64):
        return {"param": torch.randn(*batch, *self.event, dtype=dtype)}

    def build(self, params):
        return F.Delta(**params)

    def upstream(self, params):
        return rl.Delta(**params)

    def values(self, params, sample=()):
        """Half of the events are the point, within the tolerance or not."""
        param = params["param"].detach()
        value = param.expand(*sample, *param.shape).clone()
        value += 5e-7 * torch.randint(-1, 2, value.shape)
        value += torch.randint(0, 2, (*value.shape[:-1], 1)) * 1e-3
        return value

    def log_prob(self, params, value):
        near = np.abs(value - params["param"]) < 1e-6 + 1e-6 * np.abs(params["param"])
        return np.where(near.all(-1), math.inf, -math.inf)

    def entropy(self, params):
        # The limit of a Normal's, log(scale) + const, as its scale goes to 0.
        return np.full(params["param"].shape[:-1], -math.inf)

    def points(self, params):
        return dict.fromkeys(("mode", "median", "mean", "deterministic_sample"), params["param"])

    def test_joint_gradients_reach_the_point(self):
        param = torch.randn(3, 4, requires_grad=True)
        value, _ = F.Delta(param).rsample_and_log_prob((2,))
        (grad,) = torch.autograd.grad(value.sum(), param)
        assert torch.equal(grad, torch.full_like(param, 2))

    # A score of +-inf has no derivative, and the score of a point no path to it.
    test_gradients_of_log_prob = None
    test_gradients_of_entropy = None
    test_gradients_of_draws = None
    test_hand_written_gradients_are_those_of_the_plain_formula = None
    test_forward_mode = None
    test_log_prob_after_a_draw_has_its_gradients = None
    test_error_of_log_prob_is_at_most_twice_upstreams = None
    test_draws_follow_the_seed_and_the_generator = None


@pytest.mark.parametrize(("batch", "event"), [((2, 3), ()), ((2,), (3,)), ((), (2, 3))])
def test_shapes(batch, event):
    param = torch.randn(2, 3)
    dist = F.Delta(param, batch_shape=batch, event_shape=event)
    assert dist.batch_shape == batch and dist.event_shape == event
    assert torch.equal(dist.log_prob(param), torch.full(batch, math.inf))
    off = param.clone()
    off[0, 0] += 1
    expected = rl.Delta(param, batch_shape=batch, event_shape=event).log_prob(off)
    assert torch.equal(dist.log_prob(off), expected)


def test_a_shape_that_does_not_fit():
    with pytest.raises(ValueError, match=r"\(3, 2\), got \(2, 3\)"):
        F.Delta(torch.randn(2, 3), batch_shape=(3,), event_shape=(2,))


@pytest.mark.parametrize("tolerance", [{"atol": 0.5}, {"rtol": 0.5}])
def test_tolerances(tolerance):
    param = torch.tensor([[1.0, 1.0]])
    dist = F.Delta(param, **tolerance)
    assert dist.log_prob(param + 0.4).item() == math.inf
    assert dist.log_prob(param + 0.6).item() == -math.inf
    assert F.Delta(param).log_prob(param + 0.4).item() == -math.inf


def test_update():
    dist = F.Delta(torch.zeros(3))
    dist.update(torch.ones(3))
    assert torch.equal(dist.mode, torch.ones(3))


@pytest.mark.parametrize("interaction", ["random", "mode"])
def test_the_points_own_score_is_its_log_prob(interaction):
    param = torch.tensor([[0.0, -3.0], [math.inf, 1.0], [math.nan, 1.0], [1e30, -1e-30]])
    dist = F.Delta(param)
    value, score = dist.take(InteractionType(interaction), score=True)
    assert value is param or torch.equal(value.nan_to_num(7.0), param.nan_to_num(7.0))
    inf = math.inf
    assert torch.equal(score, torch.tensor([inf, -inf, -inf, inf]))
    assert torch.equal(score, dist.log_prob(param))
