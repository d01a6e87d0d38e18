"""The families on both sides: parameters, classes, and how far results may be off."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torchrl.modules as rl
from tensordict.nn import InteractionType
from tensordict.nn.distributions import Delta as TdDelta
from tensordict.nn.distributions import OneHotCategorical as TdOneHot
from torch import Tensor
from torch import distributions as D

from fastprob import distributions as F

MODE, MEDIAN, MEAN = InteractionType.MODE, InteractionType.MEDIAN, InteractionType.MEAN
RANDOM, DETERMINISTIC = InteractionType.RANDOM, InteractionType.DETERMINISTIC


@dataclasses.dataclass
class Draw:
    """Source of parameters: random ones, or all the same, which makes ties."""

    generator: torch.Generator
    dtype: torch.dtype
    even: bool

    def randn(self, *shape: int) -> Tensor:
        if self.even:
            return torch.zeros(shape, dtype=self.dtype)
        # Clamped: the tolerances below hold for |loc| <= 2.5.
        return torch.randn(shape, generator=self.generator).clamp(-2.5, 2.5).to(self.dtype)

    def rand(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        if self.even:
            return torch.full(shape, (low + high) / 2, dtype=self.dtype)
        unit = torch.rand(shape, generator=self.generator)
        return (unit * (high - low) + low).to(self.dtype)

    def perm(self, batch: tuple[int, ...], n: int) -> Tensor:
        return torch.rand((*batch, n), generator=self.generator).argsort(-1)


Params = Callable[[Draw, tuple[int, ...], int], dict[str, Tensor]]


def normal(draw: Draw, batch, n):
    return {"loc": draw.randn(*batch, n), "scale": draw.rand(*batch, n, low=0.2, high=1.0)}


def normal_broadcast(draw: Draw, batch, n):
    return {"loc": draw.randn(*batch, n), "scale": draw.rand(*batch, 1, low=0.2, high=1.0)}


def inside(draw: Draw, batch, n):
    loc = draw.rand(*batch, n, low=-0.5, high=0.5)
    return {"loc": loc, "scale": draw.rand(*batch, n, low=0.5, high=1.5)}


def real(name: str) -> Params:
    return lambda draw, batch, n: {name: draw.randn(*batch, n)}


def positive(*names: str, low: float = 0.1, high: float = 1.0) -> Params:
    return lambda draw, batch, n: {k: draw.rand(*batch, n, low=low, high=high) for k in names}


def masked(source: str) -> Params:
    def make(draw, batch, n):
        values = draw.randn(*batch, n) if source == "logits" else draw.rand(*batch, n, low=0.1)
        return {source: values, "mask": draw.perm(batch, n) < max(1, (n + 1) // 2)}

    return make


def listed(draw: Draw, batch, n):
    return {
        "logits": draw.randn(*batch, n),
        "indices": draw.perm(batch, n)[..., : max(1, (n + 1) // 2)],
    }


def covariance(draw: Draw, batch, n):
    root = draw.randn(*batch, n, n)
    return {
        "loc": draw.randn(*batch, n),
        "covariance_matrix": root @ root.mT + torch.eye(n, dtype=draw.dtype),
    }


def interval(draw: Draw, batch, n):
    low = draw.randn(*batch, n)
    return {"low": low, "high": low + 1.5}


def independent(base: type) -> Callable[..., D.Distribution]:
    return lambda **kwargs: D.Independent(base(**kwargs), 1)


def twice(loc, scale):
    return D.Independent(D.Independent(D.Normal(loc, scale), 0), 1)


class Plain(D.Distribution):
    """A third party's: no support, mean, mode or median."""

    arg_constraints: dict = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.loc + torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype)

    def log_prob(self, value):
        return (value - self.loc).sum(-1)


@dataclasses.dataclass(frozen=True)
class Family:
    """One family on both sides.

    Attributes:
        params: builds the parameters.
        theirs: upstream's class or callable, or one for each library.
        ours: fastprob's own class, its name, or None where it has none.
        kwargs: variants of `distribution_kwargs`.
        event: whether the value has the event dimension of the parameters.
        summed: whether the log-probability has lost it.
        discrete: whether a value of a float dtype counts or ticks off, so that it must be equal.
        value_ulps: how far continuous values may be, in units in the last place.
        score_eps: how far the log-probabilities of one element may be, in eps of the dtype.
        spec: the kind of spec that its values can be projected onto.
    """

    params: Params
    theirs: Any
    ours: Any = None
    kwargs: tuple[dict, ...] = ({},)
    event: bool = True
    summed: bool = True
    discrete: bool = False
    value_ulps: float = 2
    # One element's log-density is a sum of terms of up to 20 in size (z^2 / 2 <= 13 at 5 sigma,
    # log(scale), the log-Jacobian), in some 10 roundings each.
    score_eps: float = 200
    spec: str | None = "bounded"

    def upstream(self, library: str) -> Any:
        return self.theirs[library] if isinstance(self.theirs, dict) else self.theirs


ONE_HOT = {"tensordict": TdOneHot, "torchrl": rl.OneHotCategorical}
DELTA = {"tensordict": TdDelta, "torchrl": rl.Delta}
BOUNDS = ({}, {"low": -2.0, "high": 0.5}, {"low": -2, "high": 2})
TANH = (*BOUNDS, {"tanh_loc": True}, {"safe_tanh": False}, {"tanh_loc": True, "upscale": 2.0})
# Upstream scores a TanhNormal's deterministic value through atanh, which multiplies the rounding of
# the value by 1 / (1 - tanh(x)^2) <= 38 at 2.5, or 1.1e4 with the largest shift of a tanh_loc.
TANH_EPS = 200 * 38
# Upstream works out quantiles as differences of erf, and inverts them: an eps of 1 there is
# eps / phi(3) = 225 eps of the value, and the bounds are at most 3 sigma out.
CUT = {"value_ulps": 1400, "score_eps": 6 * 1400}
FUSED: dict[str, Family] = {
    "normal": Family(normal, D.Normal, F.Normal, summed=False),
    "normal_broadcast": Family(normal_broadcast, D.Normal, F.Normal, summed=False),
    "independent": Family(normal, independent(D.Normal), F.IndependentNormal),
    "independent_twice": Family(normal, twice, "IndependentNormal"),
    "independent_normal": Family(
        normal, rl.IndependentNormal, "independentnormal", ({}, {"tanh_loc": True})
    ),
    "independent_normal_0": Family(
        normal, rl.IndependentNormal, F.IndependentNormal, ({"event_dim": 0},), summed=False
    ),
    "tanh_normal": Family(normal, rl.TanhNormal, F.TanhNormal, TANH, score_eps=TANH_EPS),
    "tanh_normal_0": Family(
        normal, rl.TanhNormal, F.TanhNormal, ({"event_dims": 0},), summed=False, score_eps=TANH_EPS
    ),
    "truncated_normal": Family(inside, rl.TruncatedNormal, F.TruncatedNormal, **CUT),
    "delta": Family(real("param"), DELTA, F.Delta, value_ulps=0),
    "tanh_delta": Family(real("param"), rl.TanhDelta, F.TanhDelta, BOUNDS, value_ulps=4),
    "categorical": Family(
        real("logits"), D.Categorical, F.Categorical, event=False, spec="categorical"
    ),
    "categorical_probs": Family(
        positive("probs"), D.Categorical, "categorical", event=False, spec="categorical"
    ),
    "one_hot": Family(real("logits"), ONE_HOT, F.OneHotCategorical, spec="one_hot"),
    "one_hot_probs": Family(positive("probs"), ONE_HOT, F.OneHotCategorical, spec="one_hot"),
    "masked": Family(
        masked("logits"),
        rl.MaskedCategorical,
        F.MaskedCategorical,
        ({}, {"use_cross_entropy": False}, {"neg_inf": -50.0}),
        event=False,
        spec="categorical",
    ),
    "masked_probs": Family(
        masked("probs"), rl.MaskedCategorical, F.MaskedCategorical, event=False, spec="categorical"
    ),
    "masked_list": Family(
        listed,
        rl.MaskedCategorical,
        F.MaskedCategorical,
        ({}, {"use_cross_entropy": False}),
        event=False,
        spec="categorical",
    ),
    "masked_one_hot": Family(
        masked("logits"), rl.MaskedOneHotCategorical, F.MaskedOneHotCategorical, spec="one_hot"
    ),
    "masked_one_hot_list": Family(
        listed, rl.MaskedOneHotCategorical, F.MaskedOneHotCategorical, spec="one_hot"
    ),
    "ordinal": Family(real("scores"), rl.Ordinal, F.Ordinal, event=False, spec="categorical"),
    "one_hot_ordinal": Family(real("scores"), rl.OneHotOrdinal, F.OneHotOrdinal, spec="one_hot"),
    "bernoulli": Family(
        real("logits"), D.Bernoulli, F.Bernoulli, summed=False, discrete=True, spec=None
    ),
    "bernoulli_probs": Family(
        positive("probs", high=0.9), D.Bernoulli, "bernoulli", summed=False, discrete=True
    ),
    "independent_bernoulli": Family(real("logits"), independent(D.Bernoulli), discrete=True),
    "beta": Family(
        positive("concentration1", "concentration0", low=0.5, high=4.0),
        D.Beta,
        F.Beta,
        summed=False,
        # a draw is a ratio of Gamma draws, whose score near 0 and 1 is (a - 1) / x times its error
        value_ulps=8,
        score_eps=2000,
    ),
    "independent_beta": Family(
        positive("concentration1", "concentration0", low=0.5, high=4.0),
        independent(D.Beta),
        value_ulps=8,
        score_eps=2000,
    ),
}
# Distributions that fastprob has no family for. Its module runs their own code, so that the results
# must be equal to the last bit.
EXACT = {"value_ulps": 0, "score_eps": 0, "spec": "bounded"}
GENERAL: dict[str, Family] = {
    "gamma": Family(positive("concentration", "rate"), D.Gamma, summed=False, **EXACT),
    "independent_gamma": Family(positive("concentration", "rate"), independent(D.Gamma), **EXACT),
    "laplace": Family(normal, D.Laplace, summed=False, **EXACT),
    "cauchy": Family(normal, D.Cauchy, summed=False, **EXACT),
    "log_normal": Family(normal, D.LogNormal, summed=False, **EXACT),
    "student_t": Family(positive("df", low=2.5, high=9.0), D.StudentT, summed=False, **EXACT),
    "uniform": Family(interval, D.Uniform, summed=False, **EXACT),
    "poisson": Family(positive("rate"), D.Poisson, summed=False, **EXACT),
    "geometric": Family(positive("probs"), D.Geometric, summed=False, **EXACT),
    "continuous_bernoulli": Family(real("logits"), D.ContinuousBernoulli, summed=False, **EXACT),
    "binomial": Family(real("logits"), functools.partial(D.Binomial, 7), summed=False, **EXACT),
    "torch_one_hot": Family(real("logits"), D.OneHotCategorical, **EXACT),
    "straight_through": Family(real("logits"), D.OneHotCategoricalStraightThrough, **EXACT),
    "dirichlet": Family(positive("concentration", low=1.2, high=4.0), D.Dirichlet, **EXACT),
    "multivariate_normal": Family(covariance, D.MultivariateNormal, **EXACT),
    "third_party": Family(real("loc"), Plain, **EXACT),
}
FAMILIES = FUSED | GENERAL
# Components of a composite: their parameters must not be a name of the composite's own.
COMPONENTS = [
    "normal",
    "independent",
    "tanh_normal",
    "truncated_normal",
    "delta",
    "categorical",
    "one_hot",
    "masked",
    "ordinal",
    "bernoulli",
    "beta",
    "gamma",
]
INDEXED = {n for n, f in FUSED.items() if f.spec in ("categorical", "one_hot")}
ONE_HOTS = {n for n, f in FUSED.items() if f.spec == "one_hot"}
BETAS = {"beta", "independent_beta"}
# Those that normalize logits of several categories.
FLIPPED = {n for n in INDEXED if not n.endswith("_probs")}
DISCRETE = {n for n, f in FUSED.items() if f.spec in ("categorical", "one_hot") or f.discrete} | {
    "bernoulli"
}
