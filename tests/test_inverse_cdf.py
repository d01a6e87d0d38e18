"""Categories drawn from a counter-based stream by the reference: the draws that kernels make."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fastprob.counter import CounterStream
from fastprob.distributions.categorical import Categorical, OneHotCategorical
from fastprob.distributions.masked_categorical import MaskedCategorical
from fastprob.reference import categorical as reference

LEAST, MOST = 2.0**-24, 1.0 - 2.0**-24


def chi_square(index, probs):
    seen = torch.bincount(index.flatten(), minlength=len(probs)).double()
    assert (seen[probs == 0] == 0).all()
    kept = probs > 0
    expected = probs[kept].double() / probs.double().sum() * index.numel()
    return stats.chisquare(seen[kept], expected).pvalue


@pytest.mark.parametrize(
    "probs",
    [
        [0.5, 0.5],
        [0.02, 0.3, 0.0, 0.18, 0.25, 0.05, 0.2],
        [0.0, 0.0, 1e-3, 0.999],
        [1 / 40] * 40,
    ],
    ids=["coin", "seven", "rare", "many"],
)
def test_a_million_draws(probs):
    probs = torch.tensor(probs)
    dist = Categorical(logits=probs.log().expand(1_000_000, -1))
    index = dist._draw(torch.Size(), CounterStream(seed=5), False, False)[0]
    assert chi_square(index, probs) > 1e-3


def test_a_wrong_distribution_is_found():
    probs = torch.tensor([0.25, 0.25, 0.5])
    index = Categorical(probs=probs.expand(100_000, -1))._draw(
        torch.Size(), CounterStream(5), False, False
    )[0]
    assert chi_square(index, torch.tensor([0.26, 0.25, 0.49])) < 1e-6


def test_pairs_of_rows_and_of_calls_are_independent():
    stream = CounterStream(seed=6)
    dist = Categorical(logits=torch.zeros(200_000, 3))
    first, second = (dist._draw(torch.Size(), stream, False, False)[0] for _ in range(2))
    ninth = torch.full((9,), 1 / 9)
    for lag in (1, 2, 3, 4):
        assert chi_square(first[:-lag] * 3 + first[lag:], ninth) > 1e-3
    assert chi_square(first * 3 + second, ninth) > 1e-3


def test_the_first_whose_running_sum_exceeds():
    log_probs = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log()
    uniform = torch.tensor([LEAST, 0.2499, 0.2501, 0.4999, 0.5001, MOST], dtype=torch.float64)
    assert reference.inverse_cdf(log_probs, uniform).tolist() == [0, 0, 1, 1, 2, 2]
    # A constant of the row changes nothing.
    assert reference.inverse_cdf(log_probs + 700, uniform).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 5, 64, 3000])
def test_what_has_no_probability_is_never_drawn(dtype, count):
    weights = torch.zeros(4, count, dtype=dtype)
    weights[0, 1::2] = 0.1
    weights[1, count // 2] = 1e-30
    weights[2, : count // 2] = 1 / 3
    weights[3, 1:-1:2] = 2.0**-26
    weights[3, 0] = 1.0
    for uniform in (LEAST, 0.5, 0.999, MOST, 1.0 - 2.0**-53):
        # Half precisions round a uniform to 1.
        for part in (uniform, 1.0):
            index = reference.first_beyond(weights, torch.full((4,), part, dtype=dtype))
            assert (weights.gather(-1, index.unsqueeze(-1)) > 0).all()


def test_samples_and_batches():
    logits = torch.randn(3, 2, 5)
    for dist in (Categorical(logits=logits), OneHotCategorical(logits=logits)):
        value = dist._draw(torch.Size((4,)), CounterStream(1), False, False)[0]
        index = value if value.ndim == 3 else value.argmax(-1)
        uniform = CounterStream(1).uniform((4, 3, 2))
        assert torch.equal(index, reference.inverse_cdf(logits, uniform))


def test_half_precisions_keep_rare_categories():
    """Running sums in bf16 would stop at 1 of 512, and leave out all that follow."""
    logits = torch.zeros(30_000, 600, dtype=torch.bfloat16)
    index = Categorical(logits=logits)._draw(torch.Size(), CounterStream(2), False, False)[0]
    assert chi_square(index, torch.full((600,), 1 / 600)) > 1e-3


def test_masks():
    mask = torch.tensor([True, False, True, True])
    logits = torch.tensor([0.1, 5.0, 0.3, 0.2]).expand(100_000, -1)
    dist = MaskedCategorical(logits=logits, mask=mask)
    index, score = dist._draw(torch.Size(), CounterStream(3), True, False)
    probs = torch.where(mask, logits[0], -math.inf).softmax(-1)
    assert chi_square(index, probs) > 1e-3
    torch.testing.assert_close(score, probs[index].log())
