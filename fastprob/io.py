"""Reading from and writing to tensordicts, with little Python on the way."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, is_tensor_collection, is_tensorclass
from tensordict.nn import utils as _nn_utils
from tensordict.tensorclass import is_non_tensor
from tensordict.utils import NestedKey

Items = list[tuple[NestedKey, Any]]

_skip_existing = _nn_utils._skip_existing

if hasattr(_skip_existing, "get_thread_mode"):
    # tensordict 0.15: each thread may have a switch of its own.
    skips_existing = _skip_existing.get_mode
else:

    def skips_existing() -> bool | None:
        """Whether `set_skip_existing(True)` is in force; without tensordict 0.14's lock, 0.9 us."""
        return _skip_existing._mode


_is_compiling = torch.compiler.is_compiling


def can_skip(module: Any, tensordict: Any) -> bool:
    """Whether all out-keys are there already and none of them is an in-key."""
    out_keys = module.out_keys
    if any(key in out_keys for key in module.in_keys):
        return False
    present = tensordict.keys(True)
    return all(key in present for key in out_keys)


def write(out: Any, items: Items, owner: Any) -> None:
    """Writes entries into a tensordict, all of them or none.

    Args:
        out: a tensordict, or a tensorclass.
        items: keys and values, in the order of writing.
        owner: the module that writes, for messages.

    Raises:
        RuntimeError: if a value's leading dimensions are not the batch size, or `out` is locked.
    """
    plain = type(out) is TensorDict
    batch_size = out._batch_size if plain else out.batch_size
    ndim = len(batch_size)
    for key, value in items:
        shape = value.shape
        # A slice of a torch.Size takes 0.3 us, so equality comes first: the log-probability of a
        # policy has the batch size as its shape.
        if shape != batch_size and shape[:ndim] != batch_size:
            raise RuntimeError(
                f"{type(owner).__name__} cannot write {key!r} of shape {tuple(value.shape)} into a "
                f"tensordict of batch size {tuple(batch_size)}: the leading dimensions must be the "
                "batch size. Give the tensordict fewer batch dimensions, or the distribution fewer "
                "event dimensions."
            )
    if plain and not out._is_locked:
        device = out._device
        entries = out._tensordict
        for key, value in items:
            if type(key) is str and (device is None or value.device == device):
                # The checks that set() makes were made above: 0.2 us in place of 3 each, and a
                # compiled call is spared 40 guards.
                entries[key] = value
            else:
                out.set(key, value)
        return
    if _is_compiling():
        for key, value in items:
            out.set(key, value)
        return
    before: Items = []
    try:
        for key, value in items:
            old = out.get(key, None)
            out.set(key, value)
            before.append((key, old))
    except Exception:
        # A tensorclass may lack the field, a stored tensordict the room: undo what was written.
        for key, old in reversed(before):
            if old is None and not is_tensorclass(out):
                out.del_(key)
            else:
                out.set(key, old)
        raise


def leaves(tensordict: Any) -> Items:
    """The entries of a tensordict, nested ones under their full keys."""
    return list(tensordict.items(True, True))


def repeat(value: Any, shape: torch.Size | None) -> Any:
    """`value` repeated along new leading dimensions, without copying."""
    return value.expand(shape + value.shape) if shape else value


def as_dict(kwargs: Any) -> dict[str, Any]:
    """Distribution keywords as a plain dictionary of their first level."""
    if not is_tensor_collection(kwargs):
        return dict(kwargs)
    return {k: v.data if is_non_tensor(v) else v for k, v in kwargs.items()}
