"""What all specs have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastprob.ops import projection as ops

Projection: TypeAlias = Callable[[Tensor], Tensor]


def as_device(device: Any) -> torch.device:
    """The device with its index; ``None`` is torch's default device."""
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def as_shape(shape: Any) -> torch.Size:
    """A size or sizes as a ``torch.Size`` of sizes >= 0."""
    size = torch.Size([shape] if isinstance(shape, int) else [int(n) for n in shape])
    if any(n < 0 for n in size):
        raise ValueError(f"expected a shape of sizes >= 0, got {tuple(size)}")
    return size


def new_shape(shape: tuple[Any, ...]) -> torch.Size:
    """The shape given as ``f(2, 3)`` or ``f((2, 3))``."""
    return as_shape(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)


def shared(tensor: Tensor, ndim: int) -> Tensor:
    """The last ``ndim`` dims alone, where they are the same over all the others."""
    if tensor.dim() == ndim or tensor.numel() == 0:
        return tensor
    rows = tensor.flatten(0, tensor.dim() - ndim - 1)
    return rows[0] if bool((rows == rows[0]).all()) else tensor


def fits(spec: Any, shape: Sequence[int]) -> bool:
    """Whether a value of ``shape`` can be of ``spec``, a leaf of fastprob's or TorchRL's.

    The trailing dims of the value must be those of the spec, where a size of 1 in the spec goes
    with any size; so a spec of shape ``()`` fits everything, element by element.

    Args:
        spec: a leaf spec; ``None`` fits everything.
        shape: shape of the value, dims in front included.
    """
    if spec is None or ops.fits_shape(spec.shape, shape):
        return True
    # A MultiCategorical of one choice draws bare numbers.
    return len(shape) == 0 and tuple(spec.shape) == (1,) and hasattr(spec, "remove_singleton")


class Spec:
    """The set of values that a key may take: the base of all specs.

    Args:
        shape: shape of one value; a value given to the spec may have more dims in front.
        device: device of what ``rand`` and ``zero`` make; ``None`` is torch's default device.
        dtype: type of the values.
    """

    _fields: tuple[str, ...] = ()  # constructor arguments beyond shape, device and dtype

    def __init__(self, shape: Any, device: Any, dtype: torch.dtype | None):
        self.shape = as_shape(shape)
        self.device = as_device(device)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype

    @property
    def ndim(self) -> int:
        """Number of dims of the shape."""
        return len(self.shape)

    def projection(self) -> Projection:
        """The callable that projects a tensor onto the spec. See :func:`projection_for`."""
        raise NotImplementedError(f"{type(self).__name__} has no projection")

    def _inside(self, value: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no membership test")

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} cannot draw")

    def project(self, value: Tensor) -> Tensor:
        """The nearest value in the spec; ``value`` itself is not changed."""
        return self.projection()(value)

    def is_in(self, value: Tensor) -> bool:
        """Whether type, shape (dims in front allowed) and every element are the spec's."""
        if value.dtype is not self.dtype or not fits(self, value.shape):
            return False
        return bool(self._inside(value).all())

    def rand(self, shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draws a value of shape ``[*shape, *spec.shape]``, uniformly where there are bounds."""
        return self._draw(torch.Size([*as_shape(shape or ()), *self.shape]), generator)

    def zero(self, shape: Any = ()) -> Tensor:
        """Zeros of shape ``[*shape, *spec.shape]``, whether in the spec or not."""
        size = (*as_shape(shape or ()), *self.shape)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def zeros(self, shape: Any = ()) -> Tensor:
        """See :meth:`zero`."""
        return self.zero(shape)

    def _remake(self, shape: torch.Size, device: Any, dtype: torch.dtype | None) -> Spec:
        fields = {name: getattr(self, name) for name in self._fields}
        for name, field in fields.items():
            if isinstance(field, Tensor):
                fields[name] = field.to(device, copy=True)
        return type(self)(**fields, shape=shape, device=device, dtype=dtype)

    def clone(self) -> Spec:
        """A copy that shares no tensor with this one."""
        return self._remake(self.shape, self.device, self.dtype)

    def to(self, dest: Any) -> Spec:
        """The spec on another device, or of another dtype; itself where nothing changes."""
        if dest is None:
            return self
        if isinstance(dest, torch.dtype):
            return self if dest is self.dtype else self._remake(self.shape, self.device, dest)
        device = as_device(dest)
        return self if device == self.device else self._remake(self.shape, device, self.dtype)

    def expand(self, *shape: Any) -> Spec:
        """The spec with more dims in front, or with sizes of 1 made larger."""
        size = new_shape(shape)
        self._check_expand(size)
        return self._remake(size, self.device, self.dtype)

    def _check_expand(self, size: torch.Size) -> None:
        if not ops.fits_shape(self.shape, size):
            raise ValueError(
                f"cannot expand a spec of shape {tuple(self.shape)} to {tuple(size)}: the last "
                f"{self.ndim} dims must stay as they are, sizes of 1 aside"
            )

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return False
        for name in ("shape", "dtype", "device", *self._fields):
            ours, theirs = getattr(self, name), getattr(other, name)
            if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
                if not torch.equal(ours, theirs):
                    return False
            elif isinstance(ours, Tensor) or isinstance(theirs, Tensor) or ours != theirs:
                return False
        return True

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        parts = []
        for name in self._fields:
            field = getattr(self, name)
            if isinstance(field, Tensor):
                short = shared(field, 1) if name in ("mask", "nvec") else field.unique()
                field = short.tolist() if short.numel() <= 8 else f"tensor{tuple(field.shape)}"
                field = field[0] if name in ("low", "high") and len(field) == 1 else field
            parts.append(f"{name}={field}")
        parts += [f"shape={tuple(self.shape)}", f"device={self.device}", f"dtype={self.dtype}"]
        return f"{type(self).__name__}({', '.join(parts)})"
