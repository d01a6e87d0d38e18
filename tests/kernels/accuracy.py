"""How right a kernel is: no more than twice as far from the truth as PyTorch in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 6, 8, 17, 33, 64, 257)


class Errors:
    """Errors by name, gathered over cases: the largest of few says little of either side."""

    def __init__(self) -> None:
        self._worst: dict[str, list[float]] = {}

    def add(
        self, name: str, got: Tensor, own: Tensor, truth: Tensor, scale: Tensor | None = None
    ) -> None:
        """Takes one result in.

        Args:
            name: what is compared.
            got: the kernel's result.
            own: PyTorch's, computed in the same dtype.
            truth: the same in float64.
            scale: size of the terms that were summed, where they cancel; default that of the truth.
        """
        assert got.shape == truth.shape, f"{name}: {tuple(got.shape)} is not {tuple(truth.shape)}"
        assert got.dtype is own.dtype, f"{name}: {got.dtype} is not {own.dtype}"
        if not got.numel():
            return
        assert not got.isnan().any(), f"{name}: NaN"
        truth = truth.double()
        # Half a unit in the last place: what rounding the result costs, where PyTorch is exact.
        size = (truth if scale is None else scale.double()).abs().max()
        half = torch.finfo(got.dtype).eps / 2 * size
        errors = (got.double() - truth).abs().max(), (own.double() - truth).abs().max(), half
        worst = self._worst.setdefault(name, [0.0, 0.0, 0.0])
        for i, error in enumerate(errors):
            worst[i] = max(worst[i], float(error))

    def check(self) -> None:
        """Asserts that the kernel is at most twice as far from the truth as PyTorch."""
        assert self._worst
        for name, (got, own, half) in self._worst.items():
            assert got <= 2 * own + half, f"{name}: off by {got:.3g}, PyTorch by {own:.3g}"


def check(name: str, got: Tensor, own: Tensor, truth: Tensor, scale: Tensor | None = None) -> None:
    """The same for one result of many elements."""
    errors = Errors()
    errors.add(name, got, own, truth, scale)
    errors.check()
