"""Sums over the trailing event dimensions, in the forms that are fastest on a CPU.

The eager path folds the sum, the sign and the additive constant into one matrix-vector product:
on one thread `addmv` with a vector of ones takes half the time of `sum(-1)` followed by the sign
and the constant (65536 x 16, fp32), and one dispatch in place of three on small inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_is_compiling = torch.compiler.is_compiling
# What functorch's innermost transform is, None outside of any.
functorch_level = torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]

# Beyond it `sum(-1)` is faster (1.3 times at 1024), and keeps the digits that a running sum loses:
# at 32,768 elements 1.2e-7 relative in place of 2.2e-6.
WIDEST = 256

kept_vectors: dict[tuple, tuple[Tensor, Tensor]] = {}
# BLAS covers these two; half precisions are summed by ATen, which accumulates them in fp32.
_BLAS_DTYPES = (torch.float32, torch.float64)


def plain_tensors_only() -> bool:
    """Whether no compiler, functorch transform or forward-mode differentiation is at work.

    In-place fusions, cached constants and `autograd.Function` subclasses belong to plain eager
    mode; everything that traces or batches gets the out-of-place formula instead.
    """
    return not _is_compiling() and functorch_level() is None and forward_ad._current_level < 0


def outside_transforms() -> bool:
    """Whether no functorch transform and no forward mode is traced, which operators lack."""
    return functorch_level() is None and forward_ad._current_level < 0


# What `torch.compiler.assume_constant_result` does, which imports all of dynamo: it is evaluated
# when a graph is made, and dynamo guards the transforms itself.
outside_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def differentiated(*tensors: Tensor) -> bool:
    """Whether a gradient or a tangent may be asked of one of the tensors.

    `requires_grad` does not tell inside a transform that is compiled: dynamo 2.13 says False of
    what `torch.func.grad` differentiates by.
    """
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor.requires_grad:
            return True
    return _is_compiling() and not outside_transforms()


def transformed() -> bool:
    """Whether a functorch transform or forward mode is at work in eager mode.

    There `differentiated` does not tell; in a graph that is being made it does.
    """
    return not _is_compiling() and not plain_tensors_only()


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


def vectors(n: int, bias: float, alpha: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scalar `n * bias` and a vector of n times `alpha`, made once."""
    found = kept_vectors.get((n, bias, alpha, dtype))
    if found is not None:
        return found
    if len(kept_vectors) > 4096:
        kept_vectors.clear()
    # An inference tensor could not be saved for a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        weights = torch.full((n,), float(alpha), dtype=dtype)
        made = torch.tensor(n * bias, dtype=dtype), weights
    kept_vectors[(n, bias, alpha, dtype)] = made
    return made


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
    if plain and n <= WIDEST and x.numel() and x.is_cpu and x.dtype in _BLAS_DTYPES:
        key = (n, bias, alpha, x.dtype)
        offset, weights = kept_vectors.get(key) or vectors(*key)
        if len(shape) == 2 and ndims == 1:
            return torch.addmv(offset, x, weights)
        batch = shape[: len(shape) - ndims]
        return torch.addmv(offset, x.reshape(-1, n), weights).view(batch)
    total = sum_rightmost(x, ndims)
    return total.mul(alpha).add(n * bias) if alpha != 1 else total.add(n * bias)
