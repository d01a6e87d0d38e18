"""The two implementations under comparison, as namespaces with the same names.

A benchmark is written once, against these names, and is run with either side. ``specs`` is the
namespace of the side's specs, some of which share their name with a distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NAMES = ("upstream", "fastprob")


@dataclass(frozen=True)
class Implementation:
    """The classes of one side; the names are those of ``fastprob``."""

    name: str
    version: str
    ProbabilisticTensorDictModule: Any
    ProbabilisticTensorDictSequential: Any
    SafeProbabilisticModule: Any
    SafeProbabilisticTensorDictSequential: Any
    Bernoulli: Any
    Beta: Any
    Categorical: Any
    CompositeDistribution: Any
    Delta: Any
    IndependentNormal: Any
    MaskedCategorical: Any
    MaskedOneHotCategorical: Any
    Normal: Any
    OneHotCategorical: Any
    OneHotOrdinal: Any
    Ordinal: Any
    TanhDelta: Any
    TanhNormal: Any
    TruncatedNormal: Any
    specs: Any


def implementation(name: str) -> Implementation:
    """Returns one side of the comparison.

    Args:
        name: ``"upstream"`` (tensordict's and TorchRL's classes) or ``"fastprob"``.

    Raises:
        ValueError: if the name is neither.
    """
    if name == "upstream":
        return _upstream()
    if name == "fastprob":
        return _fastprob()
    raise ValueError(f"unknown implementation {name!r}; expected one of {', '.join(NAMES)}")


def _upstream() -> Implementation:
    import tensordict
    import torchrl
    from tensordict import nn
    from torch import distributions
    from torchrl import data, modules

    return Implementation(
        name="upstream",
        version=f"tensordict {tensordict.__version__}, torchrl {torchrl.__version__}",
        ProbabilisticTensorDictModule=nn.ProbabilisticTensorDictModule,
        ProbabilisticTensorDictSequential=nn.ProbabilisticTensorDictSequential,
        SafeProbabilisticModule=modules.SafeProbabilisticModule,
        SafeProbabilisticTensorDictSequential=modules.SafeProbabilisticTensorDictSequential,
        Bernoulli=distributions.Bernoulli,
        Beta=distributions.Beta,
        Categorical=distributions.Categorical,
        CompositeDistribution=nn.CompositeDistribution,
        Delta=modules.Delta,
        IndependentNormal=modules.IndependentNormal,
        MaskedCategorical=modules.MaskedCategorical,
        MaskedOneHotCategorical=modules.MaskedOneHotCategorical,
        Normal=distributions.Normal,
        OneHotCategorical=modules.OneHotCategorical,
        OneHotOrdinal=modules.OneHotOrdinal,
        Ordinal=modules.Ordinal,
        TanhDelta=modules.TanhDelta,
        TanhNormal=modules.TanhNormal,
        TruncatedNormal=modules.TruncatedNormal,
        specs=data,
    )


def _fastprob() -> Implementation:
    import fastprob
    from fastprob import distributions, specs

    return Implementation(
        name="fastprob",
        version=f"fastprob {getattr(fastprob, '__version__', 'unknown')}",
        ProbabilisticTensorDictModule=fastprob.ProbabilisticTensorDictModule,
        ProbabilisticTensorDictSequential=fastprob.ProbabilisticTensorDictSequential,
        SafeProbabilisticModule=fastprob.SafeProbabilisticModule,
        SafeProbabilisticTensorDictSequential=fastprob.SafeProbabilisticTensorDictSequential,
        Bernoulli=distributions.Bernoulli,
        Beta=distributions.Beta,
        Categorical=distributions.Categorical,
        CompositeDistribution=distributions.CompositeDistribution,
        Delta=distributions.Delta,
        IndependentNormal=distributions.IndependentNormal,
        MaskedCategorical=distributions.MaskedCategorical,
        MaskedOneHotCategorical=distributions.MaskedOneHotCategorical,
        Normal=distributions.Normal,
        OneHotCategorical=distributions.OneHotCategorical,
        OneHotOrdinal=distributions.OneHotOrdinal,
        Ordinal=distributions.Ordinal,
        TanhDelta=distributions.TanhDelta,
        TanhNormal=distributions.TanhNormal,
        TruncatedNormal=distributions.TruncatedNormal,
        specs=specs,
    )
