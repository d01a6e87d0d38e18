"""A faster drop-in for the probabilistic modules of tensordict and TorchRL."""

from __future__ import annotations

from pathlib import Path as _Path

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
from fastprob.graphs import CudaGraphPolicy, CudaGraphStep, GraphError
from fastprob.interaction import InteractionType, interaction_type, set_interaction_type
from fastprob.modules import ProbabilisticTensorDictModule
from fastprob.rollout import rollout
from fastprob.safe import SafeProbabilisticModule, SafeProbabilisticTensorDictSequential
from fastprob.sequential import ProbabilisticTensorDictSequential

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
    "get_backend",
    "interaction_type",
    "rollout",
    "set_backend",
    "set_interaction_type",
    "using_backend",
]
