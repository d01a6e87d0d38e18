"""Projection of values onto a set: the pure tensor functions.

Each function maps a value to the nearest member of its set, ties to the lowest index. All are out
of place, idempotent, free of host synchronisation and of data-dependent shapes, and work under
``torch.vmap``. Where TorchRL's ``project`` draws a replacement at random (one-hot values, masked
choices) the nearest member stands in for the draw, so that a projection is a function.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def clamp(
    value: Tensor,  # [...]
    low: float,
    high: float,
    dtype: torch.dtype,
) -> Tensor:  # [...]
    """Clamps to numbers in the type that ``value`` and ``dtype`` promote to, and returns that.

    So does ``torch.clamp`` with tensor bounds of ``dtype``; Python numbers carry no type, and a
    float16 value with float32 bounds would stay float16.
    """
    promoted = torch.promote_types(value.dtype, dtype)
    if promoted is torch.bool:  # torch.clamp has no bool kernel
        return torch.clamp(value.to(torch.uint8), low, high).bool()
    if promoted.is_floating_point and not dtype.is_floating_point:
        # 100000 is no float16: torch.clamp raises on the number, where TorchRL's tensor turns inf.
        top = torch.finfo(promoted).max
        low = -torch.inf if low < -top else low
        high = torch.inf if high > top else high
    return torch.clamp(value.to(promoted), low, high)


def clamp_bool(
    value: Tensor,  # [..., *shape]
    low: Tensor,  # [*shape], bool
    high: Tensor,  # [*shape], bool
) -> Tensor:  # [..., *shape]
    """Clamps to bool bounds of each element's own, in the type of ``value``."""
    if value.dtype is torch.bool:
        return (value | low) & high
    return torch.clamp(value, low.to(value.dtype), high.to(value.dtype))


def round_clamp(value: Tensor, last: int) -> Tensor:
    """Rounds (halves to even) and clamps to ``[0, last]``, in the type of ``value``.

    A NaN stays one. The gradient is zero, as that of ``torch.round``.
    """
    if value.dtype is torch.bool:
        return value.clone() if last else torch.zeros_like(value)
    if value.dtype.is_floating_point:
        value = torch.round(value)
    return torch.clamp(value, 0, last)


def round_clamp_to(
    value: Tensor,  # [..., *shape]
    last: Tensor,  # [*shape], int64
    dtype: torch.dtype,
) -> Tensor:  # [..., *shape], dtype
    """Rounds and clamps each element to ``[0, last]``, with an upper end of its own.

    The clamp comes before the cast to ``dtype``, so that an infinity lands on the end it points
    to. A NaN stays one where ``dtype`` can hold it, and becomes 0 in an integer.
    """
    if value.dtype is torch.bool:
        value = value.to(torch.uint8)
    if value.dtype.is_floating_point:
        if value.dtype in _LOW_PRECISION:  # bfloat16 would round an upper end of 299 up to 300
            value = value.float()
        value = torch.round(value)
        if not dtype.is_floating_point:
            value = torch.nan_to_num(value, nan=0.0)
    # torch.minimum rather than clamp, which would bring `last` to the type of the value.
    return torch.minimum(value.clamp_min(0), last).to(dtype)


def nearest_valid(
    value: Tensor,  # [..., *shape]
    table: Tensor,  # [n], or [*shape, n] broadcastable to the value's shape: see nearest_table
    last: int | Tensor,  # n - 1, or [shape[-1]] where each element has its own n
) -> Tensor:  # [..., *shape]
    """Maps each index to the nearest valid one, in the type of ``value``; a NaN stays one."""
    floating = value.dtype.is_floating_point
    index = value
    if floating:
        if value.dtype in _LOW_PRECISION:
            index = index.float()
        index = torch.nan_to_num(torch.round(index), nan=0.0)
    elif value.dtype is torch.bool:
        index = value.to(torch.uint8)
    if isinstance(last, Tensor):
        index = torch.minimum(index.clamp_min(0), last).long()
    else:
        index = torch.clamp(index, 0, last).long()
    if table.dim() == 1:
        out = table[index]
    else:
        rows = table.expand(*index.shape, table.shape[-1])
        out = torch.gather(rows, -1, index.unsqueeze(-1)).squeeze(-1)
    out = out.to(value.dtype)
    return torch.where(torch.isnan(value), value, out) if floating else out


def nearest_table(mask: Tensor) -> Tensor:
    """For every index of the last dim, the nearest one that ``mask`` allows; ties to the lower.

    Two running extrema, O(n): a table of distances would hold n² numbers.

    Args:
        mask: bool, shape ``[..., n]``, with at least one ``True`` in each row.

    Returns:
        int64, shape ``[..., n]``.
    """
    n = mask.shape[-1]
    index = torch.arange(n, device=mask.device).expand(mask.shape)
    before = torch.where(mask, index, -n).cummax(-1).values
    after = torch.where(mask, index, 2 * n).flip(-1).cummin(-1).values.flip(-1)
    return torch.where(index - before <= after - index, before, after)


def one_hot(
    value: Tensor,  # [..., n]
    classes: Tensor,  # [n]: 0 .. n - 1
    spec_dtype: torch.dtype,
    mask: Tensor | None,  # bool, broadcastable to the value's shape
) -> Tensor:  # [..., n]
    """Maps each row to the one-hot row of its largest valid entry, the first of equals.

    A row of the spec's type (``bool`` aside) that already sums to 1 with nothing on a masked entry
    is left as it is, as TorchRL does: a relaxed or straight-through sample keeps its gradient.

    The result has ``spec_dtype`` without a mask and the type of ``value`` with one, as TorchRL's.
    """
    score = value
    if mask is not None:
        if value.dtype in (torch.bool, torch.uint8):
            score = value.to(torch.int16)  # room for a number below every entry
        info = torch.finfo if score.dtype.is_floating_point else torch.iinfo
        lowest = info(score.dtype).min
        if score.dtype.is_floating_point:
            score = torch.where(mask, score.clamp_min(lowest), -torch.inf)
        else:
            score = torch.where(mask, score.clamp_min(lowest + 1), lowest)
    elif value.dtype is torch.bool:
        score = value.to(torch.uint8)  # argmax has no bool kernel
    hot = torch.argmax(score, -1, keepdim=True) == classes
    hot = hot.to(spec_dtype if mask is None else value.dtype)
    if value.dtype is torch.bool or value.dtype is not spec_dtype:
        return hot
    return torch.where(is_one_hot(value, mask), value, hot)


def is_one_hot(value: Tensor, mask: Tensor | None) -> Tensor:
    """Whether each row sums to 1 with nothing on an entry that ``mask`` forbids: ``[..., 1]``."""
    member = value.sum(-1, keepdim=True) == 1
    if mask is None:
        return member
    return member & ~((value != 0) & ~mask).any(-1, keepdim=True)
