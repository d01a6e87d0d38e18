"""Beta's kernels against the reference in float64."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from tensordict import TensorDict

from fastprob import (
    ProbabilisticTensorDictModule,
    SafeProbabilisticModule,
    backend,
    set_interaction_type,
)
from fastprob.counter import CounterStream
from fastprob.distributions.beta import Beta, recognize
from fastprob.kernels import _beta_parts as parts
from fastprob.kernels import _math as m
from fastprob.kernels import beta as kernels
from fastprob.kernels import projection
from fastprob.kernels._launch import State
from fastprob.ops._fused import Bounds
from fastprob.reference import beta as reference
from fastprob.reference import normal, philox
from fastprob.specs import Bounded, Composite, projection_plan
from tests.kernels.accesses import filled
from tests.kernels.accuracy import DTYPES, SIZES, Errors
from tests.kernels.wide import chunked, tilings

SEED = 33
NONE = torch.Size()
# A tile of the draw takes 60 ms in the interpreter.
ROWS = {1: 120, 2: 60, 3: 40, 6: 20, 8: 20, 17: 8, 33: 4, 64: 3, 257: 1}
KINDS = (kernels.RANDOM, kernels.MEAN, kernels.MODE)


def parameters(shape, dtype, device, low=0.2, high=30.0):
    """Concentrations on both sides of 1."""
    logs = torch.rand((2, *shape), device=device) * math.log(high / low) + math.log(low)
    return [t.to(dtype) for t in logs.exp()]


def pair(device, call=0):
    return torch.tensor([SEED, call], device=device)


def clamps(a, dtype, device):
    """Nothing, two numbers that fp16 has not, and bounds of each element in the dtype."""
    # The interpreter does not round to the nearest number of bf16, but towards 0.
    limits = (0.25, 0.75) if dtype is torch.bfloat16 else (0.3, 0.7)
    low = torch.rand(a, device=device) * 0.6
    high = low + torch.rand(a, device=device) * 0.4
    return [Bounds(), Bounds(limits), Bounds(None, low.to(dtype), high.to(dtype))]


def independent(a, b, ndims=1):
    base = Beta(a, b, validate_args=False)
    return recognize(torch.distributions.Independent(base, ndims, validate_args=False))


def truths(a, b, value, ndims=1):
    a, b = a.double(), b.double()
    return reference.log_prob(a, b, value.double(), ndims), reference.entropy(a, b, ndims)


def own_results(a, b, value, ndims=1):
    """What PyTorch makes of it in the dtype of `a`."""
    if ndims and a.is_cpu and a.dtype is torch.float32:
        # The interpreter adds up a row one by one; so are PyTorch's terms here.
        terms = own_results(a, b, value, 0)
        return [torch.from_numpy(np.cumsum(t.numpy(), axis=-1))[..., -1] for t in terms]
    return reference.log_prob(a, b, value, ndims), reference.entropy(a, b, ndims)


def assert_same_draws(got, expected):
    """Equal within rounding: of the logarithms, and of a value near 1."""
    eps = torch.finfo(got.dtype).eps
    # The approximate sine of a GPU is off by 7e-7 of a normal, 5 times that of a Gamma near 0.
    rtol = max(eps if eps > 1e-4 else 1e-5, 1e-3 if got.is_cuda else 0.0)
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_scores_and_entropies(dtype, device):
    errors = Errors()
    for call, a in enumerate(SIZES):
        one, zero = parameters((ROWS[a], a), dtype, device)
        for kind in KINDS:
            state = State(pair(device, call)) if kind == kernels.RANDOM else None
            value, score, entropy, _ = kernels.draw(
                one, zero, NONE, 1, kind=kind, state=state, entropy=True
            )
            assert value.dtype is score.dtype is entropy.dtype is dtype
            if kind == kernels.RANDOM:
                expected = philox.beta(pair(device, call), one.double(), zero.double())[0]
                assert_same_draws(value, expected)
                least, most = kernels.limits(dtype)
                assert value.min() >= least and value.max() <= most
            else:
                point = reference.mean if kind == kernels.MEAN else reference.mode
                errors.add("point", value, point(one, zero), point(one.double(), zero.double()))
                if kind == kernels.MODE:
                    # At an end the density is 0 or infinite.
                    continue
            own = own_results(one, zero, value)
            truth = truths(one, zero, value)
            errors.add(f"score {a}", score, own[0], truth[0])
            errors.add(f"entropy {a}", entropy, own[1], truth[1])
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@tilings
def test_rows_in_chunks(a, own, rows, dtype, device, monkeypatch):
    """The same draws whatever rows a program has, and the scores and entropies of each."""
    monkeypatch.setattr(kernels, "tiling", lambda n, a, vector: chunked(a, own, n, *kernels.SINGLE))
    sample = torch.Size((2,))
    one, zero = parameters((rows, a), dtype, device)
    state = State(pair(device))
    value, score, entropy, _ = kernels.draw(one, zero, sample, 1, state=state, entropy=True)
    wide = [t.double().expand(2, -1, -1) for t in (one, zero)]
    assert_same_draws(value, philox.beta(pair(device), *wide)[0])
    errors = Errors()
    found, truth = own_results(one, zero, value), truths(one, zero, value)
    for got in ((score, entropy), kernels.score(one, zero, value, 1, entropy=True)):
        errors.add("score", got[0], found[0], truth[0])
        errors.add("entropy", got[1], found[1], truth[1])
    errors.check()


def test_large_batches_leave_few_elements_of_their_tiles_empty():
    for vector in (4, 8):
        assert min(filled(kernels.tiling(1 << 20, a, vector)) for a in range(1, 5001)) >= 7 / 8


def test_few_rows_have_programs_of_their_own():
    """A chunk of a program waits for the one before."""
    for rows in (1, 3, 500):
        assert kernels.tiling(rows, 257, 4).programs == rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_clamp_is_that_of_the_value_alone(kind, dtype, device):
    state = State(pair(device)) if kind == kernels.RANDOM else None
    for a, samples in ((1, ()), (8, (2,)), (17, ()), (257, ())):
        sample = torch.Size(samples)
        one, zero = parameters((ROWS[a] // 2 + 1, a), dtype, device)
        free = kernels.draw(one, zero, sample, 1, kind=kind, state=state, entropy=True)
        for clamp in clamps(a, dtype, device)[1:]:
            got = kernels.draw(
                one, zero, sample, 1, kind=kind, state=state, entropy=True, clamp=clamp,
                keep=True,
            )  # fmt: skip
            assert torch.equal(got[0], normal.clamped(free[0], *clamp))
            for g, e in zip(got[1:], (free[1], free[2], free[0]), strict=True):
                assert torch.equal(g, e)
            alone = kernels.draw(
                one, zero, sample, 1, kind=kind, state=state, score=False, clamp=clamp
            )
            assert torch.equal(alone[0], got[0]) and alone[3] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_clamp_stops_the_gradient_of_the_value_alone(kind, dtype, device):
    """Not that of the score. A value that rounds to a bound is not outside of it."""
    for a in (1, 8, 17):
        one, zero = parameters((ROWS[a], a), dtype, device, 1.2, 30.0)
        state = State(pair(device)) if kind == kernels.RANDOM else None
        drawn = kernels.draw(one, zero, NONE, 1, kind=kind, state=state)[0]
        drawn.view(-1)[0] = clamps(a, dtype, device)[1].limits[0]
        by_value = torch.randn_like(drawn)
        by_score = torch.randn(ROWS[a], device=device).to(dtype)
        arguments = by_score, None, one, zero, drawn, 1
        for clamp in clamps(a, dtype, device)[1:]:
            kept = normal.clamped(drawn, *clamp) == drawn
            assert clamp.kind == 2 or kept.view(-1)[0]
            got = kernels.draw_backward(by_value, *arguments, kind=kind, clamp=clamp)
            expected = kernels.draw_backward(by_value * kept, *arguments, kind=kind)
            for g, e in zip(got, expected, strict=True):
                assert torch.equal(g, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_given_values(dtype, device):
    errors = Errors()
    for a in SIZES:
        for sample, low, high in (((), 0.05, 2.0), ((2,), 1.0, 100.0)):
            one, zero = parameters((ROWS[a], a), dtype, device, low, high)
            value = torch.rand((*sample, ROWS[a], a), device=device) * 0.98 + 0.01
            value = value.to(dtype)
            got = kernels.score(one, zero, value, 1, entropy=True)
            own, truth = own_results(one, zero, value), truths(one, zero, value)
            errors.add(f"score {a} {high}", got[0], own[0], truth[0])
            errors.add(f"entropy {a} {high}", got[1], own[1], truth[1])
    errors.check()


def test_concentrations_of_all_sizes(device):
    """From 1e-6 to 1e6 the error is that of the few terms of the result, not of log B(a, b)."""
    grid = torch.logspace(-6, 6, 16, device=device)
    one, zero = (t.flatten() for t in torch.meshgrid(grid, grid, indexing="ij"))
    mean = (one.double() / (one.double() + zero.double())).float()
    drawn = kernels.draw(one, zero, NONE, 0, state=State(pair(device)))[0]
    # x is rounded to 6e-8 of 1 - x or less; in units of the spread that is 6e-5 at 1e6.
    for value, most in ((mean, 2e-6), (drawn, 6e-5)):
        value = value.clamp(*kernels.limits(torch.float32))
        got = kernels.score(one, zero, value, 0, entropy=True)
        truth = truths(one, zero, value, 0)
        for g, t, bound in zip(got, truth, (most, 2e-6), strict=True):
            assert ((g.double() - t).abs() / (1.0 + t.abs())).max() < bound


@triton.jit
def _gamma_functions(z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(z + i)
    w = tl.minimum(1.0 / x, 1.0)
    s = tl.minimum(x, 1.0)
    tl.store(out + i, m.stirling_rest(w))
    tl.store(out + N + i, m.digamma_gap(w))
    tl.store(out + 2 * N + i, m.trigamma_excess(w))
    tl.store(out + 3 * N + i, m.log_gamma1p(s))
    tl.store(out + 4 * N + i, m.digamma1p(s))
    tl.store(out + 5 * N + i, m.trigamma1p(s))


def test_functions_of_gamma(device):
    """Against 30 digits, from 1e-6 to 1e6; half a unit of fp32 at 1 is 6e-8."""
    n = 256
    z = torch.logspace(-6, 6, n, device=device)
    out = torch.empty(6, n, device=device)
    _gamma_functions[(1,)](z, out, N=n)
    with mpmath.workdps(30):
        half_log = mpmath.log(2 * mpmath.pi) / 2
        exact = []
        for x in map(mpmath.mpf, z.tolist()):
            y, s = max(x, 1), min(x, 1)
            log_y = mpmath.log(y)
            exact.append(
                (
                    mpmath.loggamma(y) - ((y - 0.5) * log_y - y + half_log),
                    log_y - mpmath.digamma(y),
                    y * mpmath.polygamma(1, y) - 1,
                    mpmath.loggamma(1 + s),
                    mpmath.digamma(1 + s),
                    mpmath.polygamma(1, 1 + s),
                )
            )
    exact = torch.tensor([[float(v) for v in row] for row in exact], device=device).T
    error = (out.double() - exact).abs().amax(1).tolist()
    for e, most in zip(error, (3e-8, 1e-7, 1.5e-7, 6e-8, 1.5e-7, 3e-7), strict=True):
        assert e < most


@triton.jit
def _series(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    u = tl.load(x + i)
    cosine, sine = m.cos_sin_of_turn(u * 4.0)
    tl.store(out + i, m.log1p_gap(u))
    tl.store(out + N + i, m.log1p_beyond_cube(u))
    tl.store(out + 2 * N + i, cosine)
    tl.store(out + 3 * N + i, sine)


def test_series(device):
    n = 256
    x = torch.linspace(-0.25, 0.25, n, device=device)
    out = torch.empty(4, n, device=device)
    _series[(1,)](x, out, N=n)
    u = x.double()
    with mpmath.workdps(40):
        log = [mpmath.log1p(mpmath.mpf(v)) for v in u.tolist()]
        gap = [float((v - g) / mpmath.mpf(v) ** 2) for v, g in zip(u.tolist(), log, strict=True)]
        cube = [
            float((g - v + mpmath.mpf(v) ** 2 / 2 - mpmath.mpf(v) ** 3 / 3) / mpmath.mpf(v) ** 4)
            for v, g in zip(u.tolist(), log, strict=True)
        ]
    turn = u * 4.0 * math.pi
    near = torch.tensor([gap, cube], device=device)
    exact = torch.cat((near, torch.stack((turn.cos(), turn.sin()))))
    error = (out.double() - exact.double()).abs().amax(1).tolist()
    for e, most in zip(error, (1.5e-7, 1.2e-6, 2e-7, 2e-7), strict=True):
        assert e < most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_scores_and_entropies(dtype, device):
    errors = Errors()
    for a in (1, 3, 8, 17, 257):
        for sample, low, high in (((), 0.05, 2.0), ((2,), 1.0, 100.0)):
            given = [*parameters((ROWS[a], a), dtype, device, low, high)]
            value = torch.rand((*sample, ROWS[a], a), device=device) * 0.98 + 0.01
            given.append(value.to(dtype))
            shapes = (*sample, ROWS[a]), (ROWS[a],)
            weights = [torch.randn(s, device=device).to(dtype) for s in shapes]
            results = []
            for kind in (dtype, torch.float64):
                leaves = [t.to(kind).requires_grad_() for t in given]
                made = reference.log_prob(*leaves, 1), reference.entropy(*leaves[:2], 1)
                total = sum((r * w.to(kind)).sum() for r, w in zip(made, weights, strict=True))
                results.append(torch.autograd.grad(total, leaves))
            own, truth = results
            got = kernels.score_backward(*weights, *given, 1, to_value=True)
            for name, g, o, t in zip(("a", "b", "value"), got, own, truth, strict=True):
                errors.add(f"{name} {a} {high}", g, o, t)
    errors.check()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_draws(kind, device):
    """By the value and its score; that of a random value is ATen's, in both precisions."""
    errors = Errors()
    for a in (1, 8, 17):
        one, zero = parameters((ROWS[a], a), torch.float32, device, 1.2, 30.0)
        value = torch.rand(2, ROWS[a], a, device=device) * 0.9 + 0.05
        if kind != kernels.RANDOM:
            point = reference.mean if kind == kernels.MEAN else reference.mode
            value = point(one, zero).expand(2, -1, -1)
        weights = torch.randn(value.shape, device=device), torch.randn(2, ROWS[a], device=device)
        for clamp in clamps(a, torch.float32, device):
            got = kernels.draw_backward(*weights, None, one, zero, value, 1, kind=kind, clamp=clamp)
            results = []
            for dtype in (torch.float32, torch.float64):
                leaves = [t.to(dtype).requires_grad_() for t in (one, zero)]
                if kind == kernels.RANDOM:
                    x = value.to(dtype)
                    wide = [leaf.expand(x.shape) for leaf in leaves]
                    total = (wide[0] + wide[1]).detach()
                    by_one = torch._dirichlet_grad(x, wide[0].detach(), total) * (1 - x)
                    by_zero = -torch._dirichlet_grad(1 - x, wide[1].detach(), total) * x
                    moved = by_one * (leaves[0] - leaves[0].detach())
                    x = x + moved + by_zero * (leaves[1] - leaves[1].detach())
                else:
                    x = point(*leaves).expand(2, -1, -1)
                score = reference.log_prob(*leaves, x, 1)
                total = (normal.clamped(x, *clamp) * weights[0]).sum() + (score * weights[1]).sum()
                results.append(torch.autograd.grad(total, leaves))
            for g, own, truth in zip(got, *results, strict=True):
                errors.add(f"{a}", g, own, truth)
    errors.check()


def test_ends(device):
    """Scores of 0 and 1 are those of the reference: a concentration of 1 has nothing there."""
    grid = torch.tensor([0.5, 1.0, 2.0], device=device)
    one, zero = (t.flatten() for t in torch.meshgrid(grid, grid, indexing="ij"))
    for end in (0.0, 1.0):
        value = torch.full_like(one, end)
        got = kernels.score(one, zero, value, 0)[0]
        torch.testing.assert_close(got, reference.log_prob(one, zero, value, 0))
    value, score = kernels.draw(one, zero, NONE, 0, kind=kernels.MODE)[:2]
    assert torch.equal(value, reference.mode(one, zero))
    torch.testing.assert_close(score, reference.log_prob(one, zero, value, 0))


def test_tiny_and_huge_concentrations(device):
    """Two tiny ones are no 1/2: a draw lies at one end or the other, as often as they say."""
    n = 2048
    for one, zero, share in ((1e-6, 1e-6, 0.5), (1e-30, 3e-30, 0.75), (1e-38, 1e-38, 0.5)):
        a, b = torch.full((n,), one, device=device), torch.full((n,), zero, device=device)
        value, score = kernels.draw(a, b, NONE, 0, state=State(pair(device, 5)))[:2]
        least, most = kernels.limits(torch.float32)
        at_end = (value == least) | (value == most)
        assert at_end.float().mean() > 0.999 and not score.isnan().any()
        assert abs(float((value == least).float().mean()) - share) < 5 * 0.5 / math.sqrt(n)
    a = torch.full((256,), 1e12, device=device)
    value, score = kernels.draw(a, a, NONE, 0, state=State(pair(device)))[:2]
    assert (value - 0.5).abs().max() < 1e-5 and score.isfinite().all()


def test_the_tries_of_a_gamma():
    """One in 20 fails at a concentration of 1; the limit of 16 leaves 1e-20 to chance."""
    element, state = torch.arange(1 << 16), torch.tensor([SEED, 9])
    for concentration in (1.0, 1.3, 2.0, 10.0):
        d = torch.full((2, len(element)), concentration - 1 / 3, dtype=torch.float64)
        accepted = philox._tries(state, element, d, 0, 1)[1]
        rate = 1.0 - float(accepted.double().mean())
        assert 0.0 < rate < 0.055 and rate**parts.TRIES.value < 1e-20


def test_nan_parameters_come_through(device):
    one = torch.tensor([[math.nan, 2.0], [0.5, 2.0]], device=device)
    zero = torch.ones_like(one)
    for a, b in ((one, zero), (zero, one)):
        state = State(pair(device))
        value, score, entropy, _ = kernels.draw(a, b, NONE, 1, state=state, entropy=True)
        assert value.isnan().tolist() == [[True, False], [False, False]]
        assert score.isnan().tolist() == entropy.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("a", "dtype"),
    [(257, torch.float32), (511, torch.float32), (257, torch.bfloat16), (260, torch.float16)],
    ids=str,
)
def test_wide_rows_that_share_a_vector(a, dtype, device):
    """A row's end and the next one's beginning lie in the same 16 bytes, which one of them stores.

    Elements draw the same whatever the rows that they are in: by themselves, A = 1, they share
    nothing.
    """
    errors = Errors()
    rows, sample = 2, torch.Size((2,))
    one, zero = parameters((rows, a), dtype, device, 0.5)
    held = torch.full((2, rows, a + 8), math.nan, device=device).to(dtype)
    apart = [held[k, :, :a].copy_(x) for k, x in enumerate((one, zero))]
    state = State(pair(device))
    clamp = clamps(a, dtype, device)[2]
    options = {"state": state, "entropy": True, "keep": True}
    value, score, entropy, _ = kernels.draw(one, zero, sample, 1, **options)
    alone = kernels.draw(one, zero, sample, 0, state=state, score=False)[0]
    assert torch.equal(value, alone)
    held_in = kernels.draw(*apart, sample, 1, **options, clamp=clamp)
    for got, expected in zip(
        held_in, (normal.clamped(value, *clamp), score, entropy, value), strict=True
    ):
        assert torch.equal(got, expected)
    scored = kernels.score(one, zero, value, 1, entropy=True)
    own, truth = own_results(one, zero, value), truths(one, zero, value)
    for got in (score, entropy), scored, kernels.score(*apart, value.float(), 1, entropy=True):
        for name, g, o, t in zip(("score", "entropy"), got, own, truth, strict=True):
            errors.add(name, g.to(dtype), o, t)
    errors.check()


@pytest.mark.parametrize("a", [1, 3, 8, 300])
def test_strided_and_expanded_parameters_are_read_where_they_lie(a, device):
    rows = 1 if a > 100 else 5
    both = torch.rand(rows, 2 * a, device=device) + 0.5
    column = torch.rand(rows, 1, device=device).expand(rows, a) + 0.0
    turned = (torch.rand(a, rows, device=device) + 0.5).T
    one, zero = both.chunk(2, -1)
    for given in ((one, zero), (column, turned))[: 1 if a > 100 else 2]:
        plain = [t.contiguous() for t in given]
        for sample in ((), (2,)):
            state = State(pair(device))
            got = kernels.draw(*given, torch.Size(sample), 1, state=state, entropy=True)
            expected = kernels.draw(*plain, torch.Size(sample), 1, state=state, entropy=True)
            for g, e in zip(got[:3], expected[:3], strict=True):
                assert torch.equal(g, e)
        value = (turned / 2.0).expand(2, rows, a)
        got = kernels.score(*given, value, 1)[0]
        assert torch.equal(got, kernels.score(*plain, value.contiguous(), 1)[0])


def test_event_dimensions_are_summed_together(device):
    one, zero = parameters((4, 2, 3), torch.float32, device)
    for ndims in range(4):
        value, score, entropy, _ = kernels.draw(
            one, zero, torch.Size((2,)), ndims, state=State(pair(device)), entropy=True
        )
        truth = truths(one, zero, value, ndims)
        torch.testing.assert_close(score.double(), truth[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), truth[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)], ids=str)
def test_empty(shape, device):
    one = torch.empty(shape, device=device, requires_grad=True)
    value, score = independent(one, one).rsample_and_log_prob()
    assert value.shape == shape and score.shape == shape[:-1]
    assert torch.equal(score, torch.zeros_like(score))
    (value.sum() + score.sum()).backward()
    assert one.grad.shape == shape


def test_both_backends_draw_the_same(device):
    one, zero = parameters((40, 6), torch.float32, device)
    streams = [CounterStream(SEED, device=device) for _ in "ab"]
    values = []
    for back, stream in zip(("triton", "reference"), streams, strict=True):
        with backend.using_backend(back):
            dist = independent(one, zero)
            values.append(
                torch.stack([dist.rsample_and_log_prob(generator=stream)[0] for _ in range(2)])
            )
        assert stream.state.tolist() == [SEED, 2]
    assert_same_draws(*values)
    assert (values[0][0] != values[0][1]).all()


def test_operators(device):
    one, zero = (t.requires_grad_() for t in parameters((2, 3), torch.float32, device))
    value = torch.rand(2, 2, 3, device=device, requires_grad=True)
    low = torch.tensor([0.1, 0.3, 0.5], device=device)
    draw, score = torch.ops.fastprob.beta_draw.default, torch.ops.fastprob.beta_score.default
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            for clamp in (Bounds(), Bounds([0.25, 0.5]), Bounds(None, low, low + 0.25)):
                torch.library.opcheck(
                    draw, (one, zero, pair(device), [2], 1, 0, True, True, *clamp)
                )
            torch.library.opcheck(score, (one, zero, value, 1, True))
    with backend.using_backend("reference"):
        point = kernels.MEAN
        torch.library.opcheck(draw, (one, zero, None, [], 1, point, True, True, *Bounds()))


def test_operators_of_both_backends_agree(device):
    given = parameters((4, 6), torch.float32, device, 1.1, 20.0)
    x = torch.rand(3, 4, 6, device=device) * 0.9 + 0.05
    low = torch.linspace(0.1, 0.6, 6, device=device)
    clamps = (Bounds(), Bounds([0.25, 0.5]), Bounds(None, low, low + 0.25))
    made = {}
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            made[back] = []
            for kind, clamp in itertools.product(KINDS, clamps):
                for pathwise in (True, False):
                    leaves = [t.clone().requires_grad_() for t in (*given, x)]
                    one, zero, value = leaves
                    state = pair(device) if kind == kernels.RANDOM else None
                    # The third is for the backward pass.
                    out = torch.ops.fastprob.beta_draw(
                        one, zero, state, [3], 1, kind, True, pathwise, *clamp
                    )[:2]
                    out += torch.ops.fastprob.beta_score(one, zero, value, 1, True)
                    total = sum(o.square().sum() for o in out)
                    made[back] += [*out, *torch.autograd.grad(total, leaves)]
    for got, expected in zip(made["triton"], made["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_vmap(device):
    one, zero = parameters((5, 4, 6), torch.float32, device)
    value = torch.rand(2, 5, 4, 6, device=device)
    got = torch.vmap(lambda a, b, v: independent(a, b).log_prob(v), in_dims=(0, 0, 1))(
        one, zero, value
    )
    torch.testing.assert_close(got, independent(one, zero).log_prob(value).transpose(0, 1))
    flat = torch.full((3, 4, 2), 2.0, device=device)
    draw = torch.vmap(lambda a: independent(a, a).rsample_and_log_prob(), randomness="same")
    value, score = draw(flat)
    assert torch.equal(value[0], value[2]) and torch.equal(score[0], score[2])
    draw = torch.vmap(lambda a: independent(a, a).rsample(), randomness="different")
    assert not torch.equal(*draw(flat)[:2])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda a: independent(a, a).rsample())(flat)


def test_functorchs_gradients(device):
    one, zero = parameters((4, 6), torch.float32, device)
    value = torch.rand(4, 6, device=device) * 0.9 + 0.05

    def both(a, b):
        dist = independent(a, b)
        return dist.log_prob(value).sum() + dist.entropy().square().sum()

    results = []
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            results.append(torch.func.grad(both, argnums=(0, 1))(one, zero))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_compiled_equals_eager(device):
    given = parameters((5, 6), torch.float32, device)

    def call(a, b):
        dist = Beta(a, b, validate_args=False)
        value, score = dist.rsample_and_log_prob()
        fixed = dist.log_prob(torch.full_like(a, 0.25))
        return value, score, fixed, dist.entropy(), dist.mode, dist.mean

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        leaves = [t.clone().requires_grad_() for t in given]
        out = function(*leaves)
        results += [[*out, *torch.autograd.grad(sum(o.sum() for o in out), leaves)]]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)


def test_score_and_entropy_are_one_launch(device, monkeypatch):
    launches = []
    original = kernels.score
    monkeypatch.setattr(kernels, "score", lambda *a, **k: launches.append(1) or original(*a, **k))
    leaves = [t.requires_grad_() for t in parameters((5, 6), torch.float32, device)]
    one, zero = (leaf * 1.0 for leaf in leaves)
    value = torch.rand(5, 6, device=device) * 0.9 + 0.05
    dist = independent(one, zero)
    score, entropy = dist.log_prob(value), dist.entropy()
    assert len(launches) == 1
    got = torch.autograd.grad(score.sum() + entropy.sum(), leaves)
    with backend.using_backend("reference"):
        again = independent(*leaves)
        expected = again.log_prob(value), again.entropy()
        torch.testing.assert_close((score, entropy), expected, rtol=1e-4, atol=1e-4)
        expected = torch.autograd.grad(sum(e.sum() for e in expected), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    # An update in place makes what was kept another distribution's.
    with torch.no_grad():
        one.fill_(1.0)
        zero.fill_(1.0)
    torch.testing.assert_close(dist.entropy(), torch.zeros(5, device=device))


def test_a_value_without_gradient_is_a_constant(device):
    """`sample_and_log_prob`: the score's gradient is that of a given value."""
    given = parameters((5, 6), torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in given]
    value, score = independent(*leaves).sample_and_log_prob()
    assert not value.requires_grad
    got = torch.autograd.grad(score.sum(), leaves)
    score = independent(*leaves).log_prob(value)
    torch.testing.assert_close(got, torch.autograd.grad(score.sum(), leaves))
    value, score = independent(*leaves).rsample_and_log_prob()
    assert value.requires_grad
    pathwise = torch.autograd.grad(score.sum(), leaves)
    assert not torch.allclose(pathwise[0], got[0])


KEYS = ["concentration1", "concentration0"]
SPECS = {
    "numbers": Bounded(low=0.3, high=0.7, shape=(4,)),
    "tensors": Bounded(low=torch.linspace(0.1, 0.4, 4), high=torch.linspace(0.5, 0.8, 4)),
}


def head_of(concentration1, concentration0):
    return independent(concentration1, concentration0)


def head(spec=None, **kwargs):
    kwargs = {
        "in_keys": KEYS, "out_keys": ["action"], "distribution_class": head_of,
        "return_log_prob": True, **kwargs,
    }  # fmt: skip
    if spec is None:
        return ProbabilisticTensorDictModule(**kwargs)
    return SafeProbabilisticModule(spec=spec, safe=True, **kwargs)


@pytest.mark.parametrize("kind", ["random", "mode", "mean", "deterministic"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("gradient", [False, True])
def test_a_safe_call_is_one_launch(kind, spec, gradient, device, monkeypatch):
    launches = []
    for module, name in ((kernels, "draw"), (kernels, "score"), (projection, "elements")):
        original = getattr(module, name)

        def call(*args, name=name, original=original, **kwargs):
            launches.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)
    spec = SPECS[spec].to(device)
    given = parameters((5, 4), torch.float32, device, 1.2, 20.0)
    results = []
    with set_interaction_type(kind):
        for module in (head(spec), head()):
            launches.clear()
            leaves = [t.clone().requires_grad_(gradient) for t in given]
            torch.manual_seed(3)
            out = module(TensorDict(dict(zip(KEYS, leaves, strict=True)), batch_size=[5]))
            assert launches == ["draw"]
            results.append((out["action"], out["sample_log_prob"], leaves))
    (action, score, leaves), (free, expected, others) = results
    projected = spec.project(free)
    assert torch.equal(action, projected) and not torch.equal(action, free)
    # The score is that of the value before the projection.
    assert torch.equal(score, expected)
    if gradient:
        weights = torch.randn_like(action)
        got = torch.autograd.grad((action * weights).sum() + score.sum(), leaves)
        wanted = torch.autograd.grad((projected * weights).sum() + expected.sum(), others)
        torch.testing.assert_close(got, wanted)


def test_a_safe_median_is_projected(device):
    given = parameters((5, 4), torch.float32, device, 1.2, 20.0)
    td = TensorDict(dict(zip(KEYS, given, strict=True)), batch_size=[5])
    with set_interaction_type("median"):
        got, free = head(SPECS["numbers"].to(device))(td.clone()), head()(td)
    assert torch.equal(got["action"], free["action"].clamp(0.3, 0.7))
    assert torch.equal(got["sample_log_prob"], free["sample_log_prob"])


def test_a_spec_from_0_to_1_needs_no_clamp(device):
    dist = independent(*parameters((5, 4), torch.float32, device))
    for low, high, carried in ((0.0, 1.0, False), (0.1, 1.0, True)):
        plan = dict(projection_plan(Composite(x=Bounded(low=low, high=high, shape=(4,)))))
        assert dist.carry(plan["x"]) is carried


def test_safe_calls_compile(device):
    module = head(SPECS["tensors"].to(device))
    given = parameters((5, 4), torch.float32, device, 1.2, 20.0)

    def call(*leaves):
        td = module(TensorDict(dict(zip(KEYS, leaves, strict=True)), batch_size=[5]))
        return td["action"], td["sample_log_prob"]

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        leaves = [t.clone().requires_grad_() for t in given]
        with set_interaction_type("random"):
            out = function(*leaves)
        results += [[*out, *torch.autograd.grad(sum(o.sum() for o in out), leaves)]]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4), "does not broadcast"),
        (torch.zeros(2, 3, device="meta"), "given a value on"),
    ],
)
def test_a_value_that_does_not_fit(value, message, device):
    ones = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match=message):
        independent(ones, ones).log_prob(value if value.is_meta else value.to(device))
