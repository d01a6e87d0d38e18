"""TanhDelta: all mass on one point, squashed into an interval by tanh."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict.nn import InteractionType
from torch import Tensor
from torch.distributions import constraints

from fastprob.distributions._base import EMPTY, Fused
from fastprob.distributions.tanh_normal import _UNIT, _bounds
from fastprob.ops import delta as delta_ops
from fastprob.ops import tanh_delta as ops
from fastprob.ops import tanh_normal as tanh_ops


class TanhDelta(Fused):
    """All mass on `mid + half * tanh(param + mid)`, with mid and half those of `(low, high)`.

    Takes what TorchRL's class of the same name takes; that tanh sees `param + mid` is its rule. All
    interaction types give the point, and the point's own log-probability is `inf`, also where tanh
    saturates.

    Source: `log p(x) = inf` where every element of the event is within `atol + rtol * |param|` of
    the parameter before tanh, and `-inf` elsewhere.

    Args:
        param: the point before tanh, `[*batch, *event]`.
        low: lower bound of the values, a number or a tensor that broadcasts with `param`.
        high: upper bound of the values, likewise.
        event_dims: number of event dimensions.
        atol: absolute tolerance, before tanh.
        rtol: relative tolerance, before tanh.
        safe: whether |tanh| is limited to 1 minus the dtype's resolution, so that values stay
            strictly inside the bounds.

    Raises:
        ValueError: if `high` is not greater than `low`, or `event_dims` exceeds the number of
            dimensions.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    # As upstream, and as Delta: a module's random value carries no gradient.
    has_rsample = False

    def __init__(
        self,
        param: Tensor,
        low: Tensor | float = -1.0,
        high: Tensor | float = 1.0,
        event_dims: int = 1,
        atol: float = 1e-6,
        rtol: float = 1e-6,
        safe: bool = True,
    ) -> None:
        if type(low) is float and type(high) is float and low == -1.0 and high == 1.0:
            self._bounds = _UNIT[safe]
        else:
            try:
                self._bounds = _bounds(low, high, safe, param)
            except RuntimeError as err:
                raise ValueError(str(err).replace("TanhNormal", "TanhDelta")) from None
        if event_dims > param.ndim:
            raise ValueError(
                f"TanhDelta expects at least event_dims={event_dims} dimensions in its param, got "
                f"shape {tuple(param.shape)}; lower event_dims or add dimensions"
            )
        self.low, self.high = low, high
        self.atol, self.rtol = atol, rtol
        self._ndims = event_dims
        self.update(param)

    def update(self, param: Tensor) -> None:
        """Replaces the point before tanh."""
        mid = self._bounds.mid
        self.param = param if isinstance(mid, float) and mid == 0.0 else param + mid

    def _value(self) -> Tensor:
        return tanh_ops.squash(self.param, self._bounds)

    def _draw(self, shape, generator, score, pathwise):
        value, log_prob = self._point(None, score)  # type: ignore[arg-type]
        if shape:
            value = value.expand(shape + value.shape)
            log_prob = None if log_prob is None else log_prob.expand(shape + log_prob.shape)
        return value if pathwise else value.detach(), log_prob

    def _point(self, interaction: InteractionType, score: bool):
        value = self._value()
        if not score:
            return value, None
        # The point scored at itself: inf, and -inf where it is NaN.
        return value, delta_ops.log_prob(value, value, self.atol, self.rtol, self._ndims)

    def log_prob(self, value: Tensor) -> Tensor:
        """`inf` where `value` is the point, `-inf` elsewhere, `[*sample, *batch]`."""
        tolerance = (self.atol, self.rtol)
        return ops.log_prob(self.param, self._value(), value, self._bounds, tolerance, self._ndims)

    def entropy(self) -> Tensor:
        """The differential entropy, `-inf`, `[*batch]`."""
        return self.param.new_full(self.batch_shape, -math.inf)

    @property
    def min(self) -> Tensor | float:
        """Lower bound of the values, as it was given."""
        return self.low

    @property
    def max(self) -> Tensor | float:
        """Upper bound of the values, as it was given."""
        return self.high

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.param)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real

    @property
    def batch_shape(self) -> torch.Size:
        shape = self.param.shape
        return shape[: len(shape) - self._ndims] if self._ndims else shape

    @property
    def event_shape(self) -> torch.Size:
        shape = self.param.shape
        return shape[len(shape) - self._ndims :] if self._ndims else EMPTY

    _batch_shape = batch_shape
    _event_shape = event_shape

    def expand(self, batch_shape: Any, _instance: Any = None) -> TanhDelta:
        """The same distribution with its batch expanded to `batch_shape`."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.param = self.param.expand(torch.Size(batch_shape) + self.event_shape)
        return new

    def __repr__(self) -> str:
        return f"{type(self).__name__}(param: {self.param.shape})"
