"""The registry's cases under pytest-benchmark: ``pytest bench --benchmark-only``.

Two commits are compared with its own ``--benchmark-autosave`` and ``--benchmark-compare``, by CPU
time. Within one run the providers are not interleaved here, so ratios belong to
``python -m bench calls``.
"""

from __future__ import annotations

import time

import pytest
import torch

from bench.cases import CASES, SHAPES
from bench.gate import verify
from bench.implementations import implementation
from bench.providers import EXPORTED, SIDES, fresh_compiler, warm_up

# Of the one thread that calls: on a shared machine the means at the clock of two runs of the same
# code were 1.6 apart.
pytestmark = pytest.mark.benchmark(timer=time.thread_time)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "provider", "shape"),
    [
        pytest.param(case.name, provider, shape, id=f"{case.name}-{provider}-{shape[0]}x{shape[1]}")
        for shape in SHAPES
        for case in CASES.values()
        if shape in case.shapes
        for provider in case.providers("cpu", shape)
        # An export takes half a minute.
        if provider != EXPORTED
    ],
)
def test_call(benchmark, name, provider, shape):
    """Checks one provider of a case, then times it."""
    fresh_compiler()
    problem = CASES[name].build({side: implementation(side) for side in SIDES}, shape)
    benchmark.group = f"{name} {shape[0]}x{shape[1]}"
    with torch.set_grad_enabled(problem.grad):
        made = problem.makers[provider]()
        verify(problem, made, provider)
        warm_up(made)
        benchmark(made.call)
