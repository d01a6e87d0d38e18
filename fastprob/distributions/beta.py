"""Beta and `Independent(Beta)`."""

from __future__ import annotations

from typing import Any

import torch
from tensordict.nn import InteractionType
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints

from fastprob import backend
from fastprob.distributions._base import (
    EMPTY,
    MEDIAN,
    MODE,
    Fused,
    broadcast,
    check_positive,
)
from fastprob.ops import beta as ops
from fastprob.ops._fused import given


class _BetaBase(Fused):
    """Draws and scores of a Beta whose last `_ndims` dimensions are one event."""

    concentration1: Tensor
    concentration0: Tensor
    _ndims: int
    has_rsample = True

    @property
    def _kind(self) -> tuple:
        return "unit", self.concentration1.dtype

    def _draw(self, shape, generator, score, pathwise):
        a, b = self.concentration1, self.concentration0
        if backend.serves(a):
            return ops.draw(
                a, b, shape, self._ndims, generator, score=score, pathwise=pathwise,
                clamp=self._bounds_of_value,
            )  # fmt: skip
        if score and (pathwise or not torch.is_grad_enabled()):
            return ops.sample_score(a, b, shape, generator, self._ndims)
        if pathwise or not torch.is_grad_enabled():
            value = ops.sample(a, b, shape, generator)
        else:
            with torch.no_grad():
                value = ops.sample(a, b, shape, generator)
        return value, ops.log_prob(a, b, value, self._ndims) if score else None

    def _point(self, interaction: InteractionType, score: bool):
        a, b = self.concentration1, self.concentration0
        served = backend.serves(a)
        if served and interaction is not MEDIAN:
            kind = ops.MODE if interaction is MODE else ops.MEAN
            return ops.draw(
                a, b, EMPTY, self._ndims, kind=kind, score=score, clamp=self._bounds_of_value
            )
        if interaction is MODE:
            value = ops.mode(a, b)
        elif interaction is MEDIAN:
            value = ops.median(a, b)
        else:
            value = ops.mean(a, b)
        if served:
            # The median, which no kernel finds.
            scores = ops.score_given(a, b, value, self._ndims)[0] if score else None
            bounds = self._bounds_of_value
            return value if bounds is None else bounds.clamp(value), scores
        if not score:
            return value, None
        # The density does not change with the value at its mode. At a mode on the border the
        # gradient by the value is infinite, and NaN where a graph multiplies it by 0.
        scored = value.detach() if interaction is MODE else value
        return value, ops.log_prob(a, b, scored, self._ndims)

    def carry(self, projection: Any) -> bool:
        if not backend.serves(self.concentration1):
            return False
        # Values are members of a spec from 0 to 1 as they are, which the caller knows.
        if getattr(projection, "covers", None) == self._kind:
            return False
        self._bounds_of_value = ops.bounds_of(projection, self.concentration1, self._ndims)
        return self._bounds_of_value is not None

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value`, `[*sample, *batch]`."""
        # torch fails to reshape an empty value for its check of an event.
        if self._checks(value) and not (isinstance(value, Tensor) and not value.numel()):
            self._validate_sample(value)
        a, b = self.concentration1, self.concentration0
        if backend.serves(a):
            return ops.score_and_entropy(a, b, value, self._ndims, self._memo())
        try:
            return ops.log_prob(a, b, value, self._ndims)
        except (RuntimeError, AttributeError):
            given("Beta", a, b, value)
            raise

    def entropy(self) -> Tensor:
        """Differential entropy in nats, `[*batch]`."""
        a, b = self.concentration1, self.concentration0
        if backend.serves(a):
            return ops.entropy_given(a, b, self._ndims, self._memo())
        return ops.entropy(a, b, self._ndims)

    def _memo(self) -> dict[str, Any] | None:
        """What a score keeps for the entropy, which a loss with gradients asks for next."""
        a, b = self.concentration1, self.concentration0
        # A leaf may be asked for two backward passes, which one node for both would not survive.
        made = a.grad_fn is not None and b.grad_fn is not None
        if not made or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        memo = self.__dict__.get("_shared")
        if memo is None or memo["of"][0] is not a or memo["of"][1] is not b:
            memo = self._shared = {"of": (a, b)}
        return memo

    @property
    def variance(self) -> Tensor:
        a, b = self.concentration1, self.concentration0
        total = a + b
        return a * b / (total * total * (total + 1.0))

    @property
    def batch_shape(self) -> torch.Size:
        shape = self.concentration1.shape
        return shape[: len(shape) - self._ndims] if self._ndims else shape

    @property
    def event_shape(self) -> torch.Size:
        shape = self.concentration1.shape
        return shape[len(shape) - self._ndims :] if self._ndims else EMPTY

    _batch_shape = batch_shape
    _event_shape = event_shape

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with its batch expanded to `batch_shape`."""
        shape = torch.Size(batch_shape) + self.event_shape
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.__dict__["concentration1"] = self.concentration1.expand(shape)
        new.__dict__["concentration0"] = self.concentration0.expand(shape)
        return new

    def __repr__(self) -> str:
        shape = tuple(self.concentration1.shape)
        return f"{type(self).__name__}(concentration1, concentration0: {shape})"


class Beta(_BetaBase, D.Beta):
    """Beta distribution, a drop-in for `torch.distributions.Beta`.

    `mode` is 1/2 where the density is flat (torch's is NaN), and `median` is the true median, which
    torch does not have. `deterministic_sample` is the mean, as upstream's choice for it.

    Source: `log p(x) = (a - 1) log(x) + (b - 1) log(1 - x) - log B(a, b)`.

    Args:
        concentration1: a, `[*batch]`, greater than 0, or a number.
        concentration0: b, `[*batch]`, greater than 0, or a number.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if a checked parameter is NaN or not above 0, or the shapes do not broadcast.
    """

    # torch's class computes these from a Dirichlet that it holds.
    concentration1: Tensor = None  # type: ignore[assignment]
    concentration0: Tensor = None  # type: ignore[assignment]

    def __init__(
        self,
        concentration1: Tensor | float,
        concentration0: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        if validate_args is not None:
            self._validate_args = validate_args
        a, b = concentration1, concentration0
        if (
            not isinstance(a, Tensor)
            or not isinstance(b, Tensor)
            or a.shape != b.shape
            or a.dtype is not b.dtype
            or not ((a.is_cpu and b.is_cpu) or a.device == b.device)
        ):
            a, b = broadcast("Beta", concentration1=a, concentration0=b)
        self.concentration1 = a
        self.concentration0 = b
        self._ndims = 0
        if self._checks(a):
            check_positive("Beta", "concentration1", a)
            check_positive("Beta", "concentration0", b)

    @property
    def _dirichlet(self) -> D.Dirichlet:
        parts = torch.stack((self.concentration1, self.concentration0), -1)
        return D.Dirichlet(parts, validate_args=False)

    @property
    def _natural_params(self) -> tuple[Tensor, Tensor]:
        return self.concentration1, self.concentration0

    mode = Fused.mode
    mean = Fused.mean
    variance = _BetaBase.variance


class IndependentBeta(_BetaBase, D.Independent):
    """What `Independent(Beta(...), n)` is recognized as."""

    @property
    def base_dist(self) -> Beta:
        """The Beta over single elements."""
        return _build(Beta, self, 0)

    @property
    def reinterpreted_batch_ndims(self) -> int:
        """Number of event dimensions."""
        return self._ndims

    mode = Fused.mode
    mean = Fused.mean
    variance = _BetaBase.variance
    entropy = _BetaBase.entropy
    has_rsample = True
    has_enumerate_support = False  # type: ignore[assignment]

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.unit_interval, self._ndims)


def _build(cls: Any, source: Any, ndims: int) -> Any:
    new = cls.__new__(cls)
    new.concentration1, new.concentration0 = source.concentration1, source.concentration0
    new._ndims = ndims
    if "_validate_args" in source.__dict__:
        new._validate_args = source._validate_args
    return new


def recognize(dist: D.Distribution) -> Fused | None:
    """The fastprob distribution equal to a torch Beta or Independent(Beta), else None."""
    kind = type(dist)
    if kind is D.Beta:
        return _build(Beta, dist, 0)
    if kind is not D.Independent:
        return None
    source, ndims = dist, 0
    while type(source) is D.Independent:
        ndims += source.reinterpreted_batch_ndims
        source = source.base_dist
    if type(source) is not D.Beta and type(source) is not Beta:
        return None
    return _build(IndependentBeta, source, ndims)
