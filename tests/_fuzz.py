"""Random configurations, their run through upstream and through fastprob, and the comparison.

A `Case` says everything about one configuration. `observe` runs it on one side. `check` runs both
and fails where they differ; a difference that is meant stands here as a rule, named `RULE` in a
comment, which asks for exactly what fastprob gives instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import tensordict.nn as td_nn
import torch
import torchrl.data as rl_data
import torchrl.modules as rl
from hypothesis import strategies as st
from tensordict import NonTensorData, TensorDict, is_tensor_collection, unravel_key
from tensordict.nn import (
    InteractionType,
    set_composite_lp_aggregate,
    set_interaction_type,
    set_skip_existing,
)
from tensordict.nn.distributions import Delta as TdDelta
from tensordict.nn.distributions import OneHotCategorical as TdOneHot
from tensordict.tensorclass import is_non_tensor
from torch import Tensor
from torch import distributions as D

import fastprob
from fastprob import distributions as F
from fastprob import specs
from tests._ulp import ulps

MODE, MEDIAN, MEAN = InteractionType.MODE, InteractionType.MEDIAN, InteractionType.MEAN
RANDOM, DETERMINISTIC = InteractionType.RANDOM, InteractionType.DETERMINISTIC
TYPES = (RANDOM, MODE, MEDIAN, MEAN, DETERMINISTIC)
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

UPSTREAM, FASTPROB = "upstream", "fastprob"
MODULES = {
    ("tensordict", UPSTREAM): td_nn.ProbabilisticTensorDictModule,
    ("tensordict", FASTPROB): fastprob.ProbabilisticTensorDictModule,
    ("torchrl", UPSTREAM): rl.SafeProbabilisticModule,
    ("torchrl", FASTPROB): fastprob.SafeProbabilisticModule,
}
SEQUENCES = {
    ("tensordict", UPSTREAM): td_nn.ProbabilisticTensorDictSequential,
    ("tensordict", FASTPROB): fastprob.ProbabilisticTensorDictSequential,
    ("torchrl", UPSTREAM): rl.SafeProbabilisticTensorDictSequential,
    ("torchrl", FASTPROB): fastprob.SafeProbabilisticTensorDictSequential,
}

# families -----------------------------------------------------------------------------------------


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

# cases --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration. `None` in an option is its default."""

    names: tuple[str, ...]  # families: one, or the components of a composite
    variants: tuple[int, ...]
    library: str
    given: str  # whose class the module of fastprob gets
    batch: tuple[int, ...]
    event: int
    dtype: torch.dtype
    even: bool
    grad: bool
    seed: int
    nested: bool  # in-keys
    mapping: bool  # in-keys as a dictionary
    out_key: Any
    name_map: bool
    default_type: InteractionType | None
    global_type: InteractionType | None
    log_prob: bool
    log_prob_key: Any
    aggregate: bool | None
    num_samples: Any
    generator: str | None
    spec: str | None  # whose spec the module of fastprob gets
    safe: bool
    wide: bool  # whether the spec's bounds hold all values
    out: str | None  # tensordict_out
    sequence: bool
    skip: bool  # set_skip_existing
    present: bool  # the results are there before the call
    cache: bool
    positional: bool  # call with tensors

    @property
    def composite(self) -> bool:
        return len(self.names) > 1

    @property
    def families(self) -> list[Family]:
        return [FAMILIES[n] for n in self.names]

    @property
    def interaction(self) -> InteractionType:
        """The type that counts."""
        return self.global_type or self.default_type or MODE

    @property
    def shape(self) -> torch.Size:
        n = self.num_samples
        return torch.Size(() if n is None else (n,) if isinstance(n, int) else n)

    @property
    def component_names(self) -> list[Any]:
        return ["a", ("n", "b"), "c"][: len(self.names)]

    @property
    def sample_keys(self) -> list[Any]:
        if not self.composite:
            return [self.out_key]
        names = self.component_names
        return [("act", *_tuple(k)) for k in names] if self.name_map else names

    @property
    def with_tensors(self) -> bool:
        return self.positional and not self.composite

    def has(self, *families: str) -> bool:
        return any(n in families for n in self.names)


def _tuple(key: Any) -> tuple:
    return (key,) if isinstance(key, str) else key


GENERATORS = ("object", "int", "key_generator", "key_int", "key_tensor")


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    """Configurations of which most run, and some must not."""

    def pick(*values):
        return draw(st.sampled_from(values))

    def rarely(likely, *others):
        return draw(st.sampled_from((likely,) * (2 + len(others)) + others))

    composite = rarely(False, True)
    if composite:
        names = tuple(draw(st.lists(st.sampled_from(COMPONENTS), min_size=2, max_size=3)))
    else:
        names = (draw(st.sampled_from(list(FUSED) * 2 + list(GENERAL))),)
    library = pick("tensordict", "torchrl")
    general = names[0] in GENERAL
    families = [FAMILIES[n] for n in names]
    spec = None
    if library == "torchrl" and not composite and families[0].spec:
        spec = rarely(None, "torchrl", "fastprob")
    return Case(
        names=names,
        variants=tuple(draw(st.integers(0, len(f.kwargs) - 1)) for f in families),
        library=library,
        given=pick("upstream", "own"),
        batch=tuple(draw(st.lists(st.sampled_from((3, 2, 1, 0)), max_size=3))),
        event=draw(st.integers(1, 5)),
        dtype=rarely(torch.float32, torch.float64, *(() if general else HALVES)),
        even=rarely(False, False, True),
        grad=pick(False, True),
        seed=draw(st.integers(0, 2**31)),
        nested=rarely(False, True),
        mapping=rarely(False, True),
        out_key=rarely("action", ("agents", "action")),
        name_map=pick(False, True),
        default_type=pick(RANDOM, RANDOM, RANDOM, None, *TYPES),
        global_type=rarely(None, *TYPES),
        log_prob=rarely(True, False),
        log_prob_key=rarely(None, "lp", ("agents", "lp"), "list"),
        aggregate=pick(None, False, True),
        num_samples=rarely(None, 2, 1, (2, 3), ()),
        generator=rarely(None, *GENERATORS) if pick(False, True) else None,
        spec=spec,
        safe=spec is not None and rarely(True, False),
        wide=pick(False, True),
        out=rarely(None, "same", "empty"),
        sequence=rarely(False, True),
        skip=rarely(False, True),
        present=rarely(False, True),
        cache=rarely(False, True),
        positional=rarely(False, False, True),
    )


# one side -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Seen:
    """What one side did.

    Attributes:
        error: what it raised, or None.
        built: whether the module was built.
        calls: the result of each of two calls: batch size, entries, and which object it is.
        left: the entries that the input had after the calls.
        global_state: torch's random state afterwards.
        state: that of the generator that was passed in.
        out_keys: of the module.
        module: what was called.
        result: the tensordict of the last call.
    """

    error: BaseException | None = None
    built: bool = False
    calls: list = dataclasses.field(default_factory=list)
    left: dict = dataclasses.field(default_factory=dict)
    global_state: Any = None
    state: Any = None
    out_keys: Any = None
    module: Any = None
    result: Any = None


def parameters(case: Case) -> list[dict[str, Tensor]]:
    source = Draw(torch.Generator().manual_seed(case.seed), case.dtype, case.even)
    found = [f.params(source, case.batch, case.event) for f in case.families]
    if case.grad:
        for params in found:
            for value in params.values():
                if value.dtype.is_floating_point:
                    value.requires_grad_()
    return found


def key_of(case: Case, name: str) -> Any:
    """The entry of a parameter; under `mapping` its last part is not the keyword."""
    last = f"p_{name}" if case.mapping else name
    return ("deep", last) if case.nested else last


def inputs(case: Case) -> tuple[TensorDict, Any]:
    """The tensordict, and the in-keys."""
    td = TensorDict({"obs": torch.arange(math.prod(case.batch)).view(case.batch)}, case.batch)
    params = parameters(case)
    if case.composite:
        tree = TensorDict({}, case.batch)
        for name, values in zip(case.component_names, params, strict=True):
            tree[name] = TensorDict(values, case.batch)
        names = ["params"]
        td[key_of(case, "params")] = tree
    else:
        names = list(params[0])
        for name, value in params[0].items():
            td[key_of(case, name)] = value
    if case.mapping:
        return td, {n: key_of(case, n) for n in names}
    return td, [key_of(case, n) for n in names]


def options(case: Case, side: str) -> list[dict]:
    """`distribution_kwargs` of each family."""
    found = []
    for name, family, variant in zip(case.names, case.families, case.variants, strict=True):
        kwargs = dict(family.kwargs[variant])
        if side == UPSTREAM and name.startswith("tanh") and case.dtype is not torch.float32:
            # RULE: TorchRL works with numbers as bounds in float32: 1e-8 off in float64. With
            # tensors it works in their dtype, as fastprob does with both.
            for bound in kwargs.keys() & {"low", "high"}:
                kwargs[bound] = torch.tensor(kwargs[bound], dtype=case.dtype)
        found.append(kwargs)
    return found


def distribution(case: Case, side: str) -> tuple[Any, dict]:
    """`distribution_class` and `distribution_kwargs`."""
    own = side == FASTPROB and case.given == "own"
    classes = [
        f.ours if own and f.ours is not None else f.upstream(case.library) for f in case.families
    ]
    kwargs = options(case, side)
    if not case.composite:
        return classes[0], kwargs[0]
    names = case.component_names
    composite: dict[str, Any] = {"distribution_map": dict(zip(names, classes, strict=True))}
    if any(kwargs):
        composite["extra_kwargs"] = dict(zip(names, kwargs, strict=True))
    if case.name_map:
        composite["name_map"] = dict(zip(names, case.sample_keys, strict=True))
    return F.CompositeDistribution if own else td_nn.CompositeDistribution, composite


def spec_of(case: Case, side: str) -> Any:
    if case.spec is None:
        return None
    source = specs if side == FASTPROB and case.spec == "fastprob" else rl_data
    kind = case.families[0].spec
    if kind == "categorical":
        return source.Categorical(case.event if case.wide else max(1, case.event - 1))
    if kind == "one_hot":
        # TorchRL's default is bool, so that an int64 value is always projected.
        return source.OneHot(case.event, **({"dtype": torch.int64} if case.wide else {}))
    bound = 1e4 if case.wide else 0.3
    return source.Bounded(-bound, bound, shape=(case.event,), dtype=case.dtype)


def repeats(case: Case) -> bool:
    """Whether fastprob repeats a deterministic value."""
    return case.interaction is not RANDOM and bool(case.shape)


def build(case: Case, side: str, library: str | None = None) -> tuple[Any, Any]:
    """The module, and the generator that was handed to it."""
    _, in_keys = inputs(case)
    kind, kwargs = distribution(case, side)
    config: dict[str, Any] = {
        "in_keys": in_keys,
        "distribution_class": kind,
        "distribution_kwargs": kwargs,
        "return_log_prob": case.log_prob,
        "num_samples": case.num_samples,
        "cache_dist": case.cache,
    }
    if not case.composite:
        config["out_keys"] = [case.out_key]
    if case.default_type is not None:
        config["default_interaction_type"] = case.default_type
    elif side == UPSTREAM:
        # RULE: the default is MODE, upstream's DETERMINISTIC.
        config["default_interaction_type"] = MODE
    if case.log_prob_key == "list":
        config["log_prob_keys"] = [f"lp{i}" for i, _ in enumerate(case.sample_keys)]
    elif case.log_prob_key is not None:
        config["log_prob_key"] = case.log_prob_key
    elif side == UPSTREAM and case.aggregate is None and not case.composite:
        # RULE: the default key of one log-probability, where the switch was never used.
        config["log_prob_key"] = "sample_log_prob"
    if side == UPSTREAM and repeats(case):
        # RULE: deterministic values are repeated num_samples times, see `repeated`.
        config["num_samples"] = None
    generator = None
    if case.generator == "object":
        config["generator"] = generator = torch.Generator().manual_seed(case.seed + 1)
    elif case.generator == "int":
        config["generator"] = case.seed + 1
    elif case.generator is not None:
        config["generator"] = "rng"
    library = library or case.library
    if library == "torchrl":
        config["spec"] = spec_of(case, side)
        config["safe"] = case.safe
    module = MODULES[library, side](**config)
    if case.sequence:
        keys = list(in_keys.values()) if isinstance(in_keys, dict) else in_keys
        copy = td_nn.TensorDictModule(
            lambda *given: tuple(x.clone() for x in given),
            in_keys=[("raw", *_tuple(k)) for k in keys],
            out_keys=keys,
        )
        module = SEQUENCES[library, side](copy, module)
    return module, generator


@contextlib.contextmanager
def settings(case: Case, side: str):
    """The switches of one run; upstream's warnings are its own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        if side == UPSTREAM:
            warnings.simplefilter("ignore")
        else:
            # It says that it picks a stand-in for DETERMINISTIC, as upstream does.
            warnings.filterwarnings("ignore", message=".*has no deterministic_sample")
        stack.enter_context(set_composite_lp_aggregate(case.aggregate))
        if case.global_type is not None:
            stack.enter_context(set_interaction_type(case.global_type))
        yield


def entries(td: Any) -> dict[Any, Any]:
    found = {}
    for key, value in td.items(True, is_leaf=_is_leaf):
        found[unravel_key(key)] = value.data if is_non_tensor(value) else value
    return {k: v for k, v in found.items() if not is_tensor_collection(v)}


def _is_leaf(kind: type) -> bool:
    return not issubclass(kind, TensorDict)


def observe(case: Case, side: str, library: str | None = None, change: Any = None) -> Seen:
    """Runs a case on one side.

    Args:
        case: the configuration.
        side: `UPSTREAM` or `FASTPROB`.
        library: whose module is run, where it is not that of the case.
        change: what is done to the module before it is called, for the tests of this file.
    """
    seen = Seen()
    with settings(case, side):
        try:
            module, generator = build(case, side, library)
            if change is not None:
                module = change(module)
            seen.built = True
            seen.module = module
            td, in_keys = inputs(case)
            keys = list(in_keys.values()) if isinstance(in_keys, dict) else in_keys
            if case.generator == "key_generator":
                generator = torch.Generator().manual_seed(case.seed + 1)
                td["rng"] = NonTensorData(generator, batch_size=case.batch)
            elif case.generator == "key_int":
                td["rng"] = NonTensorData(case.seed + 1, batch_size=case.batch)
            elif case.generator == "key_tensor":
                td["rng"] = torch.full(case.batch, case.seed + 1)
            if case.present:
                for key, family in zip(case.sample_keys, case.families, strict=True):
                    event = (case.event,) if family.event else ()
                    td[key] = torch.full((*case.batch, *event), 7.0)
                if case.log_prob:
                    for key in set(module.out_keys) - {
                        unravel_key(k) for k in keys + case.sample_keys
                    }:
                        td[key] = torch.full((*case.batch, 1), 7.0)
            if case.sequence:
                for key in keys:
                    td[("raw", *_tuple(key))] = td[key]
                td = td.exclude(*keys)
            seen.out_keys = list(module.out_keys)
            torch.manual_seed(case.seed)
            for _ in range(2):
                out = {
                    None: None,
                    "same": TensorDict({"kept": torch.zeros(case.batch)}, case.batch),
                    "empty": TensorDict(),
                }[case.out]
                with set_skip_existing(True) if case.skip else contextlib.nullcontext():
                    if case.with_tensors:
                        result = module(*(td[k] for k in module.in_keys))
                    elif out is None:
                        result = module(td)
                    else:
                        result = module(td, tensordict_out=out)
                if is_tensor_collection(result):
                    seen.result = result
                    same = "input" if result is td else "out" if result is out else "new"
                    seen.calls.append((same, tuple(result.batch_size), entries(result)))
                else:
                    result = result if isinstance(result, tuple) else (result,)
                    seen.calls.append(("tensors", (), dict(enumerate(result))))
            seen.left = entries(td)
            seen.global_state = torch.get_rng_state()
            seen.state = None if generator is None else generator.get_state()
        except Exception as error:
            seen.error = error
    return seen


# the comparison -----------------------------------------------------------------------------------


class Mismatch(AssertionError):
    """The two sides differ, or fastprob is wrong."""


def require(condition: Any, *what: Any) -> None:
    if not condition:
        raise Mismatch(" ".join(map(str, what)))


def check(case: Case, change: Any = None) -> str:
    """Runs a case on both sides and compares.

    Returns:
        what came of it: `"equal"`, `"both raise"`, `"upstream raises"` or `"ruled out"`.

    Raises:
        Mismatch: if they differ in a way that no rule names.
    """
    library = None
    if case.has("tanh_normal", "tanh_normal_0") and case.log_prob and case.interaction is RANDOM:
        # RULE: a TanhNormal's draw is scored at the value before tanh. TorchRL's module does so as
        # well, tensordict's goes through atanh.
        library = "torchrl"
    theirs = observe(case, UPSTREAM, library)
    mine = observe(case, FASTPROB, change=change)
    if theirs.error is not None or is_unfit(case):
        if mine.error is not None:
            # torch's own distributions may raise what they like, fastprob's code may not.
            foreign = case.has(*GENERAL) and "/torch/distributions/" in raised_in(mine.error)
            require(foreign or isinstance(mine.error, KINDS), "no clear error:", repr(mine.error))
            return "both raise"
        check_alone(case, mine)
        return "upstream raises"
    if scores_a_mean(case):
        # RULE: the mean of a discrete family is none of its values and has no log-probability.
        # Upstream scores it as if it were one, or gives NaN.
        require(isinstance(mine.error, NotImplementedError), "scored a mean:", repr(mine.error))
        require("no log-probability" in str(mine.error), mine.error)
        return "ruled out"
    require(mine.error is None, "raises where upstream does not:", repr(mine.error))
    compare(case, theirs, mine)
    compare_stored(case, theirs, mine)
    return "equal"


def raised_in(error: BaseException) -> str:
    """The file that an error comes from."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else frame.tb_frame.f_code.co_filename.replace("\\", "/")


def is_unfit(case: Case) -> bool:
    """Whether upstream's answer is no answer, or not one to compare with."""
    # RULE: upstream's one-hot classes take logits of one category for logits that have no dimension
    # of categories, and the last dimension of the batch for that.
    if case.event == 1 and case.has("one_hot", "one_hot_probs", "one_hot_ordinal"):
        return True
    # RULE: see `named`. A sequence's tensordict_out gets the out-keys alone, without what upstream
    # has written under other keys.
    if case.composite and case.log_prob_key == "list" and case.sequence and case.out is not None:
        return True
    # RULE: upstream's mean of a one-hot class is a NaN for each index. fastprob's is a vector.
    if case.interaction is MEAN and case.has(*ONE_HOTS) and not skipped(case):
        return True
    # RULE: upstream's scores of a list of actions are those of other rows with three batch
    # dimensions, of which it exchanges two.
    if case.has("masked_list", "masked_one_hot_list") and len(case.batch) + len(case.shape) > 2:
        return True
    # RULE: upstream estimates the means of all components from draws where one has none.
    if case.composite and case.interaction is MEAN and case.has("tanh_normal"):
        return True
    # RULE: `repeats`, where upstream has no call to compare with: a sequence updates tensordict_out
    # from a repeated result, of another batch size.
    return repeats(case) and case.sequence and case.out is not None


# What a user can read a message of.
KINDS = (ValueError, TypeError, KeyError, RuntimeError)

INDEXED = {n for n, f in FUSED.items() if f.spec in ("categorical", "one_hot")}
ONE_HOTS = {n for n, f in FUSED.items() if f.spec == "one_hot"}
BETAS = {"beta", "independent_beta"}
# Those that normalize logits of several categories.
FLIPPED = {n for n in INDEXED if not n.endswith("_probs")}
DISCRETE = {n for n, f in FUSED.items() if f.spec in ("categorical", "one_hot") or f.discrete} | {
    "bernoulli"
}


def scores_a_mean(case: Case) -> bool:
    return case.interaction is MEAN and case.log_prob and case.has(*DISCRETE) and not skipped(case)


def skipped(case: Case) -> bool:
    """Whether the values are there already and are left as they are."""
    return case.skip and case.present and not case.with_tensors


def compare(case: Case, theirs: Seen, mine: Seen) -> None:
    """Fails unless both did the same, but for what the rules name."""
    summed = case.composite and case.aggregate is None and case.log_prob
    expected_keys = list(theirs.out_keys)
    if summed:
        # RULE: with several sampled keys and the switch unset, their sum is written too.
        expected_keys.append(total_key(case))
    require(mine.out_keys == expected_keys, "out_keys", mine.out_keys, expected_keys)
    both = list(zip(theirs.calls, mine.calls, strict=True))
    if repeats(case) and case.skip:
        # Upstream's unrepeated result is in the input then, and is there already.
        both = both[:1]
    if not same_noise(case):
        both = both[:1]
    if case.skip and case.composite and case.log_prob_key == "list":
        # Upstream's first call does not write its out-keys, so that its second one is not skipped.
        both = both[:1]
    for (kind, size, found), (my_kind, my_size, my_found) in both:
        found = named(case, found)
        caches = case.cache and case.out is not None and kind != "tensors"
        if caches and not (case.sequence or skipped(case)):
            # RULE: cache_dist writes the parameters next to the sample. Upstream never does, for
            # want of classes with an `update`, or does not get that far.
            shape = torch.Size() if repeats(case) else case.shape
            found |= {k: _expand(v, shape) for k, v in parameters_of(case).items()}
        if repeats(case) and kind != "tensors" and not skipped(case):
            size = (*case.shape, *size)
            found = {k: _expand(v, case.shape) for k, v in found.items()}
            kind = "new"
        elif repeats(case) and not skipped(case):
            found = {k: _expand(v, case.shape) for k, v in found.items()}
        require(my_kind == kind, "returns", my_kind, "and not", kind)
        require(my_size == size, "batch size", my_size, "and not", size)
        if summed and skipped(case):
            found[total_key(case)] = torch.full((*case.batch, 1), 7.0)
        elif summed:
            parts = [found[k] for k in theirs.out_keys[-len(case.sample_keys) :]]
            found[total_key(case)] = sum(_reduced(p, len(case.shape + case.batch)) for p in parts)
        require(
            set(my_found) == set(found), "keys", sorted(map(str, my_found)), sorted(map(str, found))
        )
        other = replaced(case, mine, found, my_found)
        for key, wanted in found.items():
            compare_entry(case, mine, key, my_found[key], wanted, other)
    if not repeats(case):
        left = set(named(case, theirs.left))
        if summed and total_key(case) in mine.calls[0][2]:
            left |= {total_key(case)} & set(mine.left)
        require(set(mine.left) == left, "left", set(mine.left) ^ left)
        if same_noise(case):
            require(torch.equal(mine.global_state, theirs.global_state), "global random state")
        if theirs.state is not None and same_noise(case):
            require(torch.equal(mine.state, theirs.state), "state of the generator")


def named(case: Case, found: dict) -> dict:
    """Upstream's entries under the keys where they belong."""
    found = dict(found)
    if case.composite and case.log_prob_key == "list":
        # RULE: log_prob_keys of a composite name its entries. Upstream says so in out_keys, and
        # writes "<key>_log_prob" all the same, but for TorchRL's random values.
        for i, key in enumerate(case.sample_keys):
            written = (*_tuple(key)[:-1], f"{_tuple(key)[-1]}_log_prob")
            written = written if len(written) > 1 else written[0]
            if written in found:
                found[f"lp{i}"] = found.pop(written)
    return found


def same_noise(case: Case) -> bool:
    """Whether both must draw the same amount of noise."""
    if case.skip and case.composite and case.log_prob_key == "list":
        return False  # see `compare`
    if case.safe and case.spec and case.families[0].spec == "one_hot":
        # RULE: TorchRL's projection onto a one-hot spec draws noise, also where nothing is wrong.
        return False
    # RULE: where upstream has no mean, it takes that of 1000 draws; fastprob has it.
    return not (case.interaction is MEAN and case.has("tanh_normal", "tanh_normal_0"))


def takes_noise(case: Case) -> bool:
    """Whether the value may take noise: a random one, or a mean without a closed form."""
    if case.interaction in (MODE, MEDIAN):
        return False
    return case.interaction is RANDOM or case.has(*GENERAL)


def parameters_of(case: Case) -> dict[Any, Tensor]:
    """The entries under the in-keys."""
    td, in_keys = inputs(case)
    keys = list(in_keys.values()) if isinstance(in_keys, dict) else in_keys
    return entries(td.select(*keys))


def compare_stored(case: Case, theirs: Seen, mine: Seen) -> None:
    """Compares `log_prob` of the values that upstream has drawn."""
    plain = theirs.result is not None and not (case.sequence or case.skip or case.safe)
    if not (plain and case.interaction is RANDOM and case.out is None):
        return
    if case.has("tanh_normal", "tanh_normal_0", "tanh_delta"):
        return  # through atanh, which magnifies the rounding of the value without a bound
    scores = []
    for side, seen in ((UPSTREAM, theirs), (FASTPROB, mine)):
        with settings(case, side):
            try:
                found = seen.module.log_prob(theirs.result.copy())
            except Exception as error:
                if side == UPSTREAM:
                    return
                raise Mismatch(f"log_prob raises: {error!r}") from error
        found = entries(found) if is_tensor_collection(found) else {"log_prob": found}
        # Upstream's result also has the generator of the input.
        scores.append({k: v for k, v in found.items() if k != "rng"})
    wanted, found = named(case, scores[0]), scores[1]
    require(set(found) == set(wanted), "log_prob gives", set(found), "and not", set(wanted))
    for key, value in wanted.items():
        require(found[key].dtype == value.dtype, "log_prob", key, "dtype", found[key].dtype)
        require(found[key].shape == value.shape, "log_prob", key, "shape", found[key].shape)
        compare_score(case, key, found[key].detach(), value.detach())


def total_key(case: Case) -> Any:
    return case.log_prob_key if case.log_prob_key not in (None, "list") else "sample_log_prob"


def _expand(value: Any, shape: torch.Size) -> Any:
    return value.expand(shape + value.shape) if isinstance(value, Tensor) else value


def _reduced(part: Tensor, ndim: int) -> Tensor:
    return part.flatten(ndim).sum(-1) if part.ndim > ndim else part


def role(case: Case, mine: Seen, key: Any) -> tuple[str, Any]:
    """What an entry is: `"value"` with its family, `"score"`, or `"other"`."""
    if isinstance(key, int):
        key = mine.out_keys[key]
    if key in case.sample_keys:
        return "value", case.sample_keys.index(key)
    last = str(_tuple(key)[-1])
    if last.endswith("_log_prob") or last in ("lp", "lp0", "lp1", "lp2"):
        return "score", None
    return "other", None


def replaced(case: Case, mine: Seen, wanted: dict, found: dict) -> Tensor | None:
    """The rows, `[*sample, *batch]`, where a rule has fastprob give another value than upstream.

    Their scores are those of the other value; `compare_value` says what it may be.
    """
    if skipped(case):
        return None
    rows = None
    for key, theirs in wanted.items():
        what, index = role(case, mine, key)
        if what != "value" or found[key].shape != theirs.shape:
            continue
        name, family = case.names[index], case.families[index]
        if name in FLIPPED and case.dtype in HALVES and case.interaction is RANDOM:
            other = found[key] != theirs
        elif case.interaction in (MODE, DETERMINISTIC) and (name in BETAS or family.discrete):
            other = theirs.isnan() if theirs.is_floating_point() else torch.zeros_like(theirs) > 0
        else:
            continue
        if family.event:
            other = other.any(-1)
        rows = other if rows is None else rows | other
    return rows


def compare_entry(
    case: Case, mine: Seen, key: Any, found: Any, wanted: Any, other: Tensor | None
) -> None:
    what, index = role(case, mine, key)
    if key == "rng" and case.generator in ("key_int", "key_tensor") and not takes_noise(case):
        # RULE: a value that takes no noise leaves the seed as it is. Upstream goes on to the next.
        require((torch.as_tensor(found) == case.seed + 1).all(), "the seed was changed", found)
        return
    if isinstance(wanted, torch.Generator):
        require(isinstance(found, torch.Generator), key, "is", found)
        # The second call's draws count as well, which upstream skips, see `compare`.
        same_calls = same_noise(case) and not (repeats(case) and case.skip)
        same = torch.equal(found.get_state(), wanted.get_state())
        require(same or not same_calls, "state of the generator under the key")
        return
    if not isinstance(wanted, Tensor):
        require(found is wanted or found == wanted, key, "is", found, "and not", wanted)
        return
    require(isinstance(found, Tensor), key, "is", type(found))
    require(found.dtype == wanted.dtype, key, "has the dtype", found.dtype, "not", wanted.dtype)
    require(found.shape == wanted.shape, key, "has the shape", found.shape, "not", wanted.shape)
    if not (
        # RULE: a Delta's draw carries no gradient. Upstream's says that it needs one all the same,
        # as a view does that was taken of a leaf under no_grad.
        (case.has("delta") and case.interaction is RANDOM)
        # RULE: upstream's mean of a Categorical is a constant NaN.
        or (case.interaction is MEAN and case.has(*DISCRETE))
        # RULE: TorchRL's TanhDelta has no mean, so that it is that of draws, without a gradient.
        or (case.interaction is MEAN and case.has("tanh_delta"))
        # RULE: a TanhDelta's log-prob is inf or -inf, and has no gradient to speak of.
        or (case.has("tanh_delta") and what == "score")
    ):
        require(found.requires_grad == wanted.requires_grad, key, "requires_grad", wanted)
    found, wanted = found.detach(), wanted.detach()
    if what == "value" and not skipped(case):
        compare_value(case, index, key, found, wanted)
    elif what == "score" and not skipped(case):
        if other is not None:
            other = other.view(other.shape + (1,) * (found.ndim - other.ndim))
            require(not (found.isnan() & other).any(), key, "has a NaN", found)
            wanted = torch.where(other, found, wanted)
        compare_score(case, key, found, wanted)
    elif what == "value" and case.safe and case.names[index] in ONE_HOTS:
        # RULE: the value that was there is no member of the spec. TorchRL projects it onto one of
        # the categories by chance, fastprob onto that of the largest entry, of equals the first.
        require((found.sum(-1) == 1).all() and found[..., 0].all(), key, found)
    else:
        require(_same(found, wanted), key, "was changed")


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def compare_value(case: Case, index: int, key: Any, found: Tensor, wanted: Tensor) -> None:
    family, name = case.families[index], case.names[index]
    if name in FLIPPED and case.dtype in HALVES and case.interaction is RANDOM:
        # RULE: fastprob normalizes logits in one operation, upstream in two with a rounding
        # between, and the ordinals' scores likewise: the probabilities differ by an eps or two, and
        # so does a draw in 200 at most (bfloat16 ordinals; 1 in 800 of other logits).
        flipped = found != wanted
        if name in ONE_HOTS:
            require(case.safe or (found.sum(-1) == 1).all(), key, "is not one-hot", found)
            flipped = flipped.any(-1)
        most = 2 + 0.04 * flipped.numel()
        require(flipped.sum() <= most, key, flipped.sum(), "draws differ", found, wanted)
        return
    if case.interaction is MEAN and name in INDEXED and wanted.isnan().all():
        # RULE: upstream's mean of a Categorical is NaN.
        check_point(case, index, found)
        return
    if case.interaction in (MODE, DETERMINISTIC):
        if case.even and name in ("ordinal", "one_hot_ordinal"):
            # RULE: scores of 0 make all categories equal, and rounding picks one.
            check_point(case, index, found)
            return
        if name in ONE_HOTS and case.safe and (case.even or case.dtype in HALVES):
            # RULE: of several modes one is taken. Upstream's has a one for each, which the
            # projection replaces by a draw.
            require((found.sum(-1) == 1).all(), key, "is not one-hot")
            return
        if name in ONE_HOTS and not case.safe:
            # RULE: of several modes one is taken. Upstream's one-hot mode has a one for each.
            tied = wanted.sum(-1, keepdim=True) > 1
            require((found.sum(-1) == 1).all(), key, "is not one-hot")
            require(((wanted == 1) | (found == 0)).all(), key, found, wanted)
            wanted = torch.where(tied, found, wanted)
        if case.dtype in HALVES and family.spec == "categorical" and not case.safe:
            # RULE: the mode is that of the logits given. Upstream's is that of the normalized ones,
            # which rounding makes equal: by 2 eps of numbers up to 10, so 2 * 10 / 128 at most.
            probs = probabilities(name, doubled(case, index)[0], case.event)
            at = found[(0,) * len(case.shape)].unsqueeze(-1)
            require((probs.gather(-1, at) >= probs.amax(-1, True) * 0.85).all(), key, found)
            return
        if family.discrete:
            # RULE: of two equally probable values 0 is taken, and logits decide what is equally
            # probable. Upstream's mode is NaN, also where the sigmoid was rounded to 1/2.
            above = torch.zeros_like(wanted)
            if "logits" in parameters(case)[index]:
                above = (parameters(case)[index]["logits"] > 0).to(wanted.dtype)
            right = (found == above) | ~wanted.isnan()
            require(right.all(), key, found, wanted)
            wanted = torch.where(wanted.isnan(), found, wanted)
    if name in BETAS and case.interaction is MODE:
        # RULE: with no concentration above 1 the mode is the end where the density grows faster,
        # and 1/2 where it is flat. Upstream says 1 of any pair below 1, and NaN where one of them
        # is 1, which is common in half precision.
        params = parameters(case)[index]
        a, b = params["concentration1"], params["concentration0"]
        end = torch.where((a == 1) & (b == 1), 0.5, (a >= b).to(wanted.dtype)).to(wanted.dtype)
        if case.safe and not case.wide:
            end = end.clamp_max(0.3)
        wanted = torch.where((a <= 1) & (b <= 1), end, wanted)
    if name == "truncated_normal" and case.interaction is MODE:
        # RULE: a mode at a bound is the bound. Upstream stays 1e-6 inside.
        wanted = torch.where((found - wanted).abs() <= 1.1e-6, found, wanted)
    if name in ("tanh_normal", "tanh_normal_0") and case.interaction is MEAN:
        # RULE: the mean of a TanhNormal is the true one. Upstream's is that of 1000 draws, with a
        # standard error of at most half the width / sqrt(1000).
        wide = 2.5 if family.kwargs[case.variants[index]] else 2.0
        require(((found - wanted).abs() <= 6 * wide / 2 / 1000**0.5).all(), key, found, wanted)
        return
    if not wanted.dtype.is_floating_point or family.discrete or family.value_ulps == 0:
        require(_same(found, wanted), key, found, wanted)
        return
    size = torch.full_like(wanted, 3.0 if family.spec == "bounded" else 1.0)
    distance = ulps(found, wanted, size)
    worst = distance.max().item() if distance.numel() else 0.0
    require(worst <= family.value_ulps, key, f"{worst:.1f} units apart", found, wanted)


def compare_score(case: Case, key: Any, found: Tensor, wanted: Tensor) -> None:
    if case.has("tanh_normal", "tanh_normal_0") and case.interaction is MEAN:
        return  # RULE: the score of another mean, see `compare_value`
    if case.has("tanh_delta"):
        # RULE: the log-prob of a TanhDelta's own point is inf. Upstream inverts tanh on the point,
        # and does not always find it again.
        found = torch.where((found == math.inf) & (wanted == -math.inf), wanted, found)
    most = sum(f.score_eps * case.event for f in case.families) * torch.finfo(wanted.dtype).eps
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    distance = (found.double() - wanted.double()).abs()[~same]
    worst = distance.max().item() if distance.numel() else 0.0
    require(worst <= most, key, f"{worst:.3g} apart, {most:.3g} allowed", found, wanted)


def check_alone(case: Case, mine: Seen) -> None:
    """Fails unless what fastprob gives, where upstream raises, is right."""
    if case.with_tensors or skipped(case) or (case.sequence and case.out is not None):
        return
    for _, size, found in mine.calls:
        full = (*case.shape, *case.batch)
        require(size == full or case.out == "empty", "batch size", size, full)
        for index, (key, family) in enumerate(zip(case.sample_keys, case.families, strict=True)):
            value = found[key]
            moment = case.interaction is MEAN and case.names[index] in INDEXED
            event = family.event or (moment and case.names[index] in ONE_HOTS)
            wanted = (*full, case.event) if event else full
            if case.names[index] == "third_party" or not family.event:
                wanted = (*full, case.event) if family.event else full
            require(value.shape == wanted, key, "has the shape", value.shape, wanted)
            check_point(case, index, value.detach())
        if case.log_prob:
            written = [k for k in mine.out_keys if role(case, mine, k)[0] == "score"]
            require(written, "no key of a log-prob among", mine.out_keys)
            for key in written:
                require(key in found, key, "was not written")
            if not case.composite:
                check_score(case, found[case.sample_keys[0]], found[written[0]])


def check_score(case: Case, value: Tensor, score: Tensor) -> None:
    """Fails unless a score is that of the value, by upstream's density in float64."""
    family, name = case.families[0], case.names[0]
    exact = case.interaction is not RANDOM or not name.startswith("tanh")
    if case.safe or case.dtype in HALVES or name in GENERAL or name == "tanh_delta" or not exact:
        return  # scored before the projection, too coarse, upstream's own code, through atanh
    if not value.numel():
        return  # upstream raises on empty batches here
    params, kwargs = doubled(case, 0)
    value, score = value.detach(), score.detach().double()
    if name in INDEXED:
        at = (value.argmax(-1) if name in ONE_HOTS else value.long()).unsqueeze(-1)
        probs = probabilities(name, params, case.event)
        wanted = probs.expand(*case.shape, *probs.shape).gather(-1, at).log().squeeze(-1)
    else:
        wanted = family.upstream("torchrl")(**params, **kwargs).log_prob(value.double())
    require(score.shape == wanted.shape, "the score has the shape", score.shape, wanted.shape)
    # The value was rounded to its dtype: |d log p / dx| * eps, with a slope of up to 100.
    most = (family.score_eps + 300) * case.event * torch.finfo(case.dtype).eps
    same = (score == wanted) | ((score - wanted).abs() <= most)
    require(same.all(), "score", score, wanted)


def doubled(case: Case, index: int) -> tuple[dict, dict]:
    """Parameters and keywords of a family in float64."""
    params = {
        k: v.detach().double() if v.dtype.is_floating_point else v
        for k, v in parameters(case)[index].items()
    }
    kwargs = {
        k: torch.tensor(float(v), dtype=torch.float64) if k in ("low", "high") else v
        for k, v in options(case, UPSTREAM)[index].items()
    }
    return params, kwargs


def check_point(case: Case, index: int, value: Tensor) -> None:
    """Fails unless a deterministic value is what its interaction type says, within chance.

    The truth is 2000 draws of upstream's distribution in float64, and its density.
    """
    family, name = case.families[index], case.names[index]
    if case.safe or case.interaction is RANDOM or not value.numel() or name in GENERAL:
        return
    if case.dtype in HALVES:
        return  # too coarse to tell
    params, kwargs = doubled(case, index)
    value = value[(0,) * len(case.shape)].double()
    if name in INDEXED:
        probs = probabilities(name, params, case.event)
        if case.interaction is MEAN:
            index_mean = (probs * torch.arange(case.event)).sum(-1)
            wanted = probs if name in ONE_HOTS else index_mean
            require((value - wanted).abs().max() < 1e-4, "mean", value, wanted)
            return
        at = (value.argmax(-1) if name in ONE_HOTS else value.long()).unsqueeze(-1)
        if name in ONE_HOTS:
            require((value.sum(-1) == 1).all(), "not one-hot:", value)
        if case.interaction is MEDIAN:
            upto = probs.cumsum(-1)
            before = upto - probs
            right = (upto.gather(-1, at) > 0.4999) & (before.gather(-1, at) < 0.5001)
            require(right.all(), "median", value, probs)
            return
        require((probs.gather(-1, at) >= probs.amax(-1, True) - 1e-6).all(), "mode", value, probs)
        return
    torch.manual_seed(case.seed)
    dist = family.upstream("torchrl")(**params, **kwargs)
    draws = dist.sample((2000,))
    if case.interaction is MEAN:
        error = 6 * draws.std(0) / 2000**0.5 + 1e-4
        require(((draws.mean(0) - value).abs() <= error).all(), "mean", value, draws.mean(0))
    elif case.interaction is MEDIAN:
        # A standard error of 0.011.
        tolerance = 1e-5 * (1 + value.abs())
        below = (draws <= value + tolerance).double().mean(0)
        above = (draws >= value - tolerance).double().mean(0)
        require((below >= 0.43).all() and (above >= 0.43).all(), "median", value, below)
    elif case.interaction is MODE and name not in ("delta", "tanh_delta"):
        best = dist.log_prob(draws[:200]).amax(0)
        require((dist.log_prob(value) >= best - 1e-3).all(), "mode", value, best)


def probabilities(name: str, params: dict[str, Tensor], n: int) -> Tensor:
    """Those of the categories, `[*batch, K]`."""
    if "probs" in params:
        weights = params["probs"]
    else:
        # The ordinals' logits: Tang & Agrawal 2020, equation 4, up to a constant.
        logits = params["scores"].cumsum(-1) if "scores" in params else params["logits"]
        weights = torch.softmax(logits, -1)
    if "mask" in params:
        weights = weights * params["mask"]
    if "indices" in params:
        allowed = torch.zeros_like(weights).scatter_(-1, params["indices"], 1.0)
        weights = weights * allowed
    return weights / weights.sum(-1, keepdim=True)
