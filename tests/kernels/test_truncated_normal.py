"""TruncatedNormal's kernels against the reference in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from fastprob import SafeProbabilisticModule, backend, set_interaction_type
from fastprob.counter import CounterStream
from fastprob.distributions.truncated_normal import TruncatedNormal
from fastprob.kernels import truncated_normal as kernels
from fastprob.kernels._launch import State
from fastprob.ops import truncated_normal as ops
from fastprob.ops._fused import Bounds as Clamp
from fastprob.reference import normal, philox
from fastprob.reference import truncated_normal as reference
from fastprob.specs import Bounded
from tests.kernels.accuracy import DTYPES, SIZES, Errors

SEED = 24
# Elements of a gradient.
ELEMENTS = 256
NONE = torch.Size()


def pair(device, call=0):
    return torch.tensor([SEED, call], device=device)


def parameters(shape, dtype, device):
    loc = (torch.randn(shape, device=device) * 0.7).to(dtype)
    return loc, (torch.rand(shape, device=device) + 0.25).to(dtype)


def intervals(shape, dtype, device):
    """Two numbers, and two tensors of which each element has its own."""
    low = (-torch.rand(shape[-1], device=device) - 0.5).to(dtype)
    high = (low + torch.rand(shape[-1], device=device) + 1.0).to(dtype)
    return (-1.0, 0.75), (low.expand(shape), high.expand(shape))


def probabilities(state, shape, device):
    if state is None:
        return torch.full(shape, 0.5, dtype=torch.float64, device=device)
    return philox.uniform(state, shape, torch.float64) * (1 - 2 * ops.EPS) + ops.EPS


def wide(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def exact(loc, scale, low, high, p, value=None):
    """Value, score and entropy in float64, for autograd; the score of `value` where it is given."""
    entropy = ops.entropy(loc, scale, low, high, 1)
    if value is None:
        return *ops.sample_score(loc, scale, low, high, p, 1), entropy
    return ops.log_prob(loc, scale, low, high, value, 1), entropy


def total(terms):
    """The sum of a row.

    The interpreter adds up a row one by one, 5 times as far off at A = 257 as by halves, which is
    how PyTorch and a GPU do it. Against it PyTorch's terms are added up one by one.
    """
    if terms.is_cpu and terms.dtype is torch.float32 and not terms.requires_grad:
        return torch.from_numpy(np.cumsum(terms.numpy(), axis=-1))[..., -1]
    return terms.sum(-1)


def plain(loc, scale, low, high, p, value=None):
    """The same as it is written down, from the error function, in the dtype of `loc`."""
    a, b = (low - loc) / scale, (high - loc) / scale
    root = math.sqrt(0.5)
    below = 0.5 + 0.5 * torch.erf(a * root)
    mass = 0.5 * (torch.erf(b * root) - torch.erf(a * root))
    density_a, density_b = (torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi) for t in (a, b))
    terms = torch.log(scale) + torch.log(mass) + 0.5 * math.log(2 * math.pi)
    entropy = terms + 0.5 + 0.5 * (a * density_a - b * density_b) / mass
    if value is None:
        z = torch.erfinv(2 * (below + p.to(loc.dtype) * mass) - 1) * math.sqrt(2)
        x = torch.clamp(loc + z * scale, low, high)
        return x, -total(terms + 0.5 * z * z), total(entropy)
    z = (value - loc) / scale
    return -total(terms + 0.5 * z * z), total(entropy)


def gradients(function, tensors, weights):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    total = sum((o * w).sum() for o, w in zip(function(*leaves), weights, strict=True))
    return torch.autograd.grad(total, leaves)


def finite(own, truth):
    """PyTorch's result, and the truth where it has none: no help for the kernel."""
    return torch.where(own.isfinite(), own, truth.to(own.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_scores_and_entropies(dtype, device):
    # Of all sizes together: the largest of few errors says little of either side.
    errors = Errors()
    for a in SIZES:
        for call, batch in enumerate(((), (5,), (max(1, ELEMENTS // a),))):
            loc, scale = parameters((*batch, a), dtype, device)
            states = None, pair(device, call)
            for (low, high), state in zip(
                intervals((*batch, a), dtype, device), states[:: -1 if call % 2 else 1], strict=True
            ):
                kind = kernels.MEDIAN if state is None else kernels.RANDOM
                got = kernels.draw(
                    loc, scale, low, high, NONE, 1, kind=kind, entropy=True,
                    state=None if state is None else State(state),
                )  # fmt: skip
                p = probabilities(state, loc.shape, device)
                truth = exact(*wide(loc, scale, low, high), p)
                own = [finite(*x) for x in zip(plain(loc, scale, low, high, p), truth, strict=True)]
                # A row's terms cancel.
                size = 3.0 + scale.double().log().abs().sum(-1) + a
                for name, sums, g, o, t in zip(
                    ("value", "score", "entropy"), (None, size, size), got, own, truth, strict=False
                ):
                    errors.add(name if sums is None else f"{name} {a}", g, o, t, sums)
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_draws(dtype, device):
    # Of all sizes together: the largest of few errors says little of either side.
    errors = Errors()
    for a, sample in [*((a, NONE) for a in SIZES), (3, torch.Size((3,)))]:
        rows = max(1, ELEMENTS // a)
        loc, scale = parameters((rows, a), dtype, device)
        weights = [
            torch.randn(shape, device=device).to(dtype)
            for shape in ((*sample, rows, a), (*sample, rows), (rows,))
        ]
        for (low, high), used in zip(
            intervals((rows, a), dtype, device), (pair(device), None), strict=True
        ):
            p = probabilities(used, sample + loc.shape, device)
            bounds = wide(low, high)
            got = kernels.draw_backward(
                *weights, loc, scale, low, high, used, sample, 1,
                kind=kernels.MEDIAN if used is None else kernels.RANDOM,
            )  # fmt: skip
            truth = gradients(
                lambda m, s, bounds=bounds, p=p: exact(m, s, *bounds, p),
                wide(loc, scale), wide(*weights),
            )  # fmt: skip
            own = gradients(
                lambda m, s, low=low, high=high, p=p: plain(m, s, low, high, p),
                (loc, scale), weights,
            )  # fmt: skip
            for name, g, o, t in zip(("loc", "scale"), got, own, truth, strict=True):
                errors.add(name, g, finite(o, t), t)
                if dtype is torch.float32:
                    # PyTorch's own gradients are off by 1e-2 and more.
                    torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=1e-4)
    errors.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_given_values_and_their_gradients(dtype, device):
    # Of all sizes together: the largest of few errors says little of either side.
    errors = Errors()
    for a, sample in [*((a, NONE) for a in SIZES), (3, torch.Size((2,)))]:
        rows = max(1, ELEMENTS // a)
        for low, high in intervals((rows, a), dtype, device):
            loc, scale = parameters((rows, a), dtype, device)
            place = torch.rand((*sample, rows, a), device=device)
            value = (low + (high - low) * (place * 0.98 + 0.01)).to(dtype)
            bounds = wide(low, high)
            weights = [
                torch.randn(shape, device=device).to(dtype) for shape in ((*sample, rows), (rows,))
            ]

            def truly(m, s, v, bounds=bounds):
                return exact(m, s, *bounds, None, v)

            def plainly(m, s, v, low=low, high=high):
                return plain(m, s, low, high, None, v)

            tensors = loc, scale, value
            got = kernels.score(loc, scale, low, high, value, 1, entropy=True)
            truth = truly(*wide(*tensors))
            size = 3.0 + scale.double().log().abs().sum(-1) + a
            for name, g, o, t in zip(
                ("score", "entropy"), got, plainly(*tensors), truth, strict=True
            ):
                errors.add(f"{name} {a}", g, finite(o, t), t, size)
            got = kernels.score_backward(
                *weights, loc, scale, low, high, value, got[0], 1, to_value=True
            )
            own = gradients(plainly, tensors, weights)
            truth = gradients(truly, wide(*tensors), wide(*weights))
            for name, g, o, t in zip(("loc", "scale", "value"), got, own, truth, strict=True):
                errors.add(name, g, finite(o, t), t)
                if dtype is torch.float32:
                    # PyTorch's own gradients are off by 1e-2 and more.
                    torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=1e-4)
    errors.check()


# Rows that share a tile of 2048 with others or none, and rows of several tiles.
@pytest.mark.parametrize("rows, a", [(7, 600), (3, 683), (2, 1000), (3, 1023), (2, 1500)])
def test_tiles_of_all_that_can_be_asked(rows, a, device):
    loc, scale = parameters((rows, a), torch.float32, device)
    _, (low, high) = intervals((rows, a), torch.float32, device)
    clamp = Clamp(None, low[0] + 0.25, high[0] - 0.25)
    state = pair(device)
    p = probabilities(state, loc.shape, device)
    value, *sums, _ = kernels.draw(
        loc, scale, low, high, NONE, 1, state=State(state), entropy=True, clamp=clamp
    )
    truth, *right = exact(*wide(loc, scale, low, high), p)
    right_value = normal.clamped(truth, *wide(*clamp))
    torch.testing.assert_close(value.double(), right_value, rtol=0, atol=4e-6)
    given = kernels.score(loc, scale, low, high, truth.float(), 1, entropy=True)
    for found in (sums, given):
        for one, other in zip(found, right, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * a)


# Bounds in both tails, to either side alone, close together, and none at all, in units of a scale
# of 1 from a mean of 0: where the plain formulas give NaN, inf, or nothing but rounding.
CORNERS = {
    "far tails": (30.0, 35.0),
    "very far tails": (1000.0, 1e30),
    "the other tail": (-2000.0, -1000.0),
    "a tail that begins at 2": (2.0, 1e30),
    "close together": (0.5, 0.5 + 2.0**-10),
    "close together at the mean": (-(2.0**-10), 2.0**-10),
    "close together in a tail": (50.0, 50.0 + 2.0**-10),
    "one side alone": (0.0, 1e30),
    "no bounds": (-1e30, 1e30),
    "wide": (-30.0, 20.0),
    "a seam": (-0.375, 0.375),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_corners(corner, device):
    shape = (37, 8)
    low, high = CORNERS[corner]
    # A mean and a scale that leave the bounds where they are, in fp32 exactly.
    loc, scale = torch.zeros(shape, device=device), torch.ones(shape, device=device)
    value, score, entropy, used = kernels.draw(
        loc, scale, low, high, NONE, 1, state=State(pair(device)), entropy=True, keep=True
    )
    p = probabilities(pair(device), shape, device)
    leaves = [t.double().requires_grad_() for t in (loc, scale)]
    truth = exact(*leaves, low, high, p)
    near = low if abs(low) < abs(high) else high
    # From the nearer bound: all that tells one value of a tail from another, 8 units of fp32.
    unit = 2.0**-23
    if abs(near) > 2 and abs(near) < 1e29:
        scale_of_u = 1.0 / abs(near)
        error = (value.double() - truth[0]).abs().max()
        assert error <= 8 * unit * scale_of_u + unit * abs(near)
    else:
        error = (value.double() - truth[0]).abs()
        assert (error <= 24 * unit * min(high - low, 8.0) + unit * truth[0].abs()).all()
    for got, expected in ((score, truth[1]), (entropy, truth[2])):
        assert ((got.double() - expected).abs() <= 24 * unit * (8 + expected.abs())).all()
    weights = torch.randn(shape, device=device), torch.randn(37, device=device)
    for i in range(2):
        both = [w if i == k else None for k, w in enumerate(weights)]
        got = kernels.draw_backward(*both, None, loc, scale, low, high, used, NONE, 1)
        expected = torch.autograd.grad((truth[i] * weights[i]).sum(), leaves, retain_graph=True)
        for g, t in zip(got, expected, strict=True):
            assert g.isfinite().all()
            # A gradient by loc of 1e-6 is as good as none beside that of a bound, which is 1.
            torch.testing.assert_close(g.double(), t, rtol=2e-4, atol=2e-5)
    given = kernels.score(loc, scale, low, high, value, 1)[0]
    leaves.append(value.double().requires_grad_())
    expected = ops.log_prob(*leaves[:2], low, high, leaves[2], 1)
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=2e-4)
    weight = torch.randn(37, device=device)
    got = kernels.score_backward(
        weight, None, loc, scale, low, high, value, given, 1, to_value=True
    )
    expected = torch.autograd.grad((expected * weight).sum(), leaves)
    for g, t in zip(got, expected, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("corner", CORNERS)
def test_points_and_gradients_of_the_entropy(corner, device):
    low, high = CORNERS[corner]
    loc = torch.zeros(3, 4, device=device)
    scale = torch.ones(3, 4, device=device)
    std = reference.standardize(loc, scale, low, high)
    half = torch.full((), 0.5, dtype=torch.float64)
    for kind, truth in (
        (kernels.MEDIAN, reference.quantile(std, half)),
        (kernels.MEAN, reference.mean(std)),
        (kernels.MODE, reference.mode(std)),
    ):
        value, score, _, _ = kernels.draw(loc, scale, low, high, NONE, 1, kind=kind)
        spread = min(high - low, 8.0)
        error = (value.double() - truth).abs()
        assert (error <= 2.0**-20 * spread + 2.0**-23 * truth.abs()).all()
        expected = reference.log_prob(*wide(loc, scale), low, high, truth, 1)
        torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=2e-5)
    leaves = [t.double().requires_grad_() for t in (loc, scale)]
    weight = torch.tensor([1.0, -2.0, 0.5], device=device)
    truth = torch.autograd.grad((ops.entropy(*leaves, low, high, 1) * weight).sum(), leaves)
    got = kernels.score_backward(None, weight, loc, scale, low, high, None, None, 1)
    for g, t in zip(got[:2], truth, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=2e-4, atol=2e-5)


def test_draws_stay_in_the_bounds_and_come_from_the_distribution(device):
    loc = torch.tensor([0.0, 3.0, -9.0, 0.2], device=device).expand(4096, 4)
    scale = torch.tensor([0.5, 1.0, 0.5, 40.0], device=device).expand(4096, 4)
    value, _, _, _ = kernels.draw(loc, scale, -1.0, 0.5, NONE, 1, state=State(pair(device)))
    assert value.min() >= -1.0 and value.max() <= 0.5
    std = reference.standardize(loc, scale, -1.0, 0.5)
    unit = reference.cdf(std, value).sort(0).values
    steps = (torch.arange(4096, device=device)[:, None] + 0.5) / 4096
    # Kolmogorov and Smirnov's distance, whose 99.9% point is 1.95 / sqrt(n).
    assert (unit - steps).abs().max() < 1.95 / 64


def test_values_outside_of_the_bounds(device):
    loc, scale = parameters((3, 4), torch.float32, device)
    value = torch.zeros(3, 4, device=device)
    value[1, 2] = 0.9
    leaves = [t.clone().requires_grad_() for t in (loc, scale, value)]
    dist = TruncatedNormal(*leaves[:2], low=-1.0, high=0.75)
    score = dist.log_prob(leaves[2])
    assert score[1] == -math.inf and score[[0, 2]].isfinite().all()
    for grad in torch.autograd.grad(score[1], leaves, retain_graph=True):
        assert (grad == 0).all()
    for grad in torch.autograd.grad(score.sum(), leaves):
        assert (grad[1] == 0).all() and (grad[0] != 0).all()


def test_a_clamp_stops_the_gradient_of_the_value_alone(device):
    loc, scale = parameters((50, 3), torch.float32, device)
    low = torch.tensor([-0.5, -0.25, 0.0], device=device)
    state = State(pair(device))
    free = kernels.draw(loc, scale, -1.0, 0.75, NONE, 1, state=state, keep=True)
    weights = torch.ones(50, 3, device=device), torch.ones(50, device=device)
    for clamp in (Clamp((-0.25, 0.25)), Clamp(None, low, low + 0.5)):
        got = kernels.draw(loc, scale, -1.0, 0.75, NONE, 1, state=state, clamp=clamp)
        kept = normal.clamped(free[0], *clamp) == free[0]
        assert torch.equal(got[0], normal.clamped(free[0], *clamp)) and torch.equal(got[1], free[1])
        arguments = loc, scale, -1.0, 0.75, free[3], NONE, 1
        got = kernels.draw_backward(*weights, None, *arguments, clamp=clamp)
        expected = kernels.draw_backward(weights[0] * kept, weights[1], None, *arguments)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=0)


def test_a_detached_value_is_scored_as_a_given_one(device):
    loc, scale = parameters((6, 5), torch.float32, device)
    leaves = loc.requires_grad_(), scale.requires_grad_()
    dist = TruncatedNormal(*leaves)
    value, score = dist.sample_and_log_prob(generator=CounterStream(SEED, device=device))
    assert not value.requires_grad
    got = torch.autograd.grad(score.sum(), leaves)
    wider = [t.detach().double().requires_grad_() for t in leaves]
    p = probabilities(pair(device), loc.shape, device)
    x = exact(*wider, -1.0, 1.0, p)[0].detach()
    truth = torch.autograd.grad(ops.log_prob(*wider, -1.0, 1.0, x, 1).sum(), wider)
    for g, t in zip(got, truth, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("a", [1, 3, 8, 1500, 4096])
def test_strided_and_expanded_parameters_are_read_where_they_lie(a, device):
    rows = 2 if a > 1000 else 9
    loc, scale = (torch.rand(rows, 2 * a, device=device) + 0.1).chunk(2, -1)
    turned = torch.rand(a, rows, device=device).T
    bounds = intervals((rows, a), torch.float32, device)[1]
    for mu, sigma, sample in ((loc, scale, NONE), (turned, scale, torch.Size((2,)))):
        given = (bounds[0] + 0.5).expand(*sample, rows, a)
        made = []
        for tensors in ((mu, sigma, *bounds), [t.contiguous() for t in (mu, sigma, *bounds)]):
            value, score, _, _ = kernels.draw(*tensors, sample, 1, state=State(pair(device)))
            made.append([value, score, kernels.score(*tensors, given, 1)[0]])
        assert all(torch.equal(*both) for both in zip(*made, strict=True))


def test_event_dimensions_are_summed_together(device):
    loc, scale = parameters((4, 2, 3), torch.float32, device)
    sample = torch.Size((2,))
    p = probabilities(pair(device), sample + loc.shape, device)
    std = reference.standardize(*wide(loc, scale), -1.0, 1.0)
    truth = reference.quantile(std, p)
    for ndims in range(4):
        value, score, entropy, _ = kernels.draw(
            loc, scale, -1.0, 1.0, sample, ndims, state=State(pair(device)), entropy=True
        )
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
        expected = reference.log_prob(*wide(loc, scale), -1.0, 1.0, truth, ndims)
        torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-5)
        expected = reference.entropy(std, ndims)
        torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)], ids=str)
def test_empty(shape, device):
    loc = torch.empty(shape, device=device, requires_grad=True)
    dist = TruncatedNormal(loc, torch.ones(shape, device=device))
    value, score = dist.rsample_and_log_prob()
    assert value.shape == shape and torch.equal(score, torch.zeros(shape[:-1], device=device))
    (score.sum() + value.sum() + dist.log_prob(value).sum() + dist.entropy().sum()).backward()
    assert loc.grad.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_draws_the_same_from_a_stream(dtype, device):
    loc, scale = parameters((50, 7), dtype, device)
    made = []
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            stream = CounterStream(SEED, device=device)
            dist = TruncatedNormal(loc, scale, low=-math.inf, high=1.0)
            made.append([*dist.rsample_and_log_prob(generator=stream), stream.state])
    tolerance = 8 * torch.finfo(dtype).eps
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_bounds_that_are_learned_are_left_to_the_reference(device):
    loc, scale = parameters((4, 3), torch.float32, device)
    high = torch.ones(3, device=device, requires_grad=True)
    TruncatedNormal(loc, scale, low=-1.0, high=high).rsample().sum().backward()
    assert high.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["random", "mode", "median", "mean", "deterministic"])
def test_a_safe_module_projects_in_the_same_launch(kind, device, monkeypatch):
    launches = []
    original = kernels.draw
    monkeypatch.setattr(kernels, "draw", lambda *a, **k: launches.append(1) or original(*a, **k))
    module = SafeProbabilisticModule(
        in_keys=["loc", "scale"], out_keys=["action"],
        spec=Bounded(-0.25, 0.5, shape=(3,), device=device), safe=True,
        distribution_class=TruncatedNormal, return_log_prob=True,
    )  # fmt: skip
    loc, scale = parameters((60, 3), torch.float32, device)
    made = []
    for back in ("triton", "reference"):
        torch.manual_seed(5)
        with backend.using_backend(back), set_interaction_type(kind):
            made.append(module(TensorDict(loc=loc, scale=scale, batch_size=[60])))
    assert made[0]["action"].min() == -0.25 and made[0]["action"].max() == 0.5
    assert len(launches) == 1
    if kind != "random":
        for key in ("action", "sample_log_prob"):
            torch.testing.assert_close(made[0][key], made[1][key], rtol=1e-5, atol=1e-5)


def test_a_mean_has_a_gradient(device):
    loc, scale = parameters((4, 3), torch.float32, device)
    made = []
    for back in ("triton", "reference"):
        leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
        with backend.using_backend(back):
            made.append(torch.autograd.grad(TruncatedNormal(*leaves).mean.sum(), leaves))
            mode = TruncatedNormal(*leaves).mode
            made[-1] += torch.autograd.grad(mode.sum(), leaves, allow_unused=True)
    for got, expected in zip(*made, strict=True):
        expected = torch.zeros_like(got) if expected is None else expected
        torch.testing.assert_close(got, expected)


def test_operators(device):
    tensors = [t.expand(4, 3) for t in intervals((4, 3), torch.float32, device)[1]]
    for sample, bounds, kind in (([], (None, None, [-1.0, 0.75]), 0), ([2], (*tensors, None), 3)):
        loc, scale = parameters((4, 3), torch.float32, device)
        leaves = loc.requires_grad_(), scale.requires_grad_()
        value = (torch.rand((*sample, 4, 3), device=device) * 0.1).requires_grad_()
        for back in ("triton", "reference"):
            with backend.using_backend(back):
                torch.library.opcheck(
                    torch.ops.fastprob.truncated_normal_draw.default,
                    (*leaves, *bounds, pair(device), sample, 1, kind, True, True, [-0.9, 0.9], None,
                     None),
                )  # fmt: skip
                torch.library.opcheck(
                    torch.ops.fastprob.truncated_normal_score.default,
                    (*leaves, *bounds, value, 1, True),
                )


def test_operators_of_both_backends_agree(device):
    loc, scale = parameters((4, 3), torch.float32, device)
    given = torch.rand(2, 4, 3, device=device) - 0.5
    low, high = (t.expand(4, 3) for t in intervals((4, 3), torch.float32, device)[1])
    corner = torch.full((3,), -0.25, device=device)
    cases = (
        ((None, None, [-1.0, 0.75]), kernels.RANDOM, True, Clamp()),
        ((low, high, None), kernels.RANDOM, False, Clamp()),
        ((low, high, None), kernels.MEDIAN, True, Clamp([-0.25, 0.25])),
        ((None, None, [-1.0, 0.75]), kernels.MODE, True, Clamp(None, corner, corner + 0.5)),
    )
    made = {}
    for back in ("triton", "reference"):
        with backend.using_backend(back):
            made[back] = []
            for bounds, kind, pathwise, clamp in cases:
                leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
                out = torch.ops.fastprob.truncated_normal_draw(
                    *leaves, *bounds, pair(device), [3], 1, kind, True, pathwise, *clamp
                )
                total = sum(o.sum() for o in out[pathwise is False : 2])
                made[back] += [*out, *torch.autograd.grad(total, leaves)]
                value = given.clone().requires_grad_()
                out = torch.ops.fastprob.truncated_normal_score(*leaves, *bounds, value, 1, True)
                total = out[0][out[0].isfinite()].sum() + out[1].sum()
                made[back] += [*out, *torch.autograd.grad(total, (*leaves, value))]
    for got, expected in zip(made["triton"], made["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=5e-5, atol=5e-5)


def test_a_mean_is_refused_a_gradient_by_its_operator(device):
    leaf = torch.zeros(2, 3, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="mean without a gradient"):
        torch.ops.fastprob.truncated_normal_draw(
            leaf, leaf + 1, None, None, [-1.0, 1.0], None, [], 1, kernels.MEAN, True, True, None,
            None, None,
        )  # fmt: skip


def test_vmap(device):
    loc, scale = parameters((5, 4, 6), torch.float32, device)
    value = torch.rand(2, 5, 4, 6, device=device) - 0.5
    high = torch.rand(5, 6, device=device) + 0.5

    def score(m, s, v, h):
        return TruncatedNormal(m, s, high=h).log_prob(v)

    got = torch.vmap(score, in_dims=(0, 0, 1, 0))(loc, scale, value, high)
    expected = TruncatedNormal(loc, scale, high=high[:, None]).log_prob(value)
    torch.testing.assert_close(got, expected.transpose(0, 1))
    entropy = torch.vmap(lambda m, s: TruncatedNormal(m, s).entropy())(loc, scale)
    torch.testing.assert_close(entropy, TruncatedNormal(loc, scale).entropy())
    draw = torch.vmap(lambda m, s: TruncatedNormal(m, s).rsample_and_log_prob(), randomness="same")
    value, score = draw(torch.zeros_like(loc), torch.ones_like(scale))
    assert torch.equal(value[0], value[3]) and torch.equal(score[0], score[3])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda m, s: TruncatedNormal(m, s).rsample())(loc, scale)
    median = torch.vmap(lambda m, s: TruncatedNormal(m, s).median)(loc, scale)
    torch.testing.assert_close(median, TruncatedNormal(loc, scale).median)


def test_compiled_equals_eager(device):
    loc, scale = parameters((5, 6), torch.float32, device)

    def call(mu, sigma):
        dist = TruncatedNormal(mu, sigma, low=-2.0, high=3.0)
        value, score = dist.rsample_and_log_prob()
        return value, score, dist.log_prob(value.detach()), dist.entropy(), dist.median

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(2)
        leaves = loc.clone().requires_grad_(), scale.clone().requires_grad_()
        out = function(*leaves)
        results += [[*out, *torch.autograd.grad(sum(o.sum() for o in out), leaves)]]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-5)


def test_score_and_entropy_are_one_launch(device, monkeypatch):
    launches = []
    original = kernels.score
    monkeypatch.setattr(kernels, "score", lambda *a, **k: launches.append(1) or original(*a, **k))
    leaves = parameters((5, 6), torch.float32, device)
    loc, scale = (t.requires_grad_() * 1.0 for t in leaves)
    dist = TruncatedNormal(loc, scale)
    score, entropy = dist.log_prob(torch.zeros_like(loc)), dist.entropy()
    assert len(launches) == 1
    with backend.using_backend("reference"):
        again = TruncatedNormal(loc, scale)
        torch.testing.assert_close(score, again.log_prob(torch.zeros_like(loc)))
        torch.testing.assert_close(entropy, again.entropy())
    # Parameters that change in place have another entropy.
    with torch.no_grad():
        loc.add_(0.5)
    assert not torch.equal(dist.entropy(), entropy)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4), "does not broadcast"),
        (torch.zeros(2, 3, device="meta"), "given a value on"),
    ],
)
def test_a_value_that_does_not_fit(value, message, device):
    dist = TruncatedNormal(torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device))
    with pytest.raises(ValueError, match=message):
        dist.log_prob(value if value.is_meta else value.to(device))
