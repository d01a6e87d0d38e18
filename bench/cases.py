"""The registry of cases: what is measured, by which providers, against which targets.

One entry feeds ``python -m bench calls`` and ``pytest bench --benchmark-only``. A provider is
"upstream" and "fastprob" in eager mode everywhere; "compiled" (upstream under ``torch.compile``)
and "hand" (the same maths on bare tensors, no module and no distribution) where a target names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from tensordict.nn import InteractionType, NormalParamExtractor, TensorDictModule
from torch import Tensor, nn

from bench import families
from bench.families import Expected, Family
from bench.gate import Problem, Provider
from bench.implementations import Implementation

Shape = tuple[int, int]
Sides = Mapping[str, Implementation]

SMALL, MEDIUM, LARGE = (16, 8), (4096, 8), (65536, 16)
SHAPES: tuple[Shape, ...] = (SMALL, MEDIUM, LARGE)
BOTH = ("upstream", "fastprob")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: the identifier on the command line and in results.
        title: what is called, in words.
        build: makes the problem for the two sides at a shape.
        providers: the names of the problem's makers.
        shapes: where it is measured.
        quick: whether ``--quick`` measures it.
    """

    name: str
    title: str
    build: Callable[[Sides, Shape], Problem]
    providers: tuple[str, ...] = BOTH
    shapes: tuple[Shape, ...] = SHAPES
    quick: bool = True


@dataclass(frozen=True)
class Target:
    """A bound on the ratio of two providers' times, by shape."""

    case: str
    numerator: str
    denominator: str
    at_least: bool
    bounds: Mapping[Shape, float]

    @property
    def sign(self) -> str:
        return "≥" if self.at_least else "≤"

    def met(self, ratio: float, shape: Shape) -> bool:
        """Whether a measured ratio keeps the bound at a shape."""
        bound = self.bounds[shape]
        return ratio >= bound if self.at_least else ratio <= bound


def _spec(impl: Implementation, family: Family, width: int) -> Any:
    if family.spec is not None:
        return family.spec(impl.specs, width)
    low, high = family.bounds
    return impl.specs.Bounded(low=low, high=high, shape=(width,))


def _module(impl: Implementation, family: Family, params: list[str], **kwargs: Any) -> nn.Module:
    safe = "spec" in kwargs
    cls = impl.SafeProbabilisticModule if safe else impl.ProbabilisticTensorDictModule
    return cls(
        in_keys=params,
        out_keys=["action"],
        distribution_class=getattr(impl, family.distribution),
        # An explicit key: the two sides differ in the default.
        log_prob_key="log_prob",
        return_log_prob=True,
        **kwargs,
    )


def _entries(out: TensorDict) -> dict[str, Tensor]:
    return {"action": out.get("action"), "log_prob": out.get("log_prob")}


def _on(module: Callable[[TensorDict], TensorDict], inputs: dict[str, Tensor]) -> Provider:
    # The tensordict is built once: its own cost is the same on both sides and is not compared.
    data = TensorDict(dict(inputs), batch_size=[next(iter(inputs.values())).shape[0]])
    return Provider(lambda: module(data), _entries)


def sampling(
    family: Family,
    kind: InteractionType = InteractionType.RANDOM,
    safe: bool = False,
    compiled: bool = False,
    hand: Callable[[dict[str, Tensor]], Callable[[], Any]] | None = None,
) -> Callable[[Sides, Shape], Problem]:
    """Returns the builder of a case that takes a value and scores it."""

    def build(sides: Sides, shape: Shape) -> Problem:
        params = family.params(*shape)

        def module(side: str) -> nn.Module:
            impl = sides[side]
            projection = {}
            if safe:
                projection = {"spec": _spec(impl, family, shape[1]), "safe": True}
            keys = list(params)
            return _module(impl, family, keys, default_interaction_type=kind, **projection)

        def expected(seed: int) -> dict[str, Expected]:
            if kind is InteractionType.RANDOM:
                torch.manual_seed(seed)
                draw = family.draw(params)
            else:
                assert family.point is not None
                point = family.point(params)
                draw = families.scored(point, family.score(params, point.value))
            return families.projected(family, draw) if safe else draw

        def rescore(got: dict[str, Tensor]) -> dict[str, Expected]:
            return _scored_with_moments(family, params, got)

        def own_score(got: dict[str, Tensor]) -> dict[str, Expected]:
            log_prob = family.score(params, got["action"].double())
            return {"log_prob": Expected(log_prob, families.log_prob_tolerance(log_prob))}

        def compile_upstream() -> Provider:
            # Every shape's module shares one code object, which Dynamo recompiles 8 times at most.
            torch.compiler.reset()
            compiled_module = torch.compile(module("upstream"), dynamic=False)
            provider = _on(compiled_module, params)
            return Provider(provider.call, provider.read, same_draw=False)

        makers = {side: lambda side=side: _on(module(side), params) for side in sides}
        if compiled:
            makers["compiled"] = compile_upstream
        if hand is not None:
            makers["hand"] = lambda: Provider(hand(params), lambda out: out)
        return Problem(makers, expected, rescore, own_score if family.own_score else None)

    return build


def _scored_with_moments(
    family: Family, params: dict[str, Tensor], got: dict[str, Tensor]
) -> dict[str, Expected]:
    """What a provider with noise of its own must satisfy: its score, and standard moments."""
    action = got["action"].double()
    want = families.scored(Expected(action, 0.0), family.score(params, action))
    z = (action - params["loc"]) / params["scale"]
    n = z.numel()
    got["mean"], got["square"] = z.mean(), z.square().mean()
    # Six standard errors: one false alarm in 5e8.
    want["mean"] = Expected(torch.zeros((), dtype=z.dtype), 6 / math.sqrt(n))
    want["square"] = Expected(torch.ones((), dtype=z.dtype), 6 * math.sqrt(2 / n))
    return want


def sequential(sides: Sides, shape: Shape) -> Problem:
    """An MLP 64-64 and a Normal head in one sequence: what a rollout calls."""
    rows, width = shape
    generator = torch.Generator().manual_seed(rows)
    observation = torch.randn(rows, width, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mlp = nn.Sequential(
            nn.Linear(width, 64),
            nn.Tanh(),
            nn.Linear(64, 64),
            nn.Tanh(),
            nn.Linear(64, 2 * width),
            NormalParamExtractor(),
        )
    with torch.no_grad():
        loc, scale = mlp(observation)

    def make(side: str) -> Provider:
        impl = sides[side]
        kind = InteractionType.RANDOM
        head = _module(impl, families.NORMAL, ["loc", "scale"], default_interaction_type=kind)
        policy = impl.ProbabilisticTensorDictSequential(
            TensorDictModule(mlp, in_keys=["observation"], out_keys=["loc", "scale"]), head
        )
        return _on(policy, {"observation": observation})

    def expected(seed: int) -> dict[str, Expected]:
        torch.manual_seed(seed)
        return families.NORMAL.draw({"loc": loc, "scale": scale})

    return Problem({side: lambda side=side: make(side) for side in sides}, expected)


def safe_composite(sides: Sides, shape: Shape) -> Problem:
    """A Normal and a Categorical in one safe module, as for a stick and its buttons."""
    rows, width = shape
    parts = {"stick": families.NORMAL, "button": families.CATEGORICAL}
    params = {name: family.params(*shape) for name, family in parts.items()}

    def make(side: str) -> Provider:
        impl = sides[side]
        module = impl.SafeProbabilisticModule(
            in_keys=["params"],
            out_keys=list(parts),
            spec=impl.specs.Composite({k: _spec(impl, v, width) for k, v in parts.items()}),
            safe=True,
            distribution_class=impl.CompositeDistribution,
            distribution_kwargs={
                "distribution_map": {k: getattr(impl, v.distribution) for k, v in parts.items()}
            },
            default_interaction_type=InteractionType.RANDOM,
            return_log_prob=True,
        )
        data = TensorDict({"params": params}, batch_size=[rows])

        def read(out: TensorDict) -> dict[str, Tensor]:
            return {key: out.get(key) for name in parts for key in (name, f"{name}_log_prob")}

        return Provider(lambda: module(data), read)

    def expected(seed: int) -> dict[str, Expected]:
        torch.manual_seed(seed)
        want = {}
        for name, family in parts.items():
            draw = families.projected(family, family.draw(params[name]))
            want |= {name: draw["action"], f"{name}_log_prob": draw["log_prob"]}
        return want

    return Problem({side: lambda side=side: make(side) for side in sides}, expected)


def training(family: Family) -> Callable[[Sides, Shape], Problem]:
    """Returns the builder of a case that scores stored actions as PPO does.

    Log-probability and entropy (where the family has one), and the gradient of both with respect to
    the parameters. The gradients that come in from the loss are given, so that none of the loss
    is timed.
    """

    def build(sides: Sides, shape: Shape) -> Problem:
        params = family.params(*shape)
        torch.manual_seed(0)
        stored = family.draw(params)["action"].value.to(
            torch.long if "logits" in params else torch.float32
        )
        outputs = 1 if family.entropy is None else 2
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(shape[0], generator=generator) for _ in range(outputs)]

        def outcome(leaves: dict[str, Tensor], values: list[Tensor]) -> dict[str, Tensor]:
            grads = torch.autograd.grad(
                values, list(leaves.values()), [w.to(values[0].dtype) for w in weights]
            )
            names = ["log_prob", "entropy"][:outputs] + [f"d_{key}" for key in leaves]
            return dict(zip(names, [*values, *grads], strict=True))

        def expected(seed: int) -> dict[str, Expected]:
            leaves = {key: value.double().requires_grad_() for key, value in params.items()}
            values = [family.score(leaves, stored if "logits" in params else stored.double())]
            if family.entropy is not None:
                values.append(family.entropy(leaves))
            # z reaches 5 and 1 / scale 10, so gradients reach 1e3 and lose 1e2 EPS with z.
            return {
                key: Expected(value.detach(), 1e-4 + 2e-5 * value.detach().abs())
                for key, value in outcome(leaves, values).items()
            }

        def make(side: str) -> Provider:
            leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
            module = _module(sides[side], family, list(params))
            data = TensorDict(leaves, batch_size=[shape[0]])

            def call() -> dict[str, Tensor]:
                dist = module.get_dist(data)
                values = [dist.log_prob(stored)]
                if outputs == 2:
                    values.append(dist.entropy())
                return outcome(leaves, values)

            return Provider(call, lambda out: out)

        return Problem({side: lambda side=side: make(side) for side in sides}, expected, grad=True)

    return build


# --------------------------------------------------------------------------- the hand-written floor


# A module's results live in its tensordict until the next call replaces them. The hand-written
# forms keep theirs as long; freed at once, 4 MB at 65536 x 16 would stay in the cache for the
# next call.


def hand_normal(params: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """The fastest eager form known here: five calls of ATen; a matrix product sums the row."""
    loc, scale = params["loc"], params["scale"]
    width = loc.shape[-1]
    ones = torch.ones(width)
    held: dict[str, Tensor] = {}
    bias = torch.full((1,), -0.5 * math.log(2 * math.pi) * width)

    def call() -> dict[str, Tensor]:
        eps = torch.empty_like(loc).normal_()
        action = torch.addcmul(loc, eps, scale)
        energy = torch.log(scale).addcmul_(eps, eps, value=0.5)
        held["action"] = action
        held["log_prob"] = torch.addmv(bias, energy, ones, alpha=-1)
        return held

    return call


def hand_tanh_normal(params: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """The same with tanh, scored before it: log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2 x))."""
    loc, scale = params["loc"], params["scale"]
    width = loc.shape[-1]
    ones = torch.ones(width)
    held: dict[str, Tensor] = {}
    bias = torch.full((1,), -(0.5 * math.log(2 * math.pi) + 2 * math.log(2)) * width)

    def call() -> dict[str, Tensor]:
        eps = torch.empty_like(loc).normal_()
        x = torch.addcmul(loc, eps, scale)
        energy = torch.log(scale).addcmul_(eps, eps, value=0.5).sub_(x, alpha=2)
        # softplus(x, beta=-2) = -softplus(-2 x) / 2
        energy.add_(F.softplus(x, beta=-2), alpha=4)
        held["action"] = x.tanh_()
        held["log_prob"] = torch.addmv(bias, energy, ones, alpha=-1)
        return held

    return call


# ------------------------------------------------------------------------------------ the registry

_MODE, _DETERMINISTIC = InteractionType.MODE, InteractionType.DETERMINISTIC

# Every other family of fastprob's registry in a safe module; a composite has its own builder.
SAFE: dict[str, Family] = {
    "safe_plain_normal": families.PLAIN_NORMAL,
    "safe_tanh_normal": families.TANH_NORMAL,
    "safe_truncated_normal": families.TRUNCATED_NORMAL,
    "safe_delta": families.DELTA,
    "safe_tanh_delta": families.TANH_DELTA,
    "safe_categorical": families.CATEGORICAL,
    "safe_one_hot": families.ONE_HOT,
    "safe_masked_categorical": families.MASKED_CATEGORICAL,
    "safe_masked_one_hot": families.MASKED_ONE_HOT,
    "safe_ordinal": families.ORDINAL,
    "safe_one_hot_ordinal": families.ONE_HOT_ORDINAL,
    "safe_bernoulli": families.BERNOULLI,
    "safe_beta": families.BETA,
}
_QUICK = ("safe_truncated_normal", "safe_masked_categorical", "safe_beta")


def _safe(name: str) -> Case:
    family = SAFE[name]
    # The plain Normal scores each element, and would share its title with the one of "safe".
    what = "plain Normal" if family is families.PLAIN_NORMAL else family.distribution
    build = sampling(family, safe=True)
    return Case(name, f"safe {what}, random", build, shapes=(SMALL, MEDIUM), quick=name in _QUICK)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("safe", "safe Normal, random", sampling(families.NORMAL, safe=True)),
        Case(
            "tanh_normal",
            "TanhNormal, random",
            sampling(families.TANH_NORMAL, hand=hand_tanh_normal),
            (*BOTH, "hand"),
        ),
        Case(
            "normal",
            "Normal, random",
            sampling(families.NORMAL, compiled=True, hand=hand_normal),
            (*BOTH, "compiled", "hand"),
        ),
        Case("normal_train", "Normal, stored actions, fwd+bwd", training(families.NORMAL)),
        Case("tanh_normal_train", "TanhNormal, stored, fwd+bwd", training(families.TANH_NORMAL)),
        Case("categorical_train", "Categorical, stored, fwd+bwd", training(families.CATEGORICAL)),
        Case("categorical", "Categorical, random", sampling(families.CATEGORICAL)),
        Case("one_hot", "OneHotCategorical, random", sampling(families.ONE_HOT)),
        Case("delta", "Delta, random", sampling(families.DELTA)),
        Case("normal_mode", "Normal, mode", sampling(families.NORMAL, _MODE)),
        Case("safe_mode", "safe Normal, mode", sampling(families.NORMAL, _MODE, safe=True)),
        Case(
            "tanh_normal_deterministic",
            "TanhNormal, deterministic",
            sampling(families.TANH_NORMAL, _DETERMINISTIC),
        ),
        Case("categorical_mode", "Categorical, mode", sampling(families.CATEGORICAL, _MODE)),
        Case("sequential", "MLP 64-64 and Normal, random", sequential),
        *map(_safe, SAFE),
        Case(
            "safe_composite",
            "safe composite Normal + Categorical, random",
            safe_composite,
            shapes=(SMALL, MEDIUM),
        ),
    )
}


def _by_shape(small: float, medium: float, large: float) -> dict[Shape, float]:
    return {SMALL: small, MEDIUM: medium, LARGE: large}


TARGETS: tuple[Target, ...] = (
    Target("safe", "upstream", "fastprob", True, _by_shape(6, 3, 3)),
    Target("tanh_normal", "upstream", "fastprob", True, _by_shape(6, 3, 2)),
    Target("normal", "compiled", "fastprob", True, _by_shape(2, 1.4, 1.1)),
    Target("normal", "fastprob", "hand", False, _by_shape(1.5, 1.1, 1.05)),
    Target("normal_train", "upstream", "fastprob", True, {MEDIUM: 2.0}),
    *(
        Target(name, "upstream", "fastprob", True, {SMALL: 4.0})
        for name in (*SAFE, "safe_composite")
    ),
)
