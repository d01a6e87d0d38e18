"""TruncatedNormal: a Normal cut to an interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict.nn import InteractionType
from torch import Tensor
from torch.distributions import constraints

from fastprob import rng
from fastprob.distributions._base import (
    EMPTY,
    MEDIAN,
    MODE,
    Fused,
    broadcast,
    check_positive,
    check_real,
)
from fastprob.distributions.normal import as_scale
from fastprob.ops import truncated_normal as ops
from fastprob.ops._fused import given
from fastprob.ops.projection import clamp
from fastprob.reference.truncated_normal import FAR

# TorchRL draws from the quantiles between these two.
_EPS = 1e-6
_HALVES = (torch.float16, torch.bfloat16)
# The bounds of the latest call with tensors, and what identifies them: a policy passes the same
# ones at every call, and looking at their values takes three tensor operations.
_checked: tuple[Any, Any, int | None, int | None] | None = None


class TruncatedNormal(Fused):
    """A Normal cut to `[low, high]`.

    Takes what TorchRL's class of the same name takes. The bounds may lie on one side of the mean
    and as far out in its tail as they like. `mode` is the mean of the Normal clamped to the bounds,
    `mean` and `median` those of the truncated distribution; `deterministic_sample` is the mean.

    Source: `log p(x) = log N(x; loc, scale) - log(Phi(b) - Phi(a))` with `a = (low - loc) / scale`
    and `b = (high - loc) / scale`, and `-inf` outside of the bounds.

    Args:
        loc: mean of the Normal, `[*batch, event]`.
        scale: its standard deviation, greater than 0: a tensor that broadcasts with `loc`, a
            number, or a callable that maps `loc` to a tensor. At least 1e-6 is used.
        upscale: bound of the mean where `tanh_loc` squashes it.
        low: lower bound, a number or a tensor that broadcasts with `loc`; may be `-inf`.
        high: upper bound, likewise; may be `inf`.
        tanh_loc: whether the mean becomes `upscale * tanh(loc / upscale)`.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if `high` is not greater than `low`, a checked parameter is NaN, a scale is not
            above 0, or the shapes do not broadcast.
    """

    arg_constraints: Any = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    has_rsample = True
    num_params = 2

    def __init__(
        self,
        loc: Any,
        scale: Tensor | float | Callable[[Tensor], Tensor],
        upscale: Tensor | float = 5.0,
        low: Tensor | float = -1.0,
        high: Tensor | float = 1.0,
        tanh_loc: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        if validate_args is not None:
            self._validate_args = validate_args
        if not isinstance(loc, Tensor):
            loc = torch.as_tensor(loc, dtype=torch.get_default_dtype())
        self._given_low, self._given_high = low, high
        if type(low) is float and type(high) is float and -FAR < low < high < FAR:
            self._low: Any = low
            self._high: Any = high
        else:
            self._low, self._high = _read_bounds(low, high, loc)
        self.upscale = upscale
        self.tanh_loc = tanh_loc
        self.update(loc, scale)

    def update(self, loc: Tensor, scale: Any) -> None:
        """Replaces the parameters.

        Args:
            loc: mean of the Normal, `[*batch, event]`.
            scale: as in the constructor.
        """
        if self.tanh_loc:
            loc = (loc / self.upscale).tanh() * self.upscale
        scale = as_scale(scale, loc)
        low, high = self._low, self._high
        if isinstance(low, Tensor):
            # The bounds may have more dimensions than the parameters.
            loc, scale, low, high = broadcast(
                "TruncatedNormal", loc=loc, scale=scale, low=low, high=high
            )
            self._low, self._high = low, high
        elif (
            not isinstance(scale, Tensor)
            or loc.shape != scale.shape
            or loc.dtype is not scale.dtype
        ):
            loc, scale = broadcast("TruncatedNormal", loc=loc, scale=scale)
        if self._checks(loc):
            check_real("TruncatedNormal", "loc", loc)
            check_positive("TruncatedNormal", "scale", scale)
        self.loc = loc
        self.scale = scale.clamp_min(_EPS)
        self._ndims = 1 if loc.ndim else 0

    def _args(self) -> tuple[Tensor, Tensor, Any, Any]:
        return self.loc, self.scale, self._low, self._high

    def _draw(self, shape, generator, score, pathwise):
        args = self._args()
        loc = args[0]
        if ops.served(*args):
            return ops.draw(
                *args, shape, self._ndims, generator, score=score, pathwise=pathwise,
                clamp=self._bounds_of_value,
            )  # fmt: skip
        # The steps of a counter-based stream are the kernels', whatever the dtype.
        like = loc.new_empty((), dtype=torch.float64) if rng.counted(generator) else loc
        noise = rng.uniform(
            shape + loc.shape if shape else loc.shape, like, generator, _EPS, 1.0 - _EPS
        )
        if noise.dtype in _HALVES:
            # There the upper limit rounds to 1.
            noise = noise.double().clamp(_EPS, 1.0 - _EPS)
        if score:
            joint = pathwise or not torch.is_grad_enabled()
            draw = ops.sample_score if joint else ops.sample_score_detached
            return draw(*args, noise, self._ndims)
        if pathwise:
            return ops.sample(*args, noise), None
        with torch.no_grad():
            return ops.sample(*args, noise), None

    def _point(self, interaction: InteractionType, score: bool):
        args = self._args()
        loc = args[0]
        kind = ops.MODE if interaction is MODE else ops.MEAN
        kind = ops.MEDIAN if interaction is MEDIAN else kind
        if ops.served(*args, kind):
            return ops.draw(
                *args, EMPTY, self._ndims, kind=kind, score=score, clamp=self._bounds_of_value
            )  # fmt: skip
        if interaction is MODE or interaction is MEDIAN:
            if interaction is MODE:
                low, high = args[2:]
                if loc.dtype is torch.float32 and not isinstance(low, Tensor):
                    value = clamp(loc, low, high)
                else:
                    value = torch.clamp(loc, *self._bound_tensors())
            else:
                half = torch.full((), 0.5, dtype=torch.float64, device=loc.device)
                value = ops.sample(*args, half)
            log_prob = ops.log_prob(*args, value, self._ndims) if score else None
        else:
            value, log_prob = ops.mean_score(*args, self._ndims, score)
        if self._bounds_of_value is not None:
            value = self._bounds_of_value.clamp(value)
        return value, log_prob

    def carry(self, projection: Any) -> bool:
        if not ops.served(*self._args()):
            return False
        self._bounds_of_value = ops.bounds_of(projection, self.loc, self._ndims)
        return self._bounds_of_value is not None

    def _memo(self) -> dict[str, Any] | None:
        """What a score keeps for the entropy, which a loss with gradients asks for next."""
        loc, scale = self.loc, self.scale
        # A leaf may be asked for two backward passes, which one node for both would not survive.
        made = loc.grad_fn is not None and scale.grad_fn is not None
        if not made or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        memo = self.__dict__.get("_shared")
        if memo is None or memo["of"][0] is not loc or memo["of"][1] is not scale:
            memo = self._shared = {"of": (loc, scale)}
        return memo

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value`, `[*sample, *batch]`; `-inf` outside of the bounds."""
        args = self._args()
        if ops.served(*args):
            return ops.score_and_entropy(*args, value, self._ndims, self._memo())
        try:
            return ops.log_prob(*args, value, self._ndims)
        except (RuntimeError, AttributeError):
            given("TruncatedNormal", args[0], args[1], value)
            raise

    def entropy(self) -> Tensor:
        """Differential entropy in nats, `[*batch]`."""
        args = self._args()
        if ops.served(*args):
            return ops.entropy_given(*args, self._ndims, self._memo())
        return ops.entropy(*args, self._ndims)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of what lies below `value` in each element, `[*sample, *batch, event]`."""
        return ops.cdf(ops.standardize(*self._args()), value).to(self.loc.dtype)

    def icdf(self, value: Tensor) -> Tensor:
        """The point below which the probability is `value`, `[*sample, *batch, event]`."""
        return ops.sample(*self._args(), value)

    @property
    def variance(self) -> Tensor:
        return ops.variance(ops.standardize(*self._args())).to(self.loc.dtype)

    def _bound_tensors(self) -> tuple[Tensor, Tensor]:
        loc = self.loc
        low = torch.as_tensor(self._low, dtype=loc.dtype, device=loc.device)
        return low, torch.as_tensor(self._high, dtype=loc.dtype, device=loc.device)

    @property
    def low(self) -> Tensor:
        """Lower bound of the values, a tensor."""
        return torch.as_tensor(self._given_low, dtype=self.loc.dtype, device=self.loc.device)

    @property
    def high(self) -> Tensor:
        """Upper bound of the values, a tensor."""
        return torch.as_tensor(self._given_high, dtype=self.loc.dtype, device=self.loc.device)

    min = low
    max = high

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.loc.device

    @property
    def support(self) -> constraints.Constraint:
        low, high = self.low, self.high
        return constraints.independent(constraints.interval(low, high), self._ndims)

    @property
    def batch_shape(self) -> torch.Size:
        return self.loc.shape[:-1]

    @property
    def event_shape(self) -> torch.Size:
        return self.loc.shape[-1:] if self._ndims else EMPTY

    _batch_shape = batch_shape
    _event_shape = event_shape

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedNormal:
        """The same distribution with its batch expanded to `batch_shape`."""
        shape = torch.Size(batch_shape) + self.event_shape
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.loc, new.scale = self.loc.expand(shape), self.scale.expand(shape)
        return new

    def __repr__(self) -> str:
        return f"{type(self).__name__}(loc: {self.loc.shape}, scale: {self.scale.shape})"


def _read_bounds(low: Any, high: Any, loc: Tensor) -> tuple[Any, Any]:
    """The bounds as two finite numbers, or two tensors of the dtype and on the device of `loc`.

    Raises:
        ValueError: if `high` is not greater than `low` somewhere.
    """
    global _checked
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        low, high = float(low), float(high)
        if not high > low:
            raise ValueError(
                "TruncatedNormal expects high to be greater than low, got "
                f"low={low} and high={high}; exchange them, or widen the interval"
            )
        return max(low, -FAR), min(high, FAR)
    limit = min(FAR, torch.finfo(loc.dtype).max)
    low_t = torch.as_tensor(low, dtype=loc.dtype, device=loc.device)
    high_t = torch.as_tensor(high, dtype=loc.dtype, device=loc.device)
    # A look at the values stops a GPU, so it is left to CPU tensors in plain eager mode.
    if (
        low_t.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    ):
        kind = (low, high, _version(low), _version(high))
        known = _checked
        if (
            known is None
            or known[0] is not low
            or known[1] is not high
            or known[2:] != kind[2:]
            or None in kind[2:]
        ):
            bad = ~(high_t > low_t)
            if bad.any():
                raise ValueError(
                    "TruncatedNormal expects high to be greater than low everywhere, got "
                    f"low={low_t.tolist()} and high={high_t.tolist()}; {int(bad.sum())} of "
                    f"{bad.numel()} intervals are empty"
                )
            _checked = kind
    return low_t.clamp_min(-limit), high_t.clamp_max(limit)


def _version(bound: Any) -> int | None:
    """What changes when a bound is written in place; None where that cannot be told."""
    if not isinstance(bound, Tensor):
        return -1
    return None if bound.is_inference() else bound._version
