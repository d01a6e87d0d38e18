"""The two implementations under comparison, as namespaces with the same names.

A benchmark is written once, against these names, and is run with either side.
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
    IndependentNormal: Any
    TanhNormal: Any
    Categorical: Any
    OneHotCategorical: Any
    Delta: Any
    Bounded: Any


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
    from torch.distributions import Categorical
    from torchrl import modules
    from torchrl.data import Bounded

    return Implementation(
        name="upstream",
        version=f"tensordict {tensordict.__version__}, torchrl {torchrl.__version__}",
        ProbabilisticTensorDictModule=nn.ProbabilisticTensorDictModule,
        ProbabilisticTensorDictSequential=nn.ProbabilisticTensorDictSequential,
        SafeProbabilisticModule=modules.SafeProbabilisticModule,
        SafeProbabilisticTensorDictSequential=modules.SafeProbabilisticTensorDictSequential,
        IndependentNormal=modules.IndependentNormal,
        TanhNormal=modules.TanhNormal,
        Categorical=Categorical,
        OneHotCategorical=modules.OneHotCategorical,
        Delta=modules.Delta,
        Bounded=Bounded,
    )


def _fastprob() -> Implementation:
    import fastprob
    from fastprob import distributions
    from fastprob.specs import Bounded

    return Implementation(
        name="fastprob",
        version=f"fastprob {getattr(fastprob, '__version__', 'unknown')}",
        ProbabilisticTensorDictModule=fastprob.ProbabilisticTensorDictModule,
        ProbabilisticTensorDictSequential=fastprob.ProbabilisticTensorDictSequential,
        SafeProbabilisticModule=fastprob.SafeProbabilisticModule,
        SafeProbabilisticTensorDictSequential=fastprob.SafeProbabilisticTensorDictSequential,
        IndependentNormal=distributions.IndependentNormal,
        TanhNormal=distributions.TanhNormal,
        Categorical=distributions.Categorical,
        OneHotCategorical=distributions.OneHotCategorical,
        Delta=distributions.Delta,
        Bounded=Bounded,
    )
