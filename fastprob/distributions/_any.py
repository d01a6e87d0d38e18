"""Any distribution by the interaction type: fastprob's in one operation, others as upstream."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import InteractionType
from tensordict.nn import probabilistic as _upstream
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints

from fastprob import rng
from fastprob.distributions._base import (
    DETERMINISTIC,
    EMPTY,
    MEAN,
    MEDIAN,
    MODE,
    RANDOM,
    Fused,
)

# tensordict 0.15 renamed the register; both map a torch class to the type that stands in for
# DETERMINISTIC.
_names = vars(_upstream)
_REGISTER: dict[type, InteractionType] = (
    _names.get("DETERMINISTIC_REGISTER") or _names.get("_DETERMINISTIC_REGISTER") or {}
)


def take(
    dist: D.Distribution,
    interaction: InteractionType,
    shape: torch.Size = EMPTY,
    generator: torch.Generator | None = None,
    score: bool = False,
    n_empirical_estimate: int = 1000,
    pathwise: bool | None = None,
) -> tuple[Any, Any]:
    """A value of any distribution by the interaction type, and its log-probability.

    Args:
        dist: the distribution. One of fastprob's takes one operation; any other goes through its
            public methods.
        interaction: how the value is chosen.
        shape: leading sample dimensions; deterministic values are repeated along them.
        generator: source of the noise; None for the device's default one.
        score: whether the log-probability is wanted.
        n_empirical_estimate: draws for the mean of a distribution that has no closed form.
        pathwise: whether gradients flow through a random value into the parameters; None for what
            `has_rsample` says.

    Returns:
        value, and log-probability or None.

    Raises:
        NotImplementedError: if the distribution has no such value.
        TypeError: if `dist` is no distribution.
    """
    if isinstance(dist, Fused):
        if pathwise is None:
            pathwise = dist.has_rsample
        return dist.take(interaction, shape, generator, score, pathwise, n_empirical_estimate)
    if not isinstance(dist, D.Distribution):
        raise TypeError(
            "distribution_class must build a torch.distributions.Distribution, got "
            f"{type(dist).__name__}"
        )
    if interaction is RANDOM:
        return _random(dist, shape, generator, score, pathwise)
    value = _point(dist, interaction, generator, n_empirical_estimate)
    if shape:
        value = _repeat(value, shape)
    return value, _score(dist, value) if score else None


def _random(dist, shape, generator, score, pathwise):
    reparameterized = dist.has_rsample if pathwise is None else pathwise
    if score:
        joint = "rsample_and_log_prob" if reparameterized else "sample_and_log_prob"
        if callable(getattr(type(dist), joint, None)):
            with rng.global_stream_from(generator):
                return getattr(dist, joint)(shape)
    with rng.global_stream_from(generator):
        value = dist.rsample(shape) if reparameterized else dist.sample(shape)
    return value, _score(dist, value) if score else None


def _score(dist, value):
    if isinstance(value, (Tensor, TensorDictBase)):
        return dist.log_prob(value)
    return dist.log_prob(*value)


def _repeat(value, shape):
    if isinstance(value, (Tensor, TensorDictBase)):
        return value.expand(shape + value.shape)
    return tuple(_repeat(v, shape) for v in value)


def _point(dist, interaction, generator, n_empirical_estimate):
    if isinstance(dist, D.LKJCholesky) and interaction is not MEDIAN:
        raise NotImplementedError(
            f"{type(dist).__name__} has neither mode nor mean, so that {interaction.name} cannot "
            "be taken from it; use RANDOM"
        )
    if interaction is DETERMINISTIC:
        if hasattr(dist, "deterministic_sample"):
            return dist.deterministic_sample  # type: ignore[attr-defined]
        interaction = _stand_in(dist)
    if interaction is MEAN:
        try:
            return dist.mean
        except (AttributeError, NotImplementedError):
            pass
        with rng.global_stream_from(generator):
            draw = dist.rsample if dist.has_rsample else dist.sample
            return draw(torch.Size((n_empirical_estimate,))).mean(0)
    name = "mode" if interaction is MODE else "median"
    try:
        return getattr(dist, name)
    except (AttributeError, NotImplementedError) as err:
        raise NotImplementedError(
            f"{type(dist).__name__} has no {name}, so that {interaction.name} cannot be taken from "
            "it; use another interaction type"
        ) from err


def _stand_in(dist):
    """The type that replaces DETERMINISTIC where the distribution has no such value."""
    kind = type(dist)
    if issubclass(kind, D.Independent):
        kind = type(dist.base_dist)
    known = _REGISTER.get(kind)
    if known is not None and known is not DETERMINISTIC:
        return known
    try:
        real = isinstance(dist.support, type(constraints.real))
    except (NotImplementedError, AttributeError):
        real = True
    chosen = MEAN if real else MODE
    warnings.warn(
        f"{type(dist).__name__} has no deterministic_sample; its {chosen.value} is used for "
        "DETERMINISTIC. Give the distribution a deterministic_sample, or ask for "
        f"{chosen.name} explicitly.",
        UserWarning,
        stacklevel=4,
    )
    return chosen
