"""The score of a Normal: the kernel of `native_normal` or the formula, by the size."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastprob import backend, native_normal
from fastprob.lowering._functions import Functions, numel, registered, take


def offer_score(forward: Any, backward: Any) -> None:
    """Has Inductor lower a Normal's score and its gradients; called as `offer` is.

    Args:
        forward: the overload `normal_score`.
        backward: the overload `normal_score_backward`.
    """
    if "normal_score" in registered or "torch._inductor.lowering" not in sys.modules:
        return
    registered.add("normal_score")
    from torch._inductor import lowering

    for op, make in ((forward, _lower_score), (backward, _lower_score_backward)):
        lowering.register_lowering(op, type_promotion_kind=None)(make(op))


def _lower_score(op: Any) -> Callable[..., Any]:
    from torch._inductor import lowering

    as_it_is = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(loc: Any, scale: Any, value: Any, ndims: int, entropy: bool) -> Any:
        tensors = loc, scale, value
        if not _for_cpu(tensors):
            return as_it_is(loc, scale, value, ndims, entropy)
        batch = loc.get_size()[: len(loc.get_size()) - ndims]
        if _by_kernel(loc, ndims):
            made = _call((loc, loc, *tensors), batch, loc, ndims, 0)
            score, entropies = (take(made, i) for i in range(2))
        else:
            f = Functions()
            logs, z = f.log(scale), f.div(f.sub(value, loc), scale)
            dims, n = list(range(-ndims, 0)), numel(loc.get_size()[len(batch) :])
            energy = f.add(logs, f.mul(f.mul(z, z), 0.5))
            offset = 0.5 * math.log(2 * math.pi) * n
            score = f.sub(f.mul(f.sum(energy, dims), -1.0), offset)
            entropies = f.add(f.sum(logs, dims), offset + 0.5 * n)
        return score, entropies if entropy else _empty(loc)

    return lower


def _lower_score_backward(op: Any) -> Callable[..., Any]:
    from torch._inductor import lowering

    as_it_is = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(
        of_score: Any, of_entropy: Any, loc: Any, scale: Any, value: Any, ndims: int, to_value: bool
    ) -> Any:
        given = [x for x in (of_score, of_entropy) if x is not None]
        if not given or not _for_cpu((*given, loc, scale, value)):
            return as_it_is(of_score, of_entropy, loc, scale, value, ndims, to_value)
        f = Functions()
        if _by_kernel(loc, ndims):
            what = (of_score is not None) + 2 * (of_entropy is not None)
            inputs = (of_score or given[0], of_entropy or given[0], loc, scale, value)
            made = _call(inputs, loc.get_size(), loc, ndims, what)
            by_loc, by_scale = (take(made, i) for i in range(2))
        else:
            z = f.div(f.sub(value, loc), scale)
            by_loc = by_scale = f.mul(scale, 0.0)
            if of_score is not None:
                rate = f.div(f.over_event(of_score, ndims), scale)
                by_loc, by_scale = f.mul(rate, z), f.mul(rate, f.sub(f.mul(z, z), 1.0))
            if of_entropy is not None:
                by_scale = f.add(by_scale, f.div(f.over_event(of_entropy, ndims), scale))
        return by_loc, by_scale, f.mul(by_loc, -1.0) if to_value else _empty(value)

    return lower


def _for_cpu(tensors: Sequence[Any]) -> bool:
    """Whether it is about float32 tensors on a CPU, the parameters and the value of one shape."""
    if backend.mode == "triton" or any(x is None for x in tensors):
        return False
    loc = tensors[-3]
    return all(x.get_size() == loc.get_size() for x in tensors[-3:]) and all(
        x.get_device().type == "cpu" and x.get_dtype() is torch.float32 for x in tensors
    )


def _by_kernel(loc: Any, ndims: int) -> bool:
    """Whether the kernel is faster than what Inductor makes, or may be where the size is open."""
    from torch._inductor.virtualized import V

    size = loc.get_size()
    width, count = numel(size[len(size) - ndims :]), numel(size)
    return (
        not V.graph.cpp_wrapper
        and isinstance(width, int)
        and 0 < width <= native_normal.WIDEST
        and (not isinstance(count, int) or count >= native_normal.LEAST)
        and native_normal.available()
    )


def _call(inputs: Sequence[Any], size: Any, loc: Any, ndims: int, what: int) -> Any:
    """A call of the kernel, into a buffer of two tensors of a size."""
    from torch._inductor import ir

    full = loc.get_size()
    rows, width = full[: len(full) - ndims], full[len(full) - ndims :]
    size = [2, *size]
    layout = ir.FixedLayout(
        loc.get_device(), loc.get_dtype(), size, ir.FlexibleLayout.contiguous_strides(size)
    )
    ready = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x)) for x in inputs]
    return ir.TensorBox.create(_kernel_call()(layout, ready, numel(rows), numel(width), what))


def _empty(like: Any) -> Any:
    from torch._inductor import lowering

    make = lowering.lowerings[torch.ops.aten.empty.memory_format]
    return make([0], dtype=like.get_dtype(), device=like.get_device())


@functools.cache
def _kernel_call() -> type:
    from torch._inductor import ir

    class KernelCall(ir.ExternKernelOut):
        """Two results in a buffer, one behind the other."""

        def __init__(self, layout: Any, inputs: Any, rows: Any, width: int, what: int) -> None:
            super().__init__(layout, inputs)
            self.rows, self.numbers = rows, (width, what)

        def codegen(self, wrapper: Any) -> None:
            names = [x.codegen_reference() for x in self.inputs]
            numbers = (wrapper.codegen_python_sizevar(self.rows), *self.numbers)
            arguments = ", ".join(map(str, (*names, self.get_name(), *numbers)))
            wrapper.add_import_once("import fastprob.native_normal")
            wrapper.writeline(f"fastprob.native_normal.kernel({arguments})")

    return KernelCall
