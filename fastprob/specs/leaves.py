"""The leaf specs: Bounded, Unbounded, Categorical, Binary, MultiCategorical, OneHot, MultiOneHot.

Names, constructor arguments and meaning are TorchRL's (torchrl.data), where both have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastprob.ops import projection as ops
from fastprob.reference.projection import is_one_hot
from fastprob.specs.base import Projection, Spec, as_shape, shared


def _check_n(name: str, n: Any) -> int:
    if isinstance(n, bool) or int(n) != n or n < 1:
        raise ValueError(f"{name}: expected a number of outcomes >= 1, got {n}")
    return int(n)


def _as_mask(name: str, mask: Any, shape: Sequence[int], groups: Sequence[int], device: Any):
    """Brings a mask to ``shape``, or says what is wrong with it. Reads the data once."""
    if mask is None:
        return None
    mask = torch.as_tensor(mask, device=device)
    if mask.dtype is not torch.bool:
        raise ValueError(
            f"{name}: expected a mask of bools, True where an outcome is allowed, got {mask.dtype}"
        )
    width = shape[-1]
    if mask.numel() == width:
        mask = mask.reshape(width)
    if not ops.fits_shape(mask.shape, shape):
        raise ValueError(
            f"{name}: expected a mask that expands to {tuple(shape)} (the last dim is one entry "
            f"per outcome), got one of shape {tuple(mask.shape)}"
        )
    if not all(bool(part.any(-1).all()) for part in mask.split(list(groups), -1)):
        raise ValueError(
            f"{name}: the mask leaves no valid outcome somewhere; each row needs at least one True"
        )
    return mask.expand(tuple(shape))


def _check_domain(domain: Any) -> None:
    if domain not in (None, "continuous", "discrete"):
        raise ValueError(f"expected domain 'continuous' or 'discrete', got {domain!r}")


class Bounded(Spec):
    """Values between ``low`` and ``high``, both included.

    Args:
        low: lower bound: a number, tensor or array, broadcast to ``shape``. May be ``-inf``.
        high: upper bound, likewise. May be ``inf``, and may equal ``low``.
        shape: shape of one value; left out, that of ``low`` and ``high`` together. With shape
            ``()`` a value of any shape is bounded element by element.
        device: device of the bounds.
        dtype: type of the values, torch's default type if left out.
        domain: taken for TorchRL's sake; it changes nothing.

    Raises:
        ValueError: if a bound is NaN, ``low > high`` anywhere, the shapes do not broadcast, or an
            integer ``dtype`` is given an infinite bound.
    """

    _fields = ("low", "high")

    def __init__(
        self,
        low: Any = None,
        high: Any = None,
        shape: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        domain: str | None = None,
    ):
        super().__init__((), device, dtype)
        bounds = (self._as_bound("low", low), self._as_bound("high", high))
        shapes = f"low {tuple(bounds[0].shape)}, high {tuple(bounds[1].shape)}"
        try:
            size = torch.broadcast_shapes(bounds[0].shape, bounds[1].shape)
            self.shape = size if shape is None else as_shape(shape)
            low, high = (bound.expand(self.shape).clone() for bound in bounds)
        except RuntimeError as error:
            raise ValueError(
                f"Bounded: expected low and high that broadcast to the shape, got {shapes} and "
                f"shape {None if shape is None else tuple(self.shape)}"
            ) from error
        if bool((low > high).any()):
            raise ValueError(
                f"Bounded: expected low <= high, got low={bounds[0]}, high={bounds[1]}"
            )
        self.low, self.high = low, high
        _check_domain(domain)

    def _as_bound(self, name: str, bound: Any) -> Tensor:
        if bound is None:
            raise TypeError(f"Bounded: expected a number or tensor for {name}, got None")
        try:
            if not isinstance(bound, Tensor):
                # Straight to the spec's type: by way of float32, 0.1 would not be float64's 0.1.
                exact = torch.as_tensor(bound, dtype=self.dtype, device=self.device)
                bound = torch.as_tensor(bound, device=self.device)
            else:
                exact = bound.detach().to(self.device, self.dtype)
        except (RuntimeError, OverflowError, ValueError) as error:
            raise ValueError(f"Bounded: {name}={bound} is no {self.dtype}") from error
        if bound.is_floating_point() and bool(bound.isnan().any()):
            raise ValueError(f"Bounded: expected a number for {name}, got NaN in {bound}")
        if not self.dtype.is_floating_point and not bool(bound.isfinite().all()):
            raise ValueError(f"Bounded: {name}={bound} is no {self.dtype}: it must be finite")
        return exact

    def projection(self) -> Projection:
        """A clamp: to numbers where the bounds are the same everywhere, to tensors elsewhere."""
        if self.low.numel():
            low, high = self.low.flatten()[0], self.high.flatten()[0]
            if bool((self.low == low).all()) and bool((self.high == high).all()):
                low, high = low.item(), high.item()
                if self.dtype is torch.bool:
                    low, high = int(low), int(high)
                return ops.Clamp(low, high, self.dtype)
        return ops.ClampEach(self.low, self.high)

    def _inside(self, value: Tensor) -> Tensor:
        return (value >= self.low.to(value.device)) & (value <= self.high.to(value.device))

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        if not bool((self.low.isfinite() & self.high.isfinite()).all()):
            raise ValueError(f"cannot draw uniformly between infinite bounds: {self}")
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        if self.dtype.is_floating_point:
            # high * u + low * (1 - u): the difference of the bounds may be too large for the type.
            u = torch.rand(shape, dtype=self.dtype, **options)
            drawn = torch.addcmul(self.low * (1 - u), self.high, u)
        else:
            low, high = self.low.long(), self.high.long()
            span = high - low
            if bool(((span < 0) | (span >= 2**62)).any()):  # the difference may have wrapped
                u = torch.rand(shape, dtype=torch.float64, **options)
                drawn = (high.double() * u + low.double() * (1 - u)).clamp(max=2.0**63 - 1024)
            else:
                drawn = low + torch.randint(0, 2**63 - 1, shape, **options) % (span + 1)
            drawn = drawn.long()
            return torch.clamp(drawn, low, high).to(self.dtype)
        return torch.clamp(drawn, self.low, self.high)


class Unbounded(Spec):
    """Every value of the type: only the ``dtype`` counts, which a projection casts to.

    Args:
        shape: shape of one value.
        device: device of what ``rand`` and ``zero`` make.
        dtype: type of the values, torch's default type if left out.
        domain: taken for TorchRL's sake; it changes nothing.
    """

    def __init__(
        self,
        shape: Any = (1,),
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        domain: str | None = None,
    ):
        super().__init__(shape, device, dtype)
        _check_domain(domain)

    def projection(self) -> Projection:
        """A cast to the spec's type, as TorchRL does; the value itself where it has it."""
        return ops.Cast(self.dtype)

    def _inside(self, value: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=value.device)

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        if self.dtype.is_floating_point:
            return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)
        return torch.empty(shape, dtype=self.dtype, device=self.device).random_(generator=generator)


class Categorical(Spec):
    """Indices ``0 .. n - 1``, a mask saying which are allowed.

    Args:
        n: number of outcomes.
        shape: shape of one value.
        device: device of the mask.
        dtype: type of the indices.
        mask: bools, ``True`` where an outcome is allowed, that expand to ``[*shape, n]``.

    Raises:
        ValueError: if ``n < 1``, the mask has another shape or type, or leaves nothing valid.
    """

    _fields: tuple[str, ...] = ("n", "mask")
    _outcomes: tuple[int, ...]  # outcomes of each choice along the last dim
    mask: Tensor | None

    def __init__(
        self,
        n: int,
        shape: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = torch.int64,
        mask: Any = None,
    ):
        self.n = _check_n(type(self).__name__, n)
        self._outcomes = (self.n,)
        super().__init__(() if shape is None else shape, device, dtype)
        self.update_mask(mask)

    def _mask_shape(self) -> tuple[int, ...]:
        return (*self.shape, self.n)

    def update_mask(self, mask: Any) -> None:
        """Sets the mask, or takes it away with ``None``. A projection made before sees it."""
        name = type(self).__name__
        self.mask = _as_mask(name, mask, self._mask_shape(), self._outcomes, self.device)

    def projection(self) -> Projection:
        """Round and clamp; under a mask, the nearest allowed index, ties to the lower."""
        if self.mask is None:
            return ops.RoundClamp(self.n - 1)
        return ops.NearestValid(shared(self.mask, 1), self.shape)

    def _inside(self, value: Tensor) -> Tensor:
        inside = (value >= 0) & (value <= self.n - 1)
        if value.is_floating_point():
            inside = inside & (value == value.round())
        if self.mask is not None:
            index = value.nan_to_num().clamp(0, self.n - 1).long().unsqueeze(-1)
            mask = self.mask.to(value.device).expand(*value.shape, self.n)
            inside = inside & mask.gather(-1, index).squeeze(-1)
        return inside

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        if self.mask is None:
            drawn = torch.randint(0, self.n, shape, device=self.device, generator=generator)
        else:
            rows = self.mask.expand(*shape, self.n).reshape(-1, self.n).float()
            drawn = torch.multinomial(rows, 1, generator=generator).reshape(shape)
        return drawn.to(self.dtype)


class Binary(Categorical):
    """Any number of zeros and ones.

    Args:
        n: length of the last dim.
        shape: shape of one value, with ``n`` as its last size if both are given.
        device: device of what ``rand`` and ``zero`` make.
        dtype: type of the values.

    Raises:
        TypeError: if neither ``n`` nor ``shape`` is given.
        ValueError: if the two do not go together.
    """

    _fields = ()

    def update_mask(self, mask: Any) -> None:
        """A binary spec has no mask: both values are valid everywhere."""
        if mask is not None:
            raise ValueError("Binary: expected no mask; a Categorical with n=2 takes one")
        self.mask = None

    def __init__(
        self,
        n: int | None = None,
        shape: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = torch.int8,
    ):
        if shape is None:
            if n is None:
                raise TypeError("Binary: expected n or shape, got neither")
            shape = (_check_n("Binary", n),)
        shape = as_shape(shape)
        if n is not None and n != (shape[-1] if shape else 0):
            raise ValueError(f"Binary: expected a shape that ends in n={n}, got {tuple(shape)}")
        super().__init__(2, shape, device, dtype)


def _as_nvec(name: str, nvec: Any) -> Tensor:
    nvec = torch.as_tensor(nvec, device="cpu")
    if nvec.dtype.is_floating_point or nvec.numel() == 0 or bool((nvec < 1).any()):
        raise ValueError(f"{name}: expected numbers of outcomes >= 1, got {nvec.tolist()}")
    return nvec.long().reshape(1) if nvec.dim() == 0 else nvec.long()


class MultiCategorical(Categorical):
    """Several choices side by side along the last dim, each with its own number of outcomes.

    Args:
        nvec: numbers of outcomes, broadcast to ``shape``.
        shape: shape of one value; left out, that of ``nvec``.
        device: device of the mask.
        dtype: type of the indices.
        mask: bools that expand to ``[*shape[:-1], sum(nvec)]``; needs an ``nvec`` that is the same
            over all dims but the last.
        remove_singleton: for a spec of shape ``(1,)``, ``rand`` leaves that dim out.

    Raises:
        ValueError: if a number of outcomes is < 1, or shapes or the mask do not fit.
    """

    _fields = ("nvec", "mask", "remove_singleton")

    def __init__(
        self,
        nvec: Any,
        shape: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = torch.int64,
        mask: Any = None,
        remove_singleton: bool = True,
    ):
        nvec = _as_nvec("MultiCategorical", nvec)
        Spec.__init__(self, nvec.shape if shape is None else shape, device, dtype)
        if (
            self.ndim == 0
            or self.shape[-1] != nvec.shape[-1]
            or not ops.fits_shape(nvec.shape, self.shape)
        ):
            raise ValueError(
                f"MultiCategorical: expected a shape that nvec, of shape {tuple(nvec.shape)}, "
                f"expands to, got {tuple(self.shape)}"
            )
        self.nvec = nvec.expand(self.shape).to(self.device)
        self.remove_singleton = remove_singleton
        row = shared(self.nvec, 1)
        if mask is not None and row.dim() > 1:
            raise ValueError(
                "MultiCategorical: a mask needs the same numbers of outcomes in every row, got "
                f"nvec={self.nvec.tolist()}"
            )
        self._outcomes = tuple(row.tolist()) if row.dim() == 1 else ()
        self.update_mask(mask)

    @property
    def n(self) -> int:
        """Width of the equivalent one-hot spec."""
        return sum(self._outcomes)

    def _mask_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.n)

    def projection(self) -> Projection:
        """Round and clamp to each choice's range, in the spec's type; under a mask, the nearest
        allowed index in the value's type. Both as TorchRL.
        """  # noqa: D205
        if self.mask is None:
            return ops.RoundClampEach(shared(self.nvec, 1) - 1, self.dtype)
        widest = max(self._outcomes)
        rows = [
            torch.nn.functional.pad(part, (0, widest - part.shape[-1]))
            for part in self.mask.split(self._outcomes, -1)
        ]
        mask = shared(torch.stack(rows, -2), 2)
        return ops.NearestValid(mask, self.shape, self.nvec.reshape(-1, self.shape[-1])[0] - 1)

    def _inside(self, value: Tensor) -> Tensor:
        inside = (value >= 0) & (value < self.nvec.to(value.device))
        if value.is_floating_point():
            inside = inside & (value == value.round())
        if self.mask is not None:
            inside = inside & (self.projection()(value) == value)
        return inside

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        if self.mask is None:
            u = torch.rand(shape, dtype=torch.float64, device=self.device, generator=generator)
            drawn = torch.minimum((u * self.nvec).long(), self.nvec - 1)
        else:
            mask = self.mask.expand(*shape[:-1], self.n).reshape(-1, self.n)
            parts = mask.float().split(self._outcomes, -1)
            drawn = torch.cat([torch.multinomial(p, 1, generator=generator) for p in parts], -1)
            drawn = drawn.reshape(shape)
        drawn = drawn.to(self.dtype)
        return drawn.squeeze(-1) if self.remove_singleton and self.shape == (1,) else drawn


class OneHot(Spec):
    """One-hot rows along the last dim, a mask saying which entries may be set.

    Args:
        n: number of outcomes, the width of a row.
        shape: shape of one value, which ends in ``n``; left out, ``(n,)``.
        device: device of the mask.
        dtype: type of the values.
        use_register: not supported, here for the order of TorchRL's arguments.
        mask: bools, ``True`` where an entry may be set, that expand to ``shape``.

    Raises:
        ValueError: if ``n < 1``, ``shape`` ends in another width, or the mask has another shape or
            type, or leaves nothing valid.
    """

    _fields: tuple[str, ...] = ("n", "mask")
    _outcomes: tuple[int, ...]
    mask: Tensor | None

    def __init__(
        self,
        n: int,
        shape: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = torch.bool,
        use_register: bool = False,
        mask: Any = None,
    ):
        self._outcomes = (_check_n(type(self).__name__, n),)
        self._set_up(shape, device, dtype, use_register, mask)

    def _set_up(self, shape: Any, device: Any, dtype: Any, use_register: bool, mask: Any) -> None:
        name = type(self).__name__
        if use_register:
            raise NotImplementedError(f"{name}: use_register is not supported; use TorchRL's spec")
        super().__init__((self.n,) if shape is None else shape, device, dtype)
        if not self.shape or self.shape[-1] != self.n:
            raise ValueError(
                f"{name}: expected a shape that ends in the width {self.n}, got {tuple(self.shape)}"
            )
        self.update_mask(mask)

    @property
    def n(self) -> int:
        """Width of the last dim."""
        return sum(self._outcomes)

    def update_mask(self, mask: Any) -> None:
        """Sets the mask, or takes it away with ``None``. A projection made before sees it."""
        self.mask = _as_mask(type(self).__name__, mask, self.shape, self._outcomes, self.device)

    def projection(self) -> Projection:
        """The one-hot row of the largest valid entry, the first of equals."""
        mask = None if self.mask is None else shared(self.mask, 1)
        return ops.OneHot(self._outcomes, self.dtype, mask, self.device)

    def _inside(self, value: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask.to(value.device)
        masks = [None] * len(self._outcomes) if mask is None else mask.split(self._outcomes, -1)
        rows = value.split(self._outcomes, -1)
        pairs = zip(rows, masks, strict=True)
        return torch.cat([is_one_hot(row, row_mask) for row, row_mask in pairs], -1)

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        mask = torch.ones(self.n, dtype=torch.bool, device=self.device)
        mask = (mask if self.mask is None else self.mask).expand(shape).reshape(-1, self.n)
        drawn = []
        for part in mask.float().split(self._outcomes, -1):
            index = torch.multinomial(part, 1, generator=generator)
            drawn.append(torch.zeros_like(part).scatter(-1, index, 1))
        return torch.cat(drawn, -1).reshape(shape).to(self.dtype)


class MultiOneHot(OneHot):
    """Several one-hot rows side by side along the last dim.

    Args:
        nvec: widths of the rows.
        shape: shape of one value, which ends in ``sum(nvec)``; left out, ``(sum(nvec),)``.
        device: device of the mask.
        dtype: type of the values.
        use_register: not supported, here for the order of TorchRL's arguments.
        mask: see :class:`OneHot`; each row needs a valid entry of its own.

    Raises:
        ValueError: see :class:`OneHot`.
    """

    _fields = ("nvec", "mask")

    def __init__(
        self,
        nvec: Sequence[int],
        shape: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = torch.bool,
        use_register: bool = False,
        mask: Any = None,
    ):
        self._outcomes = tuple(_as_nvec("MultiOneHot", nvec).flatten().tolist())
        self._set_up(shape, device, dtype, use_register, mask)

    @property
    def nvec(self) -> tuple[int, ...]:
        """Widths of the rows."""
        return self._outcomes
