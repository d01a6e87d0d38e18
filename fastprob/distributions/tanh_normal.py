"""TanhNormal: a Normal squashed into an interval by tanh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict.nn import InteractionType
from torch import Tensor
from torch import distributions as D
from torch.distributions import constraints

from fastprob import backend, rng
from fastprob.distributions._base import (
    EMPTY,
    MEAN,
    MODE,
    Fused,
    broadcast,
    check_positive,
    check_real,
)
from fastprob.distributions.normal import IndependentNormal, Normal, as_scale
from fastprob.ops import extractor
from fastprob.ops import normal as normal_ops
from fastprob.ops import tanh_normal as ops
from fastprob.ops._fused import given
from fastprob.ops.extractor import Mapping
from fastprob.ops.tanh_normal import Bounds
from fastprob.reference import tanh_normal as reference
from fastprob.reference._chunks import rows_per_piece
from fastprob.reference._reduce import plain_tensors_only

_UNIT = {safe: Bounds(1.0, 0.0, 0.0, safe) for safe in (True, False)}
# The bounds of the latest call with tensors: a policy passes the same ones at every call, and
# working them out anew takes four tensor operations and a pass over both.
_latest: tuple[Any, Any, tuple, Bounds] | None = None


class TanhNormal(Fused):
    """A Normal squashed into `(low, high)` by tanh.

    Takes what TorchRL's class of the same name takes. Draws are scored at the value before tanh,
    which is exact where tanh saturates; `mode` is the true mode, `mean` the true mean and `median`
    the true median of the squashed distribution. `deterministic_sample` is the squashed mean of the
    Normal, which is the median.

    Source: `log p(y) = log N(x; loc, scale) - log(1 - tanh(x)^2) - log((high - low) / 2)` with
    `y = (high + low) / 2 + (high - low) / 2 * tanh(x)`; Haarnoja et al. 2018, appendix C.

    Args:
        loc: mean before tanh, `[*batch, *event]`.
        scale: standard deviation before tanh, greater than 0: a tensor that broadcasts with `loc`,
            a number, or a callable that maps `loc` to a tensor.
        upscale: bound of the mean where `tanh_loc` squashes it.
        low: lower bound of the values, a number or a tensor that broadcasts with `loc`.
        high: upper bound of the values, likewise.
        event_dims: number of event dimensions. Default 1, or 0 for a scalar `loc`.
        tanh_loc: whether the mean becomes `upscale * tanh(loc / upscale)`, moved by the middle of
            the interval.
        safe_tanh: whether |tanh| is limited to 1 minus the dtype's resolution, so that values stay
            strictly inside the bounds.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if a checked parameter is NaN, a scale is not above 0, or the shapes do not
            broadcast.
        RuntimeError: if `high` is not greater than `low`.
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
        event_dims: int | None = None,
        tanh_loc: bool = False,
        safe_tanh: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        if validate_args is not None:
            self._validate_args = validate_args
        if not isinstance(loc, Tensor):
            loc = torch.as_tensor(loc, dtype=torch.get_default_dtype())
        if type(low) is float and type(high) is float and low == -1.0 and high == 1.0:
            self._bounds = _UNIT[safe_tanh]
        else:
            self._bounds = _bounds(low, high, safe_tanh, loc)
        self._low, self._high = low, high
        self.upscale = upscale
        self.tanh_loc = tanh_loc
        self._ndims = min(1, loc.ndim) if event_dims is None else event_dims
        self.update(loc, scale)

    def update(self, loc: Tensor, scale: Any) -> None:
        """Replaces the parameters.

        Args:
            loc: mean before tanh, `[*batch, *event]`.
            scale: as in the constructor.
        """
        if self.tanh_loc:
            loc = (loc / self.upscale).tanh() * self.upscale + self._bounds.mid
        scale = as_scale(scale, loc)
        if (
            not isinstance(scale, Tensor)
            or loc.shape != scale.shape
            or loc.dtype is not scale.dtype
        ):
            loc, scale = broadcast("TanhNormal", loc=loc, scale=scale)
        if self._ndims > loc.ndim:
            raise ValueError(
                f"TanhNormal expects at least event_dims={self._ndims} dimensions in its "
                f"parameters, got shape {tuple(loc.shape)}; lower event_dims or add dimensions"
            )
        self.loc = loc
        self.scale = scale
        if self._checks(loc):
            check_real("TanhNormal", "loc", loc)
            check_positive("TanhNormal", "scale", scale)

    def _draw(self, shape, generator, score, pathwise):
        loc, scale = self.loc, self.scale
        if backend.serves(loc):
            bounds = ops.served_bounds(self._bounds, loc, self._ndims)
            if bounds is not None:
                return ops.draw(
                    loc, scale, bounds, shape, self._ndims, generator, score=score,
                    pathwise=pathwise, clamp=self._bounds_of_value,
                )  # fmt: skip
        if score and not shape and not torch.is_grad_enabled() and not rng.counted(generator):
            rows = rows_per_piece(loc, scale, self._ndims)
            if rows and isinstance(self._bounds.half, float):
                fill = rng.normal_filler(generator)
                return ops.sample_score_pieces(loc, scale, fill, self._bounds, self._ndims, rows)
        noise = rng.standard_normal(shape + loc.shape if shape else loc.shape, loc, generator)
        if pathwise or not torch.is_grad_enabled():
            if score:
                return ops.sample_score(loc, scale, noise, self._bounds, self._ndims)
            return ops.sample(loc, scale, noise, self._bounds), None
        with torch.no_grad():
            x = normal_ops.sample(loc, scale, noise)
            value = ops.squash(x, self._bounds)
        if not score:
            return value, None
        return value, ops.log_prob_before(loc, scale, x, self._bounds, self._ndims)

    def _point(self, interaction: InteractionType, score: bool):
        loc, scale, bounds = self.loc, self.scale, self._bounds
        served = ops.served_bounds(bounds, loc, self._ndims) if backend.serves(loc) else None
        if served is not None:
            return ops.draw(
                loc, scale, served, EMPTY, self._ndims, kind=_kind(interaction), score=score,
                clamp=self._bounds_of_value,
            )  # fmt: skip
        if interaction is MEAN:
            unit = reference.mean(loc, scale)
            value = unit * bounds.half + bounds.mid
            return value, self.log_prob(value) if score else None
        x = ops.mode(loc, scale) if interaction is MODE else loc
        value = ops.squash(x, bounds)
        log_prob = ops.log_prob_before(loc, scale, x, bounds, self._ndims) if score else None
        if self._bounds_of_value is not None:
            value = self._bounds_of_value.clamp(value)
        return value, log_prob

    def carry(self, projection: Any) -> bool:
        loc = self.loc
        if not backend.serves(loc) or not ops.served_bounds(self._bounds, loc, self._ndims):
            return False
        self._bounds_of_value = ops.bounds_of(projection, loc, self._ndims)
        return self._bounds_of_value is not None

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value`, `[*sample, *batch]`; it depends on the value alone.

        Values on or outside the bounds are scored just inside them.
        """
        loc = self.loc
        if backend.serves(loc):
            bounds = ops.served_bounds(self._bounds, loc, self._ndims)
            if bounds is not None:
                return ops.score_given(loc, self.scale, value, bounds, self._ndims)
        try:
            return ops.log_prob(loc, self.scale, value, self._bounds, self._ndims)
        except (RuntimeError, AttributeError, KeyError):
            given("TanhNormal", loc, self.scale, value)
            if value.is_floating_point():
                raise
            return self.log_prob(value.to(loc.dtype))

    @property
    def low(self) -> Tensor:
        """Lower bound of the values, a tensor."""
        return torch.as_tensor(self._low, device=self.loc.device)

    @property
    def high(self) -> Tensor:
        """Upper bound of the values, a tensor."""
        return torch.as_tensor(self._high, device=self.loc.device)

    min = low
    max = high

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.loc.device

    @property
    def base_dist(self) -> Normal | IndependentNormal:
        """The Normal before tanh."""
        if self._ndims == 0:
            return Normal(self.loc, self.scale, validate_args=False)
        return IndependentNormal(self.loc, self.scale, event_dim=self._ndims, validate_args=False)

    root_dist = property(lambda self: Normal(self.loc, self.scale, validate_args=False))

    @property
    def transforms(self) -> list[D.Transform]:
        """The squashing, as torch transforms."""
        half, mid = self._bounds.half, self._bounds.mid
        return [D.TanhTransform(cache_size=1), D.AffineTransform(mid, half)]

    def get_mode(self) -> Tensor:
        """The mode, detached."""
        return self.mode.detach()

    @property
    def support(self) -> constraints.Constraint:
        return constraints.real

    @property
    def batch_shape(self) -> torch.Size:
        shape = self.loc.shape
        return shape[: len(shape) - self._ndims] if self._ndims else shape

    @property
    def event_shape(self) -> torch.Size:
        shape = self.loc.shape
        return shape[len(shape) - self._ndims :] if self._ndims else EMPTY

    _batch_shape = batch_shape
    _event_shape = event_shape

    def expand(self, batch_shape: Any, _instance: Any = None) -> TanhNormal:
        """The same distribution with its batch expanded to `batch_shape`."""
        shape = torch.Size(batch_shape) + self.event_shape
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.loc, new.scale = self.loc.expand(shape), self.scale.expand(shape)
        return new

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(loc: {self.loc.shape}, scale: {self.scale.shape}, "
            f"event_dims: {self._ndims})"
        )


class ExtractedTanhNormal(TanhNormal):
    """A TanhNormal whose parameters are the raw output of a network, as yet unmapped.

    See `ExtractedNormal`.

    Args:
        raw: `[*batch, 2 A]`, loc and the raw scale side by side.
        mapping: how the second half becomes the scale.
        low: as for `TanhNormal`.
        high: likewise.
        safe_tanh: likewise.
    """

    def __init__(
        self,
        raw: Tensor,
        mapping: Mapping,
        low: Tensor | float = -1.0,
        high: Tensor | float = 1.0,
        safe_tanh: bool = True,
    ) -> None:
        self._validate_args = False
        self.tanh_loc, self.upscale = False, 5.0
        self._raw, self._mapping = raw, mapping
        self._mapped: Tensor | None = None
        self.loc = raw.chunk(2, -1)[0]
        self._low, self._high = low, high
        self._bounds = _bounds(low, high, safe_tanh, self.loc)
        self._ndims = 1

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Standard deviation before tanh, `[*batch, A]`."""
        if self._mapped is None:
            self._mapped = extractor.scale(self._raw, self._mapping)
        return self._mapped

    @scale.setter
    def scale(self, value: Tensor) -> None:
        self._mapped = value

    def _extracted(self) -> Bounds | None:
        """The interval, where the kernel that draws is to map the scale."""
        if self._mapped is not None or not backend.serves(self._raw):
            return None
        return ops.served_bounds(self._bounds, self.loc, 1)

    def _draw(self, shape, generator, score, pathwise):
        interval = self._extracted()
        if interval is None:
            return super()._draw(shape, generator, score, pathwise)
        value, log_prob, self._mapped = extractor.draw(
            self._raw, self._mapping, generator, shape=shape, score=score, pathwise=pathwise,
            bounds=self._bounds_of_value, interval=interval,
        )  # fmt: skip
        return value, log_prob

    def _point(self, interaction: InteractionType, score: bool):
        interval = self._extracted()
        if interval is None:
            return super()._point(interaction, score)
        value, log_prob, self._mapped = extractor.draw(
            self._raw, self._mapping, kind=_kind(interaction), score=score,
            bounds=self._bounds_of_value, interval=interval,
        )  # fmt: skip
        return value, log_prob


@D.register_kl(TanhNormal, TanhNormal)
def _kl(p: TanhNormal, q: TanhNormal) -> Tensor:
    """KL divergence of the Normals before tanh: an invertible map of both leaves it as it is.

    Raises:
        NotImplementedError: if the bounds differ.
    """
    same = p._low is q._low and p._high is q._high
    if not same and not (torch.equal(p.low, q.low) and torch.equal(p.high, q.high)):
        raise NotImplementedError(
            "the KL divergence of two TanhNormals has no closed form where their bounds differ"
        )
    return D.kl_divergence(p.base_dist, q.base_dist)


def _kind(interaction: InteractionType) -> int:
    """Which value that is not drawn, as the operators number it."""
    return ops.MEAN if interaction is MEAN else ops.MODE if interaction is MODE else ops.MEDIAN


def _bounds(low: Any, high: Any, safe: bool, loc: Tensor) -> Bounds:
    """Half width and middle of the interval.

    Raises:
        RuntimeError: if `high` is not greater than `low` somewhere.
    """
    global _latest
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        low, high = float(low), float(high)
        if not high > low:
            raise RuntimeError(
                f"TanhNormal expects high to be greater than low, got low={low} and high={high}"
            )
        half = (high - low) / 2
        return Bounds(half, (high + low) / 2, math.log(half), safe)
    # Before the versions are looked at: that breaks a graph. A compiled policy of 32 rows took 1.9
    # times upstream's time in four graphs, and 0.8 times in one.
    if not plain_tensors_only():
        return _tensor_bounds(low, high, safe, loc)
    kind = (_version(low), _version(high), safe, loc.device, loc.dtype)
    if _latest is not None:
        known_low, known_high, known_kind, bounds = _latest
        if known_low is low and known_high is high and known_kind == kind:
            return bounds
    if None in kind:
        return _tensor_bounds(low, high, safe, loc)
    # What is kept must serve a later backward pass as well, which an inference tensor does not.
    with torch.inference_mode(False), torch.no_grad():
        bounds = _tensor_bounds(low, high, safe, loc)
    _latest = (low, high, kind, bounds)
    return bounds


def _tensor_bounds(low: Any, high: Any, safe: bool, loc: Tensor) -> Bounds:
    low = torch.as_tensor(low, dtype=loc.dtype, device=loc.device)
    high = torch.as_tensor(high, dtype=loc.dtype, device=loc.device)
    # A look at the values stops a GPU, so it is left to CPU tensors in eager mode.
    if low.is_cpu and plain_tensors_only() and not bool((high > low).all()):
        raise RuntimeError(
            "TanhNormal expects high to be greater than low everywhere, got "
            f"low={low.tolist()} and high={high.tolist()}"
        )
    half = (high - low) / 2
    return Bounds(half, (high + low) / 2, torch.log(half), safe, half.requires_grad)


def _version(bound: Any) -> int | None:
    """What changes when a bound is written in place; None where the bounds cannot be kept.

    That is so where a write leaves no trace, and where a bound is learned.
    """
    if not isinstance(bound, Tensor):
        return -1
    return None if bound.is_inference() or bound.requires_grad else bound._version
