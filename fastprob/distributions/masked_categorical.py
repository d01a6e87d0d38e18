"""MaskedCategorical and MaskedOneHotCategorical: categorical over the allowed actions."""

from __future__ import annotations

import math
from typing import Any

import torch
from tensordict.nn import InteractionType
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints

from fastprob import backend
from fastprob.distributions._base import EMPTY, MEAN, MEDIAN, check_real
from fastprob.distributions.categorical import (
    _KINDS,
    _CategoricalBase,
    check_probs,
    relaxed_one_hot,
)
from fastprob.ops import categorical as categorical_ops
from fastprob.ops import masked_categorical as ops

_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class _MaskedBase(_CategoricalBase):
    """The masked logits as `_given`, and how their positions become actions.

    With a boolean mask a position is the action. With a list of indices it is a place in the list,
    `_indices`: drawing there takes the noise that TorchRL draws.
    """

    _indices: Tensor | None
    _mask: Tensor
    # Logits as they were given, where the kernels take them along with the mask.
    _raw: Tensor | None = None
    neg_inf: float
    num_samples: int

    def _set_masked(
        self,
        logits: Tensor | None,
        probs: Tensor | None,
        mask: Tensor | None,
        indices: Tensor | None,
        neg_inf: float,
        padding_value: int | None,
        padding_side: str,
        validate_args: bool | None,
    ) -> None:
        name = self._name
        if (mask is None) == (indices is None):
            raise ValueError(
                f"{name} expects either mask, a boolean tensor, or indices, the allowed actions; "
                f"got {'neither' if mask is None else 'both'}"
            )
        if (logits is None) == (probs is None):
            raise ValueError(
                f"{name} expects either logits or probs, got "
                f"{'neither' if logits is None else 'both'}"
            )
        if validate_args is not None:
            self._validate_args = validate_args
        given = probs if logits is None else logits
        assert given is not None
        if given.ndim < 1:
            raise ValueError(
                f"{name} expects {'probs' if logits is None else 'logits'} of one dimension or "
                "more, whose last one is the categories; got a scalar"
            )
        if not given.dtype.is_floating_point:
            given = given.to(torch.get_default_dtype())
        self.neg_inf = neg_inf
        self.num_samples = given.shape[-1]
        self._padding_value = padding_value
        self._padding_side = padding_side
        self._from_probs = False
        self._log_probs: Tensor | None = None
        checks = self._checks(given)
        if checks and logits is None:
            check_probs(name, given)
        if mask is not None:
            _check_mask(name, mask, given)
            self._mask, self._indices = mask, None
            if logits is None:
                self._given = ops.probs_to_logits(given, mask)
            elif backend.serves(given):
                # The kernels take logits and mask as they are; see `__getattr__`.
                full = torch.broadcast_shapes(given.shape, mask.shape)
                self._raw, self._mask = given.expand(full), mask.expand(full)
            else:
                self._given = ops.mask_logits(given, mask)
        else:
            assert indices is not None
            if indices.dtype not in _DTYPES or indices.ndim < 1:
                raise ValueError(
                    f"{name} expects indices of an integer dtype with the allowed actions in the "
                    f"last dimension, got {indices.dtype} of shape {tuple(indices.shape)}"
                    + ("; pass a boolean tensor as mask" if indices.dtype is torch.bool else "")
                )
            self._mask = indices
            padded = None
            if padding_value is not None:
                padded = indices == padding_value
                indices = indices.masked_fill(padded, 0)
            if indices.dtype is not torch.int64:
                indices = indices.long()
            if checks:
                _check_indices(name, indices, self.num_samples, padding_value)
            if logits is None:
                given = ops.probs_to_logits(given, None)
            self._given = ops.gather(given, indices, padded)
            self._indices = indices
        if checks:
            self._check_rows()

    def __getattr__(self, name: str) -> Any:
        """The masked logits of a distribution whose kernels have not needed them so far."""
        if name == "_given" and self._raw is not None:
            self._given = ops.mask_logits(self._raw, self._mask)
            return self._given
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        raw = self._raw
        return (self._given, None) if raw is None else (raw, self._mask)

    def _served(self) -> bool:
        raw = self._raw
        return backend.serves(self._given if raw is None else raw)

    @property
    def batch_shape(self) -> torch.Size:
        raw = self._raw
        return (self._given if raw is None else raw).shape[:-1]

    _batch_shape = batch_shape

    def _check_rows(self) -> None:
        """Raises if a logit is NaN, or a row has no allowed action."""
        name, given = self._name, self._given
        if not given.numel():
            return
        top = given.detach().amax(-1)
        # The largest of a row is NaN where one of it is, and -inf where all are masked.
        if not bool((top > -math.inf).all()):
            check_real(name, "logits", given)
            bad = top == -math.inf
            first = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{name} expects at least one allowed action of positive probability in each row, "
                f"but {int(bad.sum())} of {bad.numel()} rows have none: the first is at index "
                f"{first}; allow an action there, or leave the row out"
            )

    @property
    def logits(self) -> Tensor:
        """Log-probabilities of the categories, `neg_inf` where masked.

        `[*batch, K]`, or one for each entry of `indices`, as TorchRL's.
        """
        scores = self._scores
        if self.neg_inf == -math.inf:
            return scores
        return scores.masked_fill(scores == -math.inf, self.neg_inf)

    @property
    def probs(self) -> Tensor:
        """Probabilities, 0 where masked; `[*batch, K]`, or one for each entry of `indices`."""
        return categorical_ops.exponentials(self._scores)

    @property
    def mask(self) -> Tensor:
        """The boolean mask.

        Raises:
            ValueError: if the distribution was built from indices.
        """
        if self._indices is not None:
            raise ValueError(f"{self._name} was built from indices and has no boolean mask")
        return self._mask

    @property
    def padding_value(self) -> int:
        """What stands for no action in `indices`; 0 if it was not given."""
        return 0 if self._padding_value is None else self._padding_value

    @property
    def padding_side(self) -> str:
        """The side of the padding, as it was given; any place is recognized."""
        return self._padding_side

    @property
    def _num_events(self) -> int:
        return self.num_samples

    @property
    def _action_probs(self) -> Tensor:
        """Probabilities of the actions, `[*batch, K]`."""
        if self._indices is None:
            return self.probs
        return ops.spread(self.probs, self._indices, self.num_samples)

    @property
    def _action_log_probs(self) -> Tensor:
        """Log-probabilities of the actions, `[*batch, K]`, -inf where masked or not listed."""
        scores = self._scores
        if self._indices is None:
            return scores
        actions = torch.arange(self.num_samples, device=scores.device)
        actions = actions.view(-1, *([1] * (scores.ndim - 1)))
        return ops.score_action(scores, self._indices, actions).movedim(0, -1)

    def _action(self, position: Tensor) -> Tensor:
        return position if self._indices is None else ops.to_action(self._indices, position)

    def _score_position(self, position: Tensor, action: Tensor) -> Tensor:
        if self._indices is None:
            return categorical_ops.pick(self._scores, position)
        return ops.score_position(self._scores, self._indices, position, action)

    def _score_action(self, action: Tensor) -> Tensor:
        if self._indices is None:
            return categorical_ops.pick(self._scores, action)
        return ops.score_action(self._scores, self._indices, action)

    def _log_prob(self, value: Tensor, hot: bool) -> Tensor:
        if self._indices is None and self._served():
            return self._score_kernel(value, hot, self.neg_inf)
        if hot and value.dtype is torch.bool:
            # torch finds no largest element of these.
            value = value.byte()
        try:
            result = self._score_action(value.argmax(-1) if hot else value)
        except (RuntimeError, AttributeError):
            if self._indices is None:
                categorical_ops.fitting(self._given, None, value, hot)
            raise
        return torch.where(result == -math.inf, self.neg_inf, result)

    def _at_action(self, interaction: InteractionType, score: bool):
        """The action of a deterministic interaction type, and its log-probability."""
        if interaction is MEDIAN and self._indices is not None:
            # The order is that of the actions, not of the list.
            action = categorical_ops.median_of(self._action_probs)
            return action, self._score_action(action) if score else None
        plain = self._indices is None
        position, log_prob = self._at(interaction, score and plain)
        action = self._action(position)
        if score and not plain:
            log_prob = self._score_position(position, action)
        return action, log_prob

    def entropy(self) -> Tensor:
        """Entropy in nats over the allowed actions, `[*batch]`; an entry of `indices` is one."""
        return super().entropy()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with its batch expanded to `batch_shape`."""
        new = super().expand(batch_shape, _instance)
        shape = torch.Size(batch_shape)
        new._mask = self._mask.expand(shape + self._mask.shape[-1:])
        if self._raw is not None:
            new._raw = self._raw.expand(shape + self._raw.shape[-1:])
        if self._indices is not None:
            new._indices = self._indices.expand(shape + self._indices.shape[-1:])
        return new


class MaskedCategorical(_MaskedBase, D.Categorical):
    """Categorical distribution over the allowed actions; draws are int64 indices.

    Takes what TorchRL's class of the same name takes. Values are always the original indices, also
    where the allowed actions are given as a list. A masked action is never drawn, and its
    log-probability is `neg_inf`.

    Source: `log p(k) = logits_k - logsumexp(allowed logits)`.

    Args:
        logits: unnormalized log-probabilities, `[*batch, K]`.
        probs: unnormalized probabilities, `[*batch, K]`. Exclusive with `logits`.
        mask: True for the actions that are allowed, `[*batch, K]` or broadcastable to it.
        indices: the allowed actions, `[*batch, L]`, integers in [0, K). Exclusive with `mask`.
        neg_inf: log-probability of what is masked.
        padding_value: entries of `indices` with this value name no action.
        use_cross_entropy: accepted for TorchRL's sake; without effect.
        padding_side: accepted for TorchRL's sake; padding is recognized anywhere.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if both or none of two exclusive arguments are given; the mask or the indices
            are of a wrong dtype or shape; or a check finds a NaN, an index out of range, or a row
            without an allowed action.
    """

    _name = "MaskedCategorical"

    def __init__(
        self,
        logits: Tensor | None = None,
        probs: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        neg_inf: float = -math.inf,
        padding_value: int | None = None,
        use_cross_entropy: bool = True,
        padding_side: str = "left",
        validate_args: bool | None = None,
    ) -> None:
        self.use_cross_entropy = use_cross_entropy
        self._set_masked(
            logits, probs, mask, indices, neg_inf, padding_value, padding_side, validate_args
        )

    logits = _MaskedBase.logits
    probs = _MaskedBase.probs
    event_shape = property(lambda self: EMPTY)
    _event_shape = event_shape

    @property
    def _kind(self) -> tuple:
        return "index", self.num_samples

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.num_samples - 1)

    def _draw(self, shape, generator, score, pathwise):
        if self._served():
            plain = self._indices is None
            position, _, log_prob = self._kernel(
                categorical_ops.RANDOM, categorical_ops.NO_VALUE, score and plain, shape, generator
            )
            if plain:
                return position, log_prob
            log_prob = None
        else:
            position, log_prob = self._draw_index(shape, generator, score and self._indices is None)
        action = self._action(position)
        if score and log_prob is None:
            log_prob = self._score_position(position, action)
        return action, log_prob

    def _point(self, interaction: InteractionType, score: bool):
        if interaction is not MEAN:
            if self._indices is None and self._served():
                kind = _KINDS[interaction is MEDIAN]
                return self._kernel(kind, categorical_ops.NO_VALUE, score)[::2]
            return self._at_action(interaction, score)
        if score:
            raise NotImplementedError(
                "the mean of a MaskedCategorical lies between the categories and has no "
                "log-probability; use MODE or MEDIAN, or return_log_prob=False"
            )
        index = self._indices
        if index is None and self._served():
            return self._kernel(categorical_ops.MEAN, categorical_ops.MEAN_INDEX, False)[1], None
        probs = self.probs
        if index is None:
            index = torch.arange(self.num_samples, device=probs.device)
        return (probs * index).sum(-1), None

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of actions, `[*sample, *batch]`; `neg_inf` where masked."""
        return self._log_prob(value, False)


class MaskedOneHotCategorical(_MaskedBase, D.Categorical):
    """Categorical distribution over the allowed actions; draws are one-hot vectors, int64.

    Takes what TorchRL's class of the same name takes; see `MaskedCategorical`. The vectors have the
    K original actions, also where the allowed ones are given as a list.

    Source: `log p(x) = logits_k - logsumexp(allowed logits)` with k the position of the one.

    Args:
        logits: unnormalized log-probabilities, `[*batch, K]`.
        probs: unnormalized probabilities, `[*batch, K]`. Exclusive with `logits`.
        mask: True for the actions that are allowed, `[*batch, K]` or broadcastable to it.
        indices: the allowed actions, `[*batch, L]`, integers in [0, K). Exclusive with `mask`.
        neg_inf: log-probability of what is masked.
        padding_value: entries of `indices` with this value name no action.
        grad_method: how `rsample` gets its gradient, as in `OneHotCategorical`.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: as `MaskedCategorical`, and for an unknown `grad_method`.
    """

    _name = "MaskedOneHotCategorical"

    def __init__(
        self,
        logits: Tensor | None = None,
        probs: Tensor | None = None,
        mask: Tensor | None = None,
        indices: Tensor | None = None,
        neg_inf: float = -math.inf,
        padding_value: int | None = None,
        grad_method: Any = "PassThrough",
        validate_args: bool | None = None,
    ) -> None:
        self.grad_method = getattr(grad_method, "name", grad_method)
        if self.grad_method not in ("PassThrough", "RelaxedOneHot"):
            raise ValueError(
                "grad_method must be 'PassThrough' or 'RelaxedOneHot', or TorchRL's "
                f"ReparamGradientStrategy, got {grad_method!r}"
            )
        self._set_masked(
            logits, probs, mask, indices, neg_inf, padding_value, "left", validate_args
        )

    logits = _MaskedBase.logits
    probs = _MaskedBase.probs
    support = constraints.one_hot  # type: ignore[assignment]

    @property
    def _kind(self) -> tuple:
        return "one_hot", self.num_samples

    @property
    def event_shape(self) -> torch.Size:
        return torch.Size((self.num_samples,))

    _event_shape = event_shape

    def _draw(self, shape, generator, score, pathwise):
        if pathwise and self.grad_method == "RelaxedOneHot":
            # Masked entries at -inf would make the relaxed draw's gradient NaN.
            scores = self._scores.clamp_min(0.25 * torch.finfo(self._scores.dtype).min)
            relaxed = relaxed_one_hot(scores, shape, generator)
            position = relaxed.detach().argmax(-1)
            action = self._action(position)
            hard = categorical_ops.one_hot(position, relaxed.shape[-1]).to(relaxed.dtype)
            value = relaxed + (hard - relaxed.detach())
            if self._indices is not None:
                value = ops.spread(value, self._indices, self.num_samples)
        elif self._indices is None and self._served():
            return self._kernel(
                categorical_ops.RANDOM, categorical_ops.ONE_HOT, score, shape, generator, pathwise
            )[1:]
        else:
            plain = self._indices is None
            position, log_prob = self._draw_index(shape, generator, score and plain)
            action = self._action(position)
            value = categorical_ops.one_hot(action, self.num_samples)
            if pathwise:
                probs = self._action_probs
                value = value + probs - probs.detach()
            if plain:
                return value, log_prob
        return value, self._score_position(position, action) if score else None

    def _point(self, interaction: InteractionType, score: bool):
        if interaction is not MEAN:
            if self._indices is None and self._served():
                kind = _KINDS[interaction is MEDIAN]
                return self._kernel(kind, categorical_ops.ONE_HOT, score)[1:]
            action, log_prob = self._at_action(interaction, score)
            return categorical_ops.one_hot(action, self.num_samples), log_prob
        if score:
            raise NotImplementedError(
                "the mean of a MaskedOneHotCategorical is its vector of probabilities, which has "
                "no log-probability; use MODE or MEDIAN, or return_log_prob=False"
            )
        if self._indices is None and self._served():
            return self._kernel(categorical_ops.MEAN, categorical_ops.PROBS, False)[1], None
        return self._action_probs, None

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of one-hot vectors, `[*sample, *batch]`; `neg_inf` where masked."""
        if value.shape[-1] != self.num_samples:
            raise ValueError(
                f"MaskedOneHotCategorical has {self.num_samples} categories, got a value of shape "
                f"{tuple(value.shape)}: its last dimension must be the categories"
            )
        return self._log_prob(value, True)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All one-hot vectors, masked ones included, `[K, *batch, K]`."""
        n, batch = self.num_samples, self.batch_shape
        values = torch.eye(n, dtype=torch.int64, device=self._given.device)
        values = values.view((n,) + (1,) * len(batch) + (n,))
        return values.expand((n, *batch, n)) if expand else values


def _check_mask(name: str, mask: Tensor, given: Tensor) -> None:
    """Raises unless the mask is boolean, in place and has the categories as its last dimension.

    Raises:
        ValueError: naming what was given.
    """
    if mask.dtype is not torch.bool:
        raise ValueError(
            f"{name} expects mask to be a boolean tensor, True where an action is allowed, got "
            f"{mask.dtype}; pass a list of allowed actions as indices"
        )
    if mask.shape != given.shape and not _fits(mask.shape, given.shape):
        raise ValueError(
            f"{name} expects a mask over the {given.shape[-1]} categories, of shape "
            f"{tuple(given.shape)} or broadcastable to it, got {tuple(mask.shape)}"
        )
    if not (mask.is_cpu and given.is_cpu) and mask.device != given.device:
        raise ValueError(
            f"the parameters of {name} must be on one device, got a mask on {mask.device} for "
            f"{given.device}"
        )


def _fits(mask: torch.Size, given: torch.Size) -> bool:
    """Whether a mask is one over the categories, in a shape that broadcasts with the logits."""
    sizes = zip(reversed(mask), reversed(given), strict=False)
    return (
        len(mask) > 0 and mask[-1] in (1, given[-1]) and all(1 in s or s[0] == s[1] for s in sizes)
    )


def _check_indices(name: str, indices: Tensor, count: int, padding_value: int | None) -> None:
    """Raises if an index is out of range.

    Raises:
        ValueError: naming the first such index.
    """
    if not indices.numel():
        return
    low, high = torch.aminmax(indices)
    if low >= 0 and high < count:
        return
    bad = (indices < 0) | (indices >= count)
    first = tuple(bad.nonzero()[0].tolist())
    hint = "" if padding_value is not None else ", or name the padding with padding_value"
    raise ValueError(
        f"{name} expects indices between 0 and {count - 1}, but {int(bad.sum())} of "
        f"{indices.numel()} are out of range: the first is {int(indices[first])} at index {first}; "
        f"correct it{hint}"
    )
