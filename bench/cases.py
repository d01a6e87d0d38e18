"""The registry of cases: what is measured, by which providers, against which targets.

One entry feeds ``python -m bench calls`` and ``pytest bench --benchmark-only``. Upstream and
fastprob in eager mode stand in each; the other providers (see ``bench.providers``) where compiling
and exporting, at 10 s each, are worth it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensordict.nn import InteractionType

from bench import families, hand, objectives, problems
from bench.families import Family
from bench.points import POINTS
from bench.problems import Builder, Shape, sampling, scoring, training
from bench.providers import COMPILED, EXPORTED, GRAPHED, HAND, REDUCED, ROOF, SIDES

SMALL, MEDIUM, LARGE = (16, 8), (4096, 8), (65536, 16)
SHAPES: tuple[Shape, ...] = (SMALL, MEDIUM, LARGE)
# 1M x 64 takes 11 s a call of upstream on a CPU.
HUGE: tuple[Shape, ...] = ((1 << 20, 8), (1 << 20, 64))
GPU_ONLY = (*REDUCED, *GRAPHED, ROOF)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: the identifier on the command line and in results.
        title: what is called, in words.
        build: makes the problem for the two sides at a shape, on a device.
        also: providers beside the two sides in eager mode.
        shapes: where it is measured.
        gpu_shapes: where it is measured on a GPU besides.
        quick: whether ``--quick`` measures it.
        sides: the sides that have it; upstream lacks some values, or gets them wrong.
    """

    name: str
    title: str
    build: Builder
    also: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = SHAPES
    gpu_shapes: tuple[Shape, ...] = ()
    quick: bool = True
    sides: tuple[str, ...] = SIDES

    def providers(self, device: str, shape: Shape) -> tuple[str, ...]:
        """The names of those that are timed at a shape on a device."""
        also = [name for name in self.also if device != "cpu" or name not in GPU_ONLY]
        # What an export spares is Python, which does not count at large shapes.
        return (*self.sides, *(name for name in also if name != EXPORTED or shape == SMALL))

    def at(self, device: str) -> tuple[Shape, ...]:
        """The shapes on a device."""
        return self.shapes if device == "cpu" else (*self.shapes, *self.gpu_shapes)


@dataclass(frozen=True)
class Target:
    """A bound on the ratio of two providers' times, by shape."""

    case: str
    numerator: str
    denominator: str
    at_least: bool
    bounds: Mapping[Shape, float]
    device: str = "cpu"

    @property
    def sign(self) -> str:
        return "≥" if self.at_least else "≤"

    def met(self, ratio: float, shape: Shape) -> bool:
        """Whether a measured ratio keeps the bound at a shape."""
        bound = self.bounds[shape]
        return ratio >= bound if self.at_least else ratio <= bound


# Each family of fastprob's registry, by the name that its cases have; a composite has its own case.
FAMILIES: dict[str, Family] = {
    "normal": families.NORMAL,
    "plain_normal": families.PLAIN_NORMAL,
    "tanh_normal": families.TANH_NORMAL,
    "truncated_normal": families.TRUNCATED_NORMAL,
    "delta": families.DELTA,
    "tanh_delta": families.TANH_DELTA,
    "categorical": families.CATEGORICAL,
    "one_hot": families.ONE_HOT,
    "masked_categorical": families.MASKED_CATEGORICAL,
    "masked_one_hot": families.MASKED_ONE_HOT,
    "ordinal": families.ORDINAL,
    "one_hot_ordinal": families.ONE_HOT_ORDINAL,
    "bernoulli": families.BERNOULLI,
    "beta": families.BETA,
}
# Upstream raises for these, but for two: the mean of a TanhNormal, which it takes over 1,000 draws,
# and the deterministic value of an Ordinal, for which it warns at every first call.
NOT_UPSTREAM = {(key, "median") for key in FAMILIES}
NOT_UPSTREAM |= {("tanh_normal", "mode"), ("tanh_normal", "mean"), ("ordinal", "deterministic")}
GRAPHABLE = (*COMPILED, *REDUCED, *GRAPHED, ROOF)
HAND_WRITTEN = {"normal": hand.normal, "tanh_normal": hand.tanh_normal}
# Those with every provider; the others of the grid run in eager mode only.
FULL = ("normal", "tanh_normal", "safe_normal", "safe_tanh_normal", "categorical")
QUICK = ("normal", "tanh_normal", "categorical", "safe_normal", "safe_truncated_normal")


def _title(family: Family) -> str:
    # The plain Normal scores each element, IndependentNormal their sum.
    if family in (families.NORMAL, families.PLAIN_NORMAL):
        return "Normal" if family is families.NORMAL else "plain Normal"
    return family.distribution


def _grid() -> list[Case]:
    """Families x interaction types x {plain, safe}: a value and its score."""
    cases = []
    for key, family in FAMILIES.items():
        for kind in (InteractionType.RANDOM, *POINTS[family.distribution]):
            suffix = "" if kind is InteractionType.RANDOM else f"_{kind.value}"
            for safe in (False, True):
                name = ("safe_" if safe else "") + key + suffix
                full = name in FULL
                written = None if safe or suffix else HAND_WRITTEN.get(key)
                also = (*GRAPHABLE, EXPORTED) if full else ()
                case = Case(
                    name,
                    f"{'safe ' if safe else ''}{_title(family)}, {kind.value}",
                    sampling(family, kind, safe=safe, hand=written),
                    also if written is None else (*also, HAND),
                    shapes=SHAPES if full else (SMALL, MEDIUM),
                    gpu_shapes=HUGE if full else HUGE[:1],
                    quick=name in QUICK,
                    sides=SIDES[1:] if (key, kind.value) in NOT_UPSTREAM else SIDES,
                )
                cases.append(case)
    return cases


_TRAINED = (*COMPILED, *REDUCED, ROOF)
# A Delta's score has no gradient. Upstream's TruncatedNormal loses 4e-4 of that of its scale, four
# times what the gate allows.
_UNTRAINED = ("truncated_normal", "delta", "tanh_delta")
_TRAINED_LARGE = ("normal", "tanh_normal", "categorical", "masked_categorical")

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *_grid(),
        Case(
            "safe_composite",
            "safe composite Normal + Categorical, random",
            problems.safe_composite,
            shapes=(SMALL, MEDIUM),
            quick=False,
        ),
        Case("sequential", "MLP 64-64 and Normal, random", problems.sequential, GRAPHABLE[:-1]),
        *(
            Case(
                f"{key}_score",
                f"{_title(family)}, stored actions",
                scoring(family),
                (ROOF,),
                shapes=(SMALL, MEDIUM),
                gpu_shapes=HUGE[:1],
                quick=False,
            )
            for key, family in FAMILIES.items()
        ),
        *(
            Case(
                f"{key}_train",
                f"{_title(family)}, stored actions, fwd+bwd",
                training(family),
                _TRAINED if key == "normal" else (ROOF,),
                shapes=SHAPES if key in _TRAINED_LARGE else (SMALL, MEDIUM),
                gpu_shapes=HUGE[:1],
                quick=key == "normal",
            )
            for key, family in FAMILIES.items()
            if key not in _UNTRAINED
        ),
        Case(
            "ppo_minibatch",
            "Normal, PPO's clipped loss, fwd+bwd",
            training(families.NORMAL, clipped=True),
            _TRAINED,
            shapes=(MEDIUM,),
            quick=False,
        ),
        *(
            Case(
                f"objective_{name}",
                f"TorchRL's {name} loss, fwd+bwd",
                objectives.problem(name),
                (*COMPILED, *REDUCED),
                shapes=(objectives.SHAPE,),
                quick=False,
            )
            for name in objectives.NAMES
        ),
    )
}


def _by_shape(small: float, medium: float, large: float) -> dict[Shape, float]:
    return {SMALL: small, MEDIUM: medium, LARGE: large}


_EAGER, _BOTH_COMPILED = SIDES, COMPILED
# The families that a safe module of each must be 4 times as fast with; Normal's goal is higher.
SAFE = tuple(f"safe_{key}" for key in FAMILIES if key != "normal")

TARGETS: tuple[Target, ...] = (
    Target("safe_normal", *_EAGER, True, _by_shape(6, 3, 3)),
    Target("tanh_normal", *_EAGER, True, _by_shape(6, 3, 2)),
    Target("normal", "upstream compiled", "fastprob", True, _by_shape(2, 1.4, 1.1)),
    Target("normal", "fastprob", HAND, False, _by_shape(1.5, 1.1, 1.05)),
    Target("normal_train", *_EAGER, True, {MEDIUM: 2.0}),
    Target("normal", *_BOTH_COMPILED, True, {SMALL: 1.6, LARGE: 1.2}),
    Target("safe_normal", *_BOTH_COMPILED, True, {SMALL: 2.5}),
    Target("tanh_normal", *_BOTH_COMPILED, True, {LARGE: 2.0}),
    Target("ppo_minibatch", *_BOTH_COMPILED, True, {MEDIUM: 1.3}),
    Target("normal", "fastprob compiled", EXPORTED, True, {SMALL: 3.0}),
    *(Target(name, *_EAGER, True, {SMALL: 4.0}) for name in (*SAFE, "safe_composite")),
    *(
        Target(name, *pair, True, {SMALL: bound, MEDIUM: bound}, "cuda")
        for name in ("normal", "safe_normal", "tanh_normal")
        for pair, bound in ((GRAPHED, 3.0), (("upstream", "fastprob graph"), 20.0))
    ),
    *(
        Target(name, *_BOTH_COMPILED, True, {HUGE[0]: 2.5}, "cuda")
        for name in ("normal", "tanh_normal")
    ),
    # A copy of as many bytes, as a part of the time: 87% and 95%, and so on.
    Target("normal", ROOF, "fastprob", True, {HUGE[0]: 0.87, HUGE[1]: 0.95}, "cuda"),
    Target("tanh_normal", ROOF, "fastprob", True, {HUGE[0]: 0.85, HUGE[1]: 0.93}, "cuda"),
)
