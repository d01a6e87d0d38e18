"""Delta: all mass on one point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict.nn import InteractionType
from torch import Tensor
from torch.distributions import constraints

from fastprob.distributions._base import Fused
from fastprob.ops import delta as ops


class Delta(Fused):
    """All mass on one point, which makes a deterministic policy of a probabilistic module.

    Source: `log p(x) = inf` where every element of the event is within `atol + rtol * |param|` of
    `param`, and `-inf` elsewhere.

    Args:
        param: the point, `[*batch, *event]`.
        atol: absolute tolerance.
        rtol: relative tolerance.
        batch_shape: batch shape. Without `batch_shape` and `event_shape`, the last dimension of
            `param` is the event.
        event_shape: event shape.

    Raises:
        ValueError: if `batch_shape + event_shape` is not the shape of `param`.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    # As upstream: a module's random value carries no gradient, its deterministic ones do.
    has_rsample = False

    def __init__(
        self,
        param: Tensor,
        atol: float = 1e-6,
        rtol: float = 1e-6,
        batch_shape: Sequence[int] | None = None,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        self.param = param
        self.atol = atol
        self.rtol = rtol
        if batch_shape or event_shape:
            self._event_shape = torch.Size(event_shape or ())
            self._batch_shape = torch.Size(batch_shape or ())
            if self._batch_shape + self._event_shape != param.shape:
                raise ValueError(
                    f"Delta expects a param of shape batch_shape + event_shape = "
                    f"{tuple(self._batch_shape + self._event_shape)}, got {tuple(param.shape)}"
                )
        else:
            self._event_shape = param.shape[-1:]
            self._batch_shape = param.shape[:-1]

    def update(self, param: Tensor) -> None:
        """Replaces the point."""
        self.param = param

    def _draw(self, shape, generator, score, pathwise):
        param = self.param
        value = param.expand(shape + param.shape) if shape else param
        if not pathwise:
            value = value.detach()
        return value, self._own_score(value) if score else None

    def _point(self, interaction: InteractionType, score: bool):
        return self.param, self._own_score(self.param) if score else None

    def _own_score(self, value: Tensor) -> Tensor:
        """`log_prob(param)`, which is `inf` wherever the point is finite."""
        if self.atol > 0:
            return ops.score_own(value, len(self._event_shape))
        return self.log_prob(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """`inf` where `value` is the point, `-inf` elsewhere, `[*sample, *batch]`."""
        return ops.log_prob(self.param, value, self.atol, self.rtol, len(self._event_shape))

    def entropy(self) -> Tensor:
        """The differential entropy, `-inf`, `[*batch]`."""
        return self.param.new_full(self._batch_shape, -math.inf)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.param)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Delta:
        """The same distribution with its batch expanded to `batch_shape`."""
        batch_shape = torch.Size(batch_shape)
        if batch_shape == self._batch_shape:
            return self
        return type(self)(
            self.param.expand(batch_shape + self._event_shape),
            atol=self.atol,
            rtol=self.rtol,
            batch_shape=batch_shape,
            event_shape=self._event_shape,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(param: {self.param.shape})"
