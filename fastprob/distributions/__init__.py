"""fastprob's distributions, and the registry that recognizes everyone else's."""

from __future__ import annotations

from fastprob.distributions import kl as _kl  # noqa: F401  # registers the divergences
from fastprob.distributions._base import Fused
from fastprob.distributions._registry import recognize, resolve
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

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "CompositeDistribution",
    "Delta",
    "Fused",
    "IndependentNormal",
    "MaskedCategorical",
    "MaskedOneHotCategorical",
    "Normal",
    "OneHotCategorical",
    "OneHotOrdinal",
    "Ordinal",
    "TanhDelta",
    "TanhNormal",
    "TruncatedNormal",
    "recognize",
    "resolve",
]
