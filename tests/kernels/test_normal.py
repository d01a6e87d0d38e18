"""The Normal's kernels against the reference in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastprob import InteractionType, backend, set_interaction_type
from fastprob.counter import CounterStream
from fastprob.distributions.normal import IndependentNormal, Normal
from fastprob.kernels import normal as kernels
from fastprob.kernels._launch import State
from fastprob.ops._fused import Bounds
from fastprob.reference import normal as reference
from fastprob.reference import philox
from tests.kernels.accuracy import DTYPES, SIZES, Errors

SEED = 20
# Elements of a gradient: the largest of few errors says little of either side.
ROWS = 600


def parameters(shape, dtype, device):
    loc = torch.randn(shape, device=device).to(dtype)
    scale = (torch.rand(shape, device=device) * 2 + 0.25).to(dtype)
    return loc, scale


def pair(device, call=0):
    return torch.tensor([SEED, call], device=device)


def clamps(a, device):
    low = -torch.rand(a, device=device)
    return (
        Bounds(),
        Bounds((-0.5, 0.25)),
        Bounds(None, low, low + torch.rand(a, device=device)),
    )


def summed(own, terms):
    """PyTorch's sums of a row, as those of the kernel are made that they are compared with.

    The interpreter adds up a row one by one, 5 times as far off at A = 257 as by halves, which is
    how PyTorch and a GPU do it. Against it PyTorch's terms are added up one by one.
    """
    if own.is_cpu and own.dtype is torch.float32:
        return torch.from_numpy(np.cumsum(terms.numpy(), axis=-1))[..., -1]
    return own


@pytest.mark.parametrize("a", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_scores_and_entropies(dtype, a, device):
    errors = Errors()
    batches = (), (5,), (3, 13), (ROWS // a,)
    kinds = itertools.cycle(clamps(a, device))
    for call, batch in enumerate(batches):
        loc, scale = parameters((*batch, a), dtype, device)
        for state in (None, pair(device, call)):
            bounds = next(kinds)
            got = kernels.draw(
                loc, scale, torch.Size(), 1, clamp=bounds, entropy=True,
                state=None if state is None else State(state),
            )  # fmt: skip
            arguments = (state, torch.Size(), 1, True, True, *bounds)
            value, *own = reference.draw(loc, scale, *arguments)
            terms = reference.draw(loc, scale, state, torch.Size(), 0, True, True, *bounds)[1:]
            own = [value, *(summed(o, t) for o, t in zip(own, terms, strict=True))]
            truth = reference.draw(loc.double(), scale.double(), *arguments)
            size = scale.double().log().abs().sum(-1) + a * 1.5
            for name, sums, g, o, t in zip(
                ("value", "score", "entropy"), (None, size, size), got, own, truth, strict=False
            ):
                errors.add(name, g, o, t, sums)
    errors.check()


@pytest.mark.parametrize("a", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_given_values(dtype, a, device):
    errors = Errors()
    for sample, batch in (((), ()), ((), (ROWS // a,)), ((2,), (3, 4))):
        loc, scale = parameters((*batch, a), dtype, device)
        value = torch.randn((*sample, *batch, a), device=device).to(dtype)
        got = kernels.score(loc, scale, value, 1, entropy=True)
        truth = reference.log_prob(loc.double(), scale.double(), value.double(), 1)
        own = reference.log_prob(loc, scale, value, 1)
        own = summed(own, reference.log_prob(loc, scale, value, 0))
        errors.add("score", got[0], own, truth)
        size = scale.double().log().abs().sum(-1) + a * 1.5
        own = summed(reference.entropy(scale, 1), reference.entropy(scale, 0))
        truth = reference.entropy(scale.double(), 1)
        errors.add("entropy", got[1], own, truth, size)
    errors.check()


def gradients(function, tensors, weights):
    """Gradients by the tensors of the outputs, each weighted."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    total = sum((o * w).sum() for o, w in zip(function(*leaves), weights, strict=True))
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("a", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", [(), (3,)], ids=str)
def test_gradients_of_draws(dtype, a, sample, device):
    rows = ROWS // a
    loc, scale = parameters((rows, a), dtype, device)
    sample = torch.Size(sample)
    weights = [
        torch.randn(shape, device=device).to(dtype)
        for shape in ((*sample, rows, a), (*sample, rows), (rows,))
    ]
    errors = Errors()
    # With samples one kind of bounds is enough: they are summed after it.
    for bounds in clamps(a, device)[2 if sample else 0 :]:
        for used in (None, pair(device)):

            def draw(mu, sigma, used=used, bounds=bounds):
                return reference.draw(mu, sigma, used, sample, 1, True, True, *bounds)

            got = kernels.draw_backward(*weights, loc, scale, used, sample, 1, clamp=bounds)
            own = gradients(draw, (loc, scale), weights)
            truth = gradients(draw, (loc.double(), scale.double()), [w.double() for w in weights])
            for name, g, o, t in zip(("loc", "scale"), got, own, truth, strict=True):
                errors.add(name, g, o, t)
    errors.check()


@pytest.mark.parametrize("a", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_scores(dtype, a, device):
    rows = ROWS // a
    errors = Errors()
    for sample in ((), (2,)):
        loc, scale = parameters((rows, a), dtype, device)
        value = torch.randn((*sample, rows, a), device=device).to(dtype)
        weights = [torch.randn(s, device=device).to(dtype) for s in ((*sample, rows), (rows,))]

        def score(mu, sigma, x):
            return reference.log_prob(mu, sigma, x, 1), reference.entropy(sigma, 1)

        got = kernels.score_backward(*weights, loc, scale, value, 1, to_value=True)
        tensors = (loc, scale, value)
        own = gradients(score, tensors, weights)
        truth = gradients(score, [t.double() for t in tensors], [w.double() for w in weights])
        for name, g, o, t in zip(("loc", "scale", "value"), got, own, truth, strict=True):
            errors.add(name, g, o, t)
    errors.check()


def test_a_detached_value_is_scored_as_a_given_one(device):
    loc, scale = parameters((6, 5), torch.float32, device)
    leaves = loc.requires_grad_(), scale.requires_grad_()
    dist = IndependentNormal(*leaves)
    value, score = dist.sample_and_log_prob(generator=CounterStream(3, device=device))
    assert not value.requires_grad
    got = torch.autograd.grad(score.sum(), leaves)
    with backend.using_backend("reference"):
        again = IndependentNormal(*(t.double() for t in leaves)).log_prob(value.double())
        truth = torch.autograd.grad(again.sum(), leaves)
    torch.testing.assert_close(got, truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("a", [1, 3, 8, 1500, 4096])
def test_strided_and_expanded_parameters_are_read_where_they_lie(a, device):
    rows = 2 if a > 1000 else 9
    both = torch.rand(rows, 2 * a, device=device) + 0.1
    loc, scale = both.chunk(2, -1)
    column = torch.rand(rows, 1, device=device).expand(rows, a)
    turned = torch.rand(a, rows, device=device).T
    row = torch.rand(a, device=device).expand(rows, a) + 0.5
    for mu, sigma in ((loc, scale), (column, row), (turned, scale)):
        for sample in ((), (2,)):
            state = State(pair(device))
            size = torch.Size(sample)
            got = kernels.draw(mu, sigma, size, 1, state=state, entropy=True)
            plain = kernels.draw(
                mu.contiguous(), sigma.contiguous(), size, 1, state=state, entropy=True
            )
            for g, p in zip(got[:3], plain[:3], strict=True):
                assert torch.equal(g, p)
            value = turned.expand(*sample, rows, a)
            g = kernels.score(mu, sigma, value, 1)[0]
            assert torch.equal(
                g, kernels.score(mu.contiguous(), sigma.contiguous(), value.contiguous(), 1)[0]
            )


def test_event_dimensions_are_summed_together(device):
    loc, scale = parameters((4, 2, 3, 5), torch.float32, device)
    for ndims in range(5):
        value, score, entropy, _ = kernels.draw(
            loc, scale, torch.Size((2,)), ndims, state=State(pair(device)), entropy=True
        )
        truth = reference.draw(
            loc.double(), scale.double(), pair(device), torch.Size((2,)), ndims, True, True,
            None, None, None,
        )  # fmt: skip
        torch.testing.assert_close(value.double(), truth[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(score.double(), truth[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), truth[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)], ids=str)
def test_empty(shape, device):
    loc = torch.empty(shape, device=device, requires_grad=True)
    scale = torch.ones(shape, device=device)
    value, score = IndependentNormal(loc, scale).rsample_and_log_prob()
    assert value.shape == shape and score.shape == shape[:-1]
    assert torch.equal(score, torch.zeros_like(score))
    score.sum().backward()
    assert loc.grad.shape == shape


def test_the_draw_is_that_of_the_reference_stream(device):
    loc, scale = torch.zeros(1000, 7, device=device), torch.ones(1000, 7, device=device)
    stream = CounterStream(SEED, device=device)
    for call in range(3):
        value, _ = Normal(loc, scale).rsample_and_log_prob(generator=stream)
        expected = philox.standard_normal(pair(device, call), loc.shape, torch.float64)
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
    assert stream.state.tolist() == [SEED, 3]
    assert stream.ticket.tolist() == [0]


def test_a_stream_without_a_score_is_advanced_as_well(device):
    stream = CounterStream(1, device=device)
    dist = Normal(torch.zeros(3, device=device), torch.ones(3, device=device))
    first = dist._draw(torch.Size(), stream, False, True)[0]
    second = dist._draw(torch.Size(), stream, False, True)[0]
    assert stream.state.tolist() == [1, 2]
    assert not torch.equal(first, second)


def test_torchs_seed_rules_where_there_is_no_generator(device):
    dist = Normal(torch.zeros(64, device=device), torch.ones(64, device=device))
    draws = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        draws.append((dist.rsample(), dist.rsample()))
    assert torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], draws[2][0])


def test_nan_and_infinite_parameters_come_through(device):
    loc = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [0.0, 0.0]], device=device)
    scale = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, math.nan]], device=device)
    value, score, _, _ = kernels.draw(
        loc, scale, torch.Size(), 1, state=State(pair(device)), clamp=Bounds((-1.0, 1.0))
    )
    assert value[0, 0].isnan() and value[1, 0] == 1.0 and value[2, 1].isnan()
    assert score[2].isnan() and not score[:2].isnan().any()


def test_more_than_2_to_the_31_elements_are_addressed(device):
    # An expanded row of a batch that is never held: the last tile alone is looked at.
    if device.type == "cpu":
        rows, a = 2**31 // 8 + 4, 8
        loc = torch.zeros(1, a, device=device).expand(rows, a)
        parameter = kernels.parameter(loc, 1, False)
        assert (parameter.row, parameter.column) == (0, 1)
        assert kernels.forward_grid(rows, a, 4).programs * 256 >= rows
        return
    rows, a = 2**31 // 8 + 4, 8
    loc = torch.zeros(1, a, device=device, dtype=torch.bfloat16).expand(rows, a)
    value, score, _, _ = kernels.draw(
        loc, loc + 1, torch.Size(), 1, state=State(pair(device)), score=True
    )
    assert value[-1].isfinite().all() and score[-1].isfinite()


def test_operators(device):
    for sample in ([], [2]):
        loc, scale = parameters((4, 6), torch.float32, device)
        leaves = loc.requires_grad_(), scale.requires_grad_()
        value = torch.randn((*sample, 4, 6), device=device, requires_grad=True)
        for back in ("triton", "reference"):
            with backend.using_backend(back):
                torch.library.opcheck(
                    torch.ops.fastprob.normal_draw.default,
                    (*leaves, pair(device), sample, 1, True, True, True, True, [-1.0, 1.0], None,
                     None),
                )  # fmt: skip
                torch.library.opcheck(
                    torch.ops.fastprob.normal_score.default, (*leaves, value, 1, True)
                )


def test_operators_of_both_backends_agree(device):
    loc, scale = parameters((4, 6), torch.float32, device)
    low = torch.full((6,), -0.5, device=device)
    made = {}
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            made[back] = []
            for pathwise in (True, False):
                for bounds in (Bounds(), Bounds([-0.5, 1.0]), Bounds(None, low, low + 1)):
                    leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
                    out = torch.ops.fastprob.normal_draw(
                        *leaves, pair(device), [3], 1, True, True, True, pathwise, *bounds
                    )
                    total = sum(o.sum() for o in out[pathwise is False : 3])
                    made[back] += [*out, *torch.autograd.grad(total, leaves)]
    for got, expected in zip(made["triton"], made["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_vmap(device):
    loc, scale = parameters((5, 4, 6), torch.float32, device)
    value = torch.randn(2, 5, 4, 6, device=device)
    got = torch.vmap(lambda m, s, v: IndependentNormal(m, s).log_prob(v), in_dims=(0, 0, 1))(
        loc, scale, value
    )
    expected = IndependentNormal(loc, scale).log_prob(value).transpose(0, 1)
    torch.testing.assert_close(got, expected)
    draw = torch.vmap(
        lambda m, s: IndependentNormal(m, s).rsample_and_log_prob(), randomness="same"
    )
    value, score = draw(torch.zeros_like(loc), torch.ones_like(scale))
    assert torch.equal(value[0], value[3]) and torch.equal(score[0], score[3])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda m, s: IndependentNormal(m, s).rsample())(loc, scale)
    # What is not drawn asks for no randomness.
    point = torch.vmap(lambda m, s: IndependentNormal(m, s).take(InteractionType.MODE, score=True))
    value, score = point(loc, scale)
    assert torch.equal(value, loc)
    torch.testing.assert_close(score, IndependentNormal(loc, scale).log_prob(loc))


def test_compiled_equals_eager(device):
    loc, scale = parameters((5, 6), torch.float32, device)

    def call(mu, sigma):
        with set_interaction_type("random"):
            dist = IndependentNormal(mu, sigma)
            value, score = dist.rsample_and_log_prob()
            return value, score, dist.log_prob(value.detach()), dist.entropy()

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
        out = function(*leaves)
        results += [[*out, *torch.autograd.grad(sum(o.sum() for o in out), leaves)]]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)


def test_score_and_entropy_are_one_launch(device, monkeypatch):
    launches = []
    original = kernels.score
    monkeypatch.setattr(kernels, "score", lambda *a, **k: launches.append(1) or original(*a, **k))
    loc, scale = parameters((5, 6), torch.float32, device)
    scale = scale.requires_grad_() * 1.0
    dist = IndependentNormal(loc, scale)
    score, entropy = dist.log_prob(torch.zeros_like(loc)), dist.entropy()
    assert len(launches) == 1
    with backend.using_backend("reference"):
        again = IndependentNormal(loc, scale)
        torch.testing.assert_close(score, again.log_prob(torch.zeros_like(loc)))
        torch.testing.assert_close(entropy, again.entropy())


def test_entropy_is_kept_only_for_gradients_of_one_pass(device):
    loc, scale = parameters((5, 6), torch.float32, device)
    made = scale.requires_grad_() * 1.0
    dist = IndependentNormal(loc, made)
    with torch.no_grad():
        dist.log_prob(loc)
    assert dist.entropy().requires_grad
    dist.log_prob(loc)
    with torch.no_grad():
        assert not dist.entropy().requires_grad
    # Leaves may be differentiated in two passes.
    dist = IndependentNormal(loc, scale)
    dist.log_prob(loc + 1).sum().backward()
    dist.entropy().sum().backward()
    truth = scale.detach().double().requires_grad_()
    with backend.using_backend("reference"):
        again = IndependentNormal(loc.double(), truth)
        (again.log_prob(loc.double() + 1).sum() + again.entropy().sum()).backward()
    torch.testing.assert_close(scale.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)


# torch 2.13: the first use of forward mode compiles torch's own formulas by a deprecated name.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_that_differentiate(device):
    loc, scale = parameters((5, 6), torch.float32, device)
    stream = CounterStream(3, device)

    def loss(mu):
        dist = IndependentNormal(mu, scale)
        value, score = dist.rsample_and_log_prob(generator=stream)
        return (value.square().sum(-1) + score + dist.log_prob(torch.zeros_like(mu))).sum()

    (got, tangent) = torch.func.jvp(loss, (loc,), (torch.ones_like(loc),))
    stream.state[1] = 0
    grad = torch.func.grad(loss)(loc)
    assert stream.state.tolist() == [3, 1]
    stream.state[1] = 0
    leaf = loc.clone().requires_grad_()
    eager = loss(leaf)
    (expected,) = torch.autograd.grad(eager, leaf)
    torch.testing.assert_close(got, eager.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tangent, expected.sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4), "does not broadcast"),
        (torch.zeros(2, 3, device="meta"), "given a value on"),
    ],
)
def test_a_value_that_does_not_fit(value, message, device):
    dist = IndependentNormal(torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device))
    with pytest.raises(ValueError, match=message):
        dist.log_prob(value if value.is_meta else value.to(device))
