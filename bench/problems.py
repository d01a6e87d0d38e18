"""Builders of the cases: what is called, on which inputs, and what comes out of it.

A builder takes the two sides, a shape ``(rows, width)`` and a device, and returns a
``gate.Problem``: a maker for each provider, and the reference that each is held to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, NormalParamExtractor, TensorDictModule
from torch import Tensor, nn

from bench import families, providers
from bench.families import EPS, Expected, Family
from bench.gate import Problem, Provider, ends
from bench.implementations import Implementation
from bench.points import POINTS

Shape = tuple[int, int]
Sides = Mapping[str, Implementation]
Builder = Callable[[Sides, Shape, str], Problem]
Tensors = dict[str, Tensor]
RANDOM = InteractionType.RANDOM


def spec_of(impl: Implementation, family: Family, width: int, device: str = "cpu") -> Any:
    """Returns what a safe module of a family projects onto."""
    if family.spec is not None:
        spec = family.spec(impl.specs, width)
    else:
        low, high = family.bounds
        spec = impl.specs.Bounded(low=low, high=high, shape=(width,))
    return spec if device == "cpu" else spec.to(device)


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


def _entries(out: TensorDict) -> Tensors:
    return {"action": out.get("action"), "log_prob": out.get("log_prob")}


def _params(family: Family, shape: Shape, device: str) -> Tensors:
    return {key: value.to(device) for key, value in family.params(*shape).items()}


def _batches(inputs: Mapping[str, Any], rows: int, device: str) -> list[TensorDict]:
    # Without a device on a CPU, as most tensordicts there have none.
    made = providers.batches(inputs, rows)
    return made if device == "cpu" else [data.to(device) for data in made]


def _values(expected: Mapping[str, Expected]) -> Tensors:
    return {key: item.value for key, item in expected.items()}


def score_of(
    score: Callable[[Tensor], Tensor],
    value: Tensor,
    free: Tensor | None = None,
    eps: float = EPS,
) -> Expected:
    """The score of a value that a provider returned, and what its rounding allows.

    A provider may have scored the value before it was rounded, or squashed, to float32. What that
    moves is the slope of the score times the rounding of the value.

    Args:
        score: in float64.
        value: as returned.
        free: rows whose value was not projected, the only ones that can be scored; None for all.
        eps: of the dtype in which the value was returned.
    """
    x = value.detach().double().requires_grad_(value.is_floating_point())
    with torch.enable_grad():
        scored = score(x)
        slope = torch.zeros_like(x)
        if scored.requires_grad:
            (slope,) = torch.autograd.grad(scored.sum(), x)
    moved = 4 * eps * x.detach().abs().clamp(min=1.0) * slope.abs().nan_to_num(0.0)
    scored = scored.detach()
    if moved.ndim > scored.ndim:
        moved = moved.sum(-1)
    tolerance = families.log_prob_tolerance(scored) + moved
    if free is not None:
        tolerance = torch.where(free, tolerance, torch.inf)
        scored = torch.where(free, scored, torch.zeros_like(scored))
    return Expected(scored, tolerance)


def _free(family: Family, action: Tensor) -> Tensor | None:
    """Which entries of the score belong to values strictly inside the box of a safe module."""
    if family.spec is not None:
        return None
    low, high = family.bounds
    inside = (action > low) & (action < high)
    elementwise = family in (families.PLAIN_NORMAL, families.BETA)
    return inside if elementwise else inside.all(-1)


def sampling(
    family: Family,
    kind: InteractionType = RANDOM,
    safe: bool = False,
    hand: Callable[[Tensors], Callable[[], Any]] | None = None,
) -> Builder:
    """Returns the builder of a case that takes a value and scores it."""

    def build(sides: Sides, shape: Shape, device: str = "cpu") -> Problem:
        params = _params(family, shape, device)
        inputs = _batches(params, shape[0], device)

        def make(side: str) -> nn.Module:
            impl = sides[side]
            projection = {}
            if safe:
                projection = {"spec": spec_of(impl, family, shape[1], device), "safe": True}
            keys = list(params)
            return _module(impl, family, keys, default_interaction_type=kind, **projection)

        def drawn(of: Mapping[str, Tensor]) -> dict[str, Expected]:
            draw = family.draw(of)
            return families.projected(family, draw) if safe else draw

        def expected(seed: int) -> dict[str, Expected]:
            if kind is RANDOM:
                torch.manual_seed(seed)
                return drawn(params)
            point = POINTS[family.distribution][kind](params)
            want = families.scored(point, family.score(params, point.value))
            return families.projected(family, want) if safe else want

        def rescore(got: Tensors) -> dict[str, Expected]:
            action = got["action"]
            free = _free(family, action) if safe else None
            return {"log_prob": score_of(lambda x: family.score(params, x), action, free)}

        def own_score(got: Tensors) -> dict[str, Expected]:
            return {"log_prob": score_of(lambda x: family.score(params, x), got["action"])}

        def exact_score(got: Tensors) -> Tensors:
            return {"log_prob": family.score(params, got["action"].double())}

        makers = providers.forms(make, inputs, _entries, kind, tuple(sides))
        if hand is not None:
            calls = [hand({key: data[key] for key in params}) for data in inputs]
            makers[providers.HAND] = lambda: Provider(
                providers.in_turn(lambda call: call(), calls), lambda out: out, device == "cpu"
            )
        random = kind is RANDOM and family not in (families.DELTA, families.TANH_DELTA)
        few = {key: ends(value) for key, value in params.items()}
        # A point of a density is rounded before it is scored, or after. One that was projected
        # can no longer be scored.
        own = family.own_score or not (random or safe or family.spec is not None)
        return Problem(
            makers,
            expected,
            rescore=rescore if random else None,
            own_score=own_score if own else None,
            either_score=exact_score if random and family.either_score else None,
            draw=(lambda: _values(drawn(few))) if random else None,
            moved=_bytes(params),
        )

    return build


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def sequential(sides: Sides, shape: Shape, device: str = "cpu") -> Problem:
    """An MLP 64-64 and a Normal head in one sequence: what a rollout calls."""
    rows, width = shape
    generator = torch.Generator().manual_seed(rows)
    observation = torch.randn(rows, width, generator=generator).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp = nn.Sequential(
            nn.Linear(width, 64),
            nn.Tanh(),
            nn.Linear(64, 64),
            nn.Tanh(),
            nn.Linear(64, 2 * width),
            NormalParamExtractor(),
        ).to(device)
    with torch.no_grad():
        loc, scale = copy.deepcopy(mlp).double()(observation.double())
    params = {"loc": loc, "scale": scale}

    def make(side: str) -> nn.Module:
        impl = sides[side]
        head = _module(impl, families.NORMAL, list(params), default_interaction_type=RANDOM)
        return impl.ProbabilisticTensorDictSequential(
            TensorDictModule(mlp, in_keys=["observation"], out_keys=["loc", "scale"]), head
        )

    def draw(of: Tensors) -> dict[str, Expected]:
        # The noise is drawn in float32, and the network in float32 is off by 1e-6: three sums of
        # 64 terms, in an order that fusion changes.
        eps = families.noise(torch.empty_like(of["loc"], dtype=torch.float32))
        value = of["loc"] + eps * of["scale"]
        return families.scored(Expected(value, 1e-5), families.NORMAL.score(of, value))

    def expected(seed: int) -> dict[str, Expected]:
        torch.manual_seed(seed)
        return draw(params)

    def rescore(got: Tensors) -> dict[str, Expected]:
        scored = score_of(lambda x: families.NORMAL.score(params, x), got["action"])
        return {"log_prob": Expected(scored.value, 10 * torch.as_tensor(scored.tolerance))}

    few = {key: ends(value) for key, value in params.items()}
    inputs = _batches({"observation": observation}, rows, device)
    return Problem(
        providers.forms(make, inputs, _entries, RANDOM, tuple(sides)),
        expected,
        rescore,
        draw=lambda: _values(draw(few)),
        moved=_bytes({"observation": observation}),
    )


def safe_composite(sides: Sides, shape: Shape, device: str = "cpu") -> Problem:
    """A Normal and a Categorical in one safe module, as for a stick and its buttons."""
    rows, width = shape
    parts = {"stick": families.NORMAL, "button": families.CATEGORICAL}
    params = {name: _params(family, shape, device) for name, family in parts.items()}

    def make(side: str) -> nn.Module:
        impl = sides[side]
        specs = {key: spec_of(impl, family, width, device) for key, family in parts.items()}
        return impl.SafeProbabilisticModule(
            in_keys=["params"],
            out_keys=list(parts),
            spec=impl.specs.Composite(specs),
            safe=True,
            distribution_class=impl.CompositeDistribution,
            distribution_kwargs={
                "distribution_map": {k: getattr(impl, v.distribution) for k, v in parts.items()}
            },
            default_interaction_type=RANDOM,
            return_log_prob=True,
        )

    def read(out: TensorDict) -> Tensors:
        return {key: out.get(key) for name in parts for key in (name, f"{name}_log_prob")}

    def drawn(of: Mapping[str, Tensors]) -> dict[str, Expected]:
        want = {}
        for name, family in parts.items():
            draw = families.projected(family, family.draw(of[name]))
            want |= {name: draw["action"], f"{name}_log_prob": draw["log_prob"]}
        return want

    def expected(seed: int) -> dict[str, Expected]:
        torch.manual_seed(seed)
        return drawn(params)

    def rescore(got: Tensors) -> dict[str, Expected]:
        want = {}
        for name, family in parts.items():
            want[f"{name}_log_prob"] = score_of(
                lambda x, name=name, family=family: family.score(params[name], x),
                got[name],
                _free(family, got[name]),
            )
        return want

    few = {name: {k: ends(v) for k, v in part.items()} for name, part in params.items()}
    inputs = _batches({"params": params}, rows, device)
    return Problem(
        providers.forms(make, inputs, read, RANDOM, tuple(sides)),
        expected,
        rescore,
        draw=lambda: _values(drawn(few)),
        moved=sum(map(_bytes, params.values())),
    )


def scoring(family: Family) -> Builder:
    """Returns the builder of a case that scores stored actions by a module's ``log_prob``."""

    def build(sides: Sides, shape: Shape, device: str = "cpu") -> Problem:
        params = _params(family, shape, device)
        stored = _stored(family, params)
        want = family.score(params, stored if family.spec is not None else stored.double())

        def make(side: str) -> Provider:
            module = _module(sides[side], family, list(params))
            return Provider(providers.in_turn(module.log_prob, inputs), lambda out: {"score": out})

        inputs = _batches({**params, "action": stored}, shape[0], device)
        return Problem(
            {side: lambda side=side: make(side) for side in sides},
            lambda seed: {"score": families.scored(Expected(want, 0.0), want)["log_prob"]},
            moved=_bytes(params) + _bytes({"stored": stored}),
        )

    return build


def _stored(family: Family, params: Tensors) -> Tensor:
    """Actions as a buffer has them, drawn with a fixed seed."""
    torch.manual_seed(0)
    value = family.draw(params)["action"].value
    discrete = family.spec is not None and family is not families.BERNOULLI
    return value.to(torch.long if discrete else torch.float32)


def training(family: Family, clipped: bool = False) -> Builder:
    """Returns the builder of a case that scores stored actions as PPO does, and differentiates.

    Log-probability and entropy (where the family has one), and the gradient of both with respect to
    the parameters. The gradients that come in from the loss are given, so that none of the loss
    is timed; with ``clipped`` the loss is PPO's clipped surrogate less 0.01 entropy, and is timed.
    """

    def build(sides: Sides, shape: Shape, device: str = "cpu") -> Problem:
        params = _params(family, shape, device)
        discrete = family.spec is not None
        stored = _stored(family, params)
        has_entropy = family.entropy is not None
        outputs = 1 if clipped or not has_entropy else 2
        generator = torch.Generator().manual_seed(1)
        before = family.score(params, stored if discrete else stored.double())
        weights = [torch.randn(before.shape, generator=generator).to(device) for _ in range(2)]
        advantage, before = weights[0], (before + 0.1 * weights[1]).float()

        def values(log_prob: Tensor, entropy: Callable[[], Tensor]) -> list[Tensor]:
            if not clipped:
                return [log_prob] if outputs == 1 else [log_prob, entropy()]
            gain = advantage.to(log_prob.dtype)
            ratio = (log_prob - before).exp()
            surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
            return [-surrogate.mean() - 0.01 * entropy().mean()]

        def outcome(leaves: Tensors, of: list[Tensor]) -> Tensors:
            seeds = None if clipped else [w.to(of[0].dtype) for w in weights[:outputs]]
            wanted = {key: value for key, value in leaves.items() if value.requires_grad}
            grads = torch.autograd.grad(of, list(wanted.values()), seeds)
            names = ["loss"] if clipped else ["log_prob", "entropy"][:outputs]
            names += [f"d_{key}" for key in wanted]
            return dict(zip(names, [*of, *grads], strict=True))

        def expected(seed: int) -> dict[str, Expected]:
            leaves = {
                key: value.double().requires_grad_() if value.is_floating_point() else value
                for key, value in params.items()
            }
            score = family.score(leaves, stored if discrete else stored.double())
            of = values(score, lambda: family.entropy(leaves))  # type: ignore[misc]
            # z reaches 5 and 1 / scale 10, so gradients reach 1e3 and lose 1e2 EPS with z.
            return {
                key: Expected(value.detach(), 1e-4 + 2e-5 * value.detach().abs())
                for key, value in outcome(leaves, of).items()
            }

        def make(side: str, mode: str | None = "eager") -> Provider:
            module = _module(sides[side], family, list(params))

            def forward(data: TensorDict, action: Tensor) -> list[Tensor]:
                dist = module.get_dist(data)
                return values(dist.log_prob(action), dist.entropy)

            run = forward
            if mode != "eager":
                run = torch.compile(forward, dynamic=False, mode=mode)

            def call(turn: tuple[Tensors, TensorDict, Tensor]) -> Tensors:
                if mode == "reduce-overhead":
                    torch.compiler.cudagraph_mark_step_begin()
                leaves, data, action = turn
                return outcome(leaves, run(data, action))

            turns = []
            for data in _batches(params, shape[0], device):
                leaves = {key: data[key] for key in params}
                for value in leaves.values():
                    value.requires_grad_(value.is_floating_point())
                turns.append((leaves, TensorDict(leaves, [shape[0]]), stored.clone()))
            return Provider(providers.in_turn(call, turns), lambda out: out)

        makers: dict[str, Callable[[], Provider]] = {}
        for side in sides:
            makers[side] = lambda side=side: make(side)
            makers[f"{side} compiled"] = lambda side=side: make(side, None)
            makers[f"{side} reduce-overhead"] = lambda side=side: make(side, "reduce-overhead")
        moved = 2 * _bytes(params) + _bytes({"stored": stored})
        return Problem(makers, expected, grad=True, moved=moved)

    return build
