"""Draws: fills of a buffer, by ATen or by functions of ours."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from fastprob import native
from fastprob.lowering._functions import registered

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

# What is left of the token's mutation once Inductor has made it one in place: nothing.
_copy = torch.ops.aten.copy_.default


def offer(op: Any) -> None:
    """Has Inductor lower a draw, once it is there; called whenever the operator is traced.

    Args:
        op: an overload that draws from torch's default generator, of arguments `size`, `like`,
            numbers, and the token that it declares to write; overload `alone` has no token.
    """
    name, full = op._schema.name.partition("::")[2], str(op)
    if full in registered or name not in _FILLS or "torch._inductor.lowering" not in sys.modules:
        return
    registered.add(full)
    from torch._inductor import lowering

    lowering.register_lowering(op, type_promotion_kind=None)(_lower(op, name))


def _lower(op: Any, name: str) -> Callable[..., Any]:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    as_it_is = lowering.fallback_handler(op, add_to_fallback_set=False)
    kind = _fill()
    alone = op._overloadname == "alone"

    def lower(size: Any, like: Any, *rest: Any) -> Any:
        *numbers, token = (*rest, None) if alone else rest
        plain = all(isinstance(number, float) for number in numbers)
        if V.graph.cpp_wrapper or like.get_device().type != "cpu" or not plain:
            return as_it_is(size, like, *rest)
        layout = ir.FixedLayout(
            like.get_device(), like.get_dtype(), size, ir.FlexibleLayout.contiguous_strides(size)
        )
        if token is not None:
            token.realize()
            token = None if _only_draw(V.current_node) else token
        function = _FASTER.get(name) if _large(layout) else None
        if name == "standard_normal" and function is not None and not native.available():
            function = None
        return ir.TensorBox.create(kind(layout, token, _FILLS[name](*numbers), function))

    return lower


def _only_draw(node: Any) -> bool:
    """Whether no other draw is to be kept apart from this one, and in order.

    Code that does not use the token does not check its shape either: 0.4 of 19 us a call.
    """
    token = node.args[-1]
    # A token that is no input of the graph has been handed on by an earlier draw.
    return token.op == "placeholder" and all(
        user is node or user.target is _copy for user in token.users
    )


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
            super().__init__(layout, [] if token is None else [token])
            self.method, self.function = method, function
            if token is not None:
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
