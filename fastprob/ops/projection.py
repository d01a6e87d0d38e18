"""Projections as small callable objects, worked out once from a spec.

A module keeps one of these per key and calls it on every sample. What a call needs is decided at
construction: Python numbers for bounds that are the same everywhere, tensors otherwise, which are
copied to a device the first time that a value lives there.

All are out of place, idempotent, free of host synchronisation, and trace under
``torch.compile(fullgraph=True)`` and ``torch.vmap``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastprob.reference import projection as reference

__all__ = ["Ask", "Cast", "Clamp", "ClampEach", "NearestValid", "OneHot", "RoundClamp",
           "RoundClampEach", "fits_shape"]  # fmt: skip


def fits_shape(spec_shape: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a value of ``shape`` can be of a spec of ``spec_shape``.

    The trailing dims of the value must be those of the spec, where a 1 (or TorchRL's -1, a size
    that is left open) in the spec's goes with any size.
    """
    extra = len(shape) - len(spec_shape)
    if extra < 0:
        return False
    for want, have in zip(spec_shape, shape[extra:], strict=True):
        if want != have and want != 1 and want != -1:
            return False
    return True


def _own(tensor: Tensor) -> Tensor:
    """A copy that autograd may save, also where the plan is made in inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().clone()


class _PerDevice(dict):
    """Tensors by device, copied to one when a value there first asks: ``copies[value.device]``.

    A dict, so that a lookup enters no Python frame.
    """

    def __init__(self, *tensors: Tensor):
        super().__init__()
        self[tensors[0].device] = tuple(_own(tensor) for tensor in tensors)

    def __missing__(self, device: torch.device) -> tuple[Tensor, ...]:
        first = next(iter(self.values()))
        # Under inference mode the copies would be of no use to a later backward pass.
        with torch.inference_mode(False):
            self[device] = copies = tuple(tensor.to(device) for tensor in first)
        return copies

    def __reduce__(self) -> tuple[Any, ...]:
        return _PerDevice, next(iter(self.values()))

    def __deepcopy__(self, memo: dict[int, Any]) -> _PerDevice:
        return _PerDevice(*next(iter(self.values())))


def _check_shape(value: Tensor, spec_shape: torch.Size) -> None:
    # The sizes are nearly always the spec's own, which one comparison tells.
    ndim = len(spec_shape)
    if ndim and value.shape[-ndim:] != spec_shape and not fits_shape(spec_shape, value.shape):
        raise ValueError(
            f"cannot project a value of shape {tuple(value.shape)} onto a spec of shape "
            f"{tuple(spec_shape)}: the last {ndim} dims of the value must be those of the spec "
            "(a 1 in the spec's goes with any size)."
        )


class Clamp:
    """Clamp to bounds that are the same for every element: one ``torch.clamp`` with numbers.

    The shape of the value is not looked at.
    """

    __slots__ = ("_plain", "covers", "dtype", "high", "low")

    def __init__(self, low: float, high: float, dtype: torch.dtype):
        self.low, self.high, self.dtype = low, high, dtype
        # Numbers from 0 to 1 of the same type are members already.
        self.covers = ("unit", dtype) if low <= 0 and high >= 1 else None
        self._plain = None if dtype is torch.bool else dtype  # what torch.clamp does by itself

    def __call__(self, value: Tensor) -> Tensor:
        if value.dtype is self._plain:
            return torch.clamp(value, self.low, self.high)
        return reference.clamp(value, self.low, self.high, self.dtype)

    def __repr__(self) -> str:
        return f"Clamp({self.low}, {self.high}, {self.dtype})"


class ClampEach:
    """Clamp to bounds of each element's own.

    Raises:
        ValueError: on a call, if the value's shape does not fit the bounds'.
    """

    __slots__ = ("_bool", "_bounds", "dtype", "shape")

    def __init__(self, low: Tensor, high: Tensor):
        self.dtype, self.shape = low.dtype, low.shape
        self._bool = low.dtype is torch.bool
        self._bounds = _PerDevice(low, high)

    def __call__(self, value: Tensor) -> Tensor:
        low, high = self._bounds[value.device]
        try:
            if self._bool:
                out = reference.clamp_bool(value, low, high)
            else:
                out = torch.clamp(value, low, high)
        except RuntimeError:
            _check_shape(value, self.shape)
            raise
        # Bounds that made the value larger do not fit it. Two thirds of the time that slicing the
        # shape before the clamp takes.
        if out.shape != value.shape:
            _check_shape(value, self.shape)
        return out

    def bounds(self, device: torch.device) -> tuple[Tensor, ...]:
        """Lower and upper bounds on a device."""
        return self._bounds[device]

    def __repr__(self) -> str:
        return f"ClampEach(shape={tuple(self.shape)}, {self.dtype})"


class Cast:
    """Nothing but the spec's type: what is left of the projection onto an unbounded spec."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, value: Tensor) -> Tensor:
        return value if value.dtype is self.dtype else value.to(self.dtype)

    def __repr__(self) -> str:
        return f"Cast({self.dtype})"


class RoundClamp:
    """Indices ``0 .. last``: round, then clamp, in the value's type."""

    __slots__ = ("covers", "last")

    def __init__(self, last: int):
        self.last = last
        # Indices of as many categories are members already.
        self.covers = ("index", last + 1)

    def __call__(self, value: Tensor) -> Tensor:
        return reference.round_clamp(value, self.last)

    def __repr__(self) -> str:
        return f"RoundClamp({self.last})"


class RoundClampEach:
    """Indices ``0 .. last`` with a last one of each element's own, in the spec's type.

    Raises:
        ValueError: on a call, if the value's shape does not fit the spec's.
    """

    __slots__ = ("_last", "dtype", "shape")

    def __init__(self, last: Tensor, dtype: torch.dtype):
        self.dtype, self.shape = dtype, last.shape
        self._last = _PerDevice(last.long())

    def __call__(self, value: Tensor) -> Tensor:
        # TorchRL takes a bare number for a vector of length 1.
        if value.dim() == 0 and self.shape.numel() == 1:
            return self(value.unsqueeze(0)).squeeze(0)
        _check_shape(value, self.shape)
        return reference.round_clamp_to(value, self._last[value.device][0], self.dtype)

    def __repr__(self) -> str:
        return f"RoundClampEach(shape={tuple(self.shape)}, {self.dtype})"


class NearestValid:
    """Indices under a mask: the nearest valid index, ties to the lower one, in the value's type.

    Args:
        mask: bool, shape ``[n]`` (the same for every element) or ``[*shape, n]``.
        shape: the spec's shape.
        last: int64, shape ``[shape[-1]]``: the last index of each element, where they differ.

    Raises:
        ValueError: on a call, if the value's shape does not fit the spec's.
    """

    __slots__ = ("_tensors", "last", "shape")

    def __init__(self, mask: Tensor, shape: torch.Size, last: Tensor | None = None):
        table = reference.nearest_table(mask)
        self.shape = shape
        self.last = mask.shape[-1] - 1
        self._tensors = _PerDevice(table) if last is None else _PerDevice(table, last)

    def __call__(self, value: Tensor) -> Tensor:
        _check_shape(value, self.shape)
        tensors = self._tensors[value.device]
        last = self.last if len(tensors) == 1 else tensors[1]
        return reference.nearest_valid(value, tensors[0], last)

    def __repr__(self) -> str:
        return f"NearestValid(shape={tuple(self.shape)})"


class OneHot:
    """One-hot rows, one or several side by side: the largest valid entry, the first of equals.

    Args:
        widths: the width of each row: ``(n,)``, or ``nvec`` for several.
        dtype: the spec's type.
        mask: bool, shape ``[sum(widths)]`` (the same everywhere) or the spec's.

    Raises:
        ValueError: on a call, if the value has another width, or its shape does not fit the mask's.
    """

    __slots__ = ("_tensors", "covers", "dtype", "masked", "width", "widths")

    def __init__(self, widths: Sequence[int], dtype: torch.dtype, mask: Tensor | None, device: Any):
        self.widths = tuple(int(n) for n in widths)
        self.width = sum(self.widths)
        self.dtype = dtype
        self.masked = mask is not None
        # One-hot vectors of the same width and type are members already.
        self.covers = (
            ("one_hot", self.width)
            if mask is None and len(self.widths) == 1 and dtype is torch.int64
            else None
        )
        classes = torch.arange(max(self.widths), device=device)
        self._tensors = _PerDevice(classes) if mask is None else _PerDevice(classes, mask)

    def __call__(self, value: Tensor) -> Tensor:
        if value.dim() == 0 or value.shape[-1] != self.width:
            raise ValueError(
                f"cannot project a value of shape {tuple(value.shape)} onto a one-hot spec: the "
                f"last dim must be {self.width} wide, one entry per outcome."
            )
        classes, *rest = self._tensors[value.device]
        mask = rest[0] if self.masked else None
        if mask is not None:
            _check_shape(value, mask.shape)
        if len(self.widths) == 1:
            return reference.one_hot(value, classes, self.dtype, mask)
        masks = (None,) * len(self.widths) if mask is None else mask.split(self.widths, -1)
        rows = value.split(self.widths, -1)
        return torch.cat(
            [
                reference.one_hot(row, classes[:n], self.dtype, row_mask)
                for n, row, row_mask in zip(self.widths, rows, masks, strict=True)
            ],
            -1,
        )

    def __repr__(self) -> str:
        return f"OneHot({self.widths}, {self.dtype}, masked={self.masked})"


class Ask:
    """A spec that is not known projects by itself, on a copy, so that the input never changes."""

    __slots__ = ("spec",)

    def __init__(self, spec: Any):
        self.spec = spec

    def __call__(self, value: Tensor) -> Tensor:
        return self.spec.project(value.clone() if isinstance(value, Tensor) else value)

    def __repr__(self) -> str:
        return f"Ask({type(self.spec).__name__})"
