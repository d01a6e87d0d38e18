"""What the operators of all families that the kernels serve share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprob.ops._register import nothing
from fastprob.ops.projection import Clamp, ClampEach
from fastprob.reference._reduce import plain_tensors_only as plain_eager

__all__ = [
    "Bounds",
    "bounds_of",
    "fold_samples",
    "given",
    "no_bounds",
    "plain_eager",
    "wanted",
    "wants_gradient",
]


class Bounds(NamedTuple):
    """What a value is clamped to: two numbers, or a tensor each with the elements of an event.

    Attributes:
        limits: lower and upper bound as numbers, or None.
        low: lower bounds, contiguous, or None.
        high: upper bounds, likewise.
    """

    limits: Sequence[float] | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def kind(self) -> int:
        """0 for none, 1 for numbers, 2 for tensors, as the kernels name them."""
        if self.limits is not None:
            return 1
        return 0 if self.low is None else 2

    def clamp(self, value: Tensor) -> Tensor:
        """The value clamped to them, by itself."""
        if self.limits is not None:
            return value.clamp(self.limits[0], self.limits[1])
        return value if self.low is None else value.clamp(self.low, self.high)


no_bounds = Bounds()


def bounds_of(projection: Any, like: Tensor, ndims: int) -> Bounds | None:
    """A projection as bounds that a kernel can clamp to; None where it is no such one.

    Args:
        projection: one of `ops.projection`.
        like: a parameter, `[*batch, *event]`; a clamp to another dtype is not taken over.
        ndims: number of event dimensions, whose elements have the bounds.
    """
    if type(projection) is Clamp and projection.dtype is like.dtype:
        return Bounds((projection.low, projection.high))
    if type(projection) is ClampEach and projection.dtype is like.dtype:
        event = like.shape[like.dim() - ndims :]
        if ndims and projection.shape == event:
            low, high = projection.bounds(like.device)
            return Bounds(None, low, high)
    return None


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd follows one of the tensors."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def fold_samples(grads: Sequence[Tensor], samples: int) -> Sequence[Tensor]:
    """Gradients summed over their first `samples` dimensions."""
    if not samples:
        return grads
    dims = tuple(range(samples))
    return [grad.sum(dims) for grad in grads]


def wanted(made: Tensor | None, like: Tensor) -> Tensor:
    """An output of an operator, empty where the call did not want it."""
    return nothing(like) if made is None else made


def given(
    name: str, first: Tensor, second: Tensor, value: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters and a value whose trailing dimensions are those of the parameters.

    Args:
        name: the distribution.
        first: a parameter.
        second: another, of the same shape.
        value: what is to be scored.

    Returns:
        the three, expanded where they broadcast.

    Raises:
        TypeError: if the value is no tensor, or one of complex numbers.
        ValueError: if the value is on another device, or does not broadcast.
    """
    if not isinstance(value, Tensor) or value.dtype.is_complex:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} scores tensors of real numbers, got {kind}")
    if value.device != first.device:
        raise ValueError(
            f"{name} has parameters on {first.device} and was given a value on {value.device}; "
            "move one of them"
        )
    shape = first.shape
    if value.shape == shape:
        return first, second, value
    try:
        full = torch.broadcast_shapes(shape, value.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} with parameters of shape {tuple(shape)} was given a value of shape "
            f"{tuple(value.shape)}, which does not broadcast with them"
        ) from None
    if full[len(full) - len(shape) :] != shape:
        first, second = first.expand(full), second.expand(full)
    return first, second, value.expand(full)
