"""TanhNormal where tanh saturates: scores and gradients of a draw stay right to 1e-5.

The truth is worked out in 60 digits, from the loc, the scale and the noise that the draw had. A
score that goes back through atanh is off by 16,312 here, TorchRL's issue 4080. Errors are relative,
below a size of 1 absolute.
"""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch

from fastprob import backend
from fastprob.kernels import normal, tanh_normal
from fastprob.kernels._launch import State
from fastprob.ops import tanh_normal as ops

LOCS = (0.0, 1e-4, 0.3, 1.0, 4.0, 8.0, 9.5, 20.0, 50.0)
SCALES = (1e-4, 1e-2, 0.3, 1.0, 3.0, 10.0)
REPEATS = 4
NONE = torch.Size()
TOLERANCE = 1e-5
UNIT = ops.Bounds(1.0, 0.0, 0.0, True)
# What `safe` leaves of 1 - tanh(x)^2 where tanh is limited.
LIMIT = torch.tensor(1 - 1e-6, dtype=torch.float32, device="cpu").item()


@pytest.fixture
def saturated(device):
    """Loc and scale, `[N, 1]`, and the noise of their draw from a state."""
    points = [
        (sign * loc, scale)
        for loc, scale in itertools.product(LOCS, SCALES)
        for sign in (1.0, -1.0)
        for _ in range(REPEATS)
    ]
    loc, scale = torch.tensor(points, device=device).T[..., None].contiguous()
    state = torch.tensor([7, 0], device=device)
    noise = normal.draw(torch.zeros_like(loc), torch.ones_like(scale), NONE, 1, state=State(state))[
        0
    ]
    return loc, scale, noise, state


def score(loc, scale, noise):
    """The score and its derivatives by loc and scale at a fixed noise, to 60 digits."""
    with mpmath.workdps(60):
        mu, sigma, z = mpmath.mpf(loc), mpmath.mpf(scale), mpmath.mpf(noise)
        x = mu + sigma * z
        made = (
            -z * z / 2
            - mpmath.log(sigma)
            - mpmath.log(2 * mpmath.pi) / 2
            + 2 * mpmath.log(mpmath.cosh(x))
        )
        slope = 2 * mpmath.tanh(x)
        return float(made), float(slope), float(slope * z - 1 / sigma)


def value_slopes(loc, scale, noise):
    """The value, and its derivatives by loc and scale, of a tanh that is limited."""
    with mpmath.workdps(60):
        y = mpmath.tanh(mpmath.mpf(loc) + mpmath.mpf(scale) * mpmath.mpf(noise))
        y = max(min(y, mpmath.mpf(LIMIT)), -mpmath.mpf(LIMIT))
        slope = 1 - y * y
        return float(y), float(slope), float(slope * mpmath.mpf(noise))


def truths(function, *tensors):
    rows = [
        function(*numbers) for numbers in zip(*(t.flatten().tolist() for t in tensors), strict=True)
    ]
    return torch.tensor(rows, dtype=torch.float64).T


def check(got, truth):
    assert got.isfinite().all()
    error = (got.flatten().cpu().double() - truth).abs() / truth.abs().clamp_min(1.0)
    assert error.max() <= TOLERANCE, f"off by {error.max():.3g} at {int(error.argmax())}"


def reference(loc, scale, noise):
    leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
    with backend.using_backend("reference"):
        value, scores = ops.sample_score(*leaves, noise, UNIT, 1)
        by_score = torch.autograd.grad(scores.sum(), leaves, retain_graph=True)
        by_value = torch.autograd.grad(value.sum(), leaves)
    return value, scores, by_score, by_value


def kernels(loc, scale, state):
    value, scores, used = tanh_normal.draw(loc, scale, UNIT, NONE, 1, state=State(state), keep=True)
    arguments = loc, scale, UNIT, used, NONE, 1
    by_score = tanh_normal.draw_backward(None, torch.ones_like(scores), *arguments)
    by_value = tanh_normal.draw_backward(torch.ones_like(value), None, *arguments)
    return value, scores, by_score, by_value


@pytest.mark.parametrize("implementation", ["kernels", "reference"])
def test_a_drawn_value(implementation, saturated):
    loc, scale, noise, state = saturated
    if implementation == "kernels":
        value, scores, by_score, by_value = kernels(loc, scale, state)
    else:
        value, scores, by_score, by_value = reference(loc, scale, noise)
    assert value.abs().max() == LIMIT
    made, by_loc, by_scale = truths(score, loc, scale, noise)
    check(scores, made)
    check(by_score[0], by_loc)
    check(by_score[1], by_scale)
    made, by_loc, by_scale = truths(value_slopes, loc, scale, noise)
    check(value, made)
    check(by_value[0], by_loc)
    check(by_value[1], by_scale)


def test_small_values_are_right_in_themselves(saturated):
    # A tanh of 1e-4 that is off by 6e-8 would be off by 6e-4 of itself.
    loc, scale, noise, state = saturated
    value, _, by_score, _ = kernels(loc, scale, state)
    truth = truths(value_slopes, loc, scale, noise)[0]
    # x itself is rounded where loc and noise cancel.
    room = (
        2.0**-22 * (loc.abs() + (noise * scale).abs()).flatten().cpu().double() + 1e-6 * truth.abs()
    )
    assert ((value.flatten().cpu().double() - truth).abs() <= room).all()
    slope = truths(score, loc, scale, noise)[1]
    assert ((by_score[0].flatten().cpu().double() - slope).abs() <= 4 * room).all()


@pytest.mark.parametrize("back", ["triton", "reference"])
def test_a_given_value_scores_finite_with_finite_gradients(back, saturated):
    loc, scale, noise, _ = saturated
    value = torch.tanh(loc + noise * scale)
    assert (value.abs() == 1.0).any()
    leaves = [t.clone().requires_grad_() for t in (loc, scale, value)]
    with backend.using_backend(back):
        if back == "triton":
            scores = ops.score_given(*leaves, UNIT, 1)
        else:
            scores = ops.log_prob(*leaves, UNIT, 1)
    assert scores.isfinite().all()
    for grad in torch.autograd.grad(scores.sum(), leaves):
        assert grad.isfinite().all()


def test_the_check_fails_by_the_way_back_through_atanh(saturated):
    loc, scale, noise, _ = saturated
    value = torch.tanh(loc + noise * scale).clamp(-LIMIT, LIMIT)
    x = torch.atanh(value)
    back = torch.distributions.Normal(loc, scale).log_prob(x) - torch.log1p(-value * value)
    with pytest.raises(AssertionError, match="off by"):
        check(back, truths(score, loc, scale, noise)[0])
