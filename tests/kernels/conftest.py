"""Tests that run kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter is chosen before Triton is imported, for a whole process, and the tests of machine
code need the compiler. So a plain run of the tests starts these in a process of their own, see
`tests/test_interpreter.py`; they are not collected anywhere else without a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
import triton

from fastprob import backend

INTERPRETED = triton.knobs.runtime.interpret
RUNS = INTERPRETED or torch.cuda.is_available()

collect_ignore_glob = [] if RUNS else ["test_*.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU all of these are its tests: `pytest -m gpu`.

    In the interpreter `KERNELS_PART=I/N` keeps the Ith of N parts, for processes side by side.
    """
    if INTERPRETED:
        part, count = map(int, os.environ.get("KERNELS_PART", "1/1").split("/"))
        left_out = [item for i, item in enumerate(items) if i % count != part - 1]
        items[:] = items[part - 1 :: count]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
    else:
        for item in items:
            if "tests/kernels/" in item.path.as_posix():
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _kernels_serve():
    with backend.using_backend("triton"):
        yield


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")
