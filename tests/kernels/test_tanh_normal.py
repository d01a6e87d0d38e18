"""TanhNormal's kernels against float64."""

from __future__ import annotations

import itertools
import math

import mpmath
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
from fastprob.reference import philox
from fastprob.reference import tanh_normal as reference
from fastprob.specs import Bounded
from tests.kernels.accuracy import DTYPES, SIZES, Errors, check
from tests.kernels.tanh_formulas import (
    ELEMENTS,
    NONE,
    SEED,
    clamps,
    formula,
    gradients,
    intervals,
    noise_of,
    pair,
    parameters,
    point_formula,
    total,
)


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


@pytest.mark.parametrize("kind", [kernels.MODE, kernels.MEAN], ids=["mode", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modes_and_means(dtype, kind, device):
    limit = torch.tensor(reference.limit(dtype), dtype=dtype).item()
    errors = Errors()
    for a in SIZES:
        kinds = itertools.cycle(
            zip(intervals(a, dtype, device) * 2, clamps(a, device)[::-1] * 2, strict=True)
        )
        for batch in ((), (5,), (3, 13), (max(1, ELEMENTS // a),)):
            loc, scale = parameters((*batch, a), dtype, device)
            bounds, clamp = next(kinds)
            got = kernels.draw(loc, scale, bounds, NONE, 1, clamp=clamp, state=None, point=kind)
            own, truth = (
                point_formula(kind, loc.to(t), scale.to(t), bounds, clamp, limit)
                for t in (dtype, torch.float64)
            )
            errors.add("value", got[0], own[0], truth[0])
            size = (loc.double().abs() * 2 + 2).sum(-1)
            errors.add(f"score {a}", got[1], own[1], truth[1], size)
    errors.check()


@pytest.mark.parametrize("kind", [kernels.MODE, kernels.MEAN], ids=["mode", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_modes_and_means(dtype, kind, device):
    limit = torch.tensor(reference.limit(dtype), dtype=dtype).item()
    errors = Errors()
    for a, sample in [*((a, NONE) for a in SIZES), (3, torch.Size((3,)))]:
        rows = max(1, ELEMENTS // a)
        loc, scale = parameters((rows, a), dtype, device)
        if kind == kernels.MODE:
            # Where three roots meet one element would outweigh all others: a test of its own.
            meeting = (loc.abs() < 0.5) & ((2 * scale * scale - 1).abs() < 0.5)
            loc = torch.where(meeting, loc + 0.5, loc)
        weights = [
            torch.randn(shape, device=device).to(dtype)
            for shape in ((*sample, rows, a), (*sample, rows))
        ]
        for bounds, clamp in zip(intervals(a, dtype, device), clamps(a, device), strict=True):

            def point(mu, sigma, bounds=bounds, clamp=clamp, sample=sample):
                made = point_formula(kind, mu, sigma, bounds, clamp, limit)
                return [t.expand(sample + t.shape) for t in made]

            # Of the value, of the score, and of both.
            for wanted in ((True, False), (False, True), (True, True)):
                grads = [w if use else None for w, use in zip(weights, wanted, strict=True)]
                got = kernels.draw_backward(
                    *grads, loc, scale, bounds, None, sample, 1, point=kind, clamp=clamp
                )
                used = [w * use for w, use in zip(weights, wanted, strict=True)]
                own = gradients(point, (loc, scale), used)
                truth = gradients(point, (loc.double(), scale.double()), [w.double() for w in used])
                for name, g, o, t in zip(("loc", "scale"), got, own, truth, strict=True):
                    errors.add(f"{name} {wanted}", g, o, t)
    errors.check()


def roots(loc, scale):
    """The mode before tanh in 50 digits, bisected between |loc| and |loc| + 2 scale^2."""
    made = []
    with mpmath.workdps(50):
        for mu, sigma in zip(loc.tolist(), scale.tolist(), strict=True):
            size, w = mpmath.mpf(abs(mu)), 2 * mpmath.mpf(sigma) ** 2
            # To the right of where the slope is 0 there is one root, the highest.
            low = mpmath.acosh(mpmath.sqrt(w)) if w > 1 else mpmath.mpf(0)
            low, high = max(low, size), size + w
            for _ in range(160):
                middle = (low + high) / 2
                below = middle - size - w * mpmath.tanh(middle) < 0
                low, high = (middle, high) if below else (low, middle)
            made.append(float(mpmath.tanh(low)) * (-1 if mu < 0 else 1))
    return torch.tensor(made, dtype=torch.float64, device=loc.device)


def test_modes_where_three_roots_meet(device):
    sizes = (0.0, 1e-9, 1e-6, 1e-4, 1e-2, 0.3, 3.0, 30.0)
    near = [0.5**0.5 * (1 + sign * 10.0**-k) for k in range(1, 8) for sign in (-1, 1)]
    points = list(itertools.product(sizes, [1e-3, 0.3, 1.5, 30.0, *near]))
    loc, scale = torch.tensor(points, device=device).T.contiguous()
    loc[1::2] *= -1
    unit = ops.Bounds(1.0, 0.0, 0.0, False)
    value, score, _ = kernels.draw(loc, scale, unit, NONE, 0, state=None, point=kernels.MODE)
    assert score.isfinite().all()
    truth = roots(loc, scale)
    own = torch.tanh(reference.mode(loc, scale))
    torch.testing.assert_close(own.double(), truth, rtol=2e-7, atol=0)
    torch.testing.assert_close(value.double(), truth, rtol=3e-6, atol=1e-7)
    weight = torch.ones_like(value)
    arguments = loc, scale, unit, None, NONE, 0
    by_loc, by_scale = kernels.draw_backward(weight, None, *arguments, point=kernels.MODE)
    rest = 1.0 - truth * truth
    slope = rest / (1.0 - 2.0 * scale.double() ** 2 * rest)
    leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
    own = torch.autograd.grad(torch.tanh(reference.mode(*leaves)).sum(), leaves)
    # Which of the two is farther off, of the gradients up to 1,000: of more little is left.
    small = slope.abs() < 1e3
    for got, mine, exact in zip(
        (by_loc, by_scale), own, (slope, slope * 4.0 * scale * truth), strict=True
    ):
        assert got.isfinite().all()
        check("slope", got[small], mine[small], exact[small])
    for grad in kernels.draw_backward(None, weight, *arguments, point=kernels.MODE):
        assert grad.isfinite().all()


def test_a_mode_of_two_equal_sides_is_the_positive_one(device):
    loc = torch.tensor([0.0, -0.0], device=device)
    scale = torch.full_like(loc, 2.0)
    value = kernels.draw(
        loc, scale, ops.Bounds(1.0, 0.0, 0.0, True), NONE, 0, state=None, point=kernels.MODE
    )[0]
    torch.testing.assert_close(value, torch.tanh(reference.mode(loc, scale)))
    assert (value > 0.9).all()


@pytest.mark.parametrize("kind", [kernels.MODE, kernels.MEAN], ids=["mode", "mean"])
def test_modes_and_means_of_extreme_parameters(kind, device):
    loc = torch.tensor([math.inf, -math.inf, 1e10, 0.0, 0.0, math.nan, 0.5], device=device)
    scale = torch.tensor([1.0, 1.0, 1e-4, 1e-4, 1e6, 1.0, math.nan], device=device)
    unit = ops.Bounds(1.0, 0.0, 0.0, False)
    value, score, _ = kernels.draw(loc, scale, unit, NONE, 0, state=None, point=kind)
    zero = 1.0 if kind == kernels.MODE else 0.0
    expected = torch.tensor([1.0, -1.0, 1.0, 0.0, zero, math.nan, math.nan], device=device)
    torch.testing.assert_close(value, expected, equal_nan=True)
    assert score[5:].isnan().all()


@pytest.mark.parametrize("interaction", ["mode", "mean"])
def test_gradients_through_a_distribution_agree_with_the_reference(interaction, device):
    loc, scale = parameters((7, 3), torch.float32, device)
    made = []
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
            dist = TanhNormal(*leaves, low=-2.0, high=3.0)
            value, score = dist.take(InteractionType.from_str(interaction), score=True)
            total = (value.sin().sum(-1) * score).sum()
            made.append([value, score, *torch.autograd.grad(total, leaves)])
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


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


@pytest.mark.parametrize("a", [257, 401, 514, 600, 1023])
def test_tiles_that_begin_in_front_of_their_rows(a, device):
    loc, scale = parameters((23, a), torch.float32, device)
    unit = intervals(1, torch.float32, device)[0]
    value, score, _ = kernels.draw(loc, scale, unit, NONE, 1, state=State(pair(device)))
    expected = reference.draw(
        loc.double(), scale.double(), pair(device), NONE, 1, True, 1.0, 0.0, True, None, None, None
    )
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(score.double(), expected[1], rtol=1e-5, atol=1e-3)
    given = value.clamp(-0.9, 0.9)
    torch.testing.assert_close(
        kernels.score(loc, scale, given, unit, 1).double(),
        ops.log_prob(loc.double(), scale.double(), given.double(), unit, 1),
        rtol=1e-5, atol=1e-3,
    )  # fmt: skip


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
    # A mean next to a bound is scored through atanh, which the reference knows to 1e-3 alone.
    loc = loc.clamp(-2.0, 2.0)
    made = []
    for back in ("triton", "reference"):
        torch.manual_seed(5)
        with backend.using_backend(back), set_interaction_type(kind):
            made.append(module(TensorDict(loc=loc, scale=scale, batch_size=[40])))
    assert made[0]["action"].min() == -0.25 and made[0]["action"].max() == 0.5
    assert len(launches) == 1
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
                for kind in (ops.RANDOM, ops.MODE) if sample else (ops.MEAN,):
                    torch.library.opcheck(
                        torch.ops.fastprob.tanh_normal_draw.default,
                        (*leaves, pair(device), sample, 1, kind, True, True, *interval,
                         [-0.9, 0.9], None, None),
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
            kinds = ops.RANDOM, ops.MODE, ops.MEAN, ops.RANDOM
            cases = list(operator_arguments(device))
            for interval, kind, pathwise, clamp in zip(
                (*cases, cases[0]), kinds, (True, True, True, False),
                (Clamp(), Clamp([-0.5, 1.0]), Clamp(None, low, low + 1), Clamp()), strict=True,
            ):  # fmt: skip
                leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
                out = torch.ops.fastprob.tanh_normal_draw(
                    *leaves, pair(device), [3], 1, kind, True, pathwise, *interval, *clamp
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
    for kind in (InteractionType.MODE, InteractionType.MEAN):
        got = torch.vmap(lambda m, s, kind=kind: TanhNormal(m, s).take(kind, score=True))(
            loc, scale
        )
        for g, expected in zip(got, TanhNormal(loc, scale).take(kind, score=True), strict=True):
            torch.testing.assert_close(g, expected)


def test_compiled_equals_eager(device):
    loc, scale = parameters((5, 6), torch.float32, device)

    def call(mu, sigma):
        dist = TanhNormal(mu, sigma, low=-2.0, high=3.0)
        value, score = dist.rsample_and_log_prob()
        points = [
            dist.take(kind, score=True) for kind in (InteractionType.MODE, InteractionType.MEAN)
        ]
        points = [t for point in points for t in point]
        return value, score, dist.log_prob(value.detach()), dist.deterministic_sample, *points

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
