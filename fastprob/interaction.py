"""Interaction types: tensordict's own, and what a module makes of an argument."""

from __future__ import annotations

import threading
from typing import Any

import torch
from tensordict.nn import InteractionType, set_interaction_type
from tensordict.nn import probabilistic as _upstream
from tensordict.nn.probabilistic import interaction_type

from fastprob.distributions._any import take

__all__ = [
    "InteractionType",
    "current_type",
    "in_this_thread",
    "interaction_type",
    "read_type",
    "set_interaction_type",
    "take",
]


_mode = _upstream._interaction_type

if hasattr(_mode, "get_thread_mode"):
    # tensordict 0.15: lock-free, and each thread may have a type of its own.
    current_type = _mode.get_mode

    def in_this_thread(kind: InteractionType | None) -> Any:
        """A block under an interaction type that other threads do not see."""
        return set_interaction_type(kind, thread_local=True)  # type: ignore[call-arg]

else:
    # tensordict 0.14 has one type for the whole process. Blocks of two threads that overlap would
    # each put back what they have found, and leave the type of one of them behind for good.
    _lock = threading.Lock()
    _entered: list[Any] = []
    _before: InteractionType | None = None

    class _Block:
        __slots__ = ("kind",)

        def __init__(self, kind: InteractionType | None) -> None:
            self.kind = kind

        def __enter__(self) -> None:
            global _before
            with _lock:
                if not _entered:
                    _before = _mode._mode
                _entered.append(self)
                _mode._mode = self.kind

        def __exit__(self, *_: Any) -> None:
            with _lock:
                _entered.remove(self)
                _mode._mode = _entered[-1].kind if _entered else _before

    def in_this_thread(kind: InteractionType | None) -> Any:
        """A block under an interaction type, which all threads see while it lasts."""
        return set_interaction_type(kind) if torch.compiler.is_compiling() else _Block(kind)

    def current_type() -> InteractionType | None:
        """The interaction type in force, or None; without tensordict 0.14's lock (0.6 us)."""
        return _mode._mode


def read_type(value: Any, argument: str) -> InteractionType:
    """`value` as an interaction type.

    Raises:
        ValueError: naming the five types.
    """
    if type(value) is InteractionType:
        return value
    try:
        return InteractionType(value)
    except ValueError:
        known = ", ".join(repr(t.value) for t in InteractionType.__members__.values())
        raise ValueError(
            f"{argument} must be an InteractionType or one of {known}, got {value!r}"
        ) from None
