"""Large draws in pieces are the draws made whole."""

from __future__ import annotations

import math

import pytest
import torch

from fastprob.distributions import IndependentNormal, TanhNormal
from fastprob.reference import _chunks


def build(family, loc, scale, ndims):
    if family == "normal":
        return IndependentNormal(loc, scale, event_dim=ndims)
    bounds = {} if family == "tanh" else {"low": -2.0, "high": 3.0}
    return TanhNormal(loc, scale, event_dims=ndims, **bounds)


@pytest.mark.parametrize("family", ["normal", "tanh", "tanh in bounds"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape, ndims",
    [
        ((20_011, 7), 1),
        ((20_011, 7), 0),
        ((8_192, 4, 5), 2),
        ((64, 256, 16), 1),
        ((16_389, 8), 1),
    ],
)
@pytest.mark.parametrize("generator", [False, True])
def test_pieces_continue_each_other(monkeypatch, family, dtype, shape, ndims, generator):
    torch.manual_seed(0)
    loc, scale = torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) + 0.1
    dist = build(family, loc, scale, ndims)
    results = []
    for piece in (4096, 1 << 40):
        monkeypatch.setattr(_chunks, "PIECE", piece)
        stream = torch.Generator().manual_seed(5) if generator else None
        torch.manual_seed(5)
        with torch.no_grad():
            assert bool(_chunks.rows_per_piece(loc, scale, ndims)) == (piece == 4096)
            results.append(dist.rsample_and_log_prob(generator=stream))
            # The noise that follows shows where the stream stands.
            results[-1] += (torch.randn(4, generator=stream),)
    (value, score, after), (whole, whole_score, whole_after) = results
    assert torch.equal(value, whole)
    assert torch.equal(after, whole_after)
    # BLAS sums a row of another matrix in another order: rounding of 35 terms of size 10.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(score, whole_score, rtol=8 * eps, atol=350 * eps)
    assert score.shape == shape[: len(shape) - ndims]


def test_whole_where_pieces_would_change_something(monkeypatch):
    monkeypatch.setattr(_chunks, "PIECE", 4096)
    loc = torch.randn(70_000, 8)
    scale = torch.ones(70_000, 8)
    assert _chunks.rows_per_piece(loc, scale, 1) > 0
    # strided, half precision, a short tail that is drawn by another rule, too small
    assert _chunks.rows_per_piece(loc.t().contiguous().t(), scale, 1) == 0
    assert _chunks.rows_per_piece(loc.half(), scale.half(), 1) == 0
    tail = torch.randn(_chunks.PIECE * torch.get_num_threads() * 5 + 3)
    assert _chunks.rows_per_piece(tail, tail, 0) == 0
    assert _chunks.rows_per_piece(loc[:100], scale[:100], 1) == 0


def test_gradients_are_left_to_the_whole_draw():
    loc = torch.zeros(70_000, 8, requires_grad=True)
    scale = torch.ones(70_000, 8)
    value, score = IndependentNormal(loc, scale).rsample_and_log_prob()
    assert value.requires_grad
    (value.sum() + score.sum()).backward()
    assert torch.equal(loc.grad, torch.ones_like(loc))


@pytest.mark.parametrize("family", [IndependentNormal, TanhNormal])
def test_scores_of_wide_rows_keep_their_digits(family):
    # A running sum in fp32 is off by 2e-6 of the terms at this width.
    loc, scale = torch.randn(16, 32768), torch.rand(16, 32768) + 0.5
    with torch.no_grad():
        torch.manual_seed(3)
        value, score = family(loc, scale).rsample_and_log_prob()
        torch.manual_seed(3)
        noise = torch.randn_like(loc).double()
    x = loc.double() + noise * scale.double()
    terms = -0.5 * noise**2 - scale.double().log() - 0.5 * math.log(2 * math.pi)
    if family is TanhNormal:
        terms -= 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x))
    off = (score.double() - terms.sum(-1)).abs().max()
    assert off <= 4e-7 * terms.abs().sum(-1).max()
    assert value.shape == loc.shape
