"""Projections as small callable objects, worked out once from a spec.

A module keeps one of these per key and calls it on every sample. What a call needs is decided at
construction: Python numbers for bounds that are the same everywhere, tensors otherwise, which are
copied to a device the first time that a value lives there.

All are out of place, idempotent, free of host synchronisation, and trace under
``torch.compile(fullgraph=True)`` and ``torch.vmap``.

Where the kernels serve a value, what plain PyTorch would launch several kernels for is one: bounds
of another dtype, indices, nearest valid ones, one-hot rows, and the gradient of a clamp. A plain
clamp is one launch of torch's own already, of the same bytes. Under ``torch.compile`` the plain
operations are kept: Inductor fuses them into what stands around them. So they are under functorch's
transforms, which see through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastprob import backend, lowering
from fastprob.ops._register import lead, register
from fastprob.reference import projection as reference
from fastprob.reference._reduce import outside_transforms, plain_tensors_only

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


# fp64 stays with the reference.
_SERVED = frozenset(
    (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16,
     torch.int8, torch.uint8, torch.bool)
)  # fmt: skip


def _served(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel projects the value, to a result of `dtype`."""
    return (
        plain_tensors_only()
        and value.dtype in _SERVED
        and dtype in _SERVED
        and backend.serves(value)
    )


def _needs_gradient(value: Tensor) -> bool:
    return value.requires_grad and torch.is_grad_enabled()


def _trailing(tensor: Tensor, value: Tensor, ndim: int) -> Tensor:
    """Bounds or the like with the sizes of the last `ndim` dimensions of the value."""
    shape = value.shape[value.dim() - ndim :]
    if tensor.shape[:ndim] != shape:
        tensor = tensor.expand(shape + tensor.shape[ndim:])
    return tensor.contiguous()


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
        plain = value.dtype is self._plain
        if (not value.is_cpu or backend.mode != "auto") and (not plain or _needs_gradient(value)):
            dtype = torch.promote_types(value.dtype, self.dtype)
            if _served(value, dtype):
                return elements(value, self.low, self.high, None, None, None, dtype, False)
        if plain:
            limited = clamp if value.requires_grad else torch.clamp
            return limited(value, self.low, self.high)
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
        if not value.is_cpu or backend.mode != "auto":
            made = self._by_kernel(value, low, high)
            if made is not None:
                return made
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

    def _by_kernel(self, value: Tensor, low: Tensor, high: Tensor) -> Tensor | None:
        if not plain_tensors_only():
            return None
        _check_shape(value, self.shape)
        if value.dtype is self.dtype and not self._bool and not _needs_gradient(value):
            return None
        dtype = value.dtype if self._bool else torch.result_type(value, low)
        if not _served(value, dtype):
            return None
        ndim = low.dim()
        low, high = _trailing(low, value, ndim), _trailing(high, value, ndim)
        return elements(value, 0, 0, low, high, None, dtype, False)

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
        # Of integers the clamp is all, and one launch of torch's own.
        may = (not value.is_cpu or backend.mode != "auto") and value.dtype.is_floating_point
        if may and _served(value, value.dtype):
            return elements(value, 0, self.last, None, None, None, value.dtype, True)
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
        last = self._last[value.device][0]
        if (not value.is_cpu or backend.mode != "auto") and _served(value, value.dtype):
            last = _trailing(last, value, last.dim())
            return elements(value, 0, 0, None, last, None, self.dtype, True)
        return reference.round_clamp_to(value, last, self.dtype)

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
        last = None if len(tensors) == 1 else tensors[1]
        if (not value.is_cpu or backend.mode != "auto") and _served(value, value.dtype):
            table = tensors[0]
            if table.dim() > 1:
                table = _trailing(table, value, table.dim() - 1)
            return elements(value, 0, self.last, None, last, table, value.dtype, True)
        return reference.nearest_valid(value, tensors[0], self.last if last is None else last)

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
        tables = _segment_tables(self.widths).to(classes.device)
        self._tensors = _PerDevice(classes, tables, *(() if mask is None else (mask,)))

    def __call__(self, value: Tensor) -> Tensor:
        if value.dim() == 0 or value.shape[-1] != self.width:
            raise ValueError(
                f"cannot project a value of shape {tuple(value.shape)} onto a one-hot spec: the "
                f"last dim must be {self.width} wide, one entry per outcome."
            )
        classes, tables, *rest = self._tensors[value.device]
        mask = rest[0] if self.masked else None
        if mask is not None:
            _check_shape(value, mask.shape)
        if not value.is_cpu or backend.mode != "auto":
            dtype = self.dtype if mask is None else value.dtype
            if _served(value, dtype):
                if mask is not None:
                    mask = _trailing(mask, value, mask.dim())
                return one_hot_rows(value, mask, tables, self.widths, dtype, self.dtype)
        return _one_hot(value, classes, mask, self.widths, self.dtype)

    def __repr__(self) -> str:
        return f"OneHot({self.widths}, {self.dtype}, masked={self.masked})"


def _one_hot(
    value: Tensor, classes: Tensor, mask: Tensor | None, widths: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """One-hot rows side by side, in plain PyTorch."""
    if len(widths) == 1:
        return reference.one_hot(value, classes, dtype, mask)
    masks = (None,) * len(widths) if mask is None else mask.split(widths, -1)
    return torch.cat(
        [
            reference.one_hot(row, classes[:n], dtype, row_mask)
            for n, row, row_mask in zip(widths, value.split(widths, -1), masks, strict=True)
        ],
        -1,
    )


def _segment_tables(widths: Sequence[int]) -> Tensor:
    """Where each segment of a row begins, their widths, and the segment of each entry, int32."""
    n = torch.tensor(widths, dtype=torch.int32, device="cpu")
    of = torch.repeat_interleave(torch.arange(len(n), dtype=torch.int32, device="cpu"), n)
    return torch.cat((n.cumsum(0, dtype=torch.int32) - n, n, of))


class Ask:
    """A spec that is not known projects by itself, on a copy, so that the input never changes."""

    __slots__ = ("spec",)

    def __init__(self, spec: Any):
        self.spec = spec

    def __call__(self, value: Tensor) -> Tensor:
        return self.spec.project(value.clone() if isinstance(value, Tensor) else value)

    def __repr__(self) -> str:
        return f"Ask({type(self.spec).__name__})"


# the kernels' operators ---------------------------------------------------------------------


def clamp(value: Tensor, low: float, high: float) -> Tensor:
    """`torch.clamp` with numbers.

    With a gradient, a graph for a CPU holds an operator that Inductor lowers: 480 -> 116 us for
    both passes of 4096 x 8.

    Args:
        value: `[...]`, of a floating type.
        low: lower bound.
        high: upper bound.
    """
    if (
        value.requires_grad
        and torch.compiler.is_compiling()
        and lowering.enabled
        and value.is_cpu
        and value.is_contiguous()  # as the operator's result is
        and not backend.is_exporting()
        and outside_transforms()
    ):
        args = value, low, high, None, None, None, value.dtype, False
        return torch.ops.fastprob.project_elements(*args)
    return torch.clamp(value, low, high)


def elements(
    value: Tensor,
    low: float,
    high: float,
    lows: Tensor | None,
    highs: Tensor | None,
    table: Tensor | None,
    dtype: torch.dtype,
    rounded: bool,
) -> Tensor:
    """Projects each element by itself, in one launch.

    Args:
        value: `[..., *shape]`.
        low: lower bound; counts where `highs` is None.
        high: upper bound, likewise.
        lows: lower bounds of each element's own, `[*shape]`, contiguous; 0 where it is None and
            `highs` is not.
        highs: upper bounds likewise; with a table, those of the last dimension alone will do.
        table: what each index becomes, int64 `[n]` or `[*shape, n]`, contiguous.
        dtype: of the result. A clamp computes in it, everything else in that of the value.
        rounded: whether the result is an index, which has a gradient of 0.

    Returns:
        `[..., *shape]`, contiguous.
    """
    if not _needs_gradient(value):
        return backend.kernels("projection").elements(
            value, low, high, lows, highs, table, dtype, rounded
        )
    return torch.ops.fastprob.project_elements(value, low, high, lows, highs, table, dtype, rounded)


def one_hot_rows(
    value: Tensor,
    mask: Tensor | None,
    tables: Tensor,
    widths: Sequence[int],
    dtype: torch.dtype,
    spec_dtype: torch.dtype,
) -> Tensor:
    """Projects one-hot rows side by side, in one launch.

    Args:
        value: `[..., n]`.
        mask: which entries may be set, bool, of the last dimensions of the value, contiguous.
        tables: what `_segment_tables` says of the widths.
        widths: of the rows, n in all.
        dtype: of the result.
        spec_dtype: a value of this type, `bool` aside, may be a member already, which stays.

    Returns:
        `[..., n]`, contiguous.
    """
    member = value.dtype is spec_dtype and spec_dtype is not torch.bool
    # A result that is no part of the value has no gradient.
    if not member:
        value = value.detach()
    if not _needs_gradient(value):
        return backend.kernels("projection").one_hot(value, mask, tables, widths, dtype, member)[0]
    return torch.ops.fastprob.project_one_hot(value, mask, tables, list(widths), dtype, member)[0]


def _elements_op(value, low, high, lows, highs, table, dtype, rounded):
    if _served(value, value.dtype):
        return backend.kernels("projection").elements(
            value, low, high, lows, highs, table, dtype, rounded
        )
    if table is not None:
        return reference.nearest_valid(value, table, high if highs is None else highs)
    if rounded and highs is None:
        return reference.round_clamp(value, high)
    if rounded:
        return reference.round_clamp_to(value, highs, dtype)
    if highs is None:
        return reference.clamp(value, low, high, dtype).contiguous()
    if lows.dtype is torch.bool:
        return reference.clamp_bool(value, lows, highs)
    return torch.clamp(value, lows, highs)


def _elements_fake(value, low, high, lows, highs, table, dtype, rounded):
    ops = torch.ops.fastprob
    lowering.offer_clamp(ops.project_elements.default, ops.project_clamp_backward.default)
    return value.new_empty(value.shape, dtype=dtype)


def _elements_setup(ctx, inputs, output):
    value, ctx.low, ctx.high, lows, highs, table, _, rounded = inputs
    ctx.index = rounded or table is not None
    ctx.save_for_backward(value, lows, highs)


def _elements_gradient(ctx, grad):
    value, lows, highs = ctx.saved_tensors
    if ctx.index:
        made = torch.zeros_like(value)
    else:
        made = torch.ops.fastprob.project_clamp_backward(
            grad, value, ctx.low, ctx.high, lows, highs
        )
    return made, *(None,) * 7


def _elements_vmap(info, in_dims, value, *rest):
    value = lead(value, in_dims[0], info.batch_size)
    return torch.ops.fastprob.project_elements(value, *rest), 0


def _clamp_backward_op(grad, value, low, high, lows, highs):
    if _served(value, value.dtype):
        return backend.kernels("projection").clamp_backward(grad, value, low, high, lows, highs)
    kept = (value >= (low if highs is None else lows)) & (
        value <= (high if highs is None else highs)
    )
    return torch.where(kept, grad, 0.0).to(value.dtype).contiguous()


def _clamp_backward_setup(ctx, inputs, output):
    _, value, ctx.low, ctx.high, lows, highs = inputs
    ctx.save_for_backward(value, lows, highs)


def _clamp_backward_gradient(ctx, grad):
    value, lows, highs = ctx.saved_tensors
    made = torch.ops.fastprob.project_clamp_backward(grad, value, ctx.low, ctx.high, lows, highs)
    return made, *(None,) * 5


def _clamp_backward_vmap(info, in_dims, grad, value, *rest):
    grad, value = (
        lead(t, d, info.batch_size) for t, d in zip((grad, value), in_dims, strict=False)
    )
    return torch.ops.fastprob.project_clamp_backward(grad, value, *rest), 0


def _one_hot_op(value, mask, tables, widths, dtype, member):
    if _served(value, dtype):
        made, members = backend.kernels("projection").one_hot(
            value, mask, tables, widths, dtype, member, keep=True
        )
        return made, members
    classes = torch.arange(max(widths), device=value.device)
    # Any type but the value's own: members are not kept as they are.
    spec_dtype = value.dtype if member else dtype if mask is None else torch.bool
    made = _one_hot(value, classes, mask, widths, spec_dtype)
    masks = (None,) * len(widths) if mask is None else mask.split(widths, -1)
    found = [
        reference.is_one_hot(row, part)
        for row, part in zip(value.split(widths, -1), masks, strict=True)
    ]
    return made, torch.cat(found, -1)


def _one_hot_fake(value, mask, tables, widths, dtype, member):
    return (
        value.new_empty(value.shape, dtype=dtype),
        value.new_empty((*value.shape[:-1], len(widths)), dtype=torch.bool),
    )


def _one_hot_setup(ctx, inputs, output):
    _, _, tables, ctx.widths, _, ctx.member = inputs
    ctx.save_for_backward(tables, output[1])


def _one_hot_gradient(ctx, grad, _):
    tables, members = ctx.saved_tensors
    made = None
    if ctx.member:
        # Members are the value itself, other rows are constants.
        if len(ctx.widths) > 1:
            members = members.index_select(-1, tables[2 * len(ctx.widths) :])
        made = torch.where(members, grad, 0.0)
    return made, *(None,) * 5


def _one_hot_vmap(info, in_dims, value, *rest):
    value = lead(value, in_dims[0], info.batch_size)
    return torch.ops.fastprob.project_one_hot(value, *rest), (0, 0)


register(
    "project_clamp_backward",
    "(Tensor grad, Tensor value, Scalar low, Scalar high, Tensor? lows, Tensor? highs) -> Tensor",
    _clamp_backward_op,
    lambda grad, value, low, high, lows, highs: value.new_empty(value.shape),
    setup=_clamp_backward_setup,
    backward=_clamp_backward_gradient,
    vmap=_clamp_backward_vmap,
)
register(
    "project_elements",
    "(Tensor value, Scalar low, Scalar high, Tensor? lows, Tensor? highs, Tensor? table, "
    "ScalarType dtype, bool rounded) -> Tensor",
    _elements_op,
    _elements_fake,
    setup=_elements_setup,
    backward=_elements_gradient,
    vmap=_elements_vmap,
)
register(
    "project_one_hot",
    "(Tensor value, Tensor? mask, Tensor tables, int[] widths, ScalarType dtype, bool member) -> "
    "(Tensor, Tensor)",
    _one_hot_op,
    _one_hot_fake,
    setup=_one_hot_setup,
    backward=_one_hot_gradient,
    vmap=_one_hot_vmap,
)
