"""What Inductor makes of fastprob's operators in a graph, on a CPU.

**Draws** become ATen's own fill of a buffer that Inductor plans itself. `rng` registers a draw as
an operator in Python, which a compiler does not look into. Called from compiled code, such an
operator costs several times what ATen takes for a small draw. Where Inductor compiles for a CPU in
Python, a draw from torch's default generator becomes `buffer.normal_()` instead: the same call as
in eager mode, so that the noise is the same. A large one goes to the kernel of `native`, which
draws the same numbers faster.

**A Normal's score of given values** and its gradients go to the kernel of `native_normal` where the
batch is large, and become the formula, for Inductor to fuse with what is around, where it is small.

Everything here stands on Inductor's internals, and is left out where they are not as expected: the
operator then runs as it is.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from fastprob import backend, native, native_normal

# In place, into a contiguous buffer of the draw's own shape and dtype.
_FILLS: dict[str, Callable[..., str]] = {
    "standard_normal": lambda: "normal_()",
    "exponential": lambda: "exponential_()",
    "uniform": lambda low, high: f"uniform_({low!r}, {high!r})",
}
# The same numbers from functions of ours, where they are faster.
_FASTER = {
    "standard_normal": ("fastprob.native", "normal_in_graph"),
    "exponential": ("fastprob.reference._noise", "exponential_"),
}
_registered: set[str] = set()


def offer(op: Any) -> None:
    """Has Inductor lower a draw, once it is there; called whenever the operator is traced.

    Args:
        op: the overload that draws from torch's default generator, of arguments `size`, `like`,
            numbers, and the token that it declares to write.
    """
    name = op._schema.name.partition("::")[2]
    if name in _registered or name not in _FILLS or "torch._inductor.lowering" not in sys.modules:
        return
    _registered.add(name)
    from torch._inductor import lowering

    lowering.register_lowering(op, type_promotion_kind=None)(_lower(op, name))


def _lower(op: Any, name: str) -> Callable[..., Any]:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    as_it_is = lowering.fallback_handler(op, add_to_fallback_set=False)
    kind = _fill()

    def lower(size: Any, like: Any, *rest: Any) -> Any:
        *numbers, token = rest
        plain = all(isinstance(number, float) for number in numbers)
        if V.graph.cpp_wrapper or like.get_device().type != "cpu" or not plain:
            return as_it_is(size, like, *rest)
        layout = ir.FixedLayout(
            like.get_device(), like.get_dtype(), size, ir.FlexibleLayout.contiguous_strides(size)
        )
        token.realize()
        function = _FASTER.get(name) if _large(layout) else None
        if name == "standard_normal" and function is not None and not native.available():
            function = None
        return ir.TensorBox.create(kind(layout, token, _FILLS[name](*numbers), function))

    return lower


def _large(layout: Any) -> bool:
    """Whether functions of ours may be faster than ATen; so may they be where the size is open."""
    try:
        numel = math.prod(int(n) for n in layout.size)
    except TypeError:
        numel = native.LEAST
    return layout.dtype is torch.float32 and numel >= native.LEAST


@functools.cache
def _fill() -> type:
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    class Fill(ir.ExternKernelOut):
        """A buffer that a method of its own fills, or a function of ours."""

        def __init__(
            self, layout: Any, token: Any, method: str, function: tuple[str, str] | None
        ) -> None:
            super().__init__(layout, [token])
            self.method, self.function = method, function
            token = self.inputs[0]
            self.mutation_outputs.append(
                ir.MutationOutput(ir.NoneLayout(device=token.get_device()), token, self)
            )

        def codegen(self, wrapper: Any) -> None:
            name = self.get_name()
            if name in V.graph.removed_buffers:
                # Nobody reads it, so that nobody has made it; the generator moves on all the same.
                wrapper.writeline(wrapper.make_buffer_allocation(self))
            if self.function is not None:
                module, function = self.function
                wrapper.add_import_once(f"import {module}")
                wrapper.writeline(f"{module}.{function}({name})")
            else:
                wrapper.writeline(f"{name}.{self.method}")

        def has_side_effects(self) -> bool:
            return True

    return Fill


# the score of a Normal ----------------------------------------------------------------------


def offer_score(forward: Any, backward: Any) -> None:
    """Has Inductor lower a Normal's score and its gradients; called as `offer` is.

    Args:
        forward: the overload `normal_score`.
        backward: the overload `normal_score_backward`.
    """
    if "normal_score" in _registered or "torch._inductor.lowering" not in sys.modules:
        return
    _registered.add("normal_score")
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
            score, entropies = (_take(made, i) for i in range(2))
        else:
            f = _Functions()
            logs, z = f.log(scale), f.div(f.sub(value, loc), scale)
            dims, n = list(range(-ndims, 0)), _numel(loc.get_size()[len(batch) :])
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
        f = _Functions()
        if _by_kernel(loc, ndims):
            what = (of_score is not None) + 2 * (of_entropy is not None)
            inputs = (of_score or given[0], of_entropy or given[0], loc, scale, value)
            made = _call(inputs, loc.get_size(), loc, ndims, what)
            by_loc, by_scale = (_take(made, i) for i in range(2))
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


class _Functions:
    """Inductor's lowerings of a few of ATen's functions, by name."""

    _OVERLOADS: ClassVar[dict[str, str]] = {
        "add": "Tensor", "sub": "Tensor", "mul": "Tensor", "div": "Tensor",
        "log": "default", "sum": "dim_IntList", "unsqueeze": "default",
    }  # fmt: skip

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from torch._inductor import lowering

        return lowering.lowerings[getattr(getattr(torch.ops.aten, name), self._OVERLOADS[name])]

    def over_event(self, x: Any, ndims: int) -> Any:
        for _ in range(ndims):
            x = self.unsqueeze(x, -1)
        return x


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
    width, numel = _numel(size[len(size) - ndims :]), _numel(size)
    return (
        not V.graph.cpp_wrapper
        and isinstance(width, int)
        and 0 < width <= native_normal.WIDEST
        and (not isinstance(numel, int) or numel >= native_normal.LEAST)
        and native_normal.available()
    )


def _numel(size: Any) -> Any:
    """The product of sizes, an int where all are known."""
    product = math.prod(size)
    try:
        return int(product)
    except TypeError:
        return product


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
    return ir.TensorBox.create(_kernel_call()(layout, ready, _numel(rows), _numel(width), what))


def _take(pair: Any, i: int) -> Any:
    from torch._inductor import lowering

    return lowering.lowerings[torch.ops.aten.select.int](pair, 0, i)


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
