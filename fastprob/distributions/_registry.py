"""Which distributions are known, by class, by name and by what a callable builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict.nn import distributions as _tensordict
from tensordict.nn.distributions import continuous as _tensordict_continuous
from torch import distributions as D

from fastprob.distributions import bernoulli as _bernoulli
from fastprob.distributions import beta as _beta
from fastprob.distributions import categorical as _categorical
from fastprob.distributions import composite as _composite
from fastprob.distributions import normal as _normal
from fastprob.distributions._base import Fused
from fastprob.distributions.bernoulli import Bernoulli
from fastprob.distributions.beta import Beta
from fastprob.distributions.categorical import Categorical, OneHotCategorical
from fastprob.distributions.composite import CompositeDistribution
from fastprob.distributions.delta import Delta
from fastprob.distributions.masked_categorical import MaskedCategorical, MaskedOneHotCategorical
from fastprob.distributions.normal import IndependentNormal, Normal
from fastprob.distributions.ordinal import OneHotOrdinal, Ordinal
from fastprob.distributions.tanh_delta import TanhDelta
from fastprob.distributions.tanh_normal import TanhNormal
from fastprob.distributions.truncated_normal import TruncatedNormal

# Names for distribution_class="...", in any case.
_BY_NAME: dict[str, type] = {
    cls.__name__.lower(): cls
    for cls in (
        Bernoulli,
        Beta,
        Categorical,
        CompositeDistribution,
        Delta,
        IndependentNormal,
        MaskedCategorical,
        MaskedOneHotCategorical,
        Normal,
        OneHotCategorical,
        OneHotOrdinal,
        Ordinal,
        TanhDelta,
        TanhNormal,
        TruncatedNormal,
    )
}

# Classes whose constructor takes what fastprob's takes.
_SAME: dict[Any, type] = {
    D.Bernoulli: Bernoulli,
    D.Beta: Beta,
    D.Normal: Normal,
    D.Categorical: Categorical,
    _tensordict_continuous.Delta: Delta,
    _tensordict.OneHotCategorical: OneHotCategorical,
    _tensordict.CompositeDistribution: CompositeDistribution,
}

# The same for TorchRL's, by name: fastprob does not import TorchRL, whoever passes a class has.
_TORCHRL: dict[str, type] = {
    "torchrl.modules.distributions.continuous.Delta": Delta,
    "torchrl.modules.distributions.continuous.IndependentNormal": IndependentNormal,
    "torchrl.modules.distributions.continuous.TanhDelta": TanhDelta,
    "torchrl.modules.distributions.continuous.TanhNormal": TanhNormal,
    "torchrl.modules.distributions.continuous.TruncatedNormal": TruncatedNormal,
    "torchrl.modules.distributions.discrete.MaskedCategorical": MaskedCategorical,
    "torchrl.modules.distributions.discrete.MaskedOneHotCategorical": MaskedOneHotCategorical,
    "torchrl.modules.distributions.discrete.OneHotCategorical": OneHotCategorical,
    "torchrl.modules.distributions.discrete.OneHotOrdinal": OneHotOrdinal,
    "torchrl.modules.distributions.discrete.Ordinal": Ordinal,
}

_RECOGNIZERS = (
    _normal.recognize,
    _categorical.recognize,
    _composite.recognize_composite,
    _bernoulli.recognize,
    _beta.recognize,
)


def resolve(distribution_class: Any) -> Callable[..., Any]:
    """What is called with the parameters to build the distribution.

    Args:
        distribution_class: a class, a callable, or a name.

    Returns:
        fastprob's class where it is the equal of the one given; otherwise what was given.

    Raises:
        ValueError: for a name that is not known, naming those that are.
        TypeError: if it is no class, callable or name.
    """
    if isinstance(distribution_class, str):
        try:
            return _BY_NAME[distribution_class.lower()]
        except KeyError:
            raise ValueError(
                f"distribution_class={distribution_class!r} is not a known name; known are "
                f"{sorted(_BY_NAME)}. Pass the class itself for any other distribution."
            ) from None
    if not callable(distribution_class):
        raise TypeError(
            "distribution_class must be a distribution class, a callable that builds one, or the "
            f"name of one of fastprob's, got {distribution_class!r}"
        )
    if isinstance(distribution_class, type):
        if issubclass(distribution_class, Fused):
            return distribution_class
        same = _SAME.get(distribution_class)
        if same is None:
            path = f"{distribution_class.__module__}.{distribution_class.__qualname__}"
            same = _TORCHRL.get(path)
        if same is not None:
            return same
    return distribution_class


def recognize(dist: Any) -> Any:
    """The fastprob distribution equal to `dist`, or `dist` itself if there is none.

    Goes by what was built, so that callables returning `Independent(Normal(...), k)` and the like
    are known as well.
    """
    if isinstance(dist, Fused):
        return dist
    for recognizer in _RECOGNIZERS:
        known = recognizer(dist)
        if known is not None:
            return known
    return dist
