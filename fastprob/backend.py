"""Which implementation serves a call: the Triton kernels, or the reference in plain PyTorch.

`"auto"` takes the kernels where they can run and the reference elsewhere; `"reference"` never
takes the kernels; `"triton"` insists on them. The environment variable FASTPROB_BACKEND sets what
counts at first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

_log = logging.getLogger("fastprob")

NAMES = ("auto", "reference", "triton")
# The kernels compute in fp32, which is no help for fp64.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

mode = "auto"


def is_exporting() -> bool:
    """Whether a graph is being exported.

    In torch 2.11 `torch.compiler.is_exporting()` says so of every graph that is being compiled.
    """
    return torch.compiler._is_exporting_flag


# Asked when a graph is made, whose calls need not ask again: no graph of `torch.compile` serves an
# export. What `torch.compiler.assume_constant_result` does, which imports all of dynamo.
is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def set_backend(name: str) -> None:
    """Chooses the implementation of all calls from now on.

    Args:
        name: `"auto"`, `"reference"` or `"triton"`.

    Raises:
        ValueError: for another name.
        RuntimeError: for `"triton"` where Triton cannot be imported.
    """
    global mode
    if name not in NAMES:
        raise ValueError(f"the backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "triton" and _MISSING is not None:
        raise RuntimeError(f"the backend 'triton' cannot be used: {_MISSING}")
    mode = name


def get_backend() -> str:
    """The name of the backend that was chosen."""
    return mode


@contextlib.contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Chooses the implementation of the calls in a block; arguments as for `set_backend`."""
    before = mode
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def _find() -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        found = False
    return None if found else "triton is not installed; install triton 3.6 or later"


# Settled at import, and not by importing Triton: what `torch.compile` traces sees constants.
_MISSING = _find()
# Triton reads it once as well.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _refusal(x: Tensor) -> str | None:
    """Why the kernels cannot serve a tensor; None where they can."""
    if _MISSING is not None:
        return _MISSING
    if x.dtype not in DTYPES and (x.dtype.is_floating_point or x.dtype.is_complex):
        return f"they compute in fp32, and the parameters are {x.dtype}"
    if x.is_cuda:
        return None
    if x.is_cpu and _INTERPRETED:
        return None
    if x.is_cpu:
        return (
            "the parameters are on a CPU, where they need Triton's interpreter: set "
            "TRITON_INTERPRET=1 before the start"
        )
    return f"the parameters are on {x.device.type}, and they need a CUDA or ROCm device"


def serves(x: Tensor) -> bool:
    """Whether the kernels serve calls with parameters like `x`.

    Args:
        x: a parameter, which gives device and dtype.

    Returns:
        False also inside `torch.func.grad` and its kin and forward-mode differentiation, which see
        through the formulas of the reference, and through no kernel.

    Raises:
        RuntimeError: if the backend is `"triton"` and they cannot, with the reason.
    """
    if mode == "reference" or (mode == "auto" and x.is_cpu):
        return False
    reason = _refusal(x)
    if reason is None:
        return torch.compiler.is_compiling() or not _differentiating()
    if mode == "triton":
        raise RuntimeError(f"the backend is 'triton', but the kernels cannot run: {reason}")
    if not torch.compiler.is_compiling():
        _note(reason)
    return False


def _differentiating() -> bool:
    if forward_ad._current_level >= 0:
        return True
    levels = torch._C._functorch.get_interpreter_stack() or ()  # type: ignore[attr-defined]
    vmap = torch._C._functorch.TransformType.Vmap  # type: ignore[attr-defined]
    return any(level.key() != vmap for level in levels)


@functools.cache
def _note(reason: str) -> None:
    """Says once why a call on an accelerator is left to the reference."""
    _log.warning("fastprob's kernels are not used: %s", reason)


@functools.cache
def kernels(family: str) -> ModuleType:
    """The module of a family's kernels, imported when the first call needs it."""
    return importlib.import_module(f"fastprob.kernels.{family}")


_named = os.environ.get("FASTPROB_BACKEND")
if _named:
    try:
        set_backend(_named.lower())
    except (ValueError, RuntimeError) as _err:
        raise type(_err)(f"FASTPROB_BACKEND={_named}: {_err}") from None
