"""CUDA graphs: captured once for each way of calling, replayed ever after.

| file         | what                                                                       |
|--------------|----------------------------------------------------------------------------|
| `policy`     | `CudaGraphPolicy`, for a policy that is called in a rollout                |
| `step`       | `CudaGraphStep`, for a function with effects: an update, a step of a rollout |
| `rollout`    | `rollout`, policy and environment step as one graph                        |
| `_table`     | captured graphs by key, and how one is captured                            |
| `_watch`     | parameters that move, modules and settings that change                     |
| `_backend`   | the interface of what captures, and CUDA's                                 |
| `_recording` | the stand-in for a CPU                                                     |
| `_probe`     | finds operations that make the host wait                                   |
"""

from __future__ import annotations

from fastprob.graphs._errors import GraphError
from fastprob.graphs._recording import RecordingBackend
from fastprob.graphs._table import GraphInfo
from fastprob.graphs.policy import CudaGraphPolicy
from fastprob.graphs.rollout import Rollout, rollout
from fastprob.graphs.step import CudaGraphStep

__all__ = [
    "CudaGraphPolicy",
    "CudaGraphStep",
    "GraphError",
    "GraphInfo",
    "RecordingBackend",
    "Rollout",
    "rollout",
]
