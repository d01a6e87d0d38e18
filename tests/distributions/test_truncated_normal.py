"""TruncatedNormal against scipy, and against integrals in mpmath far out in the tails."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
import torchrl.modules as rl
from tensordict.nn import InteractionType
from torch import distributions as D

from fastprob import distributions as F
from fastprob.reference import truncated_normal as reference
from tests.distributions._suite import Suite, close

INF = float("inf")
# loc, scale, low, high: inside, at an edge, on one side, in both far tails, narrow and wide.
CASES = [
    (0.0, 1.0, -1.0, 1.0),
    (0.3, 0.2, -1.0, 1.0),
    (3.0, 0.5, -1.0, 1.0),
    (-4.0, 0.1, -1.0, 2.0),
    (0.0, 1.0, 0.0, 1.0),
    (29.9, 1.0, -3.0, 0.0),
    (30.1, 1.0, -3.0, 0.0),
    (50.0, 1.0, -1.0, 1.0),
    (-1000.0, 0.5, -1.0, 1.0),
    (1e5, 1.0, -1.0, 1.0),
    (0.0, 1e3, -1.0, 1.0),
    (200.0, 1e3, -1.0, 1.0),
    (2.0, 1.0, -30.0, 30.0),
]


class Truth:
    """The distribution by adaptive quadrature in 30 digits, from the point of highest density."""

    def __init__(self, loc, scale, low, high):
        self.loc, self.scale, self.low, self.high = map(mpmath.mpf, (loc, scale, low, high))
        self.mode = min(max(self.loc, self.low), self.high)
        reach = self.scale / max(1, abs(self.mode - self.loc) / self.scale)
        marks = [self.mode + s * k * reach for k in (1, 3, 10, 40) for s in (-1, 1)]
        inner = {m for m in (*marks, self.mode) if self.low < m < self.high}
        self.marks = sorted({self.low, self.high, *inner})
        self.mass = self.integral(lambda x: 1)

    def cost(self, x):
        u = (x - self.mode) / self.scale
        return u * (u + 2 * (self.mode - self.loc) / self.scale) / 2

    def integral(self, f, end=None):
        marks = self.marks if end is None else [m for m in self.marks if m < end] + [end]
        if len(marks) < 2:
            return mpmath.mpf(0)
        return mpmath.quad(lambda x: f(x) * mpmath.exp(-self.cost(x)), marks)

    def expect(self, f):
        return self.integral(f) / self.mass


def single(*case):
    return F.TruncatedNormal(
        *(torch.tensor([v], dtype=torch.float64) for v in case[:2]), low=case[2], high=case[3]
    )


class TestTruncatedNormal(Suite):
    # The draw is rounded once; its score changes by (z / scale) of that.
    joint_tolerance = 1e-11
    bounds: dict = {"low": -1.0, "high": 1.5}  # noqa: RUF012

    def params(self, batch, dtype=torch.float64):
        shape = (*batch, *self.event)
        return {
            "loc": torch.randn(shape, dtype=dtype) * 0.5,
            "scale": torch.rand(shape, dtype=dtype) * 0.4 + 0.3,
        }

    def options(self, params):
        dtype = params["loc"].dtype
        return {
            k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in self.bounds.items()
        }

    def build(self, params):
        return F.TruncatedNormal(**params, **self.options(params))

    def upstream(self, params):
        return rl.TruncatedNormal(**params, **self.options(params))

    @property
    def limits(self):
        return tuple(torch.as_tensor(self.bounds[k]).numpy() for k in ("low", "high"))

    def frozen(self, params):
        loc, scale = params["loc"], params["scale"]
        low, high = self.limits
        return scipy.stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc, scale)

    def log_prob(self, params, value):
        return self.frozen(params).logpdf(value).sum(-1)

    def entropy(self, params):
        return self.frozen(params).entropy().sum(-1)

    def points(self, params):
        dist = self.frozen(params)
        mode = np.clip(params["loc"], *self.limits)
        return {
            "mode": mode,
            "median": dist.median(),
            "mean": dist.mean(),
            "deterministic_sample": dist.mean(),
            "variance": dist.var(),
        }

    @pytest.mark.parametrize("sample", [(), (3,)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_draws_are_upstreams(self, dtype, sample):
        params = self.params((50,), dtype)
        torch.manual_seed(5)
        mine = self.build(params).rsample(sample)
        torch.manual_seed(5)
        theirs = self.upstream(params).rsample(sample)
        # Upstream inverts the Normal's cdf in the dtype, and keeps it 1e-6 away from 0 and 1: an
        # error of (4 eps + 1e-6) / density, which is 0.006 at the 0.2% quantile.
        z = (mine - params["loc"]) / params["scale"]
        near = z.abs() < 2.88
        assert near.double().mean() > 0.9
        atol = (4 * torch.finfo(dtype).eps + 1e-6) / 0.006
        torch.testing.assert_close(mine[near], theirs[near], rtol=0, atol=atol)

    def test_cdf_inverts_icdf(self):
        params = self.params((3,))
        dist = self.build(params)
        p = torch.rand(5, 3, 4, dtype=torch.float64)
        close(dist.cdf(dist.icdf(p)), p, 1e-12)
        close(dist.icdf(p), self.frozen(self.arrays(params)).ppf(p.numpy()), 1e-9)

    def test_kl_divergence(self):
        p, q = self.params((3,)), self.params((3,))
        found = D.kl_divergence(self.build(p), self.build(q))
        a, b = self.frozen(self.arrays(p)), self.frozen(self.arrays(q))
        low, high = (np.broadcast_to(v, (3, 4)) for v in self.limits)
        t, w = np.polynomial.legendre.leggauss(60)
        x = low + (high - low) * (t[:, None, None] + 1) / 2
        each = a.pdf(x) * (a.logpdf(x) - b.logpdf(x)) * w[:, None, None] * (high - low) / 2
        close(found, each.sum((0, -1)), 1e-9)
        for other in (self.upstream(q), self.build(q)):
            for one in (self.upstream(p), self.build(p)):
                if not isinstance(one, rl.TruncatedNormal) or isinstance(other, F.TruncatedNormal):
                    close(D.kl_divergence(one, other), found, 1e-12)


class TestTruncatedNormalTensors(TestTruncatedNormal):
    bounds = {  # noqa: RUF012
        "low": torch.tensor([-1.0, -2.0, 0.2, -0.5], dtype=torch.float64),
        "high": torch.tensor([1.0, 0.5, 2.0, 3.0], dtype=torch.float64),
    }


# Tails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_formula_against_quadrature(case):
    dist = single(*case)
    with mpmath.workdps(30):
        truth = Truth(*case)
        shift = truth.expect(lambda x: x - truth.mode)
        second = truth.expect(lambda x: (x - truth.mode - shift) ** 2)
        entropy = float(mpmath.log(truth.mass) + truth.expect(truth.cost))
        assert dist.mean.item() == pytest.approx(float(truth.mode + shift), rel=1e-14, abs=1e-14)
        # 1 - variance / scale^2 is what the formula knows: a loss of eps t^2.
        assert dist.variance.item() == pytest.approx(float(second), rel=1e-6)
        assert dist.entropy().item() == pytest.approx(entropy, rel=1e-12, abs=1e-12)
        for part in (0.0, 0.1, 0.5, 0.93, 1.0):
            x = float(truth.low + (truth.high - truth.low) * mpmath.mpf(part))
            score = float(-truth.cost(mpmath.mpf(x)) - mpmath.log(truth.mass))
            given = torch.tensor([x], dtype=torch.float64)
            assert dist.log_prob(given).item() == pytest.approx(score, rel=1e-12, abs=1e-12)
        for p in (1e-6, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-6):
            x = dist.icdf(torch.tensor([p], dtype=torch.float64)).item()
            reached = truth.integral(lambda x: 1, mpmath.mpf(x)) / truth.mass
            density = mpmath.exp(-truth.cost(mpmath.mpf(x))) / truth.mass
            # The value is off by its own rounding, and by that of z times the scale: z up to 30
            # comes from ndtri, beyond from the bound.
            t = min(abs(float((truth.mode - truth.loc) / truth.scale)), 30.0)
            ulp = 2.3e-16 * (abs(x) + (1 + t) * float(truth.scale))
            allowed = 4 * float(density) * ulp + 1e-9 * min(p, 1 - p)
            assert abs(float(reached - mpmath.mpf(p))) <= allowed, p


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_mean_in_place_is_the_mean(case):
    with mpmath.workdps(30):
        truth = Truth(*case)
        exact = float(truth.mode + truth.expect(lambda x: x - truth.mode))
        cost = truth.cost(mpmath.mpf(exact)) + mpmath.log(truth.mass)
    dist = single(*case)
    inside = case[2] <= case[0] <= case[3]
    assert (reference.inner_mean(*dist._args()) is not None) == inside
    value, score = dist.take(InteractionType.MEAN, score=True)
    assert value.item() == pytest.approx(exact, rel=1e-14, abs=1e-14)
    assert score.item() == pytest.approx(float(-cost), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tensors", [False, True])
def test_means_of_many_are_those_of_the_general_formula(dtype, tensors):
    loc = (torch.rand(300, 4) * 2 - 1).to(dtype)
    scale = (torch.rand(300, 4) * 2 + 0.01).to(dtype)
    low, high = -1.0, 1.25
    if tensors:
        low, high = torch.full((4,), low, dtype=dtype), torch.full((4,), high, dtype=dtype)
    dist = F.TruncatedNormal(loc, scale, low=low, high=high)
    assert reference.inner_mean(*dist._args()) is not None
    general = reference.mean(reference.standardize(*dist._args()))
    value, score = dist.take(InteractionType.MEAN, score=True)
    assert value.dtype == score.dtype == dtype
    torch.testing.assert_close(value, general.to(dtype), rtol=1e-15, atol=1e-15)
    exact = reference.log_prob(*(t.double() if isinstance(t, torch.Tensor) else t
                                 for t in dist._args()), general, 1)  # fmt: skip
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(score.double(), exact, rtol=eps, atol=1e-14)
    # One element outside of its bounds, and the others keep their means.
    loc[7, 2] = 1.5
    dist = F.TruncatedNormal(loc, scale, low=low, high=high)
    assert reference.inner_mean(*dist._args()) is None
    again = dist.mean
    assert again[7, 2] != value[7, 2]
    again[7, 2] = value[7, 2]
    torch.testing.assert_close(again, value, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("case", [c for c in CASES if c[1] < 100], ids=str)
def test_single_precision_is_right_in_the_tails(case):
    full = single(*case)
    loc, scale = (torch.tensor([v]) for v in case[:2])
    dist = F.TruncatedNormal(loc, scale, low=case[2], high=case[3])
    full = F.TruncatedNormal(loc.double(), scale.double(), low=case[2], high=case[3])
    torch.manual_seed(5)
    value, score = dist.sample_and_log_prob((200,))
    torch.manual_seed(5)
    p = torch.empty(200, 1).uniform_(1e-6, 1 - 1e-6).double()
    torch.testing.assert_close(value.double(), full.icdf(p), rtol=1e-7, atol=0)
    torch.testing.assert_close(score.double(), full.log_prob(full.icdf(p)), rtol=2e-7, atol=2e-7)
    assert (value >= case[2]).all() and (value <= case[3]).all()
    for name in ("mean", "median", "mode"):
        torch.testing.assert_close(
            getattr(dist, name).double(), getattr(full, name), rtol=1e-7, atol=1e-12
        )


def test_gradients_everywhere():
    columns = torch.tensor(
        [c for c in CASES if c[1] < 100 and abs(c[0]) < 100], dtype=torch.float64
    ).unbind(-1)
    loc, scale, low, high = (c.clone().requires_grad_() for c in columns)
    p = torch.rand(2, len(loc), dtype=torch.float64) * 0.9 + 0.05

    def draw(loc, scale, low, high):
        return F.TruncatedNormal(loc, scale, low=low, high=high).icdf(p)

    value = draw(loc, scale, low, high).detach().requires_grad_()

    def score(loc, scale, low, high, value):
        return F.TruncatedNormal(loc, scale, low=low, high=high).log_prob(value)

    args = (loc, scale, low, high)
    assert torch.autograd.gradcheck(draw, args)
    assert torch.autograd.gradgradcheck(draw, args, fast_mode=True)
    assert torch.autograd.gradcheck(score, (*args, value), eps=1e-7, atol=1e-4)
    for what in ("mean", "variance", "median"):
        assert torch.autograd.gradcheck(
            lambda *a, what=what: getattr(F.TruncatedNormal(a[0], a[1], low=a[2], high=a[3]), what),
            args,
        )
    assert torch.autograd.gradcheck(
        lambda *a: F.TruncatedNormal(a[0], a[1], low=a[2], high=a[3]).entropy(), args
    )
    fixed = [t.detach() for t in args[2:]]
    assert torch.autograd.gradcheck(
        lambda loc, scale: F.TruncatedNormal(loc, scale, low=fixed[0], high=fixed[1]).entropy(),
        args[:2],
    )


@pytest.mark.parametrize(("low", "high"), [(-INF, INF), (-INF, 0.5), (0.5, INF)])
def test_infinite_bounds(low, high):
    loc = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    dist = F.TruncatedNormal(loc, scale, low=low, high=high)
    value, score = dist.rsample_and_log_prob((5,))
    given = [t.detach().numpy() for t in (loc, scale)]
    frozen = scipy.stats.truncnorm(
        (low - given[0]) / given[1], (high - given[0]) / given[1], *given
    )
    close(score, frozen.logpdf(value.detach().numpy()).sum(-1), 1e-10)
    close(dist.mean, frozen.mean(), 1e-10)
    total = score.sum() + value.sum() + dist.entropy() + dist.mean.sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, (loc, scale)))


def test_outside_of_the_bounds():
    loc = torch.zeros(2, 3, requires_grad=True)
    dist = F.TruncatedNormal(loc, torch.ones(2, 3))
    value = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.5, 1.001]])
    score = dist.log_prob(value)
    assert score[0].isfinite() and score[1] == -INF
    score.sum().backward()
    assert torch.equal(loc.grad[1], torch.zeros(3)) and loc.grad[0].abs().sum() > 0
    assert dist.cdf(torch.tensor([[-2.0, 0.0, 2.0]] * 2)).tolist()[0] == [0.0, 0.5, 1.0]


def test_kl_divergence_of_other_bounds():
    p = single(0.3, 0.5, -1.0, 1.0)
    wide, apart = single(0.1, 0.8, -2.0, 1.0), single(0.1, 0.8, -0.5, 2.0)
    with mpmath.workdps(30):
        a, b = Truth(0.3, 0.5, -1, 1), Truth(0.1, 0.8, -2, 1)
        ratio = mpmath.log(b.mass / a.mass)
        expected = float(ratio + a.expect(lambda x: b.cost(x) - a.cost(x)))
    assert D.kl_divergence(p, wide).item() == pytest.approx(expected, rel=1e-12)
    assert D.kl_divergence(p, apart).item() == INF
    with pytest.raises(NotImplementedError, match="no KL divergence is known"):
        D.kl_divergence(p, D.Independent(D.Normal(torch.zeros(1), torch.ones(1)), 1))


# Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds",
    [{"low": 1.0, "high": 1.0}, {"low": 2, "high": -2}, {"low": torch.tensor([0.0, 3.0])}],
    ids=str,
)
def test_bounds_in_the_wrong_order(bounds):
    for _ in range(2):  # the second time, the bounds are known
        with pytest.raises(ValueError, match="TruncatedNormal expects high to be greater than low"):
            F.TruncatedNormal(torch.zeros(2), torch.ones(2), **bounds)


@pytest.mark.parametrize(
    ("loc", "scale", "message"),
    [
        ([0.0, math.nan], [1.0, 1.0], r"loc to be real.*index \(1,\)"),
        ([0.0, 0.0], [1.0, 0.0], r"scale to be greater than 0.*index \(1,\)"),
        ([0.0, 0.0], [1.0, 1.0, 1.0], "broadcast"),
    ],
)
def test_bad_parameters(loc, scale, message):
    with pytest.raises(ValueError, match=f"TruncatedNormal.*{message}"):
        F.TruncatedNormal(torch.tensor(loc), torch.tensor(scale), validate_args=True)


def test_tanh_loc_update_and_bounds():
    loc, scale = torch.randn(3, 2) * 10, torch.ones(3, 2)
    options = {"tanh_loc": True, "upscale": 2.0, "low": -1.0, "high": torch.tensor([3.0, 2.0])}
    mine, theirs = (
        F.TruncatedNormal(loc, scale, **options),
        rl.TruncatedNormal(loc, scale, **options),
    )
    torch.testing.assert_close(mine.loc, theirs.loc)
    torch.testing.assert_close(mine.low, theirs.low)
    torch.testing.assert_close(mine.high, theirs.high)
    mine.update(loc / 3, scale * 2)
    theirs.update(loc / 3, scale * 2)
    torch.testing.assert_close(mine.loc, theirs.loc)
    torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-4, atol=1e-4)
    assert mine.support.check(mine.sample()).all()


# the operator of compiled graphs without gradients ------------------------------------------


QUANTILE = torch.ops.fastprob.truncated_normal_quantile.default


def bounds_of_kind(kind):
    if kind == "numbers":
        return -1.0, 1.0
    return torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([1.0, 0.5, 3.0])


@pytest.fixture
def graphs():
    """A backend of torch.compile that keeps the graphs it gets."""
    kept = []

    def backend(graph, inputs):
        kept.append(graph)
        return graph

    torch._dynamo.reset()
    yield kept, backend
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["numbers", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_graph_without_gradients_holds_one_operator(graphs, kind, dtype):
    kept, backend = graphs
    low, high = bounds_of_kind(kind)
    draw = torch.Generator().manual_seed(3)
    # A mean outside of its bounds takes the long formula.
    for spread in (0.2, 4.0):
        loc = torch.randn(7, 3, generator=draw).mul_(spread).to(dtype)
        scale = torch.rand(7, 3, generator=draw).add_(0.2).to(dtype)

        def call(loc, scale):
            return F.TruncatedNormal(loc, scale, low=low, high=high).rsample_and_log_prob((2,))

        torch.manual_seed(1)
        expected = call(loc, scale)
        compiled = torch.compile(call, backend=backend, fullgraph=True)
        torch.manual_seed(1)
        found = compiled(loc, scale)
        assert all(map(torch.equal, found, expected))
        assert [t.shape for t in found] == [(2, 7, 3), (2, 7)]
    targets = [node.target for node in kept[0].graph.nodes]
    assert targets.count(torch.ops.fastprob.truncated_normal_quantile) == 1 or QUANTILE in targets


def test_graph_with_gradients_holds_the_formula(graphs):
    kept, backend = graphs
    loc, scale = torch.zeros(4, 3, requires_grad=True), torch.ones(4, 3)

    def call(loc, scale):
        return F.TruncatedNormal(loc, scale).rsample_and_log_prob()

    torch.compile(call, backend=backend, fullgraph=True)(loc, scale)
    names = {str(node.target) for node in kept[0].graph.nodes}
    assert not any("truncated_normal_quantile" in name for name in names)


@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_operator_passes_opcheck_and_is_batched_by_vmap(kind):
    low, high = bounds_of_kind(kind)
    given = (None, None, [low, high]) if kind == "numbers" else (low, high, None)
    draw = torch.Generator().manual_seed(5)
    loc = torch.randn(4, 5, 3, generator=draw)
    scale = torch.rand(5, 3, generator=draw) + 0.2
    p = torch.rand(2, 5, 4, 3, generator=draw)
    torch.library.opcheck(QUANTILE, (loc[0], scale, *given, p[:, :, 0], 1))

    def one(loc, p):
        return QUANTILE(loc, scale, *given, p, 1)

    value, score = torch.vmap(one, in_dims=(0, 2))(loc, p)
    for i in range(4):
        expected = one(loc[i], p[:, :, i])
        torch.testing.assert_close(value[i], expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(score[i], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.01, 0.3, 1.0, 3.0, 10.0, 100.0])
def test_the_mean_of_a_nearly_flat_density(t):
    # At the widest interval that it is used for, w (t + w) = 0.1.
    w = (-t + (t * t + 0.4) ** 0.5) / 2
    with mpmath.workdps(30):
        weighted = mpmath.quad(lambda u: u * mpmath.exp(-u * (t + u / 2)), [0, w])
        expected = weighted / mpmath.quad(lambda u: mpmath.exp(-u * (t + u / 2)), [0, w])
    found = reference._narrow_mean(*torch.tensor([t, w], dtype=torch.float64))
    assert found.item() == pytest.approx(float(expected), rel=1e-13)
