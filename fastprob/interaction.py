"""Interaction types: tensordict's own, and what a module makes of an argument."""

from __future__ import annotations

from typing import Any

from tensordict.nn import InteractionType, set_interaction_type
from tensordict.nn import probabilistic as _upstream
from tensordict.nn.probabilistic import interaction_type

from fastprob.distributions._any import take

__all__ = ["InteractionType", "interaction_type", "read_type", "set_interaction_type", "take"]


_mode = _upstream._interaction_type

if hasattr(_mode, "get_thread_mode"):
    # tensordict 0.15: lock-free, and each thread may have a type of its own.
    current_type = _mode.get_mode
else:

    def current_type() -> InteractionType | None:
        """The interaction type in force, or None; without tensordict 0.14's lock (0.6 us)."""
        return _mode._mode


def read_type(value: Any, argument: str) -> InteractionType:
    """`value` as an interaction type.

    Raises:
        ValueError: naming the five types.
    """
    try:
        return InteractionType(value)
    except ValueError:
        known = ", ".join(repr(t.value) for t in InteractionType.__members__.values())
        raise ValueError(
            f"{argument} must be an InteractionType or one of {known}, got {value!r}"
        ) from None
