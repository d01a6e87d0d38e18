"""TanhNormal's kernels against float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from fastprob import InteractionType, SafeProbabilisticModule, backend, set_interaction_type
from fastprob.counter import CounterStream
from fastprob.distributions.tanh_normal import TanhNormal
from fastprob.kernels import tanh_normal as kernels
from fastprob.kernels._launch import State
from fastprob.ops import tanh_normal as ops
from fastprob.ops._fused import Bounds as Clamp
from fastprob.reference import normal, philox
from fastprob.reference import tanh_normal as reference
from fastprob.specs import Bounded
from tests.kernels.accuracy import DTYPES, SIZES, Errors

SEED = 23
# Elements of a gradient.
ELEMENTS = 256
NONE = torch.Size()


def parameters(shape, dtype, device):
    loc = (torch.randn(shape, device=device) * 1.5).to(dtype)
    return loc, (torch.rand(shape, device=device) + 0.25).to(dtype)


def pair(device, call=0):
    return torch.tensor([SEED, call], device=device)


def intervals(a, dtype, device, safe=True):
    """(-1, 1), two numbers, and two tensors."""
    half = (torch.rand(a, device=device) + 0.5).to(dtype)
    mid = torch.randn(a, device=device).to(dtype)
    return (
        ops.Bounds(1.0, 0.0, 0.0, safe),
        ops.Bounds(2.0, 0.5, math.log(2.0), safe),
        ops.Bounds(half, mid, torch.log(half), safe),
    )


def clamps(a, device):
    low = -torch.rand(a, device=device)
    return Clamp(), Clamp((-0.5, 0.25)), Clamp(None, low, low + torch.rand(a, device=device))


class _Limited(torch.autograd.Function):
    """tanh between two limits, with the gradient of tanh at what it gives."""

    @staticmethod
    def forward(ctx, x, limit):
        y = torch.tanh(x).clamp(-limit, limit)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1.0 - y * y), None


def total(terms):
    """The sum of a row.

    The interpreter adds up a row one by one, 5 times as far off at A = 257 as by halves, which is
    how PyTorch and a GPU do it. Against it PyTorch's terms are added up one by one.
    """
    if terms.is_cpu and terms.dtype is torch.float32 and not terms.requires_grad:
        return torch.from_numpy(np.cumsum(terms.numpy(), axis=-1))[..., -1]
    return terms.sum(-1)


def formula(loc, scale, noise, bounds, clamp, limit):
    """Value and score, of noise that is given, for autograd in any dtype."""
    x = loc + noise * scale
    tanh = _Limited.apply(x, limit) if bounds.safe else torch.tanh(x)
    half, mid = (t.to(x.dtype) if isinstance(t, torch.Tensor) else t for t in bounds[:2])
    value = normal.clamped(tanh * half + mid, *clamp)
    log_half = math.log(half) if isinstance(half, float) else torch.log(half)
    jacobian = 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x)) + log_half
    terms = -0.5 * noise * noise - torch.log(scale) - 0.5 * math.log(2 * math.pi) - jacobian
    return value, total(terms)


def gradients(function, tensors, weights):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    total = sum((o * w).sum() for o, w in zip(function(*leaves), weights, strict=True))
    return torch.autograd.grad(total, leaves)


def noise_of(state, shape, dtype, device):
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return philox.standard_normal(state, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_and_scores(dtype, device):
    # Of all sizes together: the largest of few errors says little of either side.
    errors = Errors()
    for a in SIZES:
        kinds = itertools.cycle(
            zip(intervals(a, dtype, device) * 2, clamps(a, device)[::-1] * 2, strict=True)
        )
        for call, batch in enumerate(((), (5,), (3, 13), (max(1, ELEMENTS // a),))):
            loc, scale = parameters((*batch, a), dtype, device)
            for state in (None, pair(device, call)):
                bounds, clamp = next(kinds)
                got = kernels.draw(
                    loc, scale, bounds, NONE, 1, clamp=clamp,
                    state=None if state is None else State(state),
                )  # fmt: skip
                limit = reference.limit(dtype)
                limit = torch.tensor(limit, dtype=dtype).item()
                own, truth = (
                    formula(
                        loc.to(t), scale.to(t), noise_of(state, loc.shape, t, device), bounds,
                        clamp, limit,
                    )
                    for t in (dtype, torch.float64)
                )  # fmt: skip
                errors.add("value", got[0], own[0], truth[0])
                # Its terms cancel.
                size = (loc.double().abs() * 2 + 2).sum(-1)
                errors.add(f"score {a}", got[1], own[1], truth[1], size)
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_draws(dtype, device):
    limit = torch.tensor(reference.limit(dtype), dtype=dtype).item()
    # Of all sizes together: the largest of few errors says little of either side.
    errors = Errors()
    for a, sample in [*((a, NONE) for a in SIZES), (3, torch.Size((3,)))]:
        rows = max(1, ELEMENTS // a)
        loc, scale = parameters((rows, a), dtype, device)
        weights = [
            torch.randn(shape, device=device).to(dtype)
            for shape in ((*sample, rows, a), (*sample, rows))
        ]
        cases = list(zip(intervals(a, dtype, device), clamps(a, device), strict=True))
        # With samples one case is enough: they are summed after it.
        for bounds, clamp in cases[2 if sample else 0 :]:
            for used in (None, pair(device)):

                def draw(mu, sigma, used=used, bounds=bounds, clamp=clamp, sample=sample):
                    noise = noise_of(used, sample + mu.shape, mu.dtype, device)
                    return formula(mu, sigma, noise, bounds, clamp, limit)

                got = kernels.draw_backward(
                    *weights, loc, scale, bounds, used, sample, 1, clamp=clamp
                )
                own = gradients(draw, (loc, scale), weights)
                truth = gradients(
                    draw, (loc.double(), scale.double()), [w.double() for w in weights]
                )
                for name, g, o, t in zip(("loc", "scale"), got, own, truth, strict=True):
                    errors.add(name, g, o, t)
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_given_values_and_their_gradients(dtype, device):
    limit = torch.tensor(reference.limit(dtype), dtype=dtype).item()
    # Of all sizes together: the largest of few errors says little of either side.
    errors = Errors()
    for a in SIZES:
        rows = max(1, ELEMENTS // a)
        for sample, bounds in zip(((2,), (), ()), intervals(a, dtype, device), strict=True):
            bounds = bounds._replace(safe=a % 2 == 0)
            loc, scale = parameters((rows, a), dtype, device)
            inner = torch.rand((*sample, rows, a), device=device) * 1.8 - 0.9
            value = (inner * bounds.half + bounds.mid).to(dtype)
            weight = torch.randn((*sample, rows), device=device).to(dtype)

            def score(mu, sigma, v, bounds=bounds):
                half, mid = (
                    t.to(mu.dtype) if isinstance(t, torch.Tensor) else t for t in bounds[:2]
                )
                y = ((v - mid) / half).clamp(-limit, limit)
                z = (torch.atanh(y) - mu) / sigma
                log_half = math.log(half) if isinstance(half, float) else torch.log(half)
                jacobian = torch.log1p(-y * y) + log_half
                terms = 0.5 * z * z + torch.log(sigma) + 0.5 * math.log(2 * math.pi) + jacobian
                return (-total(terms),)

            tensors = loc, scale, value
            wide = [t.double() for t in tensors]
            got = kernels.score(*tensors, bounds, 1)
            errors.add(f"score {a}", got, score(*tensors)[0], score(*wide)[0])
            got = kernels.score_backward(weight, *tensors, bounds, 1, to_value=True)
            own = gradients(score, tensors, [weight])
            truth = gradients(score, wide, [weight.double()])
            for name, g, o, t in zip(("loc", "scale", "value"), got, own, truth, strict=True):
                errors.add(name, g, o, t)
    errors.check()


def test_values_at_and_beyond_the_bounds_are_scored_just_inside(device):
    loc = torch.zeros(3, 2, device=device, requires_grad=True)
    scale = torch.ones(3, 2, device=device)
    value = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-1.0, 0.0]], device=device).requires_grad_()
    dist = TanhNormal(loc, scale)
    score = dist.log_prob(value)
    assert score.isfinite().all()
    assert (score == score[0]).all()
    (grad,) = torch.autograd.grad(score.sum(), value)
    assert (grad[:, 0] == 0.0).all()


def test_a_detached_value_is_scored_as_a_given_one(device):
    loc, scale = parameters((6, 5), torch.float32, device)
    leaves = loc.requires_grad_(), scale.requires_grad_()
    dist = TanhNormal(*leaves)
    value, score = dist.sample_and_log_prob(generator=CounterStream(SEED, device=device))
    assert not value.requires_grad
    got = torch.autograd.grad(score.sum(), leaves)
    noise = philox.standard_normal(pair(device), loc.shape, torch.float64)
    x = (loc.double() + noise * scale.double()).detach()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(torch.distributions.Normal(*wide).log_prob(x).sum(), wide)
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("a", [1, 3, 8, 1500, 4096])
def test_strided_and_expanded_parameters_are_read_where_they_lie(a, device):
    rows = 2 if a > 1000 else 9
    loc, scale = (torch.rand(rows, 2 * a, device=device) + 0.1).chunk(2, -1)
    column = torch.rand(rows, 1, device=device).expand(rows, a)
    turned = torch.rand(a, rows, device=device).T
    bounds = intervals(a, torch.float32, device)[2]
    for mu, sigma, sample in ((loc, scale, NONE), (column, turned, torch.Size((2,)))):
        plain = mu.contiguous(), sigma.contiguous()
        state = State(pair(device))
        got = kernels.draw(mu, sigma, bounds, sample, 1, state=state)
        again = kernels.draw(*plain, bounds, sample, 1, state=state)
        assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])
        given = turned.expand(*sample, rows, a)
        assert torch.equal(
            kernels.score(mu, sigma, given, bounds, 1),
            kernels.score(*plain, given.contiguous(), bounds, 1),
        )


def test_event_dimensions_are_summed_together(device):
    loc, scale = parameters((4, 2, 3, 5), torch.float32, device)
    unit = intervals(1, torch.float32, device)[0]
    for ndims in range(5):
        value, score, _ = kernels.draw(
            loc, scale, unit, torch.Size((2,)), ndims, state=State(pair(device))
        )
        truth = reference.draw(
            loc.double(), scale.double(), pair(device), torch.Size((2,)), ndims, True,
            1.0, 0.0, False, None, None, None,
        )  # fmt: skip
        torch.testing.assert_close(value.double(), truth[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(score.double(), truth[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)], ids=str)
def test_empty(shape, device):
    loc = torch.empty(shape, device=device, requires_grad=True)
    dist = TanhNormal(loc, torch.ones(shape, device=device))
    value, score = dist.rsample_and_log_prob()
    assert value.shape == shape and torch.equal(score, torch.zeros(shape[:-1], device=device))
    (score.sum() + value.sum() + dist.log_prob(value).sum()).backward()
    assert loc.grad.shape == shape


def test_nan_and_infinite_parameters_come_through(device):
    loc = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [-math.inf, 0.0]], device=device)
    value, score, _ = kernels.draw(
        loc, torch.ones_like(loc), intervals(1, torch.float32, device)[0], NONE, 1,
        state=State(pair(device)), clamp=Clamp((-1.0, 1.0)),
    )  # fmt: skip
    assert value[0, 0].isnan() and score[0].isnan()
    limit = torch.tensor(reference.limit(torch.float32), device=device)
    assert value[1, 0] == limit and value[2, 0] == -limit


def test_the_reference_draws_the_same_from_a_stream(device):
    loc, scale = parameters((50, 7), torch.float32, device)
    made = []
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            stream = CounterStream(SEED, device=device)
            dist = TanhNormal(loc, scale, low=-2.0, high=3.0)
            made.append([*dist.rsample_and_log_prob(generator=stream), stream.state])
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_bounds_that_the_kernels_do_not_read_are_left_to_the_reference(device):
    loc, scale = parameters((4, 3), torch.float32, device)
    high = torch.rand(4, 3, device=device) + 0.5
    dist = TanhNormal(loc, scale, low=-high, high=high)
    value, score = dist.rsample_and_log_prob()
    assert (value.abs() < high).all()
    torch.testing.assert_close(dist.log_prob(value), score, rtol=1e-3, atol=1e-3)
    learned = torch.ones(3, device=device, requires_grad=True)
    TanhNormal(loc, scale, low=-1.0, high=learned).rsample().sum().backward()
    assert learned.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["random", "mode", "median", "mean", "deterministic"])
def test_a_safe_module_projects_in_the_same_launch(kind, device, monkeypatch):
    launches = []
    original = kernels.draw
    monkeypatch.setattr(kernels, "draw", lambda *a, **k: launches.append(1) or original(*a, **k))
    module = SafeProbabilisticModule(
        in_keys=["loc", "scale"], out_keys=["action"],
        spec=Bounded(-0.25, 0.5, shape=(3,), device=device), safe=True,
        distribution_class=TanhNormal, return_log_prob=True,
        default_interaction_type=InteractionType.MODE,
    )  # fmt: skip
    loc, scale = parameters((40, 3), torch.float32, device)
    made = []
    for back in ("triton", "reference"):
        torch.manual_seed(5)
        with backend.using_backend(back), set_interaction_type(kind):
            made.append(module(TensorDict(loc=loc, scale=scale, batch_size=[40])))
    assert made[0]["action"].min() == -0.25 and made[0]["action"].max() == 0.5
    assert len(launches) == (kind in ("random", "median", "deterministic"))
    if kind != "random":
        for key in ("action", "sample_log_prob"):
            torch.testing.assert_close(made[0][key], made[1][key], rtol=1e-4, atol=1e-4)


def operator_arguments(device):
    half = torch.tensor([0.5, 2.0, 1.0], device=device)
    for interval in (((1.0, 0.0), None, None), ((2.0, 0.5), None, None), (None, half, half - 1.0)):
        yield (*interval, True)


def test_operators(device):
    for sample, interval in list(zip(([], [], [2]), operator_arguments(device), strict=True))[1:]:
        loc, scale = parameters((4, 3), torch.float32, device)
        leaves = loc.requires_grad_(), scale.requires_grad_()
        value = (torch.rand((*sample, 4, 3), device=device) - 0.5).requires_grad_()
        for back in ("triton", "reference"):
            with backend.using_backend(back):
                torch.library.opcheck(
                    torch.ops.fastprob.tanh_normal_draw.default,
                    (*leaves, pair(device), sample, 1, True, True, True, *interval, [-0.9, 0.9],
                     None, None),
                )  # fmt: skip
                torch.library.opcheck(
                    torch.ops.fastprob.tanh_normal_score.default, (*leaves, value, 1, *interval)
                )


def test_operators_of_both_backends_agree(device):
    loc, scale = parameters((4, 3), torch.float32, device)
    given = torch.rand(2, 4, 3, device=device) - 0.5
    low = torch.full((3,), -0.5, device=device)
    made = {}
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            made[back] = []
            for interval, pathwise, clamp in zip(
                operator_arguments(device), (True, True, False),
                (Clamp(), Clamp([-0.5, 1.0]), Clamp(None, low, low + 1)), strict=True,
            ):  # fmt: skip
                leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
                out = torch.ops.fastprob.tanh_normal_draw(
                    *leaves, pair(device), [3], 1, True, True, pathwise, *interval, *clamp
                )
                total = sum(o.sum() for o in out[pathwise is False : 2])
                made[back] += [*out, *torch.autograd.grad(total, leaves)]
                value = given.clone().requires_grad_()
                out = torch.ops.fastprob.tanh_normal_score(*leaves, value, 1, *interval)
                made[back] += [out, *torch.autograd.grad(out.sum(), (*leaves, value))]
    for got, expected in zip(made["triton"], made["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=5e-5, atol=5e-5)


def test_vmap(device):
    loc, scale = parameters((5, 4, 6), torch.float32, device)
    value = torch.rand(2, 5, 4, 6, device=device) - 0.5
    got = torch.vmap(lambda m, s, v: TanhNormal(m, s).log_prob(v), in_dims=(0, 0, 1))(
        loc, scale, value
    )
    torch.testing.assert_close(got, TanhNormal(loc, scale).log_prob(value).transpose(0, 1))
    draw = torch.vmap(lambda m, s: TanhNormal(m, s).rsample_and_log_prob(), randomness="same")
    value, score = draw(torch.zeros_like(loc), torch.ones_like(scale))
    assert torch.equal(value[0], value[3]) and torch.equal(score[0], score[3])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda m, s: TanhNormal(m, s).rsample())(loc, scale)


def test_compiled_equals_eager(device):
    loc, scale = parameters((5, 6), torch.float32, device)

    def call(mu, sigma):
        dist = TanhNormal(mu, sigma, low=-2.0, high=3.0)
        value, score = dist.rsample_and_log_prob()
        return value, score, dist.log_prob(value.detach()), dist.deterministic_sample

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
        out = function(*leaves)
        results += [[*out, *torch.autograd.grad(sum(o.sum() for o in out), leaves)]]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4), "does not broadcast"),
        (torch.zeros(2, 3, device="meta"), "given a value on"),
    ],
)
def test_a_value_that_does_not_fit(value, message, device):
    dist = TanhNormal(torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device))
    with pytest.raises(ValueError, match=message):
        dist.log_prob(value if value.is_meta else value.to(device))
