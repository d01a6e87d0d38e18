"""TanhDelta: its point, and that it scores as its own."""

from __future__ import annotations

import pytest
import torch
import torchrl.modules as rl
from torch import distributions as D

from fastprob import distributions as F

INF = float("inf")
BOUNDS = [
    {},
    {"low": -2.0, "high": 3.0},
    {"low": -1.0, "high": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)},
]
POINTS = ["mode", "median", "mean", "deterministic_sample"]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_the_point_and_its_gradient_are_upstreams(bounds):
    param = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mine, theirs = F.TanhDelta(param, **bounds), rl.TanhDelta(param, **bounds)
    assert mine.batch_shape == theirs.batch_shape and mine.event_shape == theirs.event_shape
    (expected,) = torch.autograd.grad(theirs.mode.square().sum(), param)
    for name in POINTS:
        value = getattr(mine, name)
        torch.testing.assert_close(value, theirs.mode)
        (found,) = torch.autograd.grad(value.square().sum(), param)
        torch.testing.assert_close(found, expected)
    assert mine.rsample((2,)).shape == (2, 3, 4) and mine.rsample().requires_grad
    assert not mine.sample((2,)).requires_grad
    off = theirs.mode.detach().clone()
    off[0, 0] += 1e-3
    assert torch.equal(mine.log_prob(off), theirs.log_prob(off))
    assert mine.log_prob(off).tolist() == [-INF, INF, INF]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_saturated_point_scores_as_its_own(dtype):
    param = torch.tensor([[-50.0, 50.0], [-9.0, 9.0], [3.0, -4.0], [0.0, 0.1]], dtype=dtype)
    dist = F.TanhDelta(param)
    value, score = dist.sample_and_log_prob((2,))
    assert value.dtype == score.dtype == dtype
    assert (score == INF).all() and (dist.log_prob(value) == INF).all()
    assert (dist.log_prob(value * 0.9)[:, :3] == -INF).all()
    assert (value.abs() < 1).all()
    # Upstream goes back through atanh and loses it.
    if dtype is torch.float32:
        theirs = rl.TanhDelta(param)
        assert (theirs.log_prob(theirs.mode)[:2] == -INF).all()


def test_shapes():
    for ndims in (0, 1, 2):
        dist = F.TanhDelta(torch.randn(2, 3), event_dims=ndims)
        assert len(dist.event_shape) == ndims
        assert dist.sample_and_log_prob((5,))[1].shape == (5, *dist.batch_shape)
        assert dist.entropy().shape == dist.batch_shape
        wide = dist.expand((7, *dist.batch_shape))
        assert wide.mode.shape == (7, 2, 3)
    for batch in ((0,), (2, 0)):
        value, score = F.TanhDelta(torch.randn(*batch, 3)).rsample_and_log_prob()
        assert value.shape == (*batch, 3) and score.shape == batch
    found = torch.vmap(lambda p: F.TanhDelta(p).sample_and_log_prob()[0])(torch.ones(4, 3))
    torch.testing.assert_close(found, torch.ones(4, 3).tanh())


@pytest.mark.parametrize("low", [1.0, 2, torch.tensor([0.0, 1.0])], ids=str)
def test_bad_bounds(low):
    with pytest.raises(ValueError, match="TanhDelta expects high to be greater than low"):
        F.TanhDelta(torch.zeros(2), low=low)


def test_bad_shapes_and_divergences():
    with pytest.raises(ValueError, match="event_dims=2"):
        F.TanhDelta(torch.zeros(2), event_dims=2)
    dist = F.TanhDelta(torch.zeros(2))
    with pytest.raises(NotImplementedError):
        D.kl_divergence(dist, dist)
