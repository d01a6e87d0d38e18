"""Which operations make the host wait for the device.

A stream that is being captured cannot be waited for, so that such an operation ends the capture
with an error that names a CUDA function and not the operation. Here each operation is looked at
before it runs.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import tensordict
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprob.graphs._errors import GraphError

# Operators whose result, or the shape of whose result, the host reads from the device.
_READS = frozenset(
    "aten::" + name
    for name in (
        "_local_scalar_dense",  # item, bool, int, float, tolist
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    )
)
_INSIDE = tuple(
    os.path.dirname(os.path.abspath(str(file))) + os.sep
    for file in (torch.__file__, tensordict.__file__, __file__)
)


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device_type: str) -> bool:
    """Whether an operation makes the host wait for a device.

    Args:
        func: an `OpOverload`.
        args: its positional arguments.
        kwargs: its keyword arguments.
        device_type: the kind of device that would be waited for.
    """
    if device_type == "cpu" and _state.unlike_a_device:
        return False
    name = func._schema.name
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not any(t.device.type == device_type for t in tensors):
        # A copy from a host's pageable memory onto the device waits as well.
        wanted = kwargs.get("device")
        return (
            name == "aten::_to_copy"
            and wanted is not None
            and torch.device(wanted).type == device_type
            and not kwargs.get("non_blocking")
        )
    if name in _READS:
        return True
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # Assigning one value under a mask is a fill, whose shape does not depend on the mask.
        return bool(masks) and (name == "aten::index" or args[2].numel() != 1)
    if name == "aten::copy_":
        return len({t.device.type for t in tensors}) > 1 and not (len(args) > 2 and args[2])
    if name == "aten::_to_copy":
        wanted = kwargs.get("device")
        return wanted is not None and torch.device(wanted).type != device_type
    return False


def refuse(func: Any) -> GraphError:
    """The error for an operation that waits."""
    return GraphError(
        f"the operation {func} ({_where()}) makes the host wait for the device, which cannot be "
        "part of a CUDA graph. Keep the decision on the device (torch.where, masks of fixed "
        "shape), or move the operation out of what is captured."
    )


def _frames() -> Iterator[Any]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _where() -> str:
    """The caller's line outside torch, tensordict and this package."""
    for frame in _frames():
        file = os.path.abspath(frame.f_code.co_filename)
        if not file.startswith(_INSIDE):
            return f"{file}:{frame.f_lineno}, in {frame.f_code.co_name}"
    return "from the interpreter"


class _State(threading.local):
    unlike_a_device = False


_state = _State()

# On a CPU these look at their arguments' values, on a device they do not.
_CHECKED_ON_CPU = frozenset({torch.nn.functional.one_hot})


class AsOnADevice(TorchFunctionMode):
    """Lets functions pass whose values only a CPU looks at, so that it can stand in for a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in _CHECKED_ON_CPU:
            return func(*args, **(kwargs or {}))
        before, _state.unlike_a_device = _state.unlike_a_device, True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            _state.unlike_a_device = before


class Probe(TorchDispatchMode):
    """Notes the first operation that makes the host wait for a device, and lets all of them run.

    Attributes:
        found: the error for that operation, or None.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.found: GraphError | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.found is None and waits(func, args, kwargs, self.device_type):
            self.found = refuse(func)
        return func(*args, **kwargs)
