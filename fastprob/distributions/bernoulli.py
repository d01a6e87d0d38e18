"""Bernoulli and `Independent(Bernoulli)`."""

from __future__ import annotations

from typing import Any

import torch
from tensordict.nn import InteractionType
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints

from fastprob import backend, rng
from fastprob.distributions._base import EMPTY, MEAN, Fused, check_real, reject
from fastprob.ops import bernoulli as ops
from fastprob.ops._fused import given


class _BernoulliBase(Fused):
    """Draws and scores of a Bernoulli whose last `_ndims` dimensions are one event."""

    _given: Tensor
    _from_probs: bool
    _ndims: int
    _log_odds: Tensor | None
    has_rsample = False

    # Zeros and ones need no projection onto a Binary spec.
    _kind = ("index", 2)

    @property
    def logits(self) -> Tensor:
        """`log(p / (1 - p))`, `[*batch, *event]`."""
        if not self._from_probs:
            return self._given
        logits = self._log_odds
        if logits is None:
            logits = ops.logits(self._given)
            # What was worked out under no_grad must not answer a later call that needs a gradient.
            if logits.requires_grad or not self._given.requires_grad:
                self._log_odds = logits
        return logits

    @property
    def probs(self) -> Tensor:
        """Probability of 1, `[*batch, *event]`."""
        return self._given if self._from_probs else torch.sigmoid(self._given)

    def _draw(self, shape, generator, score, pathwise):
        given = self._given
        if backend.serves(given):
            return ops.draw(given, self._from_probs, shape, self._ndims, generator, score=score)[:2]
        with torch.no_grad():
            probs = self.probs
            value = rng.bernoulli(probs.expand(shape + probs.shape) if shape else probs, generator)
        return value, ops.log_prob(self.logits, value, self._ndims) if score else None

    def _point(self, interaction: InteractionType, score: bool):
        if interaction is MEAN:
            if score:
                raise NotImplementedError(
                    "the mean of a Bernoulli is its probability, which lies between the two values "
                    "and has no log-probability; use MODE or MEDIAN, or return_log_prob=False"
                )
            return self.probs, None
        given = self._given
        if backend.serves(given):
            return ops.draw(
                given, self._from_probs, EMPTY, self._ndims, random=False, score=score
            )[:2]  # fmt: skip
        value = ops.is_mode(given, self._from_probs).to(given.dtype)
        return value, ops.log_prob(self.logits, value, self._ndims) if score else None

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of zeros and ones, `[*sample, *batch]`."""
        # torch fails to reshape an empty value for its check of an event.
        if self._checks(value) and not (isinstance(value, Tensor) and not value.numel()):
            self._validate_sample(value)
        if backend.serves(self._given):
            memo = self._memo()
            return ops.score_and_entropy(self._given, self._from_probs, value, self._ndims, memo)
        logits = self.logits
        try:
            if value.dtype is not logits.dtype:
                value = value.to(logits.dtype)
            return ops.log_prob(logits, value, self._ndims)
        except (RuntimeError, AttributeError):
            given("Bernoulli", logits, logits, value)
            raise

    def entropy(self) -> Tensor:
        """Entropy in nats, `[*batch]`."""
        if backend.serves(self._given):
            return ops.entropy_given(self._given, self._from_probs, self._ndims, self._memo())
        return ops.entropy(self.logits, self._ndims)

    def _memo(self) -> dict[str, Any] | None:
        """What a score keeps for the entropy, which a loss with gradients asks for next."""
        given = self._given
        # A leaf may be asked for two backward passes, which one node for both would not survive.
        if given.grad_fn is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        memo = self.__dict__.get("_shared")
        if memo is None or memo["of"] is not given:
            memo = self._shared = {"of": given}
        return memo

    @property
    def variance(self) -> Tensor:
        probs = self.probs
        return probs * (1.0 - probs)

    @property
    def param_shape(self) -> torch.Size:
        return self._given.shape

    @property
    def _param(self) -> Tensor:
        return self._given

    @property
    def batch_shape(self) -> torch.Size:
        shape = self._given.shape
        return shape[: len(shape) - self._ndims] if self._ndims else shape

    @property
    def event_shape(self) -> torch.Size:
        shape = self._given.shape
        return shape[len(shape) - self._ndims :] if self._ndims else EMPTY

    _batch_shape = batch_shape
    _event_shape = event_shape

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with its batch expanded to `batch_shape`."""
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._given = self._given.expand(torch.Size(batch_shape) + self.event_shape)
        new._log_odds = None
        return new

    def __repr__(self) -> str:
        name = "probs" if self._from_probs else "logits"
        return f"{type(self).__name__}({name}: {self._given.shape})"


class Bernoulli(_BernoulliBase, D.Bernoulli):
    """Bernoulli distribution, a drop-in for `torch.distributions.Bernoulli`.

    `mode` and `median` are 0 where the two values are equally probable (torch's mode is NaN).

    Source: `log P(x) = x s - softplus(s)` with the logits `s = log(p / (1 - p))`.

    Args:
        probs: probability of 1, `[*batch]`, or a number.
        logits: log-odds of 1, `[*batch]`, or a number. Exclusive with `probs`.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if both or none of the two are given, or a checked parameter is NaN or a
            probability outside [0, 1].
    """

    def __init__(
        self,
        probs: Tensor | float | None = None,
        logits: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if (probs is None) == (logits is None):
            raise ValueError(
                "Bernoulli expects either probs or logits, got "
                f"{'neither' if probs is None else 'both'}"
            )
        if validate_args is not None:
            self._validate_args = validate_args
        given = logits if probs is None else probs
        if not isinstance(given, Tensor):
            given = torch.as_tensor(given, dtype=torch.get_default_dtype())
        elif not given.dtype.is_floating_point:
            given = given.to(torch.get_default_dtype())
        self._given = given
        self._from_probs = logits is None
        self._log_odds = None
        self._ndims = 0
        if self._checks(given):
            if self._from_probs:
                _check_probs(given)
            else:
                check_real("Bernoulli", "logits", given)

    logits = _BernoulliBase.logits
    probs = _BernoulliBase.probs
    mode = Fused.mode
    mean = Fused.mean
    support = constraints.boolean


class IndependentBernoulli(_BernoulliBase, D.Independent):
    """What `Independent(Bernoulli(...), n)` is recognized as."""

    @property
    def base_dist(self) -> Bernoulli:
        """The Bernoulli over single elements."""
        return _build(Bernoulli, self, 0)

    @property
    def reinterpreted_batch_ndims(self) -> int:
        """Number of event dimensions."""
        return self._ndims

    mode = Fused.mode
    mean = Fused.mean
    variance = _BernoulliBase.variance
    entropy = _BernoulliBase.entropy
    has_rsample = False
    has_enumerate_support = False  # type: ignore[assignment]

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.boolean, self._ndims)


def _check_probs(probs: Tensor) -> None:
    """Raises if `probs` has a NaN or an element outside [0, 1].

    Raises:
        ValueError: naming the first such element.
    """
    if not probs.numel():
        return
    low, high = torch.aminmax(probs.detach())
    if not (low >= 0 and high <= 1):
        bad = ~((probs >= 0) & (probs <= 1))
        raise reject("Bernoulli", "probs", probs, "between 0 and 1", bad)


def _build(cls: Any, source: Any, ndims: int) -> Any:
    new = cls.__new__(cls)
    if isinstance(source, _BernoulliBase):
        new._given, new._from_probs = source._given, source._from_probs
    else:
        # torch adds the other of the two when it is asked for.
        new._given = source._param
        new._from_probs = source.__dict__.get("probs") is source._param
    new._log_odds = None
    new._ndims = ndims
    if "_validate_args" in source.__dict__:
        new._validate_args = source._validate_args
    return new


def recognize(dist: D.Distribution) -> Fused | None:
    """The fastprob distribution equal to a torch Bernoulli or Independent(Bernoulli), else None."""
    kind = type(dist)
    if kind is D.Bernoulli:
        return _build(Bernoulli, dist, 0)
    if kind is not D.Independent:
        return None
    source, ndims = dist, 0
    while type(source) is D.Independent:
        ndims += source.reinterpreted_batch_ndims
        source = source.base_dist
    if type(source) is not D.Bernoulli and type(source) is not Bernoulli:
        return None
    return _build(IndependentBernoulli, source, ndims)
