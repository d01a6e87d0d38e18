"""fastprob's modules beside upstream's: the same tensordict and seed in, the same results out.

Upstream is tensordict's module with tensordict's or torch's distribution classes, and TorchRL's
safe module with TorchRL's. What DESIGN.md lists as different on purpose is left out here or named
where it is met.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tensordict.nn as td_nn
import torch
import torchrl.data as rl_data
import torchrl.modules as rl
from tensordict import TensorDict
from tensordict.nn import InteractionType, set_composite_lp_aggregate, set_interaction_type
from tensordict.nn.distributions import Delta as TdDelta
from tensordict.nn.distributions import OneHotCategorical as TdOneHot
from torch import distributions as D

import fastprob
from fastprob import distributions as F
from fastprob import specs
from tests._ulp import assert_within_ulps

MODE, MEDIAN, MEAN = InteractionType.MODE, InteractionType.MEDIAN, InteractionType.MEAN
RANDOM, DETERMINISTIC = InteractionType.RANDOM, InteractionType.DETERMINISTIC
EVERY = (MODE, MEDIAN, MEAN, DETERMINISTIC, RANDOM)

BATCH = (5,)
SIZE = 3
LIBRARIES = {
    "tensordict": (
        td_nn.ProbabilisticTensorDictModule,
        fastprob.ProbabilisticTensorDictModule,
    ),
    "torchrl": (rl.SafeProbabilisticModule, fastprob.SafeProbabilisticModule),
}
FLOATS = (torch.float32, torch.float64)
NUM_SAMPLES = (None, 2, (2, 3))
LAYOUTS = ("flat", "nested")

# The log-density of one element is a sum of terms of up to 20 in size (z^2 / 2 <= 13 at 5 sigma,
# log(scale), the log-Jacobian), some 10 roundings each; both sides round, in another order. Three
# elements are summed: 3 * 20 * 10 = 600 eps, if every rounding went the same way.
LOG_PROB_EPS = 600
# A gradient is a sum of terms that cancel upstream (the score's through the value and through loc),
# each up to |z| / scale = 5 / 0.1 in size, for three elements.
GRAD_EPS = 1200


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def normal(batch, dtype):
    return {
        "loc": torch.randn(*batch, SIZE, dtype=dtype),
        "scale": torch.rand(*batch, SIZE, dtype=dtype) * 0.4 + 0.1,
    }


def one(name: str, make: Callable[..., Any]) -> Callable[..., dict]:
    return lambda batch, dtype: {name: make(*batch, SIZE, dtype=dtype)}


def independent(loc, scale):
    return D.Independent(D.Normal(loc, scale), 1)


def independent_twice(loc, scale):
    return D.Independent(D.Independent(D.Normal(loc, scale), 0), 1)


LOW, HIGH = torch.tensor([-1.0, -2.0, 0.5]), torch.tensor([1.0, 0.5, 3.0])


@dataclasses.dataclass
class Family:
    """A family on both sides.

    Attributes:
        params: builds the parameters from batch shape and dtype.
        theirs: upstream's class or callable, or one for each library.
        ours: fastprob's own class, which must do as well as `theirs` handed to fastprob.
        kwargs: `distribution_kwargs`.
        stands_for: the upstream interaction type whose value a type must give that upstream does
            not have: the median of a symmetric distribution is its mean.
        types: the interaction types that both have, or that `stands_for` has.
        scored: those whose value has a log-probability.
        size: the largest number on the way to a value, from the parameters and the value.
        log_prob_eps: what log-probs may differ by, in eps of the dtype.
    """

    params: Callable[..., dict]
    theirs: Any
    ours: Any = None
    kwargs: dict = dataclasses.field(default_factory=dict)
    stands_for: dict = dataclasses.field(default_factory=dict)
    types: tuple = EVERY
    scored: tuple = EVERY
    size: Callable[..., Any] = lambda params, value: params.get("loc")
    log_prob_eps: float = LOG_PROB_EPS

    def upstream(self, library: str) -> Any:
        return self.theirs[library] if isinstance(self.theirs, dict) else self.theirs

    def dist_kwargs(self, dtype: torch.dtype, upstream: bool = False) -> dict:
        def convert(name, value):
            if isinstance(value, torch.Tensor):
                return value.to(dtype)
            if upstream and name in ("low", "high"):
                # TorchRL takes the logarithm of the width of numbers in float32, 1e-8 off in
                # float64; that of a tensor in the tensor's own dtype.
                return torch.tensor(value, dtype=dtype)
            return value

        return {k: convert(k, v) for k, v in self.kwargs.items()}


def tanh_normal(**kwargs) -> Family:
    # tanh has slope 1 or less and the bounds scale by up to 1.25: what loc + eps * scale rounds off
    # reaches the value at most 1.25 times, next to the interval's middle.
    def size(params, value):
        return torch.maximum(params["loc"].abs() * 1.25, torch.full_like(params["loc"], 1.75))

    return Family(
        normal,
        rl.TanhNormal,
        F.TanhNormal,
        kwargs,
        # Upstream has neither mode, mean nor median; its deterministic value is the median.
        {MEDIAN: DETERMINISTIC},
        (MEDIAN, DETERMINISTIC, RANDOM),
        size=size if kwargs else (lambda params, value: params["loc"]),
        # Upstream's module scores through atanh, which multiplies the rounding of the value by
        # 1 / (1 - tanh(x)^2) <= 1 / (1 - tanh(4)^2) = 746, and the score by dlogp/dx <= 52.
        log_prob_eps=SIZE * 746 * 52,
    )


SYMMETRIC = {MEDIAN: MEAN}
FAMILIES = {
    "normal": Family(normal, D.Normal, F.Normal, {}, SYMMETRIC),
    "independent": Family(normal, independent, "IndependentNormal", {}, SYMMETRIC),
    "independent_twice": Family(normal, independent_twice, F.IndependentNormal, {}, SYMMETRIC),
    "independent_normal": Family(normal, rl.IndependentNormal, F.IndependentNormal, {}, SYMMETRIC),
    "independent_normal_0": Family(
        normal, rl.IndependentNormal, F.IndependentNormal, {"event_dim": 0}, SYMMETRIC
    ),
    "independent_normal_tanh": Family(
        normal, rl.IndependentNormal, F.IndependentNormal, {"tanh_loc": True}, SYMMETRIC
    ),
    "tanh_normal": tanh_normal(),
    "tanh_normal_scalars": tanh_normal(low=-2.0, high=0.5),
    "tanh_normal_ints": tanh_normal(low=-2, high=2),
    "tanh_normal_tensors": tanh_normal(low=LOW, high=HIGH),
    "tanh_normal_mixed": tanh_normal(low=-2.5, high=HIGH),
    "tanh_normal_tanh_loc": tanh_normal(tanh_loc=True),
    "tanh_normal_upscale": tanh_normal(tanh_loc=True, upscale=2.0, low=-2.0, high=0.5),
    "tanh_normal_upscale_tensor": tanh_normal(
        tanh_loc=True, upscale=torch.tensor([2.0, 3.0, 0.5]), low=LOW, high=HIGH
    ),
    "tanh_normal_event_0": tanh_normal(event_dims=0),
    "tanh_normal_unsafe": tanh_normal(safe_tanh=False),
    "delta": Family(
        one("param", torch.randn),
        {"tensordict": TdDelta, "torchrl": rl.Delta},
        F.Delta,
        {},
        {MEDIAN: MEAN},
        size=lambda params, value: None,
    ),
    "categorical": Family(
        one("logits", torch.randn),
        D.Categorical,
        F.Categorical,
        # Upstream's mean is NaN and it has no median.
        types=(MODE, DETERMINISTIC, RANDOM),
    ),
    "categorical_probs": Family(
        one("probs", torch.rand),
        D.Categorical,
        F.Categorical,
        types=(MODE, DETERMINISTIC, RANDOM),
    ),
    "one_hot": Family(
        one("logits", torch.randn),
        {"tensordict": TdOneHot, "torchrl": rl.OneHotCategorical},
        F.OneHotCategorical,
        types=(MODE, DETERMINISTIC, RANDOM),
    ),
    # Upstream scores a Bernoulli's mean, which is neither of its two values.
    "bernoulli": Family(
        one("logits", torch.randn), D.Bernoulli, types=(MODE, DETERMINISTIC, RANDOM)
    ),
    "bernoulli_probs": Family(
        one("probs", torch.rand), D.Bernoulli, types=(MODE, DETERMINISTIC, RANDOM)
    ),
    "one_hot_probs": Family(
        one("probs", torch.rand),
        {"tensordict": TdOneHot, "torchrl": rl.OneHotCategorical},
        F.OneHotCategorical,
        types=(MODE, DETERMINISTIC, RANDOM),
    ),
}


def layout(params: dict, nested: bool) -> tuple[TensorDict, Any, Any, Any]:
    """The tensordict, and in-keys, out-key and log-prob key for it."""
    td = TensorDict({}, BATCH)
    for name, value in params.items():
        td[("deep", "er", name) if nested else name] = value
    if nested:
        return td, {k: ("deep", "er", k) for k in params}, ("out", "action"), ("out", "lp")
    return td, list(params), "action", "lp"


def run(module: Any, td: TensorDict) -> TensorDict:
    torch.manual_seed(7)
    with warnings.catch_warnings():
        # Both sides say that they pick a stand-in for DETERMINISTIC.
        warnings.filterwarnings("ignore", message=".*deterministic_sample.*")
        return module(td.clone(False))


def build(cls: type, dist_class, kwargs, keys, interaction, log_prob, num_samples=None):
    in_keys, out_key, lp_key = keys
    return cls(
        in_keys=in_keys,
        out_keys=[out_key],
        distribution_class=dist_class,
        distribution_kwargs=dict(kwargs),
        default_interaction_type=interaction,
        return_log_prob=log_prob,
        log_prob_key=lp_key,
        num_samples=num_samples,
    )


def expected_of(cls, dist_class, kwargs, keys, interaction, log_prob, num_samples, td):
    """What upstream writes; a deterministic value repeated, which it leaves as it is."""
    repeat = num_samples is not None and interaction is not RANDOM
    out = run(
        build(
            cls,
            dist_class,
            kwargs,
            keys,
            interaction,
            log_prob,
            None if repeat else num_samples,
        ),
        td,
    )
    shape = torch.Size((num_samples,) if isinstance(num_samples, int) else num_samples or ())
    wanted = [out[k] for k in ([keys[1], keys[2]] if log_prob else [keys[1]])]
    return [v.expand(shape + v.shape) if repeat else v for v in wanted], shape


def assert_same_values(family, params, actual, expected, where):
    assert actual.dtype == expected.dtype, where
    assert actual.shape == expected.shape, where
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, expected), where
        return
    size = family.size(params, expected)
    size = None if size is None else size.expand_as(expected)
    assert_within_ulps(actual, expected, 2, size, where)


def shared(names=FAMILIES) -> list:
    """Families and the interaction types that both sides have for them.

    Of the others tests/distributions has the truth.
    """
    return [
        pytest.param(name, interaction, id=f"{name}-{interaction.value}")
        for name in names
        for interaction in FAMILIES[name].types
    ]


@pytest.mark.parametrize("given", ["upstream's class", "fastprob's class"])
@pytest.mark.parametrize("log_prob", [False, True], ids=["plain", "scored"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "interaction"), shared())
def test_values_and_log_probs(name, library, interaction, log_prob, given):
    family = FAMILIES[name]
    theirs, ours = LIBRARIES[library]
    own = given == "fastprob's class" and family.ours is not None
    dist_class = family.ours if own else family.upstream(library)
    upstream_type = family.stands_for.get(interaction, interaction)
    # fastprob's own class is built by the same calls: one layout, no further dtype.
    options = [(torch.float32, "nested")] if own else itertools.product(FLOATS, LAYOUTS)
    for (dtype, kind), num_samples in itertools.product(options, NUM_SAMPLES):
        where = f"{dtype}, {kind}, num_samples={num_samples}"
        torch.manual_seed(3)
        params = family.params(BATCH, dtype)
        kwargs = family.dist_kwargs(dtype)
        td, *keys = layout(params, kind == "nested")
        upstream = family.upstream(library)
        (value, *score), shape = expected_of(
            theirs,
            upstream,
            family.dist_kwargs(dtype, upstream=True),
            keys,
            upstream_type,
            log_prob,
            num_samples,
            td,
        )
        out = run(build(ours, dist_class, kwargs, keys, interaction, log_prob, num_samples), td)
        assert out.batch_size == shape + torch.Size(BATCH), where
        assert_same_values(family, params, out[keys[1]], value, where)
        assert (keys[2] in out.keys(True)) == log_prob, where
        if log_prob:
            assert out[keys[2]].dtype == score[0].dtype, where
            rounding = family.log_prob_eps * eps(dtype)
            torch.testing.assert_close(
                out[keys[2]], score[0], rtol=0, atol=rounding, msg=lambda m, w=where: f"{w}: {m}"
            )


def gradients(module, td, keys, params, weights):
    """Gradients into the parameters of a loss of value and log-prob; 0 where there is no path."""
    out = run(module, td)
    value, score = out[keys[1]], out[keys[2]]
    loss = sum(
        (t * w.to(t.dtype)).sum()
        for t, w in ((value, weights(value)), (score, weights(score)))
        if t.requires_grad
    )
    assert isinstance(loss, torch.Tensor), "neither value nor log-prob needs a gradient"
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    paths = [value.requires_grad, score.requires_grad]
    return paths, [
        torch.zeros_like(p) if g is None else g for g, p in zip(found, params.values(), strict=True)
    ]


def weights_like(t):
    return torch.linspace(0.5, 1.5, t.numel(), dtype=torch.float64).view(t.shape)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("name", "interaction"), shared(n for n in FAMILIES if n != "delta"))
def test_gradients(name, library, interaction):
    family = FAMILIES[name]
    upstream_type = family.stands_for.get(interaction, interaction)
    theirs, ours = LIBRARIES[library]
    # Upstream does not repeat deterministic values, so they have no num_samples to compare.
    counts = NUM_SAMPLES if interaction is RANDOM else (None,)
    for dtype, num_samples in itertools.product(FLOATS, counts):
        torch.manual_seed(3)
        params = {k: v.requires_grad_() for k, v in family.params(BATCH, dtype).items()}
        td, *keys = layout(params, False)
        expected, actual = (
            gradients(
                build(
                    cls,
                    family.upstream(library),
                    family.dist_kwargs(dtype, upstream=cls is theirs),
                    keys,
                    kind,
                    True,
                    num_samples,
                ),
                td,
                keys,
                params,
                weights_like,
            )
            for cls, kind in ((theirs, upstream_type), (ours, interaction))
        )
        assert actual[0] == expected[0], (dtype, "the same of value and log-prob need gradients")
        # Six samples are summed where num_samples is (2, 3), with weights up to 1.5. Upstream's
        # TanhNormal amplifies its rounding by the way through atanh, see tanh_normal() above.
        factor = 9 * (746 * 10 if name.startswith("tanh_normal") else 1)
        for a, e in zip(actual[1], expected[1], strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=GRAD_EPS * factor * eps(dtype))


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.startswith("tanh_normal")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("joint", ["rsample_and_log_prob", "sample_and_log_prob"])
def test_tanh_normal_scores_as_torchrl_where_that_uses_the_value_before_tanh(name, dtype, joint):
    family = FAMILIES[name]
    results = []
    for cls in (rl.TanhNormal, F.TanhNormal):
        torch.manual_seed(3)
        params = {k: v.requires_grad_() for k, v in family.params(BATCH, dtype).items()}
        dist = cls(**params, **family.dist_kwargs(dtype, upstream=cls is rl.TanhNormal))
        value, score = getattr(dist, joint)((4,))
        loss = (score * weights_like(score).to(dtype)).sum()
        if value.requires_grad:
            loss = loss + (value * weights_like(value).to(dtype)).sum()
        grads = torch.autograd.grad(loss, list(params.values()))
        results.append((value.requires_grad, value.detach(), score, grads))
    (path, value, score, grads), (my_path, my_value, my_score, my_grads) = results
    assert my_path == path == (joint == "rsample_and_log_prob")
    assert_same_values(family, params, my_value, value, joint)
    # No atanh on either side: rounding is that of a Normal.
    torch.testing.assert_close(my_score, score, rtol=0, atol=LOG_PROB_EPS * eps(dtype))
    for mine, wanted in zip(my_grads, grads, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=4 * 1.5 * GRAD_EPS * eps(dtype))


def test_delta_gradients():
    for library, (theirs, ours) in LIBRARIES.items():
        dist_class = FAMILIES["delta"].upstream(library)
        for interaction in (MODE, MEAN, DETERMINISTIC, RANDOM):
            param = torch.randn(5, 3, requires_grad=True)
            td = TensorDict({"param": param}, BATCH)
            keys = (["param"], "action", "lp")
            wanted, value = (
                run(build(cls, dist_class, {}, keys, interaction, False), td)["action"]
                for cls in (theirs, ours)
            )
            # Upstream's random value carries no gradient. It says that it needs one all the same,
            # as a view of a leaf does that was taken under no_grad.
            grads = [
                torch.autograd.grad(v.sum() + 0 * param.sum(), param)[0] for v in (wanted, value)
            ]
            assert torch.equal(*grads)
            assert bool(grads[1].all()) == (interaction is not RANDOM)


# Composite distributions ----------------------------------------------------------------------

COMPOSITE = {
    "cont": D.Normal,
    "ind": independent,
    "disc": D.Categorical,
    "hot": TdOneHot,
    ("deep", "tanh"): functools.partial(rl.TanhNormal, low=-2.0),
    "other": D.Beta,
}


def composite_params(dtype, grad=False):
    torch.manual_seed(3)
    params = TensorDict(
        {
            "cont": normal(BATCH, dtype),
            "ind": normal(BATCH, dtype),
            "disc": {"logits": torch.randn(5, 4, dtype=dtype)},
            "hot": {"logits": torch.randn(5, 4, dtype=dtype)},
            "deep": {"tanh": normal(BATCH, dtype)},
            "other": {
                "concentration1": torch.rand(5, 2, dtype=dtype) + 1.5,
                "concentration0": torch.rand(5, 2, dtype=dtype) + 1.5,
            },
        },
        BATCH,
    )
    return params.apply(lambda t: t.requires_grad_()) if grad else params


def composite_module(cls, dist_class, interaction, log_prob, num_samples, names):
    kwargs: dict[str, Any] = {"distribution_map": COMPOSITE_FOR[interaction]}
    if names:
        kwargs["name_map"] = {k: ("action", *_tuple(k)) for k in COMPOSITE_FOR[interaction]}
    return cls(
        in_keys=["params"],
        distribution_class=dist_class,
        distribution_kwargs=kwargs,
        default_interaction_type=interaction,
        return_log_prob=log_prob,
        num_samples=num_samples,
    )


def _tuple(key):
    return (key,) if isinstance(key, str) else key


COMPOSITE_FOR = {
    RANDOM: COMPOSITE,
    # Upstream's TanhNormal has neither mode nor mean.
    MODE: {k: v for k, v in COMPOSITE.items() if k != ("deep", "tanh")},
    # Nor has it a mean of a Categorical, or one to score of a one-hot one.
    MEAN: {k: v for k, v in COMPOSITE.items() if k in ("cont", "ind", "other")},
    DETERMINISTIC: {k: v for k, v in COMPOSITE.items() if k != "other"},
}


@pytest.mark.parametrize("given", [td_nn.CompositeDistribution, F.CompositeDistribution])
@pytest.mark.parametrize("aggregate", [False, True], ids=["each", "sum"])
@pytest.mark.parametrize("log_prob", [False, True], ids=["plain", "scored"])
@pytest.mark.parametrize("interaction", list(COMPOSITE_FOR), ids=lambda t: t.value)
@pytest.mark.parametrize("library", LIBRARIES)
def test_composite(library, interaction, log_prob, aggregate, given):
    theirs, ours = LIBRARIES[library]
    for dtype, num_samples, names in itertools.product(
        (torch.float32, torch.float64), NUM_SAMPLES, (False, True)
    ):
        if interaction is not RANDOM and num_samples is not None:
            continue  # upstream leaves these unexpanded
        td = TensorDict({"params": composite_params(dtype)}, BATCH)
        with set_composite_lp_aggregate(aggregate):
            args = (interaction, log_prob, num_samples, names)
            up = composite_module(theirs, td_nn.CompositeDistribution, *args)
            mine = composite_module(ours, given, *args)
            assert set(mine.out_keys) == set(up.out_keys)
            expected, actual = run(up, td), run(mine, td)
        assert actual.batch_size == expected.batch_size
        leaves = expected.flatten_keys("/")
        assert sorted(actual.flatten_keys("/").keys()) == sorted(leaves.keys())
        for key, wanted in leaves.items():
            found = actual.flatten_keys("/")[key]
            where = f"{key}, {dtype}, num_samples={num_samples}, names={names}"
            if "log_prob" in key:
                # The TanhNormal's is the coarsest, and the sum has them all.
                atol = FAMILIES["tanh_normal"].log_prob_eps * eps(dtype)
                torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
                continue
            if not wanted.dtype.is_floating_point:
                assert torch.equal(found, wanted), where
                continue
            assert_within_ulps(found, wanted, 2, torch.full_like(wanted, 4.0), where)


@pytest.mark.parametrize("interaction", [MODE, RANDOM], ids=lambda t: t.value)
@pytest.mark.parametrize("aggregate", [False, True], ids=["each", "sum"])
def test_composite_gradients(interaction, aggregate):
    results = []
    with set_composite_lp_aggregate(aggregate):
        for cls in LIBRARIES["tensordict"]:
            params = composite_params(torch.float64, grad=True)
            td = TensorDict({"params": params}, BATCH)
            args = (interaction, True, None, False)
            out = run(composite_module(cls, td_nn.CompositeDistribution, *args), td)
            found = out.exclude("params").flatten_keys("/")
            paths = sorted(k for k, v in found.items() if v.requires_grad)
            leaves = list(params.flatten_keys("/").items())
            loss = sum(found[k].sum() for k in paths)
            grads = torch.autograd.grad(loss, [v for _, v in leaves], allow_unused=True)
            results.append((paths, {k: g for (k, _), g in zip(leaves, grads, strict=True)}))
    (paths, expected), (my_paths, actual) = results
    assert my_paths == paths
    for key, wanted in expected.items():
        if wanted is None:
            assert actual[key] is None
            continue
        atol = GRAD_EPS * 746 * 10 * eps(torch.float64)
        torch.testing.assert_close(actual[key], wanted, rtol=0, atol=atol)


def test_composite_default_keys_without_the_switch():
    # DESIGN.md: an entry per key, and their sum under "sample_log_prob".
    td = TensorDict({"params": composite_params(torch.float64)}, BATCH)
    args = (RANDOM, True, None, False)
    with set_composite_lp_aggregate(False):
        expected = run(
            composite_module(LIBRARIES["tensordict"][0], td_nn.CompositeDistribution, *args), td
        )
    with set_composite_lp_aggregate(None):
        module = composite_module(LIBRARIES["tensordict"][1], td_nn.CompositeDistribution, *args)
        out = run(module, td)
    total = torch.zeros(BATCH, dtype=torch.float64)
    for key, wanted in expected.flatten_keys("/").items():
        found = out.flatten_keys("/")[key]
        if key.endswith("_log_prob"):
            total += wanted.flatten(1).sum(-1) if wanted.ndim > 1 else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out["sample_log_prob"], total, rtol=1e-9, atol=1e-9)


# The general path -----------------------------------------------------------------------------


def positive(*names: str, offset: float = 0.5) -> Callable[..., dict]:
    return lambda batch, dtype: {
        n: torch.rand(*batch, SIZE, dtype=dtype) * 2 + offset for n in names
    }


def uniform(batch, dtype):
    low = torch.randn(*batch, SIZE, dtype=dtype)
    return {"low": low, "high": low + 1.5}


def multivariate(batch, dtype):
    root = torch.randn(*batch, SIZE, SIZE, dtype=dtype)
    eye = torch.eye(SIZE, dtype=dtype)
    return {
        "loc": torch.randn(*batch, SIZE, dtype=dtype),
        "covariance_matrix": root @ root.mT + eye,
    }


def low_rank(batch, dtype):
    return {
        "loc": torch.randn(*batch, SIZE, dtype=dtype),
        "cov_factor": torch.randn(*batch, SIZE, 1, dtype=dtype),
        "cov_diag": torch.rand(*batch, SIZE, dtype=dtype) + 0.5,
    }


def mixture(logits, loc, scale):
    return D.MixtureSameFamily(D.Categorical(logits=logits), D.Normal(loc, scale))


def mixture_params(batch, dtype):
    return {"logits": torch.randn(*batch, SIZE, dtype=dtype), **normal(batch, dtype)}


def independent_beta(concentration1, concentration0):
    return D.Independent(D.Beta(concentration1, concentration0), 1)


# name: (parameters, what builds the distribution)
GENERAL = {
    "beta": (positive("concentration1", "concentration0", offset=1.5), D.Beta),
    "beta_independent": (
        positive("concentration1", "concentration0", offset=1.5),
        independent_beta,
    ),
    "gamma": (positive("concentration", "rate"), D.Gamma),
    "inverse_gamma": (positive("concentration", "rate", offset=2.5), D.InverseGamma),
    "chi2": (positive("df"), D.Chi2),
    "exponential": (positive("rate"), D.Exponential),
    "laplace": (normal, D.Laplace),
    "cauchy": (normal, D.Cauchy),
    "gumbel": (normal, D.Gumbel),
    "half_normal": (positive("scale"), D.HalfNormal),
    "half_cauchy": (positive("scale"), D.HalfCauchy),
    "log_normal": (normal, D.LogNormal),
    "student_t": (positive("df", "loc", "scale", offset=2.5), D.StudentT),
    "pareto": (positive("scale", "alpha", offset=2.5), D.Pareto),
    "weibull": (positive("scale", "concentration"), D.Weibull),
    "kumaraswamy": (positive("concentration1", "concentration0", offset=1.5), D.Kumaraswamy),
    "fisher_snedecor": (positive("df1", "df2", offset=4.5), D.FisherSnedecor),
    "uniform": (uniform, D.Uniform),
    "von_mises": (positive("loc", "concentration"), D.VonMises),
    "poisson": (positive("rate"), D.Poisson),
    "geometric": (one("logits", torch.randn), D.Geometric),
    "continuous_bernoulli": (one("logits", torch.randn), D.ContinuousBernoulli),
    "negative_binomial": (one("probs", torch.rand), functools.partial(D.NegativeBinomial, 5)),
    "binomial": (one("logits", torch.randn), functools.partial(D.Binomial, 7)),
    "multinomial": (one("logits", torch.randn), functools.partial(D.Multinomial, 4)),
    "torch_one_hot": (one("logits", torch.randn), D.OneHotCategorical),
    "torch_one_hot_through": (one("logits", torch.randn), D.OneHotCategoricalStraightThrough),
    "relaxed_one_hot": (
        one("logits", torch.randn),
        lambda logits: D.RelaxedOneHotCategorical(
            torch.tensor(1.0, dtype=logits.dtype), logits=logits
        ),
    ),
    "relaxed_bernoulli": (
        one("logits", torch.randn),
        lambda logits: D.RelaxedBernoulli(torch.tensor(1.0, dtype=logits.dtype), logits=logits),
    ),
    "dirichlet": (positive("concentration", offset=1.5), D.Dirichlet),
    "multivariate_normal": (multivariate, D.MultivariateNormal),
    "low_rank_normal": (low_rank, D.LowRankMultivariateNormal),
    "logistic_normal": (normal, D.LogisticNormal),
    "mixture": (mixture_params, mixture),
}


def attempt(make: Callable[[], Any]) -> Any:
    """The result, or the kind of failure."""
    try:
        return make()
    except (NotImplementedError, AttributeError):
        return NotImplementedError
    except (ValueError, RuntimeError) as err:
        return type(err)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(1234.5), b.nan_to_num(1234.5))


def nearly(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def recognized(dist_class: Any, params: dict) -> bool:
    """Whether fastprob has a family of its own for this; if not, it runs upstream's code."""
    params = {k: v.detach() for k, v in params.items()}
    return isinstance(F.recognize(F.resolve(dist_class)(**params)), F.Fused)


@pytest.mark.parametrize("interaction", EVERY, ids=lambda t: t.value)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", GENERAL)
def test_other_distributions(name, library, interaction):
    make, dist_class = GENERAL[name]
    theirs, ours = LIBRARIES[library]
    options = ((False, "flat"), (True, "flat"), (True, "nested"))
    for (log_prob, kind), num_samples in itertools.product(options, NUM_SAMPLES):
        where = f"log_prob={log_prob}, {kind}, num_samples={num_samples}"
        torch.manual_seed(3)
        params = make(BATCH, torch.float32)
        td, *keys = layout(params, kind == "nested")
        args = (dist_class, {}, keys, interaction, log_prob, num_samples)
        fused = recognized(dist_class, params)
        expected = attempt(lambda args=args, td=td: expected_of(theirs, *args, td))
        found = attempt(lambda args=args, td=td: run(build(ours, *args), td))
        if isinstance(expected, type):
            # A family of fastprob's may have the value that upstream lacks.
            assert found is expected or fused, where
            continue
        if fused and log_prob and interaction is MEAN and found is NotImplementedError:
            continue  # the mean of a discrete family is none of its values
        assert not isinstance(found, type), (where, found)
        (value, *score), shape = expected
        assert found.batch_size == shape + torch.Size(BATCH), where
        assert (nearly if fused else equal)(found[keys[1]], value), where
        if log_prob:
            # Upstream has scored the value before it was repeated: other strides take other
            # (vectorized or scalar) code paths of the same functions.
            exact = not fused and (num_samples is None or interaction is RANDOM)
            same = equal if exact else nearly
            assert same(found[keys[2]], score[0]), where


@pytest.mark.parametrize("name", GENERAL)
def test_other_distributions_give_the_same_gradients(name):
    make, dist_class = GENERAL[name]
    results = []
    for cls in LIBRARIES["tensordict"]:
        torch.manual_seed(3)
        params = make(BATCH, torch.float64)
        leaves = {k: v.requires_grad_() for k, v in params.items() if v.is_floating_point()}
        td, *keys = layout(params, False)
        module = build(cls, dist_class, {}, keys, RANDOM, True)
        run_it = functools.partial(gradients, module, td, keys, leaves, weights_like)
        results.append(attempt(run_it))
    expected, actual = results
    if isinstance(expected, type):
        assert actual is expected
        return
    assert actual[0] == expected[0]
    if recognized(dist_class, params):
        for a, e in zip(actual[1], expected[1], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8)
    else:
        assert all(map(torch.equal, actual[1], expected[1]))


# The rest of the module's options ---------------------------------------------------------------


@pytest.mark.parametrize("interaction", [MODE, RANDOM, DETERMINISTIC], ids=lambda t: t.value)
@pytest.mark.parametrize("name", ["normal", "independent", "independent_normal", "delta"])
@pytest.mark.parametrize("bounded", [rl_data.Bounded, specs.Bounded], ids=["torchrl", "fastprob"])
def test_projection_onto_a_bounded_spec(name, interaction, bounded):
    family = FAMILIES[name]
    results = []
    for (cls, spec), layer in zip(
        [
            (rl.SafeProbabilisticModule, rl_data.Bounded),
            (fastprob.SafeProbabilisticModule, bounded),
        ],
        ("upstream", "fastprob"),
        strict=True,
    ):
        torch.manual_seed(3)
        params = {k: v.requires_grad_() for k, v in family.params(BATCH, torch.float32).items()}
        td, *_ = layout(params, False)
        module = cls(
            in_keys=list(params),
            out_keys=["action"],
            spec=spec(-0.3, 0.3, shape=(SIZE,)),
            safe=True,
            distribution_class=family.upstream("torchrl"),
            default_interaction_type=interaction,
            return_log_prob=True,
            log_prob_key="lp",
        )
        out = run(module, td)
        assert out["action"].abs().max() <= 0.3, layer
        results.append((out["action"].detach(), out["lp"].detach()))
    (value, score), (my_value, my_score) = results
    assert_within_ulps(my_value, value, 2, torch.full_like(value, 4.0))
    torch.testing.assert_close(my_score, score, rtol=0, atol=LOG_PROB_EPS * eps(torch.float32))


@pytest.mark.parametrize("interaction", EVERY, ids=lambda t: t.value)
def test_the_global_interaction_type_counts(interaction):
    family = FAMILIES["normal"]
    params = family.params(BATCH, torch.float64)
    td, *keys = layout(params, False)
    upstream_type = family.stands_for.get(interaction, interaction)
    theirs, ours = LIBRARIES["tensordict"]
    with set_interaction_type(upstream_type):
        expected = run(build(theirs, D.Normal, {}, keys, MODE, True), td)
    with set_interaction_type(interaction):
        found = run(build(ours, D.Normal, {}, keys, MODE, True), td)
    assert_within_ulps(found["action"], expected["action"], 2, params["loc"])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_log_prob_of_stored_values(name, library):
    """`module.log_prob(td)` and the scores of `get_dist`, on values that someone else has drawn."""
    family = FAMILIES[name]
    theirs, ours = LIBRARIES[library]
    params = family.params(BATCH, torch.float64)
    td, *keys = layout(params, False)
    upstream, mine = (
        build(
            cls,
            family.upstream(library),
            family.dist_kwargs(torch.float64, upstream=cls is theirs),
            keys,
            RANDOM,
            True,
        )
        for cls in (theirs, ours)
    )
    stored = run(upstream, td)
    del stored["lp"]
    atol = family.log_prob_eps * eps(torch.float64)
    expected = upstream.log_prob(stored)
    found = mine.log_prob(stored)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    dist, my_dist = upstream.get_dist(stored), mine.get_dist(stored)
    assert my_dist.batch_shape == dist.batch_shape
    # Upstream's one-hot vectors are no events, although their last dimension is scored as one.
    if not name.startswith("one_hot"):
        assert my_dist.event_shape == dist.event_shape
    again = my_dist.log_prob(stored["action"])
    torch.testing.assert_close(again, dist.log_prob(stored["action"]), rtol=0, atol=atol)
