"""How right a kernel is: no more than twice as far from the truth as PyTorch in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 6, 8, 17, 33, 64, 257)


def check(name: str, got: Tensor, own: Tensor, truth: Tensor, scale: Tensor | None = None) -> None:
    """Asserts that `got` is at most twice as far from the truth as PyTorch's own result.

    Args:
        name: what is compared, for the message.
        got: the kernel's result.
        own: PyTorch's, computed in the same dtype.
        truth: the same in float64.
        scale: size of the terms that were summed, where they cancel; default that of the truth.
            Half a unit in its last place, which rounding the result costs, is added: where PyTorch
            happens to be exact.
    """
    assert got.shape == truth.shape, f"{name}: {tuple(got.shape)} is not {tuple(truth.shape)}"
    assert got.dtype is own.dtype, f"{name}: {got.dtype} is not {own.dtype}"
    if not got.numel():
        return
    assert not got.isnan().any(), f"{name}: NaN"
    truth = truth.double()
    unit = torch.finfo(got.dtype).eps * (truth if scale is None else scale.double()).abs().max()
    off = (got.double() - truth).abs().max()
    allowed = 2 * (own.double() - truth).abs().max() + unit / 2
    assert off <= allowed, f"{name}: off by {off:.3g}, allowed {allowed:.3g}"
