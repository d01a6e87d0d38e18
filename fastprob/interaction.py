"""Interaction types: tensordict's own, and what a module makes of an argument."""

from __future__ import annotations

from typing import Any

from tensordict.nn import InteractionType, set_interaction_type
from tensordict.nn.probabilistic import interaction_type

from fastprob.distributions._any import take

__all__ = ["InteractionType", "interaction_type", "read_type", "set_interaction_type", "take"]


def read_type(value: Any, argument: str) -> InteractionType:
    """`value` as an interaction type.

    Raises:
        ValueError: naming the five types.
    """
    try:
        return InteractionType(value)
    except ValueError:
        known = ", ".join(repr(t.value) for t in InteractionType)
        raise ValueError(
            f"{argument} must be an InteractionType or one of {known}, got {value!r}"
        ) from None
