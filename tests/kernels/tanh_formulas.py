"""TanhNormal in plain PyTorch, for autograd in any dtype, and the inputs of its kernels' tests."""

from __future__ import annotations

import math

import numpy as np
import torch

from fastprob.kernels import tanh_normal as kernels
from fastprob.ops import tanh_normal as ops
from fastprob.ops._fused import Bounds as Clamp
from fastprob.reference import normal, philox
from fastprob.reference import tanh_normal as reference

SEED = 23
# Elements of a gradient.
ELEMENTS = 256
NONE = torch.Size()


def parameters(shape, dtype, device):
    loc = (torch.randn(shape, device=device) * 1.5).to(dtype)
    return loc, (torch.rand(shape, device=device) + 0.25).to(dtype)


def pair(device, call=0):
    return torch.tensor([SEED, call], device=device)


def intervals(a, dtype, device, safe=True):
    """(-1, 1), two numbers, and two tensors."""
    half = (torch.rand(a, device=device) + 0.5).to(dtype)
    mid = torch.randn(a, device=device).to(dtype)
    return (
        ops.Bounds(1.0, 0.0, 0.0, safe),
        ops.Bounds(2.0, 0.5, math.log(2.0), safe),
        ops.Bounds(half, mid, torch.log(half), safe),
    )


def clamps(a, device):
    low = -torch.rand(a, device=device)
    return Clamp(), Clamp((-0.5, 0.25)), Clamp(None, low, low + torch.rand(a, device=device))


class _Limited(torch.autograd.Function):
    """tanh between two limits, with the gradient of tanh at what it gives."""

    @staticmethod
    def forward(ctx, x, limit):
        y = torch.tanh(x).clamp(-limit, limit)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1.0 - y * y), None


def total(terms):
    """The sum of a row.

    The interpreter adds up a row one by one, 5 times as far off at A = 257 as by halves, which is
    how PyTorch and a GPU do it. Against it PyTorch's terms are added up one by one.
    """
    if terms.is_cpu and terms.dtype is torch.float32 and not terms.requires_grad:
        return torch.from_numpy(np.cumsum(terms.numpy(), axis=-1))[..., -1]
    return terms.sum(-1)


def formula(loc, scale, noise, bounds, clamp, limit):
    """Value and score, of noise that is given, for autograd in any dtype."""
    x = loc + noise * scale
    tanh = _Limited.apply(x, limit) if bounds.safe else torch.tanh(x)
    half, mid = (t.to(x.dtype) if isinstance(t, torch.Tensor) else t for t in bounds[:2])
    value = normal.clamped(tanh * half + mid, *clamp)
    log_half = math.log(half) if isinstance(half, float) else torch.log(half)
    jacobian = 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x)) + log_half
    terms = -0.5 * noise * noise - torch.log(scale) - 0.5 * math.log(2 * math.pi) - jacobian
    return value, total(terms)


def gradients(function, tensors, weights):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    total = sum((o * w).sum() for o, w in zip(function(*leaves), weights, strict=True))
    return torch.autograd.grad(total, leaves)


def noise_of(state, shape, dtype, device):
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    return philox.standard_normal(state, shape, dtype)


def point_formula(kind, loc, scale, bounds, clamp, limit):
    """Value and score of a mean or a mode, for autograd in any dtype."""
    half, mid = (t.to(loc.dtype) if isinstance(t, torch.Tensor) else t for t in bounds[:2])
    log_half = math.log(half) if isinstance(half, float) else torch.log(half)
    if kind == kernels.MODE:
        x = reference.mode(loc, scale)
        y = _Limited.apply(x, limit) if bounds.safe else torch.tanh(x)
        jacobian = 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x)) + log_half
    else:
        y = reference.mean(loc, scale)
        kept = y.clamp(-limit, limit)
        x = torch.atanh(kept)
        jacobian = torch.log1p(-kept * kept) + log_half
    z = (x - loc) / scale
    terms = -0.5 * z * z - torch.log(scale) - 0.5 * math.log(2 * math.pi) - jacobian
    return normal.clamped(y * half + mid, *clamp), total(terms)
