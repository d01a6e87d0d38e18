"""TanhNormal against scipy, mpmath and numerical optima."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
import torchrl.modules as rl
from torch import distributions as D
from torch.autograd import forward_ad

from fastprob import distributions as F
from fastprob.reference import tanh_normal as reference
from tests.distributions._suite import Suite

LOW = torch.tensor([-1.0, -2.0, 0.5, 0.0])
HIGH = torch.tensor([1.0, 0.5, 3.0, 10.0])
SCALES = (1e-3, 0.1, 0.5, 0.7, 0.5**0.5, 0.7072, 0.8, 1.0, 2.0, 5.0, 30.0)
LOCS = (0.0, 1e-8, -1e-3, 0.1, -0.5, 1.0, -3.0, 10.0, -30.0)
POINTS = list(itertools.product(LOCS, SCALES))


def log_density(x, loc, scale):
    """That of tanh(x), as a function of x, to mpmath's precision."""
    z = (x - loc) / scale
    return (
        -z * z / 2
        - mpmath.log(scale)
        - mpmath.log(2 * mpmath.pi) / 2
        + 2 * mpmath.log(mpmath.cosh(x))
    )


def exact(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float64)


def optimum(loc: float, scale: float) -> float:
    """|tanh(x)| at the highest density, by a search in 60 digits that knows no derivative."""
    with mpmath.workdps(60):
        m, s = mpmath.mpf(abs(loc)), mpmath.mpf(scale)
        reach = m + 2 * s * s + 1
        grid = np.linspace(-float(reach), float(reach), 4001)
        heights = -0.5 * ((grid - abs(loc)) / scale) ** 2 + 2 * np.logaddexp(grid, -grid)
        best = int(heights.argmax())
        a, b = mpmath.mpf(grid[max(best - 1, 0)]), mpmath.mpf(grid[min(best + 1, 4000)])
        ratio = (mpmath.sqrt(5) - 1) / 2
        for _ in range(110):  # the bracket shrinks by 0.618^110 = 1e-23
            c, d = b - ratio * (b - a), a + ratio * (b - a)
            if log_density(c, m, s) > log_density(d, m, s):
                b = d
            else:
                a = c
        return float(mpmath.tanh((a + b) / 2))


def integral(loc: float, scale: float) -> float:
    """The mean of tanh(x), by adaptive quadrature."""
    return scipy.integrate.quad(
        lambda z: np.tanh(loc + scale * z) * scipy.stats.norm.pdf(z),
        -12,
        12,
        # Where tanh turns over, which is a step if the scale is large.
        points=sorted({0.0, *np.clip([(t - loc) / scale for t in (-3, -1, 0, 1, 3)], -12, 12)}),
        limit=500,
        epsabs=1e-10,
    )[0]


class TestTanhNormal(Suite):
    event = (4,)
    has_entropy = False
    # The score of the drawn value and that of its value after tanh differ by the rounding of the
    # value, amplified by d log p / dy: (|z| / scale + 2) / (1 - y^2) <= 52 * 746 at |x| <= 4.
    joint_tolerance = 52 * 746 * 4 * 2.3e-16
    bounds: dict = {}  # noqa: RUF012

    def params(self, batch, dtype=torch.float64):
        shape = (*batch, *self.event)
        return {
            "loc": torch.randn(shape, dtype=dtype) * 0.5,
            "scale": torch.rand(shape, dtype=dtype) * 0.4 + 0.1,
        }

    def options(self, params):
        dtype = params["loc"].dtype
        return {
            k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in self.bounds.items()
        }

    def build(self, params):
        return F.TanhNormal(**params, **self.options(params), event_dims=len(self.event))

    def upstream(self, params):
        options = self.options(params)
        for name in options.keys() & {"low", "high"}:
            # TorchRL takes the logarithm of the width of plain numbers in float32.
            options[name] = torch.as_tensor(options[name], dtype=params["loc"].dtype)
        return rl.TanhNormal(**params, **options, event_dims=len(self.event))

    @property
    def interval(self):
        low, high = (
            torch.as_tensor(self.bounds.get(k, v)).double().numpy()
            for k, v in (("low", -1.0), ("high", 1.0))
        )
        return (high - low) / 2, (high + low) / 2

    def log_prob(self, params, value):
        half, mid = self.interval
        y = (value - mid) / half
        each = scipy.stats.norm.logpdf(np.arctanh(y), **params) - np.log1p(-y * y) - np.log(half)
        return each.sum(tuple(range(-len(self.event), 0))) if self.event else each

    def points(self, params):
        half, mid = self.interval
        pairs = list(zip(params["loc"].flat, params["scale"].flat, strict=True))
        mode = np.array([np.copysign(optimum(*p), p[0]) for p in pairs]).reshape(
            params["loc"].shape
        )
        mean = np.array([integral(*p) for p in pairs]).reshape(params["loc"].shape)
        return {
            "mode": mid + half * mode,
            "mean": mid + half * mean,
            "median": mid + half * np.tanh(params["loc"]),
            "deterministic_sample": mid + half * np.tanh(params["loc"]),
        }

    def test_draws_follow_the_distribution(self):
        half, mid = (np.broadcast_to(v, (4,))[0] if self.event else v for v in self.interval)
        dist = F.TanhNormal(
            torch.tensor(0.4).double(),
            torch.tensor(0.7).double(),
            low=float(mid - half),
            high=float(mid + half),
        )
        drawn = dist.sample((4000,)).numpy()

        def cdf(y):
            return scipy.stats.norm.cdf(np.arctanh((y - mid) / half), 0.4, 0.7)

        assert scipy.stats.kstest(drawn, cdf).pvalue > 0.01
        assert scipy.stats.kstest(mid + 0.9 * (drawn - mid), cdf).pvalue < 1e-4

    def test_kl_divergence(self):
        p, q = self.params((3,)), self.params((3,))
        expected = D.kl_divergence(self.upstream(p), self.upstream(q))
        found = D.kl_divergence(self.build(p), self.build(q))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class TestTanhNormalNoEvent(TestTanhNormal):
    event = ()


class TestTanhNormalTwoDims(TestTanhNormal):
    event = (2, 2)


class TestTanhNormalScalars(TestTanhNormal):
    bounds = {"low": -2.0, "high": 0.5}  # noqa: RUF012


class TestTanhNormalTensors(TestTanhNormal):
    bounds = {"low": LOW, "high": HIGH}  # noqa: RUF012


class TestTanhNormalMixed(TestTanhNormal):
    bounds = {"low": -1.5, "high": HIGH}  # noqa: RUF012


class TestTanhNormalUnsafe(TestTanhNormal):
    bounds = {"safe_tanh": False}  # noqa: RUF012


# Mode, mean and median ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_the_mode_is_the_highest_point(scale):
    for loc in LOCS:
        dist = F.TanhNormal(exact(loc), exact(scale))
        mode = dist.mode.item()
        expected = optimum(loc, scale)
        # At loc = 0 both sides are equally high.
        assert abs(mode) == pytest.approx(abs(expected), abs=1e-6), loc
        assert mode * loc >= 0


def root(loc: float, scale: float) -> float:
    """The largest x with `x = loc + 2 scale^2 tanh(x)`, by bisection in 40 digits."""
    with mpmath.workdps(40):
        m, w = mpmath.mpf(loc), 2 * mpmath.mpf(scale) ** 2
        # Right of where the residual is least it only grows.
        low = max(m, mpmath.atanh(mpmath.sqrt(1 - 1 / w)) if w > 1 else m)
        high = m + w
        for _ in range(140):
            middle = (low + high) / 2
            if middle - m - w * mpmath.tanh(middle) > 0:
                high = middle
            else:
                low = middle
        return float(high)


# Where three roots meet f is x^3 / 3: its rounding of 2^-53 x leaves about 2^-53 / x of x, 1e-12 at
# 1e-4.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 4e-12), (torch.float32, 4e-7)])
def test_modes_where_three_roots_meet_and_elsewhere(dtype, tolerance):
    near = [0.5**0.5 * (1 + sign * 10.0**-k) for k in range(1, 13, 2) for sign in (-1, 1)]
    points = itertools.product((1e-12, 1e-6, 1e-3, 0.3, 3.0, 30.0), [1e-3, 0.3, 1.5, 30.0, *near])
    loc, scale = torch.tensor(list(points), dtype=torch.float64).to(dtype).T
    expected = [root(float(m), float(s)) for m, s in zip(loc, scale, strict=True)]
    found = reference.mode(loc, scale).double().numpy()
    # Relative where x is large: tanh is 1 there in any case.
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_modes_far_out():
    loc = torch.tensor([torch.inf, -torch.inf, 3e38, 0.0, torch.nan])
    scale = torch.tensor([1.0, 1.0, 1e10, 1e19, 1.0])
    found = reference.mode(loc, scale)
    assert found[:3].tolist() == loc[:3].tolist()
    assert found[3] == pytest.approx(2e38, rel=1e-6)
    assert found[4].isnan()


@pytest.mark.parametrize(("loc", "scale"), [(0.3, 0.5), (0.3, 2.0), (-1.0, 0.9)])
def test_no_value_is_more_likely_than_the_mode(loc, scale):
    dist = F.TanhNormal(exact(loc), exact(scale))
    others = torch.linspace(-0.999999, 0.999999, 20001, dtype=torch.float64)
    assert (dist.log_prob(others) <= dist.log_prob(dist.mode) + 1e-9).all()


@pytest.mark.parametrize("scale", SCALES)
def test_the_mean_is_the_integral(scale):
    locs = torch.tensor(LOCS, dtype=torch.float64)
    dist = F.TanhNormal(locs, torch.full_like(locs, scale))
    expected = [integral(loc, scale) for loc in LOCS]
    # The quadrature asks for 1e-10.
    np.testing.assert_allclose(dist.mean.numpy(), expected, rtol=0, atol=2e-10)


def test_small_means_keep_their_digits():
    # The integral of tanh(1e-6 + z / 2): odd but for the first order of loc.
    slope = scipy.integrate.quad(
        lambda z: np.cosh(z / 2) ** -2 * scipy.stats.norm.pdf(z), -12, 12, epsabs=1e-14
    )[0]
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-7)):
        loc, scale = torch.tensor([1e-6, 0.5], dtype=dtype)
        assert F.TanhNormal(loc, scale).mean.item() == pytest.approx(1e-6 * slope, rel=tolerance)


def test_a_mean_far_out_is_the_bound():
    loc = torch.tensor([50.0, -50.0, torch.inf, -torch.inf])
    dist = F.TanhNormal(loc, torch.full_like(loc, 0.3), safe_tanh=False)
    assert dist.mean.tolist() == [1.0, -1.0, 1.0, -1.0]


def test_the_median_halves_the_draws():
    dist = F.TanhNormal(torch.tensor(0.4), torch.tensor(1.3), low=-2.0, high=0.5)
    below = (dist.sample((10000,)) < dist.median).float().mean().item()
    # Four standard deviations of a binomial of 10,000.
    assert below == pytest.approx(0.5, abs=4 * 0.005)


@pytest.mark.parametrize("what", ["mode", "mean", "median", "deterministic_sample"])
def test_gradients_of_points(what):
    # Away from the scale at which the mode splits in two, where it has no derivative.
    loc = torch.tensor([0.3, -0.6, 1.5, 0.2], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.3, 0.5, 1.2, 0.97], dtype=torch.float64, requires_grad=True)
    low = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    high = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)

    def point(loc, scale, low, high):
        return getattr(F.TanhNormal(loc, scale, low=low, high=high), what)

    assert torch.autograd.gradcheck(point, (loc, scale, low, high))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_points_in_low_precision(dtype):
    loc = torch.tensor(LOCS, dtype=dtype)
    for scale in SCALES:
        full = F.TanhNormal(loc.double(), torch.full_like(loc, scale).double())
        dist = F.TanhNormal(loc, torch.full_like(loc, scale))
        # The limit of |tanh| is the dtype's own. A mode moves by d mode / d loc times the rounding
        # of the parameters, which is large where it splits in two: that scale is left out.
        bound = 1 - torch.finfo(dtype).resolution
        for what in ("median", "mean") if 0.6 < scale < 0.9 else ("median", "mean", "mode"):
            found, wanted = getattr(dist, what), getattr(full, what).clamp(-bound, bound)
            tolerance = 16 * torch.finfo(dtype).eps
            at = slice(1, None) if what == "mode" and scale > 0.7 else slice(None)
            torch.testing.assert_close(
                found.double()[at].abs(), wanted[at].abs(), rtol=0, atol=tolerance
            )


# Saturation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("low_high", [(-1.0, 1.0), (-3.0, 2.0)], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 0.5, 5.0])
@pytest.mark.parametrize("loc", [-50.0, -20.0, -9.0, 0.0, 9.0, 20.0, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saturated_draws_score_as_the_truth(dtype, loc, scale, low_high):
    low, high = low_high
    loc_t = torch.full((8,), loc, dtype=dtype, requires_grad=True)
    scale_t = torch.full((8,), scale, dtype=dtype, requires_grad=True)
    torch.manual_seed(5)
    noise = torch.randn(8, dtype=dtype).double()
    torch.manual_seed(5)
    dist = F.TanhNormal(loc_t, scale_t, low=low, high=high, event_dims=0)
    value, score = dist.rsample_and_log_prob()
    grads = torch.autograd.grad(score.sum(), (loc_t, scale_t), retain_graph=True)
    value_grads = torch.autograd.grad(value.sum(), (loc_t, scale_t))
    with mpmath.workdps(60):
        expected = []
        for e in noise.tolist():
            s = mpmath.mpf(scale_t[0].item())

            def truth(m, s, e=e):
                return log_density(m + e * s, m, s) - mpmath.log((high - low) / mpmath.mpf(2))

            m = mpmath.mpf(loc)
            expected.append(
                [float(truth(m, s))]
                + [float(mpmath.diff(truth, (m, s), order)) for order in ((1, 0), (0, 1))]
            )
    eps = torch.finfo(dtype).eps
    wanted = torch.tensor(expected, dtype=torch.float64)
    # The largest term of the score is 2 |x|, that of its gradient 1 / scale; x is rounded once.
    size = 2 * (abs(loc) + 5 * scale) + 20
    torch.testing.assert_close(score.double(), wanted[:, 0], rtol=0, atol=8 * eps * size)
    torch.testing.assert_close(grads[0].double(), wanted[:, 1], rtol=0, atol=8 * eps * size)
    torch.testing.assert_close(
        grads[1].double(), wanted[:, 2], rtol=0, atol=8 * eps * (5 * size + 1 / scale)
    )
    assert value.isfinite().all() and (value > low).all() and (value < high).all()
    assert all(g.isfinite().all() for g in value_grads)


def test_upstreams_way_through_atanh_fails_the_same_test():
    # What the test above is for, so that it is known to see it.
    loc, scale = torch.full((8,), 50.0), torch.full((8,), 0.5)
    dist = rl.TanhNormal(loc, scale, event_dims=0)
    torch.manual_seed(5)
    noise = torch.randn(8)
    torch.manual_seed(5)
    apart = (
        dist.log_prob(dist.rsample())
        - F.TanhNormal(loc, scale, event_dims=0).rsample_and_log_prob()[1]
    ).abs()
    assert noise.isfinite().all() and apart.min() > 1000


@pytest.mark.parametrize("where", [-1.0, 1.0, -5.0, 5.0])
def test_values_on_and_outside_the_bounds_are_scored_just_inside(where):
    loc = torch.zeros(3, requires_grad=True)
    dist = F.TanhNormal(loc, torch.ones(3))
    score = dist.log_prob(torch.full((3,), where))
    assert score.isfinite()
    inside = torch.full((3,), float(np.copysign(1 - 1e-6, where)))
    torch.testing.assert_close(score, dist.log_prob(inside))
    score.backward()
    assert loc.grad.isfinite().all()


# Bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["rsample", "joint", "log_prob", "mode"])
def test_gradients_into_the_bounds(what):
    loc = torch.randn(3, 2, dtype=torch.float64)
    scale = torch.rand(3, 2, dtype=torch.float64) * 0.4 + 0.1
    value = torch.rand(3, 2, dtype=torch.float64) * 0.5

    def run(low, high):
        torch.manual_seed(5)
        dist = F.TanhNormal(loc, scale, low=low, high=high)
        if what == "rsample":
            return dist.rsample()
        if what == "joint":
            return dist.rsample_and_log_prob()
        return dist.log_prob(value) if what == "log_prob" else dist.mode

    low = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    high = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (low, high))
    loc.requires_grad_()
    assert torch.autograd.gradcheck(run, (low, high))


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("learned", [False, True])
def test_bounds_kept_from_a_call_without_gradients_serve_one_with_them(first, learned):
    low = torch.tensor([-1.0, -2.0], requires_grad=learned)
    high = torch.tensor([1.0, 2.0], requires_grad=learned)
    loc, scale = torch.randn(3, 2, requires_grad=True), torch.ones(3, 2)
    with first():
        F.TanhNormal(loc, scale, low=low, high=high).sample()
    value = torch.zeros(3, 2, requires_grad=True)
    F.TanhNormal(loc, scale, low=low, high=high).log_prob(value).sum().backward()
    assert value.grad.abs().sum() > 0
    assert (low.grad is not None) == learned


def test_bounds_written_in_place_are_seen():
    low, high = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
    loc, scale = torch.zeros(2), torch.ones(2)
    F.TanhNormal(loc, scale, low=low, high=high)
    high.mul_(10)
    low.zero_()
    torch.testing.assert_close(
        F.TanhNormal(loc, scale, low=low, high=high).median, torch.tensor([5.0, 5.0])
    )


@pytest.mark.parametrize(
    "bounds",
    [{"low": 1.0, "high": 1.0}, {"low": 2, "high": -2}, {"low": torch.tensor([0.0, 3.0])}],
    ids=str,
)
def test_bounds_in_the_wrong_order(bounds):
    with pytest.raises(RuntimeError, match="high to be greater than low"):
        F.TanhNormal(torch.zeros(2), torch.ones(2), **bounds)


def test_kl_divergence_needs_equal_bounds():
    loc, scale = torch.zeros(2), torch.ones(2)
    p = F.TanhNormal(loc, scale, low=-2.0)
    with pytest.raises(NotImplementedError, match="bounds differ"):
        D.kl_divergence(p, F.TanhNormal(loc, scale, low=-3.0))
    assert D.kl_divergence(p, F.TanhNormal(loc, scale, low=torch.tensor(-2.0))).item() == 0


def test_tanh_loc_and_update():
    loc, scale = torch.randn(3, 2) * 10, torch.ones(3, 2)
    options = {"tanh_loc": True, "upscale": 2.0, "low": -1.0, "high": 3.0}
    mine, theirs = F.TanhNormal(loc, scale, **options), rl.TanhNormal(loc, scale, **options)
    torch.testing.assert_close(mine.loc, theirs.loc)
    torch.testing.assert_close(mine.loc, 2 * torch.tanh(loc / 2) + 1)
    mine.update(loc / 3, scale * 2)
    theirs.update(loc / 3, scale * 2)
    torch.testing.assert_close(mine.loc, theirs.loc)
    torch.testing.assert_close(mine.deterministic_sample, theirs.deterministic_sample)


def test_vmap_over_bounds():
    low, high = torch.rand(3, 2) - 2, torch.rand(3, 2) + 1
    loc = torch.randn(3, 2)
    value = torch.rand(3, 2)

    def score(loc, low, high, value):
        return F.TanhNormal(loc, torch.ones_like(loc), low=low, high=high).log_prob(value)

    torch.testing.assert_close(
        torch.vmap(score)(loc, low, high, value), score(loc, low, high, value)
    )


@pytest.mark.parametrize("family", [F.TanhNormal, F.IndependentNormal])
def test_forward_mode_through_a_scored_draw(family):
    loc = torch.randn(4, 3, dtype=torch.float64)
    scale = torch.rand(4, 3, dtype=torch.float64) + 0.1

    def draw(loc):
        torch.manual_seed(0)
        return family(loc, scale).rsample_and_log_prob()

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(loc, torch.ones_like(loc))
        slopes = [forward_ad.unpack_dual(t).tangent for t in draw(dual)]
    leaf = loc.clone().requires_grad_()
    value, score = draw(leaf)
    (by_value,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    torch.testing.assert_close(slopes[0], by_value)
    if score.requires_grad and slopes[1] is not None:
        (by_score,) = torch.autograd.grad(score.sum(), leaf)
        torch.testing.assert_close(slopes[1], by_score.sum(-1), atol=1e-12, rtol=1e-7)
