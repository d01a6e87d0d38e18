"""Sums over the trailing event dimensions, in the forms that are fastest on a CPU.

The eager path folds the sum, the sign and the additive constant into one matrix-vector product:
on one thread `addmv` with a vector of ones takes half the time of `sum(-1)` followed by the sign
and the constant (65536 x 16, fp32), and one dispatch in place of three on small inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ONES: dict[tuple, Tensor] = {}
_BIAS: dict[tuple, Tensor] = {}
# BLAS covers these two; half precisions are summed by ATen, which accumulates them in fp32.
_BLAS_DTYPES = (torch.float32, torch.float64)


def plain_tensors_only() -> bool:
    """Whether the caller runs neither under a compiler nor inside a functorch transform.

    In-place fusions, cached constants and `autograd.Function` subclasses belong to plain eager
    mode; everything that traces or batches gets the out-of-place formula instead.
    """
    return not torch.compiler.is_compiling() and not torch._C._functorch.peek_interpreter_stack()


def sum_rightmost(x: Tensor, ndims: int) -> Tensor:
    """Sums `x` over its last `ndims` dimensions.

    Args:
        x: `[*batch, *event]`.
        ndims: number of event dimensions, 0 leaves `x` as it is.

    Returns:
        `[*batch]`.
    """
    if ndims == 0:
        return x
    if ndims == 1:
        return x.sum(-1)
    return x.flatten(-ndims).sum(-1)


def event_numel(shape: torch.Size, ndims: int) -> int:
    """Number of elements of the last `ndims` dimensions of `shape`."""
    n = 1
    for size in shape[len(shape) - ndims :]:
        n *= size
    return n


def affine_sum(x: Tensor, ndims: int, bias: float, alpha: int, plain: bool | None = None) -> Tensor:
    """`event_numel * bias + alpha * sum(x)` over the last `ndims` dimensions.

    Args:
        x: `[*batch, *event]`.
        ndims: number of event dimensions.
        bias: constant added for each element of the event.
        alpha: factor of the sum.
        plain: what `plain_tensors_only()` says, where the caller knows it.

    Returns:
        `[*batch]`, in the dtype of `x`.
    """
    if ndims == 0:
        return x.mul(alpha).add(bias) if alpha != 1 else x.add(bias)
    shape = x.shape
    n = shape[-1] if ndims == 1 else event_numel(shape, ndims)
    if plain is None:
        plain = plain_tensors_only()
    # numel: addmv of no rows takes the shape of the offset.
    if plain and x.numel() and x.dtype in _BLAS_DTYPES and x.is_cpu:
        key = (n, x.dtype)
        ones = _ONES.get(key)
        if ones is None:
            # An inference tensor could not be saved for a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                ones = _ONES[key] = torch.ones(n, dtype=x.dtype)
        key = (n * bias, x.dtype)
        offset = _BIAS.get(key)
        if offset is None:
            if len(_BIAS) > 4096:
                _BIAS.clear()
            with torch.inference_mode(False), torch.no_grad():
                offset = _BIAS[key] = torch.tensor(n * bias, dtype=x.dtype)
        if len(shape) == 2 and ndims == 1:
            return torch.addmv(offset, x, ones, alpha=alpha)
        batch = shape[: len(shape) - ndims]
        rows = 1
        for size in batch:
            rows *= size
        return torch.addmv(offset, x.reshape(rows, n), ones, alpha=alpha).view(batch)
    total = sum_rightmost(x, ndims)
    return total.mul(alpha).add(n * bias) if alpha != 1 else total.add(n * bias)
