"""Units in the last place: how far apart two floating-point tensors are."""

from __future__ import annotations

import torch
from torch import Tensor


def ulp(magnitude: Tensor) -> Tensor:
    """The spacing of floating-point numbers at `magnitude`, in its dtype, as float64."""
    info = torch.finfo(magnitude.dtype)
    # |x| = m * 2^e with m in [1/2, 1), and numbers there are eps * 2^(e - 1) apart.
    _, exponent = torch.frexp(magnitude.abs().clamp_min(info.tiny).double())
    return torch.exp2((exponent - 1).double()) * info.eps


def ulps(actual: Tensor, expected: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """The distance of `actual` from `expected`, in units in the last place.

    Args:
        actual: a floating-point tensor.
        expected: one of the same dtype and shape.
        magnitude: the size of the largest number on the way to the result, where that is larger
            than the result. `loc + eps * scale` near 0 is the difference of two larger numbers:
            its rounding error is a unit of those, and many units of what is left.

    Returns:
        float64; 0 where both are the same infinity or both NaN, and infinity where only one is.
    """
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    size = expected.abs() if magnitude is None else torch.maximum(expected.abs(), magnitude.abs())
    distance = (actual.double() - expected.double()).abs() / ulp(size)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    broken = ~(actual.isfinite() & expected.isfinite())
    return distance.masked_fill(broken, float("inf")).masked_fill(same, 0.0)


def assert_within_ulps(
    actual: Tensor, expected: Tensor, most: float, magnitude: Tensor | None = None, where: str = ""
) -> None:
    """Fails if `actual` is more than `most` units in the last place from `expected`."""
    distance = ulps(actual, expected, magnitude)
    worst = distance.max().item() if distance.numel() else 0.0
    assert worst <= most, f"{worst:.1f} units in the last place apart, {most} allowed; {where}"
