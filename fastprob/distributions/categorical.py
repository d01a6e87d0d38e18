"""Categorical and OneHotCategorical."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict.nn import InteractionType
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints

from fastprob import backend, rng
from fastprob.distributions._base import EMPTY, MEAN, MEDIAN, Fused, check_real, reject
from fastprob.ops import categorical as ops
from fastprob.reference._noise import exponential_
from fastprob.reference._reduce import plain_tensors_only

# Half precisions are drawn by way of their rounded probabilities, as torch does.
_RACED = (torch.float32, torch.float64)
# The kind of a deterministic interaction type: by whether it is the median.
_KINDS = (ops.MODE, ops.MEDIAN)


def _needs_grad(given: Tensor) -> bool:
    return given.requires_grad and torch.is_grad_enabled()


class _CategoricalBase(Fused):
    """Holds what was given, logits or probs, and derives the log-probabilities when asked."""

    _name = "Categorical"

    def _set(self, logits: Tensor | None, probs: Tensor | None, validate_args: bool | None):
        if (logits is None) == (probs is None):
            raise ValueError(
                f"{self._name} expects either logits or probs, got "
                f"{'neither' if logits is None else 'both'}"
            )
        if validate_args is not None:
            self._validate_args = validate_args
        given = probs if logits is None else logits
        assert given is not None
        if given.ndim < 1:
            raise ValueError(
                f"{self._name} expects {'probs' if logits is None else 'logits'} of one dimension "
                "or more, whose last one is the categories; got a scalar"
            )
        if not given.dtype.is_floating_point:
            given = given.to(torch.get_default_dtype())
        self._given = given
        self._from_probs = logits is None
        self._log_probs: Tensor | None = None
        if self._checks(given):
            if self._from_probs:
                check_probs(self._name, given)
            else:
                check_real(self._name, "logits", given)

    @property
    def _scores(self) -> Tensor:
        """Log-probabilities of the categories, `[*batch, K]`."""
        scores = self._log_probs
        if scores is None:
            scores = (ops.from_probs if self._from_probs else ops.normalize)(self._given)
            # What was worked out under no_grad must not answer a later call that needs a gradient.
            if scores.requires_grad or not self._given.requires_grad:
                self._log_probs = scores
        return scores

    @property
    def logits(self) -> Tensor:
        """Log-probabilities of the categories, `[*batch, K]`."""
        return self._scores

    @property
    def probs(self) -> Tensor:
        """Probabilities of the categories, `[*batch, K]`."""
        if self._from_probs:
            return self._given / self._given.sum(-1, keepdim=True)
        return ops.exponentials(self._scores)

    @property
    def _param(self) -> Tensor:
        # What torch's Categorical calls it; its enumerate_support reads the device.
        return self._given

    @property
    def param_shape(self) -> torch.Size:
        return self._given.shape

    @property
    def _num_events(self) -> int:
        return self._given.shape[-1]

    def _index(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        """Draws indices, int64 `[*shape, *batch]`."""
        if generator is not None and rng.counted(generator):
            return self._counted(shape, generator)
        if not self._from_probs:
            # Worked out here and kept, so that scoring does not do so again.
            _ = self._scores
        with torch.no_grad():
            probs = self.probs
            if shape.numel() == 1 and (torch.compiler.is_compiling() or plain_tensors_only()):
                # One draw: the race that torch.multinomial runs, from the same noise. Under vmap
                # multinomial itself knows whether its noise is to be batched.
                noise = rng.exponential(probs.shape, probs, generator)
                index = ops.race(probs, noise)
                return index.view(shape + index.shape) if shape else index
            flat = probs.reshape(-1, probs.shape[-1])
            index = rng.multinomial(flat, shape.numel(), generator)
            return index.T.reshape(shape + probs.shape[:-1])

    def _draw_index(
        self, shape: torch.Size, generator: torch.Generator | None, score: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Draws indices, int64 `[*shape, *batch]`, and scores them."""
        given = self._given
        if (
            shape.numel() == 1
            and given.is_cpu
            and given.dtype in _RACED
            and plain_tensors_only()
            and not rng.counted(generator)
        ):
            needs_grad = _needs_grad(given)
            # Scored without the log-probabilities of the other categories: 428 us a call at
            # 4096 x 8, where they and the probabilities made of them took it to 1,911.
            if self._from_probs and not given.is_contiguous():
                # torch.multinomial draws in the order of the memory, of all rows as one batch; of
                # logits it gets a softmax, which is contiguous.
                flat = given.reshape(-1, given.shape[-1])
                noise = torch.empty_like(flat).view(given.shape)
            else:
                noise = torch.empty_like(given, memory_format=torch.contiguous_format)
            with torch.no_grad():
                index, log_prob = ops.race_score(
                    given,
                    exponential_(noise, generator),
                    self._from_probs,
                    score and not needs_grad,
                )
            if shape:
                index = index.view(shape + index.shape)
                log_prob = None if log_prob is None else log_prob.view(index.shape)
            if not needs_grad:
                return index, log_prob
        elif score and shape.numel() == 1 and self._races_in_graph(generator):
            noise = rng.exponential(given.shape, given, generator)
            index, log_prob = ops.race_score_in_graph(given, noise, self._from_probs)
            return (index.view(shape + index.shape), log_prob.view(shape + index.shape))
        else:
            index = self._index(shape, generator)
        return index, ops.pick(self._scores, index) if score else None

    def _races_in_graph(self, generator: Any) -> bool:
        """Whether a graph holds a draw without gradients and its score as one operator."""
        given = self._given
        return (
            ops.lowered(given)
            and given.dtype in _RACED
            and not _needs_grad(given)
            and not rng.counted(generator)
        )

    def _counted(self, shape: torch.Size, stream: Any) -> Tensor:
        """The draws of the kernels from a `CounterStream`, int64 `[*shape, *batch]`."""
        with torch.no_grad():
            weights = ops.weights(self._given, self._from_probs)
            size = shape + weights.shape[:-1]
            return ops.first_beyond(weights, rng.uniform(size, weights, stream))

    def _kernel(
        self, kind: int, value: int, score: bool, shape=EMPTY, generator=None, pathwise=False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Index, value and log-probability from the kernels; see `ops.categorical.draw`."""
        given, mask = self._parameters()
        return ops.draw(
            given, mask, shape, generator, from_probs=self._from_probs, kind=kind, value=value,
            pathwise=pathwise, score=score,
        )[:3]  # fmt: skip

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        """Logits or weights, and the mask, as the kernels take them."""
        return self._given, None

    def _served(self) -> bool:
        """Whether the kernels serve calls of this distribution."""
        return backend.serves(self._given)

    def _memo(self) -> dict[str, Any] | None:
        """What a score keeps for the entropy, which a loss with gradients asks for next."""
        if torch.compiler.is_compiling():
            return None
        given = self._parameters()[0]
        # A leaf may be asked for two backward passes, which one node for both would not survive.
        if given.grad_fn is None or not torch.is_grad_enabled():
            return None
        memo = self.__dict__.get("_shared")
        if memo is None or memo["of"] is not given:
            memo = self._shared = {"of": given}
        return memo

    def _score_kernel(self, value: Tensor, hot: bool, neg_inf: float = -math.inf) -> Tensor:
        given, mask = self._parameters()
        return ops.score_and_entropy(
            given, mask, value, self._memo(), from_probs=self._from_probs, hot=hot, neg_inf=neg_inf
        )

    def _at(self, interaction: InteractionType, score: bool) -> tuple[Tensor, Tensor | None]:
        """The index of a deterministic interaction type, int64 `[*batch]`, and its score."""
        given = self._given
        if interaction is MEDIAN:
            index = ops.median_index(self._scores)
        elif score and not _needs_grad(given) and ops.by_passes(given):
            return ops.mode_score(given, self._from_probs)
        else:
            index = ops.largest(given)
        return index, ops.pick(self._scores, index) if score else None

    def entropy(self) -> Tensor:
        """Entropy in nats, `[*batch]`."""
        if self._served():
            given, mask = self._parameters()
            return ops.entropy_given(given, mask, self._memo(), from_probs=self._from_probs)
        return ops.entropy(self._scores)

    @property
    def batch_shape(self) -> torch.Size:
        return self._given.shape[:-1]

    _batch_shape = batch_shape

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with its batch expanded to `batch_shape`."""
        shape = torch.Size(batch_shape) + self._given.shape[-1:]
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._given, new._log_probs = self._given.expand(shape), None
        return new

    def __repr__(self) -> str:
        name = "probs" if self._from_probs else "logits"
        return f"{type(self).__name__}({name}: {self._given.shape})"


class Categorical(_CategoricalBase, D.Categorical):
    """Categorical distribution over indices, a drop-in for `torch.distributions.Categorical`.

    `mean` and `median` are those of the index: `sum_k k p_k`, a float, and the smallest index whose
    cumulative probability reaches 1/2. torch has NaN and none.

    Source: `log p(k) = logits_k - logsumexp(logits)`.

    Args:
        probs: unnormalized probabilities, `[*batch, K]`.
        logits: unnormalized log-probabilities, `[*batch, K]`. Exclusive with `probs`.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if both or none of the two are given, or a checked parameter is NaN or negative.
    """

    def __init__(
        self,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._set(logits, probs, validate_args)

    logits = _CategoricalBase.logits
    probs = _CategoricalBase.probs
    event_shape = property(lambda self: EMPTY)
    _event_shape = event_shape

    @property
    def _kind(self) -> tuple:
        return "index", self._given.shape[-1]

    def _draw(self, shape, generator, score, pathwise):
        if backend.serves(self._given):
            return self._kernel(ops.RANDOM, ops.NO_VALUE, score, shape, generator)[::2]
        return self._draw_index(shape, generator, score)

    def _point(self, interaction: InteractionType, score: bool):
        if interaction is MEAN:
            if backend.serves(self._given):
                value = self._kernel(ops.MEAN, ops.MEAN_INDEX, False)[1]
            else:
                value = ops.mean_index(self._scores)
            if score:
                raise NotImplementedError(
                    "the mean of a Categorical lies between the categories and has no "
                    "log-probability; use MODE or MEDIAN, or return_log_prob=False"
                )
            return value, None
        if backend.serves(self._given):
            return self._kernel(_KINDS[interaction is MEDIAN], ops.NO_VALUE, score)[::2]
        return self._at(interaction, score)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of indices, `[*sample, *batch]`."""
        if self._checks(value):
            self._validate_sample(value)
        if backend.serves(self._given):
            return self._score_kernel(value, False)
        try:
            return ops.pick(self._scores, value)
        except (RuntimeError, AttributeError):
            ops.fitting(self._given, None, value, False)
            raise


class OneHotCategorical(_CategoricalBase, D.Categorical):
    """Categorical distribution over one-hot vectors, int64 as tensordict's and TorchRL's.

    `mean` is the vector of probabilities, `median` the one-hot of the median index.

    Source: `log p(x) = logits_k - logsumexp(logits)` with k the position of the one.

    Args:
        logits: unnormalized log-probabilities, `[*batch, K]`.
        probs: unnormalized probabilities, `[*batch, K]`. Exclusive with `logits`.
        grad_method: how `rsample` gets its gradient, TorchRL's `ReparamGradientStrategy` or its
            name. `"PassThrough"` hands the gradient to the probabilities (straight-through),
            `"RelaxedOneHot"` to a relaxed sample. Values of `rsample` are floating-point ones.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if both or none of the two are given, or a checked parameter is NaN or negative.
    """

    _name = "OneHotCategorical"
    num_params = 1

    def __init__(
        self,
        logits: Tensor | None = None,
        probs: Tensor | None = None,
        grad_method: Any = "PassThrough",
        validate_args: bool | None = None,
    ) -> None:
        self._set(logits, probs, validate_args)
        self.grad_method = getattr(grad_method, "name", grad_method)
        if self.grad_method not in ("PassThrough", "RelaxedOneHot"):
            raise ValueError(
                "grad_method must be 'PassThrough' or 'RelaxedOneHot', or TorchRL's "
                f"ReparamGradientStrategy, got {grad_method!r}"
            )

    logits = _CategoricalBase.logits
    probs = _CategoricalBase.probs
    support = constraints.one_hot  # type: ignore[assignment]

    @property
    def event_shape(self) -> torch.Size:
        return self._given.shape[-1:]

    _event_shape = event_shape

    def _value(self, index: Tensor) -> Tensor:
        return ops.one_hot(index, self._given.shape[-1])

    @property
    def _kind(self) -> tuple:
        return "one_hot", self._given.shape[-1]

    def _draw(self, shape, generator, score, pathwise):
        if pathwise and self.grad_method == "RelaxedOneHot":
            relaxed = relaxed_one_hot(self._scores, shape, generator)
            index = relaxed.detach().argmax(-1)
            value = relaxed + (self._value(index).to(relaxed.dtype) - relaxed.detach())
        elif backend.serves(self._given):
            return self._kernel(ops.RANDOM, ops.ONE_HOT, score, shape, generator, pathwise)[1:]
        else:
            index, log_prob = self._draw_index(shape, generator, score)
            value = self._value(index)
            if pathwise:
                probs = self.probs
                value = value + probs - probs.detach()
            return value, log_prob
        return value, ops.pick(self._scores, index) if score else None

    def _point(self, interaction: InteractionType, score: bool):
        if interaction is MEAN:
            if score:
                raise NotImplementedError(
                    "the mean of a OneHotCategorical is its vector of probabilities, which has no "
                    "log-probability; use MODE or MEDIAN, or return_log_prob=False"
                )
            if backend.serves(self._given):
                return self._kernel(ops.MEAN, ops.PROBS, False)[1:]
            return self.probs, None
        if backend.serves(self._given):
            return self._kernel(_KINDS[interaction is MEDIAN], ops.ONE_HOT, score)[1:]
        index, log_prob = self._at(interaction, score)
        return self._value(index), log_prob

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of one-hot vectors, `[*sample, *batch]`."""
        if value.shape[-1] != self._given.shape[-1]:
            raise ValueError(
                f"OneHotCategorical has {self._given.shape[-1]} categories, got a value of shape "
                f"{tuple(value.shape)}: its last dimension must be the categories"
            )
        if backend.serves(self._given):
            return self._score_kernel(value, True)
        if value.dtype is torch.bool:
            # torch finds no largest element of these.
            value = value.byte()
        try:
            return ops.pick(self._scores, value.argmax(-1))
        except (RuntimeError, AttributeError):
            ops.fitting(self._given, None, value, True)
            raise

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All one-hot vectors, `[K, *batch, K]`."""
        n = self._given.shape[-1]
        batch = self.batch_shape
        values = torch.eye(n, dtype=torch.int64, device=self._given.device)
        values = values.view((n,) + (1,) * len(batch) + (n,))
        return values.expand((n, *batch, n)) if expand else values


def relaxed_one_hot(scores: Tensor, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """A draw of temperature 1 from `torch.distributions.RelaxedOneHotCategorical`, of its noise.

    Args:
        scores: unnormalized log-probabilities, `[*batch, K]`.
        shape: leading sample dimensions.
        generator: source of the noise.

    Returns:
        points of the simplex, `[*shape, *batch, K]`, with gradients into the scores.
    """
    eps = torch.finfo(scores.dtype).eps
    uniform = rng.uniform(shape + scores.shape, scores, generator).clamp(eps, 1.0 - eps)
    return (scores - (-uniform.log()).log()).softmax(-1)


def check_probs(name: str, probs: Tensor) -> None:
    """Raises if `probs` has a NaN, a negative element, or a row without mass.

    Raises:
        ValueError: naming the first such element.
    """
    if not probs.numel():
        return
    probs = probs.detach()
    if not probs.min() >= 0:
        raise reject(name, "probs", probs, "0 or more", ~(probs >= 0))
    mass = probs.sum(-1)
    if not mass.min() > 0:
        raise reject(name, "probs", mass, "of a positive sum in each row", ~(mass > 0))


def recognize(dist: D.Distribution) -> Fused | None:
    """The fastprob distribution equal to a torch Categorical, else None."""
    if type(dist) is not D.Categorical:
        return None
    new = Categorical.__new__(Categorical)
    from_probs = "probs" in dist.__dict__ and "logits" not in dist.__dict__
    new._given = dist.probs if from_probs else dist.logits
    new._from_probs = from_probs
    new._log_probs = None if from_probs else new._given
    if "_validate_args" in dist.__dict__:
        new._validate_args = dist._validate_args
    return new
