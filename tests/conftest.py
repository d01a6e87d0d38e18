"""What every test runs under: a fixed seed, and no memory that happens to hold zeros."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

POISONED = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_permuted"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps a function that returns uninitialised memory, so that it returns it filled."""

    @functools.wraps(make)
    def filled(*args, **kwargs):
        out = make(*args, **kwargs)
        # A compiler's own metas and decompositions call these names too, under its dispatch
        # modes; a fill would be traced as a mutation of a graph that must have none.
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return out
        if type(out) is Tensor and out.layout is torch.strided:
            # detach: a leaf that requires grad refuses to be filled, its detached alias does not.
            if out.dtype in FLOATS:
                out.detach().fill_(float("nan"))
            elif out.dtype in INTEGERS:
                out.detach().fill_(torch.iinfo(out.dtype).max)
            elif out.dtype is torch.bool:
                out.detach().fill_(True)
        return out

    return filled


@pytest.fixture(scope="session", autouse=True)
def _poisoned_empty() -> Iterator[None]:
    """Fills what torch.empty and its kin return: NaN, the largest integer, True.

    Fresh memory is often zero, and a kernel that leaves an output unwritten then passes.
    torch.utils.deterministic.fill_uninitialized_memory does the same, but only along with
    deterministic algorithms, which change what is tested. Eager calls only: what a compiled graph
    allocates is not filled.
    """
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in POISONED:
            patch.setattr(owner, name, _poison(getattr(owner, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _checks_off_as_compiled() -> None:
    """Compiles once, in front of all tests: the first time dynamo switches argument checks off.

    A test that put them back as it had found them would else leave them on for those after it, and
    dynamo cannot trace a `torch.distributions.Normal` that checks: `test_direct.py` with
    `test_rng.py` behind it failed by themselves.
    """
    torch.compile(torch.neg, backend="eager")(torch.ones(1))


# A hook and not a fixture: Hypothesis refuses function-scoped fixtures.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seeds torch, so that a test draws the same numbers alone and among the others."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needs_gpu)


_AHEAD = pytest.StashKey[subprocess.Popen]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has another core compile what `test_codegen.py` reads, where that is run as a whole.

    15 minutes of compiling, which the tests in front of it take as well.
    """
    codegen = [item for item in session.items if item.path.name == "test_codegen.py"]
    if len(codegen) > 300 and not session.config.option.collectonly and (os.cpu_count() or 1) > 1:
        command = [sys.executable, "-m", "tests.kernels.ahead"]
        root = Path(__file__).resolve().parents[1]
        session.config.stash[_AHEAD] = subprocess.Popen(command, cwd=root)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends what `pytest_collection_finish` has begun."""
    process = session.config.stash.get(_AHEAD, None)
    if process is not None:
        process.terminate()
        process.wait()
