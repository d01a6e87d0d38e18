"""Normal, `Independent(Normal)` and IndependentNormal."""

from __future__ import annotations

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
    Fused,
    broadcast,
    check_positive,
    check_real,
)
from fastprob.ops import extractor
from fastprob.ops import normal as ops
from fastprob.ops._fused import given
from fastprob.ops.extractor import Mapping
from fastprob.reference._chunks import rows_per_piece

_is_compiling = torch.compiler.is_compiling


class _NormalBase(Fused):
    """Draws and scores of a Normal whose last `_ndims` dimensions are one event."""

    loc: Tensor
    scale: Tensor
    _ndims: int

    def _draw(self, shape, generator, score, pathwise):
        loc, scale = self.loc, self.scale
        if backend.serves(loc):
            return ops.draw(
                loc, scale, shape, self._ndims, generator, score=score, pathwise=pathwise,
                bounds=self._bounds_of_value,
            )[:2]  # fmt: skip
        if score and not shape and not torch.is_grad_enabled() and not rng.counted(generator):
            rows = rows_per_piece(loc, scale, self._ndims)
            if rows:
                fill = rng.normal_filler(generator)
                return ops.sample_score_pieces(loc, scale, fill, self._ndims, rows)
        if shape or generator is not None:
            noise = rng.standard_normal(shape + loc.shape, loc, generator)
        else:
            noise = rng.standard_normal_like(loc)
        if pathwise or not torch.is_grad_enabled():
            if score:
                return ops.sample_score(loc, scale, noise, self._ndims, True)
            return ops.sample(loc, scale, noise), None
        with torch.no_grad():
            value = ops.sample(loc, scale, noise)
        return value, ops.log_prob(loc, scale, value, self._ndims) if score else None

    def _point(self, interaction: InteractionType, score: bool):
        loc = self.loc
        if score and backend.serves(loc):
            return ops.draw(
                loc, self.scale, EMPTY, self._ndims, random=False, bounds=self._bounds_of_value
            )[:2]
        if self._bounds_of_value is not None:
            loc = self._bounds_of_value.clamp(loc)
        return loc, ops.log_prob(loc, self.scale, loc, self._ndims) if score else None

    def carry(self, projection: Any) -> bool:
        if not backend.serves(self.loc):
            return False
        self._bounds_of_value = ops.bounds_of(projection, self.loc, self._ndims)
        return self._bounds_of_value is not None

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value`, `[*sample, *batch]`."""
        if self._checks(value):
            self._validate_sample(value)
        try:
            return ops.log_prob(self.loc, self.scale, value, self._ndims, self._memo())
        except (RuntimeError, AttributeError):
            given("Normal", self.loc, self.scale, value)
            raise

    def entropy(self) -> Tensor:
        """Differential entropy in nats, `[*batch]`."""
        return ops.entropy(self.scale, self._ndims, self._memo())

    def _memo(self) -> dict[str, Any] | None:
        """What scores of this scale share; None where nothing is worth keeping.

        In a graph, only for a distribution that was made in the same graph.
        """
        if _is_compiling():
            return self._traced
        scale = self.scale
        if not scale.requires_grad or scale.is_inference():
            return None
        memo = self.__dict__.get("_shared")
        if memo is None or memo["of"] is not scale:
            memo = self._shared = {"of": scale}
        return memo

    def _set(self, name: str, loc: Any, scale: Any, ndims: int) -> None:
        if not _alike(loc, scale):
            loc, scale = broadcast(name, loc=loc, scale=scale)
        self.loc = loc
        self.scale = scale
        self._ndims = ndims
        if self._checks(loc):
            check_real(name, "loc", loc)
            check_positive(name, "scale", scale)

    def _batch_size(self) -> torch.Size:
        shape = self.loc.shape
        return shape[: len(shape) - self._ndims] if self._ndims else shape

    def _event_size(self) -> torch.Size:
        shape = self.loc.shape
        return shape[len(shape) - self._ndims :] if self._ndims else EMPTY


class Normal(_NormalBase, D.Normal):
    """Normal distribution, a drop-in for `torch.distributions.Normal`.

    Source: `log p(x) = -(x - loc)^2 / (2 scale^2) - log(scale) - log(2 pi) / 2`.

    Args:
        loc: mean, `[*batch]`, or a number.
        scale: standard deviation, `[*batch]`, greater than 0, or a number.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if a checked parameter is NaN, a scale is not above 0, or the shapes do not
            broadcast.
    """

    def __init__(self, loc: Any, scale: Any, validate_args: bool | None = None) -> None:
        if validate_args is not None:
            self._validate_args = validate_args
        self._set("Normal", loc, scale, 0)

    batch_shape = property(lambda self: self.loc.shape)
    event_shape = property(lambda self: EMPTY)
    _batch_shape = batch_shape
    _event_shape = event_shape

    def expand(self, batch_shape: Any, _instance: Any = None) -> Normal:
        """The same distribution with its batch expanded to `batch_shape`."""
        batch_shape = torch.Size(batch_shape)
        new = _bare(type(self))
        new.loc, new.scale, new._ndims = (
            self.loc.expand(batch_shape),
            self.scale.expand(batch_shape),
            0,
        )
        new._validate_args = self._validate_args
        return new


class IndependentNormal(_NormalBase, D.Independent):
    """Normal with independent elements whose last dimensions are one event.

    Takes what TorchRL's class of the same name takes. As there, `tanh_loc` and `upscale` act when
    the parameters are replaced through `update`, which maps the mean to
    `upscale * tanh(loc / upscale)`; the constructor takes `loc` as it is.

    Args:
        loc: mean, `[*batch, *event]`.
        scale: standard deviation, greater than 0: a tensor that broadcasts with `loc`, a number, or
            a callable that maps `loc` to a tensor.
        upscale: bound of the mean where `update` squashes it.
        tanh_loc: whether `update` squashes the mean.
        event_dim: number of event dimensions.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        ValueError: if a checked parameter is NaN, a scale is not above 0, the shapes do not
            broadcast, or `event_dim` exceeds the number of dimensions.
    """

    num_params: int = 2

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor | float | Callable[[Tensor], Tensor],
        upscale: float | Tensor = 5.0,
        tanh_loc: bool = False,
        event_dim: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        if validate_args is not None:
            self._validate_args = validate_args
        self.tanh_loc = tanh_loc
        self.upscale = upscale
        if _is_compiling():
            self._traced = {}
        if not self._validate_args and _alike(loc, scale) and event_dim <= loc.ndim:
            # Nothing to convert and nothing to check: two frames fewer on the way of a call.
            self.loc = loc
            self.scale = scale  # type: ignore[assignment]
            self._ndims = event_dim
        else:
            self._assign(loc, scale, event_dim)

    def _assign(self, loc: Tensor, scale: Any, event_dim: int) -> None:
        if not _alike(loc, scale):
            scale = as_scale(scale, loc)
        self._set(type(self).__name__, loc, scale, event_dim)
        if event_dim > self.loc.ndim:
            raise ValueError(
                f"{type(self).__name__} expects at least event_dim={event_dim} dimensions in its "
                f"parameters, got shape {tuple(self.loc.shape)}; lower event_dim or add dimensions"
            )

    def update(self, loc: Tensor, scale: Any) -> None:
        """Replaces the parameters, squashing the mean if `tanh_loc` is set.

        Args:
            loc: mean, `[*batch, *event]`.
            scale: as in the constructor.
        """
        if self.tanh_loc:
            loc = self.upscale * (loc / self.upscale).tanh()
        self._assign(loc, scale, self._ndims)

    @property
    def base_dist(self) -> Normal:
        """The Normal over single elements."""
        base = _bare(Normal)
        base.loc, base.scale, base._ndims = self.loc, self.scale, 0
        if "_validate_args" in self.__dict__:
            base._validate_args = self._validate_args
        return base

    @property
    def reinterpreted_batch_ndims(self) -> int:
        """Number of event dimensions."""
        return self._ndims

    batch_shape = property(_NormalBase._batch_size)
    event_shape = property(_NormalBase._event_size)
    _batch_shape = batch_shape
    _event_shape = event_shape
    has_rsample = True  # type: ignore[assignment]
    has_enumerate_support = False  # type: ignore[assignment]

    @property
    def variance(self) -> Tensor:
        return self.scale.pow(2)

    @property
    def stddev(self) -> Tensor:
        return self.scale

    @property
    def support(self) -> constraints.Constraint:
        return (
            constraints.independent(constraints.real, self._ndims)
            if self._ndims
            else (constraints.real)
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> IndependentNormal:
        """The same distribution with its batch expanded to `batch_shape`."""
        shape = torch.Size(batch_shape) + self._event_size()
        new = _bare(type(self))
        new.__dict__.update(self.__dict__)
        new.loc, new.scale = self.loc.expand(shape), self.scale.expand(shape)
        return new


class Independent(IndependentNormal):
    """`torch.distributions.Independent(Normal(loc, scale), n)` as one distribution.

    Args:
        base_distribution: a Normal, torch's or fastprob's.
        reinterpreted_batch_ndims: number of event dimensions.
        validate_args: whether to check the parameters; torch's default where it is None.

    Raises:
        TypeError: if the base is no Normal.
        ValueError: as `IndependentNormal`.
    """

    def __init__(
        self,
        base_distribution: D.Normal,
        reinterpreted_batch_ndims: int,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(base_distribution, D.Normal):
            raise TypeError(
                "fastprob's Independent takes a Normal as its base distribution, got "
                f"{type(base_distribution).__name__}; use torch.distributions.Independent"
            )
        super().__init__(
            base_distribution.loc,
            base_distribution.scale,
            event_dim=reinterpreted_batch_ndims,
            validate_args=validate_args,
        )


class ExtractedNormal(IndependentNormal):
    """An IndependentNormal whose parameters are the raw output of a network, as yet unmapped.

    The kernel that draws maps the scale on its way. Whatever else asks for the scale has it mapped
    by itself.

    Args:
        raw: `[*batch, 2 A]`, loc and the raw scale side by side.
        mapping: how the second half becomes the scale.
    """

    def __init__(self, raw: Tensor, mapping: Mapping) -> None:
        self._validate_args = False
        self.tanh_loc, self.upscale = False, 5.0
        self._raw, self._mapping = raw, mapping
        self._mapped: Tensor | None = None
        self.loc = raw.chunk(2, -1)[0]
        self._ndims = 1

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Standard deviation, `[*batch, A]`."""
        if self._mapped is None:
            self._mapped = extractor.scale(self._raw, self._mapping)
        return self._mapped

    @scale.setter
    def scale(self, value: Tensor) -> None:
        self._mapped = value

    def _draw(self, shape, generator, score, pathwise):
        if self._mapped is not None or not backend.serves(self._raw):
            return super()._draw(shape, generator, score, pathwise)
        value, log_prob, self._mapped = extractor.draw(
            self._raw, self._mapping, generator, shape=shape, score=score, pathwise=pathwise,
            bounds=self._bounds_of_value,
        )  # fmt: skip
        return value, log_prob

    def _point(self, interaction: InteractionType, score: bool):
        if self._mapped is not None or not backend.serves(self._raw):
            return super()._point(interaction, score)
        # Without a score as well: the scale is to be mapped in any case, in four operations apart.
        value, log_prob, self._mapped = extractor.draw(
            self._raw, self._mapping, kind=extractor.MEAN, score=score,
            bounds=self._bounds_of_value,
        )  # fmt: skip
        return value, log_prob


def _alike(loc: Any, scale: Any) -> bool:
    """Whether both are tensors of one shape and dtype on one device: nothing to broadcast."""
    return (
        isinstance(scale, Tensor)
        and isinstance(loc, Tensor)
        and loc.shape == scale.shape
        and loc.dtype is scale.dtype
        # Two flags in place of two device objects: 0.19 us, not 0.25.
        and ((loc.is_cpu and scale.is_cpu) or loc.device == scale.device)
    )


def _bare(cls: Any) -> Any:
    return cls.__new__(cls)


def as_scale(scale: Any, loc: Tensor) -> Any:
    """A scale given as a callable is that of `loc`; one on another device is moved there."""
    if isinstance(scale, Tensor):
        if scale.device != loc.device:
            return scale.to(loc.device, non_blocking=loc.device.type == "cuda")
        return scale
    return scale(loc) if callable(scale) else scale


def recognize(dist: Any) -> Fused | None:
    """The fastprob distribution equal to a torch Normal or Independent(Normal), else None."""
    kind = type(dist)
    if kind is D.Normal:
        new, source, ndims = _bare(Normal), dist, 0
    elif kind is D.Independent:
        source = dist.base_dist
        ndims = dist.reinterpreted_batch_ndims
        while type(source) is D.Independent:
            ndims += source.reinterpreted_batch_ndims
            source = source.base_dist
        if type(source) is not D.Normal and type(source) is not Normal:
            return None
        new = _bare(Independent)
        new.tanh_loc, new.upscale = False, 5.0
    else:
        return None
    new.loc, new.scale, new._ndims = source.loc, source.scale, ndims
    if "_validate_args" in dist.__dict__:
        new._validate_args = dist._validate_args
    return new
