"""A faster drop-in for the probabilistic modules of tensordict and TorchRL."""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

__version__ = "0.1.0"

# kernels/ stands at the top of the checkout and is installed as fastprob/kernels. In a source
# checkout the folder is found beside this package. The second test keeps an installed copy that
# has lost the folder from taking the unrelated package `kernels` of site-packages for its own.
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "README.md").is_file():
    __path__.append(str(_here.parent))

from fastprob.accelerate import accelerate
from fastprob.backend import get_backend, set_backend, using_backend
from fastprob.counter import CounterStream
from fastprob.distributions import CompositeDistribution
from fastprob.export import export_policy, load_policy
from fastprob.interaction import InteractionType, interaction_type, set_interaction_type
from fastprob.modules import ProbabilisticTensorDictModule
from fastprob.safe import SafeProbabilisticModule, SafeProbabilisticTensorDictSequential
from fastprob.sequential import ProbabilisticTensorDictSequential

if _TYPE_CHECKING:
    from fastprob.graphs import CudaGraphPolicy, CudaGraphStep, GraphError, rollout

__all__ = [
    "CompositeDistribution",
    "CounterStream",
    "CudaGraphPolicy",
    "CudaGraphStep",
    "GraphError",
    "InteractionType",
    "ProbabilisticTensorDictModule",
    "ProbabilisticTensorDictSequential",
    "SafeProbabilisticModule",
    "SafeProbabilisticTensorDictSequential",
    "accelerate",
    "export_policy",
    "get_backend",
    "interaction_type",
    "load_policy",
    "rollout",
    "set_backend",
    "set_interaction_type",
    "using_backend",
]

# Imported at first use: 20 ms of the 155 that `import fastprob` took over tensordict's own.
_GRAPHS = frozenset({"CudaGraphPolicy", "CudaGraphStep", "GraphError", "rollout"})


def __getattr__(name: str) -> _Any:
    if name not in _GRAPHS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastprob import graphs

    value = globals()[name] = getattr(graphs, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
