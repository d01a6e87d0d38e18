"""The counter-based stream: its integers are those of the paper, and its draws are what they say.

Seeds are fixed, so that nothing here is decided by luck. A bound is where a good stream would land
beyond it once in 10,000 times, and each check is shown to find a stream that is bad.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import special, stats

from fastprob import rng
from fastprob.counter import CounterStream
from fastprob.distributions.bernoulli import Bernoulli
from fastprob.distributions.beta import Beta
from fastprob.distributions.categorical import Categorical
from fastprob.distributions.truncated_normal import TruncatedNormal
from fastprob.reference import philox

SEED = 2024
COUNT = 1 << 20
RARE = 1e-4


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_words_are_those_of_the_papers_vectors(counter, key, words):
    """Source: the known answers that come with Random123, for philox4x32-10."""

    def number(low, high):
        return torch.tensor((high << 32 | low) - ((high >> 31) << 64))

    made = philox.words(number(*key), number(*counter[2:]), number(*counter[:2]).view(1))
    assert tuple(int(w) for w in made) == words


# The checks ---------------------------------------------------------------------------------------


def check_distribution(x, cdf):
    """Kolmogorov and Smirnov against an exact distribution function."""
    found = stats.kstest(x.double().flatten().numpy(), cdf)
    assert found.pvalue > RARE, f"KS: {found}"


def check_moments(x, moments):
    """The first four moments, by their own standard errors.

    Args:
        x: draws.
        moments: the exact ones from the first to the eighth.
    """
    x = x.double().flatten()
    for k in range(1, 5):
        mean, square = moments[k - 1], moments[2 * k - 1]
        error = float((x**k).mean() - mean) * math.sqrt(x.numel() / (square - mean**2))
        assert abs(error) < stats.norm.isf(RARE / 2), f"moment {k}: {error:.2f} standard errors"


def check_rate(count, trials, p):
    """How often something of probability p has happened."""
    tail = stats.binom.cdf(count, trials, p), stats.binom.sf(count - 1, trials, p)
    assert min(tail) > RARE / 2, f"{count} of {trials}, expected {trials * p:.1f}"


def check_independent(x, y):
    """Correlations of two sequences, of their sizes and of their squares."""
    x, y = x.double().flatten(), y.double().flatten()
    for f in (lambda t: t, torch.abs, torch.square):
        r = float(torch.corrcoef(torch.stack((f(x), f(y))))[0, 1]) * math.sqrt(x.numel())
        assert abs(r) < stats.norm.isf(RARE / 2), f"correlated: {r:.2f} standard errors"


def check_cells(x, y, bins=64):
    """Pairs of uniforms fall into equal cells of the square equally often."""
    cell = (x * bins).long() * bins + (y * bins).long()
    counts = torch.bincount(cell.flatten(), minlength=bins * bins).double()
    expected = counts.sum() / len(counts)
    found = float(((counts - expected) ** 2 / expected).sum())
    tails = stats.chi2.cdf(found, len(counts) - 1), stats.chi2.sf(found, len(counts) - 1)
    assert min(tails) > RARE / 2, f"chi square: {found:.0f} of {len(counts) - 1}"


NORMAL_MOMENTS = (0, 1, 0, 3, 0, 15, 0, 105)
# Of a uniform on (-1/2, 1/2): 1 / ((k + 1) 2^k) for even k.
UNIFORM_MOMENTS = tuple(0 if k % 2 else 1 / ((k + 1) * 2**k) for k in range(1, 9))


def normals(count=COUNT, call=0, seed=SEED):
    return philox.standard_normal(torch.tensor([seed, call]), (count,), torch.float32)


def uniforms(count=COUNT, call=0, seed=SEED):
    return philox.uniform(torch.tensor([seed, call]), (count,), torch.float32)


@pytest.fixture(scope="module")
def drawn():
    """Normals and uniforms of 4 calls, `[4, COUNT]` both."""
    return [torch.stack([f(call=c) for c in range(4)]) for f in (normals, uniforms)]


# Good streams -------------------------------------------------------------------------------------


def test_distributions_and_moments(drawn):
    z, u = drawn
    for draws in (z, *z.view(4, -1, 4).unbind(2)):
        check_distribution(draws, special.ndtr)
        check_moments(draws, NORMAL_MOMENTS)
    for draws in (u, *u.view(4, -1, 4).unbind(2)):
        check_distribution(draws, stats.uniform.cdf)
        check_moments(draws.double() - 0.5, UNIFORM_MOMENTS)


def test_tails_of_the_normal():
    """Beyond 5 sigma on 2^24 draws, and at 3 and 4; the ends are 6.66 and no further."""
    counts = dict.fromkeys((3.0, 4.0, 5.0), 0)
    for call in range(8):
        z = normals(1 << 21, 100 + call).abs()
        for edge in counts:
            counts[edge] += int((z > edge).sum())
        assert z.max() < 6.67
    for edge, count in counts.items():
        check_rate(count, 1 << 24, 2 * special.ndtr(-edge))
    ends = philox._box_muller(torch.tensor([0, 0xFFFFFFFF]), torch.tensor([0, 0]), torch.float64)[0]
    assert ends[0] == pytest.approx(math.sqrt(64 * math.log(2))) and ends[1] == 0


def test_every_bit_is_even():
    words = torch.stack(philox.words(torch.tensor(SEED), torch.tensor(5), torch.arange(COUNT // 4)))
    for bit in range(32):
        for word in words:
            check_rate(int((word >> bit & 1).sum()), words.shape[1], 0.5)


def test_calls_rows_words_and_seeds_are_independent(drawn):
    z, u = drawn
    for draws, check in ((z, check_independent), (u, check_independent), (u, check_cells)):
        for call in range(1, 4):
            check(draws[0], draws[call])
        for rows in (1, 2, 3, 4, 8, 17, 256):
            check(draws[0, rows:], draws[0, :-rows])
        words = draws[:2].reshape(-1, 4).unbind(1)
        for a in range(4):
            for b in range(a):
                check(words[a], words[b])
    for other in (SEED + 1, SEED + (1 << 32)):
        check_independent(z[0], normals(seed=other))
        check_cells(u[0], uniforms(seed=other))
    # Calls 2^32 apart, whose counters differ in another word.
    check_cells(u[0], uniforms(call=1 << 32))


def test_groups_far_apart_are_other_words():
    seed, call = torch.tensor(SEED), torch.tensor(0)
    near = torch.stack(philox.words(seed, call, torch.arange(COUNT // 4)), -1)
    far = torch.stack(philox.words(seed, call, torch.arange(COUNT // 4) + (1 << 32)), -1)
    assert not (near == far).all(-1).any()
    check_cells(near.flatten() * 2.0**-32, far.flatten() * 2.0**-32)


# Draws of families from the stream ----------------------------------------------------------------


def test_bernoulli_draws():
    stream = CounterStream(SEED)
    probs = torch.tensor([0.0, 1e-4, 0.03, 0.5, 0.75, 0.999, 1.0])
    rows = (COUNT + len(probs) - 1) // len(probs)
    draws = torch.stack(
        [Bernoulli(probs=probs.expand(rows, -1)).sample_and_log_prob(generator=stream)[0]
         for _ in range(2)]
    )  # fmt: skip
    for p, column in zip(probs.tolist(), draws.unbind(-1), strict=True):
        check_rate(int(column.sum()), column.numel(), p)
    for p in range(2, 5):
        check_independent(draws[0, :, p], draws[1, :, p])
        check_independent(draws[:, 1:, p], draws[:, :-1, p])
    check_independent(draws[..., 2], draws[..., 3])


def test_a_rare_one_is_met():
    """A probability of 2^-20, on 2^24 draws."""
    count = 0
    for call in range(8):
        state = torch.tensor([SEED, 300 + call])
        count += int(philox.bernoulli(state, torch.full((1 << 21,), 2.0**-20)).sum())
    check_rate(count, 1 << 24, 2.0**-20)


def test_truncated_normal_draws():
    stream = CounterStream(SEED)
    cases = ((0.0, 1.0, -1.0, 2.0), (-3.0, 1.0, 0.0, 4.0), (0.5, 10.0, -1.0, 1.0))
    for loc, scale, low, high in cases:
        dist = TruncatedNormal(
            torch.full((COUNT // 2, 2), loc), torch.full((COUNT // 2, 2), scale), low=low, high=high
        )
        x = dist.rsample_and_log_prob(generator=stream)[0]
        exact = stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc, scale)
        assert x.min() >= low and x.max() <= high
        check_distribution(x, exact.cdf)
        check_moments(x, [exact.moment(k) for k in range(1, 9)])
        check_independent(x[:, 0], x[:, 1])


@pytest.mark.parametrize(
    ("a", "b", "dtype"),
    [
        (1.0, 1.0, torch.float32),
        (2.0, 5.0, torch.float32),
        (200.0, 3.0, torch.float32),
        (5e3, 7e3, torch.float32),
        # Below 1 a draw comes closer to the ends than float32 can tell.
        (0.7, 1.5, torch.float64),
        (0.3, 0.2, torch.float64),
        (0.02, 40.0, torch.float64),
    ],
)
def test_beta_draws(a, b, dtype):
    stream = CounterStream(SEED)
    exact = stats.beta(a, b)
    parameters = (torch.full((COUNT // 8, 2), c, dtype=dtype) for c in (a, b))
    dist = Beta(*parameters, validate_args=False)
    x, y = (dist.rsample_and_log_prob(generator=stream)[0] for _ in "xy")
    assert x.min() > 0 and x.max() < 1
    check_distribution(x, exact.cdf)
    # Each is the one before times (a + k) / (a + b + k); scipy's eighth at 0.02 is off by 100.
    moments = [math.prod((a + i) / (a + b + i) for i in range(k)) for k in range(1, 9)]
    check_moments(x, moments)
    check_independent(x[:, 0], x[:, 1])
    check_independent(x[1:], x[:-1])
    check_independent(x, y)


def test_a_beta_is_the_same_however_its_tries_are_made():
    """Those that are left alone on a CPU; all 16 of all elements under vmap and on a device."""
    state = torch.tensor([SEED, 500])
    a, b = torch.rand(2, 5000, dtype=torch.float64) * 2 + 0.1
    few = philox.beta(state, a, b)
    all_of_them = torch.vmap(lambda a, b: philox.beta(state, a, b))(a[None], b[None])
    for x, y in zip(few, all_of_them, strict=True):
        torch.testing.assert_close(x, y[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(few[0] + few[1], torch.ones_like(a), rtol=1e-14, atol=0)
    # A draw is a function of seed, call and element: of the first ones alone it is the same.
    assert torch.equal(philox.beta(state, a[:77], b[:77])[0], few[0][:77])


def test_a_counter_stream_draws_points_of_two_parts():
    with pytest.raises(ValueError, match=r"two parts.*\(4, 3\)"):
        rng.dirichlet(torch.ones(4, 3), CounterStream(SEED))


def test_tiny_concentrations_of_a_beta():
    """A draw lies at one end or the other, as often as the two concentrations say."""
    n = 1 << 17
    for a, b in ((1e-6, 1e-6), (1e-30, 3e-30), (3e-6, 1e-6)):
        dist = Beta(torch.full((n,), a), torch.full((n,), b), validate_args=False)
        x = dist.rsample_and_log_prob(generator=CounterStream(SEED))[0]
        assert ((x < 1e-30) | (x > 1 - 1e-6)).float().mean() > 0.999
        check_rate(int((x > 0.5).sum()), n, a / (a + b))


def test_categorical_draws():
    stream = CounterStream(SEED)
    probs = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.02, 0.005, 0.0])
    draws = Categorical(probs=probs.expand(COUNT, -1)).sample_and_log_prob(generator=stream)[0]
    counts = torch.bincount(draws, minlength=len(probs))
    assert counts[-1] == 0
    found = stats.chisquare(
        counts[:-1].numpy(), (probs[:-1].double() / probs.sum() * COUNT).numpy()
    )
    assert found.pvalue > RARE
    check_independent(draws[1:], draws[:-1])


# Bad streams --------------------------------------------------------------------------------------


def test_the_checks_find_bad_draws(drawn):
    z, u = drawn[0][0], drawn[1][0]
    coarse = (u * 512).floor() / 512
    wide = z * 1.012
    short = z.clamp(-3.2, 3.2)
    for check, bad in (
        (lambda x: check_distribution(x, special.ndtr), wide),
        (lambda x: check_distribution(x, stats.uniform.cdf), coarse),
        (lambda x: check_moments(x, NORMAL_MOMENTS), wide),
        (lambda x: check_moments(x, NORMAL_MOMENTS), z + 0.005),
        (lambda x: check_moments(x, NORMAL_MOMENTS), short),
        (lambda x: check_rate(int((x > 3).sum()), COUNT, special.ndtr(-3)), wide + 0.02),
        (lambda x: check_rate(int((x > 3.6).sum()), COUNT, special.ndtr(-3.6)), short),
        (lambda x: check_independent(z, x), torch.where(z > 0, z.roll(1), z.roll(2)) + 0.01 * z),
        # Same size, another sign: no correlation but that of the squares.
        (lambda x: check_independent(z, x), z * torch.where(u < 0.5, -1, 1)),
        (lambda x: check_cells(u, x), (u + 0.01).frac()),
        (lambda x: check_cells(x, u), coarse * 0.999),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            check(bad)
    # What is too even is no stream either.
    with pytest.raises(AssertionError, match="chi square"):
        even = torch.arange(COUNT) % 4096
        check_cells((even // 64) / 64, (even % 64) / 64)
